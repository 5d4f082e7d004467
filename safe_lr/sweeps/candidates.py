"""The optimizers whose runs decide what cannot train, and the runs that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safe_lr.guard import CoherenceGuard
from safe_lr.preconditioners.named import MOMENTUM, STAND_INS, Named, named
from safe_lr.sweeps.checks import is_number

Closure = Callable[[], Tensor]
Closures = Closure | Iterable[Closure]
Makes = Callable[[nn.Module], Optimizer]

HOPELESS = 1e6
"""A loss this many times the first one ends a bare run."""

COUNTS = 0.1
"""Curvature counts while the loss is above this share of its first value. On a batch that can be classified without
error it goes to zero with the loss, and the limit grows without bound."""

_MEND = "pass optimizer_factory=, a function that makes a model's optimizer, or a list of such functions"


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
            raise ValueError(f"parameters.optimizer: {error}: {_MEND}") from error
    _fit(several)
    return Candidates(several, "The config names the optimizer; pass optimizer_factory= if yours is made otherwise")


def _fit(several: Sequence[Named]) -> None:
    """Raises where a config's momentum makes an optimizer that cannot train."""
    for one in several:
        momentum = one.options.get("momentum", 0.0)
        if not 0 <= momentum < 1:
            raise ValueError(
                f"parameters.momentum: {momentum:g} is not inside [0, 1), and {one.cls.__name__} is to run with it: "
                f"leave it out, or {_MEND}"
            )


def _listed(spec: Mapping[str, Any]) -> list[Any]:
    """A parameter's value or values; none where it is a range or holds parameters of its own."""
    return [spec["value"]] if "value" in spec else list(spec.get("values", ()))


# ---- their runs


@dataclass
class Runs:
    """Runs of one optimizer, each on a model of its own that starts as all do."""

    makes: Makes
    model_factory: Callable[[], nn.Module]
    closure_factory: Callable[[nn.Module], Closures]
    steps: int
    seed: int
    spoken_of: bool
    name: str = ""

    @property
    def whose(self) -> str:
        """How a sentence about these runs begins: with the optimizer's name, where there could be a doubt."""
        return f"of {self.name}, " if self.spoken_of else ""

    def start(self, lr: float) -> tuple[Optimizer, Iterator[Closure]]:
        """Returns the optimizer of a new model, at this lr, and the closures of its losses."""
        torch.manual_seed(self.seed)
        model = self.model_factory()
        with self.fitting():
            optimizer = self.makes(model)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer_factory has returned {optimizer!r}, which is no optimizer of torch's kind: return one"
            )
        self.name = self.makes.name if isinstance(self.makes, Named) else type(optimizer).__name__
        largest = max(float(group["lr"]) for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["lr"] = lr * (float(group["lr"]) / largest)
        return optimizer, _each(self.closure_factory(model), self.steps)

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """An error of an optimizer that is not the caller's own is told with its name, and what mends it."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError) as error:
            if not isinstance(self.makes, Named):
                raise
            raise ValueError(
                f"{self.makes.name} does not go with this model ({error}): leave it out, or {_MEND}"
            ) from error

    def train(self, lr: float) -> bool:
        """Whether a bare run lowers the loss."""
        optimizer, closures = self.start(lr)
        losses: list[float] = []
        for closure in closures:
            optimizer.zero_grad()
            loss = closure()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]) or losses[-1] > HOPELESS * abs(losses[0]):
                return False
            loss.backward()  # type: ignore[no-untyped-call]
            with self.fitting():
                optimizer.step()
        if not losses:
            raise ValueError("closure_factory gave no closure: its iterable must begin anew for each model")
        last = losses[-max(1, len(losses) // 4) :]
        return sum(last) / len(last) < losses[0]

    def largest_limit(self, lr: float) -> tuple[float, float]:
        """The largest limit met in a protected run, and what measuring cost.

        With lr_limit = c / gamma that is the largest c, which momentum reaches after some updates, times the largest
        1 / gamma met while the loss was above a tenth of its first value; the first one met where there is none.
        """
        optimizer, closures = self.start(lr)
        guard = CoherenceGuard(optimizer, loggers=None, credit=1e6, seed=self.seed)
        losses: list[float] = []
        try:
            for closure in closures:
                optimizer.zero_grad()
                loss = closure()
                losses.append(abs(float(loss.detach())))
                loss.backward()  # type: ignore[no-untyped-call]
                guard.observe(closure)
                optimizer.step()
            met: list[tuple[float, float, float]] = []  # c / 2, 2 / gamma, the loss
            for d in guard.history:
                limits: Mapping[str, float | None] = d.limits or (
                    {} if met else {"momentum": d.lr_limit}
                )  # those of trial steps have no parts
                limit, plain = limits.get("momentum"), limits.get("coherence") or limits.get("momentum")
                if limit and plain and math.isfinite(limit) and math.isfinite(plain):
                    met.append((limit / plain, plain, losses[d.step]))
            if not met:
                last = guard.last_decision
                why = "no update was made" if last is None else last.failure or last.reason
                blame = "closure_factory" if isinstance(self.makes, Named) else "closure_factory and optimizer_factory"
                raise ValueError(f"no limit of {self.name} could be measured ({why}): check {blame}")
            counting = [plain for _, plain, loss in met if loss > COUNTS * losses[0]] or [met[0][1]]
            return max(half for half, _, _ in met) * max(counting), guard.summary().cost
        finally:
            guard.close()


def _each(closures: Closures, steps: int) -> Iterator[Closure]:
    given = iter([closures] * steps) if callable(closures) else iter(closures)
    for taken, closure in enumerate(given):
        if taken == steps:
            return
        yield closure
