"""What a sweep may choose for one parameter, read from W&B's way of writing it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_RANGES = {
    # distribution: logarithmic?, integer?
    "uniform": (False, False),
    "q_uniform": (False, False),
    "int_uniform": (False, True),
    "log_uniform_values": (True, False),
    "q_log_uniform_values": (True, False),
}
LOCAL = ("constant", "categorical", "categorical_w_probabilities", *_RANGES)
"""The distributions that a local search can draw from."""

_ENDS = ("min", "max")
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # distribution: the keys that it needs, those that it may have
    "constant": (("value",), ()),
    "categorical": (("values",), ()),
    "categorical_w_probabilities": (("values", "probabilities"), ()),
    "uniform": (_ENDS, ()),
    "q_uniform": (_ENDS, ("q",)),
    "int_uniform": (_ENDS, ()),
    "log_uniform_values": (_ENDS, ()),
    "q_log_uniform_values": (_ENDS, ("q",)),
    "inv_log_uniform_values": (_ENDS, ()),
    "normal": ((), ("mu", "sigma")),
    "q_normal": ((), ("mu", "sigma", "q")),
    "log_normal": ((), ("mu", "sigma")),
    "q_log_normal": ((), ("mu", "sigma", "q")),
    "beta": ((), ("a", "b")),
    "q_beta": ((), ("a", "b", "q")),
}
"""Those that W&B takes. It knows log_uniform, with exponents for limits, too, and says that it is not to be used."""


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Example:
        >>> Choice((True, False)).draw(random.Random(0))
        False
    """

    values: tuple[Any, ...]
    weights: tuple[float, ...] | None = None

    def draw(self, stream: random.Random) -> Any:
        """Returns one of the values."""
        return stream.choices(self.values, self.weights)[0]


@dataclass(frozen=True)
class Interval:
    """A number between two others, both included.

    Attributes:
        low, high: The ends.
        log: Whether equal ratios, not equal distances, are equally likely.
        integer: Whether only integers count.
        step: Distance of the values that count, None for all. Where it is an integer, so are they.

    Example:
        >>> 0.01 <= Interval(0.01, 1.0, log=True).draw(random.Random(0)) <= 1.0
        True
        >>> Interval(1.0, 5.0, integer=True).draw(random.Random(0)) in {1, 2, 3, 4, 5}
        True
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False
    step: float | None = None

    def draw(self, stream: random.Random) -> float:
        """Returns a number from the interval."""
        if self.integer:
            return stream.randint(round(self.low), round(self.high))
        if self.log:
            value = math.exp(stream.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = stream.uniform(self.low, self.high)
        return self.rounded(value)

    def rounded(self, value: float) -> float:
        """Returns the value on the grid of `step`, inside the interval."""
        if self.step is not None:
            value = round(value / self.step) * self.step
        value = min(max(value, self.low), self.high)
        return int(value) if isinstance(self.step, int) and value == int(value) else value


def distribution(spec: Mapping[str, Any]) -> str:
    """Returns the name of a parameter's distribution, also where W&B infers it.

    Example:
        >>> distribution({"min": 1, "max": 4}), distribution({"min": 0.1, "max": 4.0}), distribution({"value": 3})
        ('int_uniform', 'uniform', 'constant')
    """
    if "distribution" in spec:
        return str(spec["distribution"])
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    whole = all(isinstance(spec.get(name), int) for name in ("min", "max"))
    return "int_uniform" if whole else "uniform"


def space(name: str, spec: Mapping[str, Any]) -> Choice | Interval:
    """Returns what a parameter may be.

    Args:
        name: Its name, for the error.
        spec: Its part of a valid sweep config.

    Raises:
        ValueError: Its distribution is not one of `LOCAL`, or it holds parameters of its own.

    Example:
        >>> space("lr", {"distribution": "log_uniform_values", "min": 0.01, "max": 1.0})
        Interval(low=0.01, high=1.0, log=True, integer=False, step=None)
    """
    if "parameters" in spec:
        raise ValueError(
            f"parameters.{name}: a local search takes flat names only: write {name}.{next(iter(spec['parameters']))}"
        )
    kind = distribution(spec)
    if kind == "constant":
        return Choice((spec["value"],))
    if kind in ("categorical", "categorical_w_probabilities"):
        weights = spec.get("probabilities")
        return Choice(tuple(spec["values"]), None if weights is None else tuple(weights))
    if kind not in _RANGES:
        raise ValueError(f"parameters.{name}: a local search cannot draw from {kind!r}: use one of {', '.join(LOCAL)}")
    log, integer = _RANGES[kind]
    step = spec.get("q", 1.0) if kind.startswith("q_") else None
    return Interval(float(spec["min"]), float(spec["max"]), log, integer, step)
