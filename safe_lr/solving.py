"""Solving a measurement's eigenproblems by the first way of making products that works."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from safe_lr import processes
from safe_lr.closures import ClosureError
from safe_lr.eigenproblem import Eigenproblem
from safe_lr.movers import MeasurementFailed, Mover
from safe_lr.objective import Objective
from safe_lr.operators import Curvature
from safe_lr.settings import COST_OF_GRAPH, Settings, least_matvecs

DIFFERENCES_TOL = 0.01
"""From this tolerance on "auto" makes products by one-sided differences where the loss's graph is smooth: half the
gradients, a fraction of the memory. With what their check takes out, their own error was .2 % at most on five smooth
networks (docs/performance.md)."""

DIFFERENCES_EPS = 1e-6
"""Coarsest arithmetic for that: float32's, not that of half precision."""


@dataclass(frozen=True)
class Spent:
    """Gradient evaluations and products."""

    cost: float = 0.0
    num_matvecs: int = 0


@dataclass(frozen=True)
class Solution:
    """What was found, how, and at what cost.

    Attributes:
        problem: The problem, for trial steps.
        figures: `Measurement`'s figures by name.
        loss: The measured loss.
        hvp: How products were made.
        spent: On all ways that were tried.
    """

    problem: Eigenproblem
    figures: dict[str, Any]
    loss: float
    hvp: str
    spent: Spent


def solve(
    objective: Objective, moving: Sequence[Mover], settings: Settings, last_hvp: str | None, **options: Any
) -> Solution:
    """Solves by the first way of making products that works.

    Differences come first where they worked last time, or where the loss is smooth and there is room for exact products
    behind them, should they fail.

    Args:
        objective: The loss.
        moving: The parameters that may move.
        settings: What and how.
        last_hvp: How the last good measurement made its products, None where there was none.
        options: `seed`, `also` and `warm`, as `measure_step` has them.

    Raises:
        MeasurementFailed: There is no limit, with what finding out has cost.
        ClosureError: A closure broke its contract.
    """
    spent = Spent()
    if settings.hvp != "auto":
        return _solved(spent, objective, moving, settings, settings.hvp, **options)
    if last_hvp != "finite-difference" and not _differences_pay(moving, settings, last_hvp):
        return _solved_by_default(spent, objective, moving, settings, **options)
    try:
        if last_hvp == "finite-difference":
            return _solved(spent, objective, moving, settings, "finite-difference", **options)
        return _solved_by_default(spent, objective, moving, settings, smooth=True, verify=last_hvp is None, **options)
    except MeasurementFailed as failed:
        if not (failed.num_matvecs and failed.hvp in ("one-sided", last_hvp)):
            raise
        doubted = failed.with_traceback(None)  # which holds the vectors
    # A product costs twice as much now. They work from here on, so let them have what the least measurement takes.
    room = max(settings.least_matvecs, (settings.max_matvecs - doubted.num_matvecs) // 2)
    objective.untouched.reset()
    spent = Spent(doubted.cost, doubted.num_matvecs)
    try:
        return _solved_by_default(
            spent, objective, moving, replace(settings, max_matvecs=room), differences=False, **options
        )
    except (MemoryError, RuntimeError) as error:
        doubted.cost += COST_OF_GRAPH
        raise doubted from error


def products_to_verify(bound: str) -> int:
    """Returns the fewest products with which differences are checked by exact ones, with room for these to take over.

    Example:
        >>> products_to_verify("momentum")
        7
    """
    return least_matvecs(bound, "one-sided") + least_matvecs(bound, "exact")


def _differences_pay(moving: Sequence[Mover], settings: Settings, last_hvp: str | None) -> bool:
    """Whether one-sided differences may be tried on a smooth loss.

    Not where processes train together: DistributedDataParallel's forward pass may wait for the other ranks', which need
    not take as many products.
    """
    needed = least_matvecs(settings.bound, "one-sided") if last_hvp else products_to_verify(settings.bound)
    return (
        last_hvp in (None, "one-sided")
        and processes.count() == 1
        and settings.tol >= DIFFERENCES_TOL
        and not settings.smallest  # whose eigenvalue nothing checks
        and settings.max_matvecs >= needed
        and all(torch.finfo(m.param.dtype).eps < DIFFERENCES_EPS for m in moving)
    )


def _solved_by_default(
    spent: Spent,
    objective: Objective,
    moving: Sequence[Mover],
    settings: Settings,
    *,
    differences: bool = True,
    smooth: bool = False,
    verify: bool = False,
    **options: Any,
) -> Solution:
    """Solves by exact products, lean ones where memory runs out, else by differences.

    Args:
        spent: What was spent before.
        objective, moving, settings: See `solve`.
        differences: Whether central differences may come last.
        smooth: Whether one-sided ones come first where the loss is smooth ...
        verify: ... and are checked by exact ones.
        options: Of `_solved`.
    """
    way = "exact" if len(objective.closures) == 1 else "lean"
    first: Exception | None = None
    while True:
        try:
            return _solved(spent, objective, moving, settings, way, smooth=smooth, verify=verify, **options)
        except (MemoryError, RuntimeError) as error:
            if way == "finite-difference":
                raise first or error from None
            spent = replace(spent, cost=spent.cost + COST_OF_GRAPH)
            first = first or error
            smooth = False
            short = isinstance(error, MemoryError) or "memory" in str(error)
            if (way == "lean" and short) or not (short or differences):
                raise
            way = "lean" if short else "finite-difference"
        except ArithmeticError as error:
            if first is None or isinstance(error, MeasurementFailed):
                raise
            raise MeasurementFailed(f"{error}; a second derivative failed too ({_first_line(first)})") from first


def _solved(
    spent: Spent,
    objective: Objective,
    moving: Sequence[Mover],
    settings: Settings,
    hvp: str,
    *,
    smooth: bool = False,
    verify: bool = False,
    **options: Any,
) -> Solution:
    """Solves with products made in one way; what was spent before is counted with it.

    Where exact products are there to check differences, they take over on their graph if those fail, or if the closure
    cannot be evaluated again.
    """
    curvature = objective.curvature([m.param for m in moving], hvp, differences=smooth, verify=verify)
    spent = replace(spent, cost=spent.cost + curvature.cost)
    exact, room, least = curvature.exact, settings.max_matvecs, settings.least_matvecs
    if exact is None:
        return _solved_on(curvature, spent, moving, settings, **options)
    try:
        return _solved_on(curvature, spent, moving, replace(settings, max_matvecs=room - least), **options)
    except MeasurementFailed as failed:
        spent = Spent(failed.cost, failed.num_matvecs)
    del curvature
    objective.untouched.reset()
    room = max(least, room - spent.num_matvecs)
    return _solved_on(exact, spent, moving, replace(settings, max_matvecs=room), **options)


def _solved_on(
    curvature: Curvature,
    spent: Spent,
    moving: Sequence[Mover],
    settings: Settings,
    *,
    seed: int,
    also: Collection[str],
    warm: dict[str, Tensor],
) -> Solution:
    """Solves with one curvature, whose making is counted in `spent`.

    Raises:
        MeasurementFailed: There is no limit; or "auto" took differences, and the closure could not be evaluated again.
    """
    problem = None
    try:
        check_finite(curvature.loss)
        problem = Eigenproblem(
            moving,
            curvature,
            tol=settings.tol,
            max_matvecs=settings.max_matvecs,
            max_basis=settings.max_basis,
            both_ends=settings.smallest,
            cautious=settings.cautious,
            seed=seed,
            warm=warm,
        )
        figures = problem.solve(settings.bound, also)
    except MeasurementFailed as failed:
        _account(failed, curvature, spent, problem)
        raise
    except ClosureError:
        raise
    except Exception as error:
        if problem is None or (settings.hvp, curvature.hvp) != ("auto", "one-sided"):
            raise
        stopped = MeasurementFailed(f"the closure could not be evaluated again ({_first_line(error)})")
        _account(stopped, curvature, spent, problem)
        raise stopped from error
    spent = Spent(spent.cost + problem.cost, spent.num_matvecs + problem.num_matvecs)
    return Solution(problem, figures, curvature.loss, curvature.hvp, spent)


def _account(failed: MeasurementFailed, curvature: Curvature, spent: Spent, problem: Eigenproblem | None) -> None:
    """Notes what it was that failed, and what that and all before it has cost."""
    failed.hvp = curvature.hvp
    failed.num_matvecs = spent.num_matvecs + (0 if problem is None else problem.num_matvecs)
    failed.cost = spent.cost + (0.0 if problem is None else problem.cost)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


def check_finite(loss: float | None) -> None:
    """Raises MeasurementFailed where a loss is NaN or Inf."""
    if loss is None or not math.isfinite(loss):
        raise MeasurementFailed(f"the loss is {loss}")
