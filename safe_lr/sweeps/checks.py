"""What is wrong with a sweep config, by key, before anything runs: W&B's rules, and what it trips over later."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from safe_lr.policies import Policy
from safe_lr.scheduler import CoherenceScheduler
from safe_lr.settings import Settings
from safe_lr.sweeps.spaces import FORMS, distribution

PREFIX = "safe_lr."
METHODS = ("bayes", "random", "grid", "custom")
SETTINGS = frozenset(inspect.signature(CoherenceScheduler.__init__).parameters) - {"self", "optimizer", "schedule"}

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_TEXTS = ("name", "description", "program", "entity", "project", "job", "image_uri", "apiVersion")
_KEYS = frozenset({*_TEXTS, "method", "metric", "metrics", "parameters", "command", "run_cap", "kind"}) | {
    "early_terminate",
    "scheduler",
    "controller",
}
_IN_GRIDS = ("constant", "categorical", "int_uniform", "q_uniform")
_GUESSES = ("latest", "best", "worst")
_ENGINES = {"wandb": ("bayes", "random", "grid"), "optuna": ("custom",), "ax": ("custom",)}  # with their methods


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
    and then trips over (a grid over a range of floats, a range that is upside down inside nested parameters), and know
    the arguments of `CoherenceScheduler`.

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
    if found := list(_not_json(config, "")):
        return found
    found = [f"{key}: W&B knows no such key" for key in config if key not in _KEYS]
    method = config.get("method")
    if method not in METHODS:
        found.append(f"method: {method!r} is not one of {', '.join(METHODS)}")
    found += _objective_faults(config, method)
    found += _stopping_faults(config.get("early_terminate"), "early_terminate" in config)
    found += _steering_faults(config, method)
    found += _plain_faults(config)
    searched = isinstance(config.get("scheduler"), Mapping) and bool(config["scheduler"].get("search_space"))
    if "parameters" in config or not searched:
        found += _parameter_faults(config.get("parameters"), method, "parameters", "")
    if not found and method == "bayes" and not searchable(config["parameters"]):
        found.append("parameters: bayes needs one that is not constant")
    return found or _wandbs_own(config)


# ---- the config's other keys


def _not_json(value: Any, key: str) -> Iterator[str]:
    """What YAML or Python has and JSON, in which W&B keeps a config, has not: dates, sets, NumPy's integers."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            here = f"{key}.{name}" if key else str(name)
            if not (name is None or isinstance(name, str | bool | int | float)):  # of these JSON makes text
                yield f"{here}: the key is of type {type(name).__name__}: write text"
            yield from _not_json(item, here)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _not_json(item, key)
    elif not (value is None or isinstance(value, str | bool | int | float)):
        mend = "put quotes around it" if hasattr(value, "isoformat") else "write text, a number or a list of these"
        yield f"{key}: {value} is of type {type(value).__name__}, which W&B cannot keep: {mend}"


def _objective_faults(config: Mapping[str, Any], method: Any) -> list[str]:
    metric = config.get("metric")
    if "metrics" in config:
        several = config["metrics"]
        if metric is not None:
            return ["metrics: it stands beside metric: give one of them"]
        if not isinstance(several, list | tuple) or len(several) < 2:
            return [f"metrics: {several!r} is not a list of two or more: one goes under metric"]
        if method != "custom":
            return ["metrics: several are for method: custom, with a scheduler of your own"]
        return [text for one in several for text in _metric_faults(one, "metrics")]
    if metric is None:
        if method == "bayes" or "metric" in config:
            return [
                f"metric: {f'{method} needs' if method == 'bayes' else 'null is not'} {{name: ..., goal: minimize}}"
            ]
        return []
    return _metric_faults(metric, "metric")


def _metric_faults(metric: Any, key: str) -> list[str]:
    if not isinstance(metric, Mapping) or not isinstance(metric.get("name"), str) or not metric["name"]:
        return [f"{key}: {metric!r} has no name: write {{name: val_loss, goal: minimize}}"]
    choices = {
        "goal": ("minimize", "maximize"),
        "impute": _GUESSES,
        "impute_while_running": (*_GUESSES, "false"),
    }
    found = [f"{key}.{name}: W&B knows no such key" for name in metric if name not in (*choices, "name", "target")]
    found += [
        f"{key}.{name}: {metric[name]!r} is not one of {', '.join(allowed)}"
        for name, allowed in choices.items()
        if name in metric and metric[name] not in allowed
    ]
    if "target" in metric and not is_number(metric["target"]):
        found.append(f"{key}.target: {metric['target']!r} is not a number")
    return found


def _stopping_faults(stopping: Any, given: bool) -> list[str]:
    if not given:
        return []
    if not isinstance(stopping, Mapping) or stopping.get("type") != "hyperband":
        return [f"early_terminate: {stopping!r} is not {{type: hyperband, ...}}, the only kind that W&B has"]
    found = []
    if "min_iter" not in stopping and not {"max_iter", "s"} <= set(stopping):
        found.append("early_terminate: hyperband needs min_iter, or max_iter and s")
    for name, value in stopping.items():
        if name not in _STOPPING:
            found.append(f"early_terminate.{name}: W&B knows no such key")
            continue
        fine, allowed = _STOPPING[name]
        if not fine(value):
            found.append(f"early_terminate.{name}: {value!r} is not {allowed}")
    return found


def is_number(value: Any) -> bool:
    """Whether it is a number, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return is_number(value) and value == int(value)


_STOPPING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (lambda value: True, ""),  # looked at before
    "min_iter": (lambda value: _is_whole(value) and value >= 1, "a whole number, 1 or more"),
    "max_iter": (_is_whole, "a whole number"),
    "s": (is_number, "a number"),
    "eta": (lambda value: is_number(value) and value > 1, "a number above 1"),
    "strict": (lambda value: isinstance(value, bool), "true or false"),
}


def _steering_faults(config: Mapping[str, Any], method: Any) -> list[str]:
    """Who proposes the points: `controller` and `scheduler`."""
    found = []
    controller, scheduler = config.get("controller"), config.get("scheduler")
    local = isinstance(controller, Mapping) and controller.get("type") == "local"
    if "controller" in config and not (
        local or (isinstance(controller, Mapping) and controller.get("type") == "cloud")
    ):
        found.append(f"controller: {controller!r} is not {{type: local}} or {{type: cloud}}")
    if "scheduler" not in config:
        return found
    if not isinstance(scheduler, Mapping) or str(scheduler.get("engine")) not in _ENGINES:
        return [*found, f"scheduler: {scheduler!r} names no engine that there is: {', '.join(_ENGINES)}"]
    if method not in _ENGINES[scheduler["engine"]]:
        needed = ", ".join(_ENGINES[scheduler["engine"]])
        found.append(f"scheduler.engine: {scheduler['engine']} goes with method {needed}, not {method}")
    if local:
        found.append("scheduler: it stands beside controller {type: local}: give one of them")
    if "early_terminate" in config:
        found.append("scheduler: it stands beside early_terminate: stopping runs is the scheduler's own task")
    for name, value in scheduler.items():
        if name not in ("engine", "source", "optimizer", "search_space"):
            found.append(f"scheduler.{name}: W&B knows no such key")
        elif not isinstance(value, str):
            found.append(f"scheduler.{name}: {value!r} is not text")
    if {"optimizer", "search_space"} & set(scheduler) and "source" not in scheduler:
        found.append("scheduler.source: it is missing; optimizer and search_space name functions in that file")
    return found


def _plain_faults(config: Mapping[str, Any]) -> list[str]:
    found = [
        f"{key}: {config[key]!r} is not {'a path' if key == 'program' else 'text'}"
        for key in _TEXTS
        if key in config and not isinstance(config[key], str)
    ]
    if "command" in config and not isinstance(config["command"], list | tuple):
        found.append(f"command: {config['command']!r} is not a list of words")
    if config.get("kind", "sweep") != "sweep":
        found.append(f"kind: {config['kind']!r} is not sweep")
    cap = config.get("run_cap", 1)
    if not _is_whole(cap) or cap < 1:
        found.append(f"run_cap: {cap!r} is not a number of runs, 1 or more")
    return found


# ---- parameters


def _parameter_faults(parameters: Any, method: Any, place: str, path: str) -> list[str]:
    """What is wrong with parameters, nested ones included.

    Args:
        parameters: By name.
        method: The sweep's.
        place: Where they stand, for the message: `parameters.opt.parameters`.
        path: The same as a run's config sees it: `opt.`
    """
    if not isinstance(parameters, Mapping) or not parameters:
        return [f"{place}: there is none to sweep"]
    found = []
    for name, spec in parameters.items():
        here = f"{place}.{name}"
        if isinstance(name, bool):
            found.append(f"{here}: YAML reads on, off, yes and no as true and false: put the name in quotes")
        elif not isinstance(name, str) or not _NAME.fullmatch(name):
            found.append(f"{here}: a name begins with a letter and holds letters, digits, '_', '.' and '-' only")
        elif not isinstance(spec, Mapping):
            says = "write {value: ...}, {values: [...]} or {min: ..., max: ...}"
            found.append(f"{here}: {spec!r} is not a mapping: {says}")
        elif "parameters" in spec:
            if more := [key for key in spec if key != "parameters"]:
                found.append(f"{here}: {', '.join(more)} stand beside nested parameters: give one or the other")
            found += _parameter_faults(spec["parameters"], method, f"{here}.parameters", f"{path}{name}.")
        elif text := _fault(spec, method, path + name) or (None if path else _mixed_fault(spec)):
            found.append(f"{here}: {text}")
    return found


def searchable(parameters: Mapping[str, Any]) -> bool:
    """Whether a parameter, nested or not, has more than one value; they are known to be in order."""
    specs = parameters.values()
    return any(searchable(s["parameters"]) if "parameters" in s else distribution(s) != "constant" for s in specs)


def _fault(spec: Mapping[str, Any], method: Any, name: str) -> str | None:
    """What is wrong with one parameter, None if nothing is."""
    ways = [way for way in ("value", "values") if way in spec] + ["a range"] * ("min" in spec or "max" in spec)
    if len(ways) > 1:
        return f"{', '.join(spec)} stand side by side: give a value, values or a range"
    if not ways and "distribution" not in spec:
        return "it says neither value nor values nor min and max"
    kind = distribution(spec)
    if kind in ("log_uniform", "q_log_uniform", "inv_log_uniform"):
        return f"{kind} takes exponents for limits: write {kind}_values, with the values"
    if kind not in FORMS:
        return f"distribution {kind!r} is not one of {', '.join(FORMS)}"
    needed, allowed = FORMS[kind]
    for key in needed:
        if key not in spec:
            return f"{key} is missing"
    for key in spec:
        if key not in (*needed, *allowed, "distribution"):
            return f"{key} does not belong to {kind}, which takes {', '.join((*needed, *allowed))}"
    found = _shape_fault(spec) or (_values_fault(spec) if "values" in spec else None)
    found = found or (_range_fault(spec, kind) if "min" in spec else None)
    if found is None and method == "grid" and kind not in _IN_GRIDS:
        what = "a range of floats" if "min" in spec else kind
        found = f"a grid cannot go over {what}: give values" + " without probabilities" * ("values" in spec)
    if found is None and method == "bayes" and "probabilities" in spec:
        found = "W&B's bayes cannot weigh values: leave probabilities out, or take method random"
    return found or (_setting_fault(name.removeprefix(PREFIX), spec) if name.startswith(PREFIX) else None)


def _setting_fault(name: str, spec: Mapping[str, Any]) -> str | None:
    """What `CoherenceScheduler` would say to a setting's values, or to the ends of its range."""
    if name not in SETTINGS:
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
    for name in ("mu", "sigma", "q", "a", "b"):
        if name in spec and not (is_number(spec[name]) and (name == "mu" or spec[name] > 0)):
            return f"{name} is {spec[name]!r}, not a number{' above 0' * (name != 'mu')}"
    return None


def _values_fault(spec: Mapping[str, Any]) -> str | None:
    values, weights = spec["values"], spec.get("probabilities")
    if not isinstance(values, list | tuple) or not values:
        return f"values are {values!r}: give a list of at least one"
    if "probabilities" not in spec:
        return None
    if not (isinstance(weights, list | tuple) and all(is_number(weight) and weight >= 0 for weight in weights)):
        return f"probabilities are {weights!r}: give a list of numbers, none below 0"
    if len(weights) != len(values):
        return f"{len(values)} values have {len(weights)} probabilities"
    if not math.isclose(sum(weights), 1.0, rel_tol=1e-5):
        return f"probabilities add up to {sum(weights):g}, not to 1"
    return None


def _range_fault(spec: Mapping[str, Any], kind: str) -> str | None:
    for side in ("min", "max"):
        value = spec[side]
        if isinstance(value, str):
            return f"{side} is the text {value!r}: YAML reads 1e-3 as text, write 1.0e-3 or 0.001"
        if not is_number(value):
            return f"{side} is {value!r}, not a number"
    low, high = spec["min"], spec["max"]
    if not low < high:
        return f"min {low!r} is not below max {high!r}"
    if "log_uniform_values" in kind and low <= 0:
        return f"min is {low!r}, but {kind} needs a range above 0"
    if kind == "int_uniform" and not (isinstance(low, int) and isinstance(high, int)):
        return f"min {low!r} and max {high!r} are not both integers, as int_uniform needs"
    return None


def _mixed_fault(spec: Mapping[str, Any]) -> str | None:
    """W&B's client asks which of integers and floats are meant; for a nested parameter it does not."""
    low, high = spec.get("min"), spec.get("max")
    if low is None or "distribution" in spec or isinstance(low, int) is isinstance(high, int):
        return None
    whole = low if isinstance(low, int) else high
    return f"min {low!r} and max {high!r} are an integer and a float: write both as floats ({whole} as {whole}.0)"


def wandbs_search() -> Any:
    """Returns W&B's package `sweeps`; None where it is missing, too old to know `run_cap`, or some other `sweeps`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sweeps = importlib.import_module("sweeps")
    except ImportError:
        return None
    version = re.match(r"(\d+)\.(\d+)", getattr(sweeps, "__version__", ""))  # a user's own folder has none
    return sweeps if version is not None and (int(version[1]), int(version[2])) >= (0, 3) else None


def _wandbs_own(config: Mapping[str, Any]) -> list[str]:
    """What W&B's own package says, nothing where it is not installed."""
    sweeps = wandbs_search()
    if sweeps is None:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Never SweepConfig(config) or next_run(validate=True): both drop nested parameters.
        said = sweeps.schema_violations_from_proposed_config(json.loads(json.dumps(dict(config))))
    return list(dict.fromkeys(str(sentence) for sentence in said))
