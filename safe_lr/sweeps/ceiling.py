"""Which part of an lr range cannot train: measured before the sweep, not found out by its runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safe_lr.guard import CoherenceGuard
from safe_lr.sweeps.checks import PREFIX, check
from safe_lr.sweeps.spaces import Interval, space

Closure = Callable[[], Tensor]
Closures = Closure | Iterable[Closure]

STEPS = 50
"""Protected updates before the limit counts. An adaptive optimizer's limit is 70 to 10,000 times smaller at
initialisation than a few updates later; with b1 = .9 its constant c has reached 99.5 % of its value by then."""

MULTIPLE = 8.0
"""Nothing below this many times the limit is cut: the furthest that a learned margin ever goes (`margin_max`)."""

RAISE = 4.0
"""Factor by which the ceiling goes up while runs at it train."""

HOPELESS = 1e6
"""A loss this many times the first one ends a trial run."""


@dataclass(frozen=True)
class Ceiling:
    """The lr at and above which a range is cut.

    Attributes:
        lr: That lr: a bare run at it was seen to fail. None where nothing is to be cut.
        lr_limit: The largest limit met in the protected run; NaN if none was needed.
        trained_at: The largest lr at which a bare run was seen to train, None if none was tried or none trained.
        reason: The above in a sentence.
        cost: Gradient evaluations spent.
    """

    lr: float | None
    lr_limit: float
    trained_at: float | None
    reason: str
    cost: float


def stable_ceiling(
    model_factory: Callable[[], nn.Module],
    closure_factory: Callable[[nn.Module], Closures],
    *,
    optimizer_factory: Callable[[nn.Module], Optimizer],
    highest: float,
    steps: int = STEPS,
    multiple: float = MULTIPLE,
    seed: int = 0,
) -> Ceiling:
    """Finds the lr from which on a run of this model, optimizer and data cannot train.

    1. A bare run of `steps` updates at `highest`. If it trains, nothing is to be cut.
    2. A protected run of as many updates, in which the limit is measured several times; its largest value counts, since
       that at initialisation is far too small for an adaptive optimizer. If `highest` is below `multiple` times that,
       nothing is to be cut.
    3. Bare runs at `multiple * lr_limit`, then at 4 times that, and so on, until one fails: that is the ceiling.

    A run trains if the mean loss of its last quarter is below its first loss. So what is cut lies beyond the linear
    limit by `multiple` *and* above an lr that was seen to fail, with `highest` seen to fail as well. What would fail
    only later is not cut.

    Args:
        model_factory: Makes a freshly initialised model; torch's seed is set before.
        closure_factory: Given the model, returns a closure of its loss, or an iterable of closures, one a step.
        optimizer_factory: Given the model, returns its optimizer. Its lrs are scaled so that the largest is the lr in
            question. There is no default: limits of two optimizers differ by orders of magnitude.
        highest: The upper end of the range.
        steps: Updates in each run.
        multiple: Nothing below this many times the limit is cut.
        seed: torch's seed for all runs; the caller's random streams are left alone.

    Raises:
        ValueError: `highest`, `steps` or `multiple` is out of range, or no limit could be measured.

    Example:
        >>> made = lambda: torch.nn.Linear(1, 1, bias=False)                     # loss 2 w^2: H = 4, lr_limit = 2 / 4
        >>> loss = lambda model: lambda: 2 * (model.weight**2).sum()
        >>> sgd = lambda model: torch.optim.SGD(model.parameters(), lr=1.0)
        >>> found = stable_ceiling(made, loss, optimizer_factory=sgd, highest=100.0)
        >>> round(found.lr_limit, 3), round(found.lr, 3)
        (0.5, 4.0)
    """
    if not (math.isfinite(highest) and highest > 0 and multiple >= 1 and steps >= 4):
        raise ValueError(
            f"highest={highest!r} must be above 0, multiple={multiple!r} at least 1 and steps={steps!r} at least 4"
        )

    def start(lr: float) -> tuple[Optimizer, Iterator[Closure]]:
        torch.manual_seed(seed)
        model = model_factory()
        optimizer = optimizer_factory(model)
        largest = max(float(group["lr"]) for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            group["lr"] = lr * (float(group["lr"]) / largest)
        return optimizer, _each(closure_factory(model), steps)

    with torch.random.fork_rng():
        cost = float(steps)
        if _trains(*start(highest)):
            return Ceiling(None, math.nan, highest, f"a bare run at lr {highest:.3g} trains: nothing is cut", cost)
        limit, spent = _largest_limit(*start(highest), seed=seed)
        cost, ceiling, trained = cost + steps + spent, multiple * limit, None
        if ceiling > highest:
            reason = f"all of it is below {multiple:g} times the largest limit met, {limit:.3g}: nothing is cut"
            return Ceiling(None, limit, None, reason, cost)
        while ceiling < highest:
            cost += steps
            if not _trains(*start(ceiling)):
                break
            trained, ceiling = ceiling, RAISE * ceiling
    ceiling = min(ceiling, highest)
    reason = (
        f"a bare run at lr {ceiling:.3g} fails within {steps} updates; the largest limit met in a protected one is "
        f"{limit:.3g}"
    )
    return Ceiling(ceiling, limit, trained, reason, cost)


def _each(closures: Closures, steps: int) -> Iterator[Closure]:
    given = iter([closures] * steps) if callable(closures) else iter(closures)
    for taken, closure in enumerate(given):
        if taken == steps:
            return
        yield closure


def _trains(optimizer: Optimizer, closures: Iterator[Closure]) -> bool:
    """Whether a bare run lowers the loss."""
    losses: list[float] = []
    for closure in closures:
        optimizer.zero_grad()
        loss = closure()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]) or losses[-1] > HOPELESS * abs(losses[0]):
            return False
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    last = losses[-max(1, len(losses) // 4) :]
    return sum(last) / len(last) < losses[0]


def _largest_limit(optimizer: Optimizer, closures: Iterator[Closure], *, seed: int) -> tuple[float, float]:
    """The largest limit met in a protected run, and what measuring cost."""
    guard = CoherenceGuard(optimizer, loggers=None, credit=1e6, seed=seed)
    try:
        for closure in closures:
            optimizer.zero_grad()
            closure().backward()  # type: ignore[no-untyped-call]
            guard.observe(closure)
            optimizer.step()
        met = [d.limits.get("momentum", d.lr_limit) if d.limits else d.lr_limit for d in guard.history]
        limits = [limit for limit in met if limit is not None and math.isfinite(limit)]
        if not limits:
            last = guard.last_decision
            why = "no update was made" if last is None else last.failure or last.reason
            raise ValueError(f"no limit could be measured ({why}): check closure_factory and optimizer_factory")
        return max(limits), guard.summary().cost
    finally:
        guard.close()


def clip_to_stable(
    config: Mapping[str, Any],
    model_factory: Callable[[], nn.Module],
    closure_factory: Callable[[nn.Module], Closures],
    *,
    optimizer_factory: Callable[[nn.Module], Optimizer],
    parameter: str = "lr",
    steps: int = STEPS,
    multiple: float = MULTIPLE,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns a sweep config without the part of its lr range that cannot train.

    The rule is `stable_ceiling`'s. A range is cut at the ceiling, values from it on are dropped, and the config's
    `description` says so. Only the upper end is cut: an lr that is too small is slow, not unstable.

    Args:
        config: A valid config, left as it is.
        model_factory, closure_factory, optimizer_factory, steps, multiple, seed: See `stable_ceiling`.
        parameter: Name of the lr.

    Returns:
        A copy. One that sweeps no lr but follows the limit (`safe_lr.follow_limit`) has nothing to be cut.

    Raises:
        ValueError: The config is invalid or has no such parameter, its distribution has no ends or holds integers only,
            or nothing of it can train.

    Example:
        >>> config = {"method": "random", "parameters": {"lr": {"values": [0.1, 1.0, 10.0]}}}
        >>> made = lambda: torch.nn.Linear(1, 1, bias=False)                            # loss 2 w^2: lr_limit = 2 / 4
        >>> clipped = clip_to_stable(
        ...     config,
        ...     made,
        ...     lambda model: lambda: 2 * (model.weight**2).sum(),
        ...     optimizer_factory=lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
        ... )
        >>> clipped["parameters"]["lr"]                                                 # cut from 8 * 0.5 on
        {'values': [0.1, 1.0]}
    """
    check(config)
    clipped = copy.deepcopy(dict(config))
    parameters = clipped["parameters"]
    if parameter not in parameters:
        if PREFIX + "follow_limit" in parameters:
            return clipped
        raise ValueError(f"the config sweeps {', '.join(parameters)}, not {parameter!r}: name its lr with parameter=")
    spec = parameters[parameter]
    lrs = space(parameter, spec)
    if isinstance(lrs, Interval) and lrs.integer:
        raise ValueError(f"parameters.{parameter}: min and max are integers, and so every draw is one: write floats")
    ends = (lrs.low, lrs.high) if isinstance(lrs, Interval) else (min(lrs.values), max(lrs.values))
    found = stable_ceiling(
        model_factory,
        closure_factory,
        optimizer_factory=optimizer_factory,
        highest=float(ends[1]),
        steps=steps,
        multiple=multiple,
        seed=seed,
    )
    if found.lr is None:
        return clipped
    if found.lr <= ends[0]:
        raise ValueError(
            f"parameters.{parameter}: nothing between {ends[0]:.3g} and {ends[1]:.3g} can train: {found.reason}. "
            "Lower the range."
        )
    if isinstance(lrs, Interval):
        spec["min"], spec["max"] = float(spec["min"]), found.lr
    else:
        kept = [index for index, lr in enumerate(lrs.values) if lr < found.lr]
        spec["values"] = [lrs.values[index] for index in kept]
        if lrs.weights is not None:
            total = sum(lrs.weights[index] for index in kept)
            spec["probabilities"] = [lrs.weights[index] / total for index in kept]
    note = f"{parameter} cut from {ends[1]:.3g} to below {found.lr:.3g}: {found.reason}."
    clipped["description"] = f"{clipped['description']} {note}" if clipped.get("description") else note
    return clipped
