"""The optimizers whose runs decide what cannot train: the caller's own, those that a config names, or stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from safe_lr.preconditioners.named import MOMENTUM, STAND_INS, Named, named
from safe_lr.sweeps.checks import is_number

Makes = Callable[[nn.Module], Optimizer]

MEND = "pass optimizer_factory=, a function that makes a model's optimizer, or a list of such functions"
"""What helps wherever an optimizer was named, or assumed, that is not the caller's."""


@dataclass(frozen=True)
class Candidates:
    """The optimizers whose runs count.

    Attributes:
        makes: Each makes one, given a model.
        why: What the reader is to know where they are not the caller's own.
    """

    makes: Sequence[Makes]
    why: str = ""


def own(given: Makes | Sequence[Makes]) -> Candidates:
    """Returns the caller's own.

    Raises:
        TypeError: It is neither a function nor a list of functions, or one of them is a class.

    Example:
        >>> own("adam")
        Traceback (most recent call last):
        TypeError: optimizer_factory='adam': give a function that makes a model's optimizer, or a list of such functions
    """
    several = [given] if callable(given) else list(given) if isinstance(given, list | tuple) else []
    for makes in several:
        if isinstance(makes, type) and issubclass(makes, Optimizer):
            name = f"torch.optim.{makes.__name__}" if makes in vars(torch.optim).values() else makes.__name__
            raise TypeError(
                f"optimizer_factory: {name} is a class, and takes parameters, no model: give "
                f"lambda model: {name}(model.parameters())"
            )
    if not several or not all(callable(makes) for makes in several):
        raise TypeError(
            f"optimizer_factory={_shown(given)}: give a function that makes a model's optimizer, or a list of such "
            "functions"
        )
    return Candidates(several)


def _shown(given: Any) -> str:
    """Its repr; of an optimizer, whose is many lines long, what it is."""
    if isinstance(given, list | tuple):
        return f"[{', '.join(map(_shown, given))}]"
    return f"<an optimizer {type(given).__name__}>" if isinstance(given, Optimizer) else repr(given)


def stand_ins(
    momenta: Sequence[float] = (MOMENTUM,),
    why: str = "No optimizer was given, so {} were assumed: pass yours as optimizer_factory=",
) -> Candidates:
    """Returns those who are tried where nobody is named.

    Example:
        >>> stand_ins().why
        'No optimizer was given, so SGD with momentum 0.9 and AdamW at its defaults were assumed: pass yours as
        optimizer_factory='
    """
    several = [one for name in STAND_INS for one in named(name, momenta)]
    return Candidates(several, why.format(" and ".join(one.name for one in several)))


def configs(parameters: Mapping[str, Any]) -> Candidates:
    """Returns torch's optimizers that a config's parameter `optimizer` names; the stand-ins where it has none.

    A name that torch does not have is no case for the stand-ins: they could cut what its owner trains.

    Raises:
        ValueError: `optimizer` is something else than names of torch's optimizers, or `momentum` is outside [0, 1).

    Example:
        >>> found = configs({"optimizer": {"values": ["adam", "sgd"]}, "momentum": {"value": 0.5}})
        >>> [makes.name for makes in found.makes]
        ['Adam at its defaults', 'SGD with momentum 0.5']
    """
    momenta = [float(value) for value in _listed(parameters.get("momentum", {})) if is_number(value)] or [MOMENTUM]
    if "optimizer" not in parameters:
        for name in STAND_INS:
            _fit(named(name, momenta))
        return stand_ins(
            momenta,
            "The config names no optimizer, so {} were assumed: name yours in its parameter optimizer, or pass "
            "optimizer_factory=",
        )
    several: list[Named] = []
    for name in _listed(parameters["optimizer"]) or [parameters["optimizer"]]:
        try:
            several += [one for one in named(name, momenta) if one not in several]
        except ValueError as error:
            raise ValueError(f"parameters.optimizer: {error}: {MEND}") from error
    _fit(several)
    return Candidates(several, "The config names the optimizer; pass optimizer_factory= if yours is made otherwise")


def _fit(several: Sequence[Named]) -> None:
    """Raises where a config's momentum makes an optimizer that cannot train."""
    for one in several:
        momentum = one.options.get("momentum", 0.0)
        if not 0 <= momentum < 1:
            raise ValueError(
                f"parameters.momentum: {momentum:g} is not inside [0, 1), and {one.cls.__name__} is to run with it: "
                f"leave it out, or {MEND}"
            )


def _listed(spec: Mapping[str, Any]) -> list[Any]:
    """A parameter's value or values; none where it is a range or holds parameters of its own."""
    return [spec["value"]] if "value" in spec else list(spec.get("values", ()))
