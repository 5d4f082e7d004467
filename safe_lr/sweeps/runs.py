"""Runs of an optimizer on a model: bare ones, that train or not, and a protected one, whose limits are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safe_lr.decisions import Decision
from safe_lr.guard import CoherenceGuard
from safe_lr.preconditioners.named import Named
from safe_lr.sweeps.candidates import MEND, Makes

Closure = Callable[[], Tensor]
Closures = Closure | Iterable[Closure]

HOPELESS = 1e6
"""A loss this many times the first one ends a bare run."""

COUNTS = 0.1
"""Curvature counts while the loss is above this share of its first value. On a batch that can be classified without
error it goes to zero with the loss, and the limit grows without bound."""


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
                f"{self.makes.name} does not go with this model ({error}): leave it out, or {MEND}"
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
        """The largest limit met in a protected run (`_largest`), and what measuring cost."""
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
            met = _met(guard.history, losses)
            if not met:
                last = guard.last_decision
                why = "no update was made" if last is None else last.failure or last.reason
                blame = "closure_factory" if isinstance(self.makes, Named) else "closure_factory and optimizer_factory"
                raise ValueError(f"no limit of {self.name} could be measured ({why}): check {blame}")
            return _largest(met), guard.summary().cost
        finally:
            guard.close()


def _each(closures: Closures, steps: int) -> Iterator[Closure]:
    given = iter([closures] * steps) if callable(closures) else iter(closures)
    for taken, closure in enumerate(given):
        if taken == steps:
            return
        yield closure


class _Met(NamedTuple):
    """A limit that was met, in its two parts.

    Attributes:
        half: Half of c, what momentum makes of it.
        plain: 2 / gamma.
        left: The loss, as a share of the first.
    """

    half: float
    plain: float
    left: float


def _met(history: Iterable[Decision], losses: Sequence[float]) -> list[_Met]:
    """The limits that a run's decisions tell. Where limits are found by trial steps, the first one stands for all: it
    has no parts.
    """
    met: list[_Met] = []
    for decision in history:
        limits: Mapping[str, float | None] = decision.limits or ({} if met else {"momentum": decision.lr_limit})
        limit = limits.get("momentum")
        plain = limits.get("coherence") or limit
        if limit and plain and math.isfinite(limit) and math.isfinite(plain):
            met.append(_Met(limit / plain, plain, losses[decision.step] / losses[0] if losses[0] else 0.0))
    return met


def _largest(met: Sequence[_Met]) -> float:
    """The largest c, which momentum reaches after some updates, times the largest 1 / gamma that counts (COUNTS), the
    first one met where none does.

    Example:
        >>> _largest([_Met(1.0, 0.5, 1.0), _Met(1.9, 0.4, 0.2), _Met(1.9, 1e9, 1e-6)])
        0.95
    """
    counting = [one.plain for one in met if one.left > COUNTS] or [met[0].plain]
    return max(one.half for one in met) * max(counting)
