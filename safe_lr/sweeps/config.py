"""Sweep configs that W&B takes: made, checked before anything runs, and read by the program that is swept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safe_lr.sweeps.checks import PREFIX, SETTINGS, check, is_number, searchable, violations

MARGIN = (0.05, 1.0)
"""Where a sweep looks for the margin: a tuned lr runs at .08-3 of the limit, and a fixed margin ends at 1."""

COMMAND = ("${env}", "${interpreter}", "${program}", "${args_no_boolean_flags}")
"""How an agent starts a program: `--name=value`, and a switch `--name` for True, nothing for False."""

_LOG = ("lr", PREFIX + "margin")

Space = float | str | bool | tuple[float, float] | Sequence[float | str | bool]


def sweep_config(
    *,
    lr: Space | None = None,
    margin: Space | None = None,
    follow_limit: Space | None = None,
    bound: Space | None = None,
    schedule: Space | None = None,
    beta1: Space | None = None,
    beta2: Space | None = None,
    method: str = "bayes",
    metric: str = "val_loss",
    goal: str = "minimize",
    program: str | None = None,
    name: str | None = None,
    runs: int | None = None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Builds a sweep config that W&B takes.

    Without any space it sweeps what needs no lr and has no unit: `margin`, with `follow_limit=True`, so that

        lr = margin * lr_limit        measured in each run, for its own model

    A margin found on a small model is therefore a place to start from on a large one; an lr is not. With `lr=` it is a
    sweep over lr like any other; `clip_to_stable` then cuts off what cannot train.

    A space is a pair (low, high) for a range, a list of values, or one value. Ranges of lr and margin are logarithmic.
    Names are flat: `lr`, `beta1`, `beta2` and `schedule` are for the program to use, `safe_lr.margin`,
    `safe_lr.follow_limit` and `safe_lr.bound` for `arguments`, which makes keyword arguments of them.

    Args:
        lr: Space of lr. A range excludes `follow_limit=True`, under which no lr is used.
        margin: Space of the fixed margin, in (0, 1], or "auto". Default (.05, 1), without `lr`.
        follow_limit: Whether lr is the cap itself. Default True, without `lr`.
        bound: Space of the bound, `momentum`, `coherence` and `lemma1`.
        schedule: Space of names that the program knows.
        beta1, beta2: Spaces of the optimizer's decays, in [0, 1).
        method: `bayes`, `random` or `grid` (lists only).
        metric: Name of the figure to judge by, as the program logs it.
        goal: `minimize` or `maximize`.
        program: The script that agents start, with its arguments as `--name=value` and switches; None for an agent
            that calls a function.
        name: The sweep's name.
        runs: Most runs.
        more: Further parameters, as W&B writes them.

    Returns:
        The config, for `wandb.sweep`, `search` or a YAML file.

    Raises:
        ValueError: The config would be rejected, or sweeps what has no effect; the message names the key.

    Example:
        >>> config = sweep_config(bound=["momentum", "coherence"], runs=20)
        >>> config["parameters"]["safe_lr.margin"]
        {'distribution': 'log_uniform_values', 'min': 0.05, 'max': 1.0}
        >>> config["parameters"]["safe_lr.follow_limit"], config["parameters"]["safe_lr.bound"]
        ({'value': True}, {'values': ['momentum', 'coherence']})
    """
    if lr is None:
        follow_limit = True if follow_limit is None else follow_limit
        margin = MARGIN if margin is None and method != "grid" else margin
    elif follow_limit is True:
        raise ValueError("lr has no effect with follow_limit=True, where lr is the cap itself: leave one of them out")
    spaces = {
        "lr": lr,
        "schedule": schedule,
        "beta1": beta1,
        "beta2": beta2,
        PREFIX + "margin": margin,
        PREFIX + "follow_limit": follow_limit,
        PREFIX + "bound": bound,
    }
    parameters = {key: _parameter(key, value) for key, value in spaces.items() if value is not None}
    for key, value in spaces.items():
        if fault := _out_of_range(key, value):
            raise ValueError(f"the sweep would be rejected: parameters.{key}: {fault}")
    parameters |= {key: dict(value) for key, value in (more or {}).items()}
    config: dict[str, Any] = {"method": method, "metric": {"name": metric, "goal": goal}, "parameters": parameters}
    config |= {"name": name} if name else {}
    config |= {"program": program, "command": list(COMMAND)} if program else {}
    config |= {"run_cap": runs} if runs is not None else {}
    check(config)
    if not searchable(parameters):
        raise ValueError("parameters: each has one value, so there is nothing to sweep: give lists, margin=[0.1, 0.3]")
    return config


def _out_of_range(key: str, value: Any) -> str | None:
    """What no optimizer would take; the scheduler's own settings are looked at by `check`."""
    numbers = [item for item in (value if isinstance(value, list | tuple) else [value]) if is_number(item)]
    if key == "lr" and any(number <= 0 for number in numbers):
        return f"{value!r} needs a range above 0"
    if key in ("beta1", "beta2") and any(not 0 <= number < 1 for number in numbers):
        return f"{value!r} is not inside [0, 1)"
    return None


def _parameter(key: str, value: Space) -> dict[str, Any]:
    """One parameter as W&B writes it: floats on both sides of a range, or it would be a range of integers."""
    if isinstance(value, tuple):
        if len(value) != 2 or not all(is_number(end) for end in value):
            raise ValueError(f"{key} is {value!r}: a range is a pair of numbers (low, high), values are a list")
        kind = "log_uniform_values" if key in _LOG else "uniform"
        return {"distribution": kind, "min": float(value[0]), "max": float(value[1])}
    return {"value": value} if isinstance(value, str | int | float) else {"values": list(value)}


def arguments(config: Any) -> dict[str, Any]:
    """Returns a run's `safe_lr.*` settings as keyword arguments for `CoherenceScheduler` or `CoherenceGuard`.

        scheduler = CoherenceScheduler(optimizer, **arguments(wandb.config))

    Args:
        config: `wandb.config`, `vars(args)` or any mapping. Other keys, and settings that are None, are left out.

    Raises:
        ValueError: A setting that the scheduler does not have.

    Example:
        >>> arguments({"lr": 0.1, "safe_lr.margin": 0.5, "safe_lr.bound": None, "safe_lr": {"follow_limit": True}})
        {'margin': 0.5, 'follow_limit': True}
    """
    given = dict(config)
    settings = {key.removeprefix(PREFIX): value for key, value in given.items() if key.startswith(PREFIX)}
    nested = given.get(PREFIX.rstrip("."))
    settings |= dict(nested) if isinstance(nested, Mapping) else {}
    for name in settings:
        if name not in SETTINGS:
            raise ValueError(f"CoherenceScheduler has no argument {name!r} ({PREFIX}{name} in the sweep's config)")
    return {name: value for name, value in settings.items() if value is not None}


def load_config(path: str | Path) -> dict[str, Any]:
    """Reads a sweep config from a YAML or JSON file, and checks it.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not YAML (or JSON, or text), or W&B would reject it.
        ImportError: PyYAML is needed, and missing.
    """
    data = Path(path).read_bytes()
    if Path(path).suffix == ".json":
        try:
            config = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    else:
        import yaml

        try:
            config = yaml.safe_load(data)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-13-01 is a ValueError
            raise ValueError(f"{path} is not YAML: {error}") from error
    if config is None:
        raise ValueError(f"{path} is empty: write method and parameters, or make one: safe-lr sweep init")
    found = violations(config)
    if found:
        raise ValueError(f"{path} would be rejected: " + "; ".join(found))
    return dict(config)


def dump_config(config: Mapping[str, Any]) -> str:
    """Returns the config as YAML, or as JSON (which is YAML too) where PyYAML is missing.

    Numbers are written so that YAML reads numbers: 1.0e-05, never 1e-05.

    Example:
        >>> dump_config({"method": "random", "parameters": {"lr": {"min": 1e-5, "max": 1.0}}}).splitlines()[0]
        'method: random'
    """
    try:
        import yaml
    except ImportError:
        return json.dumps(config, indent=2) + "\n"
    return str(yaml.safe_dump(dict(config), sort_keys=False))
