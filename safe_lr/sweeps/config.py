"""Sweep configs that W&B takes: made, checked before anything runs, and read by the program that is swept."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safe_lr.policies import Policy
from safe_lr.scheduler import CoherenceScheduler
from safe_lr.settings import Settings
from safe_lr.sweeps.spaces import DISTRIBUTIONS, distribution

PREFIX = "safe_lr."
MARGIN = (0.05, 1.0)
"""Where a sweep looks for the margin: a tuned lr runs at .08-3 of the limit, and a fixed margin ends at 1."""

COMMAND = ("${env}", "${interpreter}", "${program}", "${args_no_boolean_flags}")
"""How an agent starts a program: `--name=value`, and a switch `--name` for True, nothing for False."""

METHODS = ("bayes", "random", "grid", "custom")
_LOG = ("lr", PREFIX + "margin")
_OURS = frozenset(inspect.signature(CoherenceScheduler.__init__).parameters) - {"self", "optimizer", "schedule"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_KEYS = frozenset(
    re.findall(
        r"\w+",
        "method metric metrics parameters early_terminate scheduler controller run_cap program command job image_uri "
        "entity project name description apiVersion kind",
    )
)

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
    parameters |= {key: dict(value) for key, value in (more or {}).items()}
    config: dict[str, Any] = {"method": method, "metric": {"name": metric, "goal": goal}, "parameters": parameters}
    config |= {"name": name} if name else {}
    config |= {"program": program, "command": list(COMMAND)} if program else {}
    config |= {"run_cap": runs} if runs is not None else {}
    check(config)
    return config


def _parameter(key: str, value: Space) -> dict[str, Any]:
    """One parameter as W&B writes it: floats on both sides of a range, or it would be a range of integers."""
    if isinstance(value, tuple):
        if len(value) != 2 or not all(_is_number(end) for end in value):
            raise ValueError(f"{key} is {value!r}: a range is a pair of numbers (low, high), values are a list")
        kind = "log_uniform_values" if key in _LOG else "uniform"
        return {"distribution": kind, "min": float(value[0]), "max": float(value[1])}
    return {"value": value} if isinstance(value, str | int | float) else {"values": list(value)}


def check(config: Mapping[str, Any]) -> None:
    """Raises where `violations` finds anything.

    Raises:
        ValueError: All that is wrong, each with its key, in one message.
    """
    if found := violations(config):
        raise ValueError("the sweep would be rejected: " + "; ".join(found))


def violations(config: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with a sweep config, each as `key: reason`; nothing has run by then.

    The checks are our own and, where the package `sweeps` is installed, W&B's: ours name the key, catch what W&B takes
    and then trips over (a grid over a range of floats, `1e-3`, which YAML reads as text), and know the arguments of
    `CoherenceScheduler`.

    Args:
        config: As `wandb.sweep` takes it.

    Returns:
        Sentences; none for a config that is fine.

    Example:
        >>> violations({"method": "bayes", "parameters": {"lr": {"min": 1.0, "max": 0.1}}})
        ['metric: bayes needs {name: ..., goal: minimize}', 'parameters.lr: min 1.0 is not below max 0.1']
    """
    if not isinstance(config, Mapping):
        return [f"the config is {type(config).__name__}, not a mapping of keys such as method and parameters"]
    found = [f"{key}: W&B knows no such key" for key in config if key not in _KEYS]
    method = config.get("method")
    if method not in METHODS:
        found.append(f"method: {method!r} is not one of {', '.join(METHODS)}")
    found += _metric_violations(config.get("metric"), method)
    found += _stopping_violations(config.get("early_terminate"))
    for key, kind, allowed in (("program", str, "a path"), ("name", str, "text"), ("command", list, "a list of words")):
        if key in config and not isinstance(config[key], kind):
            found.append(f"{key}: {config[key]!r} is not {allowed}")
    cap = config.get("run_cap", 1)
    if isinstance(cap, bool) or not isinstance(cap, int) or cap < 1:
        found.append(f"run_cap: {cap!r} is not a number of runs, 1 or more")
    parameters = config.get("parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        found.append("parameters: there is none to sweep")
    else:
        found += [
            f"parameters.{key}: {text}" for key, spec in parameters.items() if (text := _fault(key, spec, method))
        ]
    return found or _wandbs_own(config)


def _metric_violations(metric: Any, method: Any) -> list[str]:
    if metric is None:
        return ["metric: bayes needs {name: ..., goal: minimize}"] if method == "bayes" else []
    if not isinstance(metric, Mapping) or not isinstance(metric.get("name"), str):
        return [f"metric: {metric!r} has no name: write {{name: val_loss, goal: minimize}}"]
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        return [f"metric.goal: {metric['goal']!r} is not one of minimize, maximize"]
    return []


def _fault(key: Any, spec: Any, method: Any) -> str | None:
    """What is wrong with one parameter, None if nothing is."""
    if not isinstance(key, str) or not _NAME.fullmatch(key):
        return "a name begins with a letter and holds letters, digits, '_', '.' and '-' only"
    if not isinstance(spec, Mapping):
        return f"{spec!r} is not a mapping: write {{value: ...}}, {{values: [...]}} or {{min: ..., max: ...}}"
    if "parameters" in spec:
        return None  # nested ones are W&B's to judge
    forms = [form for form in ("value", "values") if form in spec]
    ranged = "min" in spec or "max" in spec
    if len(forms) + ranged > 1:
        return f"{', '.join(spec)} stand side by side: give a value, values or a range"
    if not forms and not ranged and "distribution" not in spec:
        return "it says neither value nor values nor min and max"
    if distribution(spec) in ("log_uniform", "q_log_uniform", "inv_log_uniform"):
        return f"{distribution(spec)} takes exponents for limits: write {distribution(spec)}_values, with the values"
    if distribution(spec) not in DISTRIBUTIONS:
        return f"distribution {distribution(spec)!r} is not one of {', '.join(DISTRIBUTIONS)}"
    found = _shape_fault(spec)
    if "values" in spec:
        found = found or _values_fault(spec)
    elif ranged or (not forms and "uniform" in distribution(spec)):
        found = found or _range_fault(spec, method)
    return found or (_setting_fault(key.removeprefix(PREFIX), spec) if key.startswith(PREFIX) else None)


def _setting_fault(name: str, spec: Mapping[str, Any]) -> str | None:
    """What `CoherenceScheduler` would say to a setting's values, or to the ends of its range."""
    if name not in _OURS:
        return f"CoherenceScheduler has no argument {name!r}"
    ends = [spec[side] for side in ("value", "min", "max") if side in spec]
    for kind in (Policy, Settings):
        if name in kind.__dataclass_fields__:
            for value in (*ends, *spec.get("values", ())):
                try:
                    kind(**{name: value})
                except (TypeError, ValueError) as error:
                    return str(error)
    return None


def _shape_fault(spec: Mapping[str, Any]) -> str | None:
    """What is wrong with the numbers that give a distribution its shape."""
    for name in ("mu", "sigma", "q"):
        if name in spec and not (_is_number(spec[name]) and (name == "mu" or spec[name] > 0)):
            return f"{name} is {spec[name]!r}, not a number{' above 0' * (name != 'mu')}"
    return None


def _stopping_violations(stopping: Any) -> list[str]:
    if stopping is None:
        return []
    if not isinstance(stopping, Mapping) or stopping.get("type") != "hyperband":
        return [f"early_terminate: {stopping!r} is not {{type: hyperband, ...}}, the only kind that W&B has"]
    if "min_iter" not in stopping and not {"max_iter", "s"} <= set(stopping):
        return ["early_terminate: hyperband needs min_iter, or max_iter and s"]
    return []


def _values_fault(spec: Mapping[str, Any]) -> str | None:
    values, weights = spec["values"], spec.get("probabilities")
    if not isinstance(values, list | tuple) or not values:
        return f"values are {values!r}: give a list of at least one"
    if weights is not None and not (isinstance(weights, list | tuple) and all(map(_is_number, weights))):
        return f"probabilities are {weights!r}: give a list of numbers"
    if weights is not None and len(weights) != len(values):
        return f"{len(values)} values have {len(weights)} probabilities"
    if weights is not None and not math.isclose(sum(weights), 1.0, rel_tol=1e-6):
        return f"probabilities add up to {sum(weights):g}, not to 1"
    return None


def _range_fault(spec: Mapping[str, Any], method: Any) -> str | None:
    for side in ("min", "max"):
        value = spec.get(side)
        if value is None:
            return f"{side} is missing"
        if isinstance(value, str):
            return f"{side} is the text {value!r}: YAML reads 1e-3 as text, write 1.0e-3 or 0.001"
        if not _is_number(value):
            return f"{side} is {value!r}, not a number"
    low, high, kind = spec["min"], spec["max"], distribution(spec)
    if not low < high:
        return f"min {low!r} is not below max {high!r}"
    if "log_uniform_values" in kind and low <= 0:
        return f"min is {low!r}, but {kind} needs a range above 0"
    if type(low) is not type(high):
        return (
            f"min {low!r} and max {high!r} are an integer and a float: write both as floats ({low!s} as {float(low)!r})"
        )
    if method == "grid" and kind not in ("int_uniform", "q_uniform"):
        return f"a grid cannot go over a range of floats ({low!r} to {high!r}): give values"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wandbs_own(config: Mapping[str, Any]) -> list[str]:
    """What W&B's own package says, nothing where it is not installed."""
    if importlib.util.find_spec("sweeps") is None:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sweeps

        # Never SweepConfig(config) or next_run(validate=True): both drop nested parameters.
        said = sweeps.schema_violations_from_proposed_config(json.loads(json.dumps(dict(config))))
    return list(dict.fromkeys(str(sentence) for sentence in said))


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
        if name not in _OURS:
            raise ValueError(f"CoherenceScheduler has no argument {name!r} ({PREFIX}{name} in the sweep's config)")
    return {name: value for name, value in settings.items() if value is not None}


def load_config(path: str | Path) -> dict[str, Any]:
    """Reads a sweep config from a YAML or JSON file, and checks it.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not YAML, or W&B would reject it.
        ImportError: PyYAML is needed, and missing.
    """
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix == ".json":
        config = json.loads(text)
    else:
        import yaml

        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
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
