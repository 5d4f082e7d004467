"""One measurement: how sharp the loss is as the optimizer sees it, and which lr that allows."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from safe_lr.closures import ClosureError, leave_no_trace
from safe_lr.eigenproblem import BOUNDS, MIN_MATVECS, Eigenproblem
from safe_lr.ensemble import Ensemble
from safe_lr.movers import MeasurementFailed, Mover, ascends, movers, shares
from safe_lr.objective import Closures, Objective, as_list
from safe_lr.operators import CURVATURES, DIFFERENCES, Fused
from safe_lr.preconditioners import Preconditioner

HVPS = ("auto", "exact", "lean", *DIFFERENCES)

# In gradient evaluations, medians of four networks from an MLP to a 5 M transformer (docs/performance.md).
COST_OF_GRAPH = 1.0
COST_OF_PRODUCT = 2.0
COST_OF_LEAN_PRODUCT = 3.0
COST_OF_ONE_SIDED_PRODUCT = 1.0
COST_OF_LOSS = 1 / 3

DIFFERENCES_TOL = 0.01
"""From this tolerance on "auto" makes products through a fused LSTM by central differences. In eleven measurements the
limit was within half a percent of that by exact products, lambda_max within 2.1 %, 2.4 to 3.6 times as fast."""

NOT_DETERMINISTIC = (
    "the closure gave two losses for one random state: it draws from a stream of its own, or changes what it reads"
)


@dataclass(frozen=True)
class Settings:
    """How to measure. Checked when made.

    Attributes:
        bound: `lemma1` (2 p_min / lambda_max, Eq. 20-21), `coherence` (2 / gamma, Eq. 17) or `momentum` (c / gamma,
            Sec. 3.9).
        curvature: `hessian`, `gauss-newton`, `fisher` (labels sampled from the model) or `empirical-fisher`.
        hvp: `exact` (double backward on one retained graph), `lean` (the graph built anew for each product),
            `finite-difference` (central, two gradients a product), `one-sided` (one gradient a product, to a
            hundredth), or `auto`: exact, lean where memory runs out, central differences where nothing else works.
            Where `tol` is a hundredth or more, differences come first for an LSTM whose kernel is fused (oneDNN's, on
            the CPU): its second derivative is not, and takes 4-7 gradients a product. Where they fail their check
            (kinks), products are exact after all, and stay so in a run.
        tol: Relative residual at which the eigen-solver stops.
        max_matvecs: Largest number of products for one measurement.
        max_basis: Largest number of Krylov vectors kept at a time; None keeps all (one a product).
        cautious: Whether the limits come from `value + residual` (the scheduler) or from the value itself.
        smallest: Whether H's smallest eigenvalue is found too, from the Krylov space of its largest.

    Raises:
        ValueError: A choice that does not exist (the message lists the choices), or a number out of range.
    """

    bound: str = "momentum"
    curvature: str = "hessian"
    hvp: str = "auto"
    tol: float = 1e-3
    max_matvecs: int = 500
    max_basis: int | None = None
    cautious: bool = False
    smallest: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("bound", BOUNDS), ("curvature", CURVATURES), ("hvp", HVPS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        if not isinstance(self.tol, (int, float)):
            raise TypeError(f"tol must be a number in (0, 1), got {self.tol!r}")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol must lie in (0, 1), got {self.tol!r}")
        if not isinstance(self.max_matvecs, int):
            raise TypeError(f"max_matvecs must be an integer, got {self.max_matvecs!r}")
        if self.curvature != "hessian" and self.hvp in DIFFERENCES:
            raise ValueError(f"hvp={self.hvp!r} is for curvature='hessian', got curvature={self.curvature!r}")
        if self.max_basis is not None and (not isinstance(self.max_basis, int) or self.max_basis < 2):
            raise ValueError(f"max_basis must be an integer of at least 2 (vectors), or None; got {self.max_basis!r}")
        if self.smallest and self.max_basis == 2:
            raise ValueError("smallest=True needs a max_basis of at least 3, for a restart keeps both ends; got 2")
        if self.max_matvecs < self.least_matvecs:
            raise ValueError(
                f"max_matvecs must be at least {self.least_matvecs} under bound={self.bound!r}, for fewer products "
                f"tell no eigenvalue; got {self.max_matvecs!r}"
            )

    @property
    def least_cost(self) -> float:
        """Gradient evaluations of the cheapest measurement: a graph, the least products, a trial step.

        Lemma 1 needs lambda_max beside gamma.
        """
        product = COST_OF_ONE_SIDED_PRODUCT if self.hvp == "one-sided" else COST_OF_PRODUCT
        return COST_OF_GRAPH + product * self.least_matvecs + COST_OF_LOSS

    @property
    def least_matvecs(self) -> int:
        """Fewest products that tell what the bound needs, the check of a difference included."""
        return least_matvecs(self.bound, self.hvp)


def least_matvecs(bound: str, hvp: str) -> int:
    """Returns the fewest products that tell what a bound needs: differences are checked with one more per eigenvalue.

    Example:
        >>> least_matvecs("momentum", "exact"), least_matvecs("lemma1", "one-sided")
        (3, 8)
    """
    return (MIN_MATVECS + (hvp in DIFFERENCES)) * (1 + (bound == "lemma1"))


@dataclass(frozen=True)
class Measurement:
    """What one measurement found. lrs are in units of `lr_ref`, the largest desired lr of the parameter groups.

    Attributes:
        bound: The bound behind `lr_limit`.
        lambda_max: Largest algebraic eigenvalue of H (with L2 decay), loss / parameter^2. None where not solved for.
        lambda_min: Smallest algebraic eigenvalue of that matrix, to a residual of `tol * max(|lambda_min|, tol * |H|)`.
            None where not asked for.
        p_min: Smallest entry of P, leaving out coordinates that carry no curvature (gradient so far exactly zero and a
            zero row in H).
        p_min_all: Smallest entry of P; Lemma 1 uses it.
        p_eff: `lambda_max / gamma`, the entry of P that would make Lemma 1 exact.
        gamma: Coherence, largest eigenvalue of P^-1/2 H P^-1/2 (with each group's P divided by its share of `lr_ref`).
        limits: lr limit under `lemma1`, `coherence`, `momentum`, those that were solved for.
        lr_limit: The limit under the chosen bound: the coming step's, on `lr_ref`.
        residual: Residual norm of the eigenpair of gamma (of lambda_max under `lemma1`), in its unit.
        upper: That eigenvalue plus its residual: a heuristic for an upper bound, not a certificate.
        converged: Whether every eigenvalue's residual met the tolerance.
        num_matvecs: Hessian-vector products spent, over all eigenvalues.
        cost: Gradient evaluations spent: 1 for the graph, 2 a product (3 lean, 1 one-sided), 1/3 for a trial step.
        seconds: Wall time.
        curvature, hvp: What was measured and how the products were made.
        failure: Why the measurement failed, in a sentence; None if it did not. The figures are then None or NaN.
        loss: Loss on the measured batch.
        trial_lr, trial_loss: The lr tried on that batch and the loss after it, None without a trial.
        maximize: Whether the optimizer climbs.
        gradient_ratio: The training gradient along the closure's own, in units of it: about 1 where both are of one
            batch, k where k backward passes were added up. None without a training gradient.
        inferred: Whether P was inferred from an unknown optimizer's own update.
        note: What else should be known, in a sentence.
        vectors: The eigenvectors found, for a warm start.
    """

    bound: str = "momentum"
    lambda_max: float | None = None
    lambda_min: float | None = None
    p_min: float | None = None
    p_min_all: float | None = None
    p_eff: float | None = None
    gamma: float | None = None
    limits: dict[str, float] = field(default_factory=dict)
    lr_limit: float = math.nan
    residual: float = math.nan
    upper: float = math.nan
    converged: bool = False
    num_matvecs: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    curvature: str = "hessian"
    hvp: str = "exact"
    failure: str | None = None
    loss: float | None = None
    trial_lr: float | None = None
    trial_loss: float | None = None
    maximize: bool = False
    gradient_ratio: float | None = None
    inferred: bool = False
    note: str | None = None
    vectors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def trial_failed(self) -> bool | None:
        """Whether the trial step would make the batch's loss worse, or not finite; None without a trial.

        Example:
            >>> Measurement(loss=1.0, trial_loss=2.0).trial_failed, Measurement(loss=1.0).trial_failed
            (True, None)
        """
        if self.trial_loss is None or self.loss is None:
            return None
        better = self.trial_loss >= self.loss if self.maximize else self.trial_loss <= self.loss
        return not (math.isfinite(self.trial_loss) and better)


def measure(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    closure: Closures | None = None,
    *,
    bound: str = "momentum",
    curvature: str = "hessian",
    hvp: str = "auto",
    tol: float = 1e-3,
    max_matvecs: int = 500,
    max_basis: int | None = None,
    smallest: bool = False,
    preconditioner: str | Preconditioner | None = None,
    seed: int = 0,
) -> Measurement:
    """Measures, once and with nothing changed, how large an lr the optimizer could take now.

    With `D_i = (2 / c) (lr_g / lr_ref) / p_i` the limit under the default bound is

        lr_limit = 2 / lambda_max(D^1/2 H D^1/2 + diag((lr_g / lr_ref) wd_g))

    where P is that of a step taken on the measured batch itself and c comes from the optimizer's update rule at its
    coming step. Parameters, gradients, buffers, modes and random streams are left as they were, bit for bit.

    Args:
        optimizer: A torch optimizer, or several that act on one loss; state, hyper-parameters and groups are read.
        closure: Returns the scalar loss with its graph; no `backward()`. Or several, whose mean is measured at the
            memory of one.
        bound: Which of `limits` becomes `lr_limit`: `momentum`, `coherence` or `lemma1`.
        curvature: `hessian`; `empirical-fisher` (the closure returns per-example losses), `gauss-newton` or `fisher`
            (it returns the pair (outputs, loss_of_outputs)).
        hvp: `auto`, `exact`, `lean`, `finite-difference` or `one-sided`.
        tol: Relative residual of the eigenvalues.
        max_matvecs: Largest number of products, over all eigenvalues.
        max_basis: Largest number of parameter-sized Krylov vectors kept at a time; None keeps one a product.
        smallest: Whether to find H's smallest eigenvalue too (`lambda_min`): more products, in the Krylov space of its
            largest.
        preconditioner: None for what is registered, "from-update" to infer P from an unknown optimizer's own update, or
            a `Preconditioner`.
        seed: Seed of the start vectors.

    Returns:
        A `Measurement` with all three limits. Where the loss or the curvature is not finite, or nowhere positive, its
        `failure` says so.

    Raises:
        TypeError: No closure, or one that breaks its contract (`ClosureError`), or an optimizer that is not known.
        ValueError: A choice that does not exist, a tolerance out of range, or no parameter that requires grad.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> found = measure(torch.optim.SGD([x], lr=0.1, momentum=0.9), lambda: (x ** 2 @ torch.tensor([2.0, 0.5])))
        >>> round(found.lambda_max, 4), round(found.limits["coherence"], 4)      # H = diag(4, 1), P = 1
        (4.0, 0.5)

    References:
        The source paper, Eq. 16-17, 20-21, 23.
    """
    ensemble = Ensemble(optimizer, preconditioner)
    if "trial" in ensemble.kinds:
        raise TypeError(
            f"{ensemble.name} has no stability limit to measure: it steps by signs. A CoherenceScheduler or "
            "CoherenceGuard holds its lr by trial steps alone."
        )
    if closure is None:
        raise TypeError(
            "measure() needs a closure that returns the loss: measure(optimizer, lambda: criterion(model(x), y))"
        )
    as_list(closure, "measure()")
    settings = Settings(bound, curvature, hvp, tol, max_matvecs, max_basis, smallest=smallest)
    lrs = [float(group["lr"]) for group in ensemble.param_groups]
    initial = [float(group.get("initial_lr", group["lr"])) for group in ensemble.param_groups]
    moving = movers(ensemble, shares(lrs, initial)[1])
    if not moving:
        raise ValueError("no parameter of the optimizer requires grad in a group with lr > 0: nothing can be measured")
    for mover in moving:
        mover.grad = None  # a one-shot measurement is about the closure's batch, whatever gradients lie around
    return measure_step(moving, closure, settings, seed=seed, also=BOUNDS)


def measure_step(
    moving: Sequence[Mover],
    closures: Closures,
    settings: Settings,
    *,
    seed: int = 0,
    also: Collection[str] = (),
    warm: dict[str, Tensor] | None = None,
    try_lr: Callable[[Measurement], float | None] | None = None,
    check: bool = False,
    last_hvp: str | None = None,
) -> Measurement:
    """Measures the coming step of the given movers; the engine behind `measure` and the scheduler.

    Args:
        moving: The parameters that may move. A mover's `grad` (the training gradient) forms P where it is set, the
            closure's own gradient where it is None.
        closures: One or several, whose mean is measured.
        settings: What and how.
        seed: Seed of the start vectors.
        also: Bounds to solve for beside the chosen one (those that come free are always there).
        warm: Eigenvectors of an earlier measurement, by name.
        check: Whether to evaluate the loss twice and note where the two differ.
        try_lr: Given the finished measurement, the lr (in units of lr_ref) to try on the batch next; asked again after
            each trial until it is None.
        last_hvp: How the last good measurement of the same kind made its products: under `auto` the first way to try.
    """
    started = time.perf_counter()
    found = Measurement(bound=settings.bound, curvature=settings.curvature)
    with leave_no_trace([m.param for m in moving]) as untouched:
        objective = Objective(closures, untouched, settings.curvature, seed)
        try:
            if not moving:
                raise MeasurementFailed("no parameter that requires grad is in a group with lr > 0: nothing moves")
            found = replace(found, maximize=ascends(moving))
            options = {"seed": seed, "also": also, "warm": warm or {}}
            found, problem = _solved_somehow(found, objective, moving, settings, last_hvp, **options)
            with contextlib.suppress(RuntimeError, MemoryError):  # out of memory: the limit stands by itself
                if check:
                    found = replace(found, cost=found.cost + COST_OF_LOSS)
                    if not objective.deterministic(found.loss or math.nan):
                        found = replace(found, note=NOT_DETERMINISTIC)
                steps = problem.coming_steps
                while try_lr is not None and (lr := try_lr(found)) is not None:
                    found = replace(found, cost=found.cost + COST_OF_LOSS)
                    found = replace(found, trial_lr=lr, trial_loss=objective.loss_after(steps(lr)))
        except MeasurementFailed as failed:
            found = replace(found, failure=str(failed), num_matvecs=failed.num_matvecs, cost=failed.cost)
        except ArithmeticError as failed:
            found = replace(found, failure=str(failed), cost=found.cost + COST_OF_GRAPH)
    return replace(found, seconds=time.perf_counter() - started)


def _solved_somehow(
    found: Measurement,
    objective: Objective,
    moving: Sequence[Mover],
    settings: Settings,
    last_hvp: str | None,
    **options: Any,
) -> tuple[Measurement, Eigenproblem]:
    """Solves by the first way of making products that works.

    Differences come first where they worked last time, or where a fused kernel makes them much cheaper and there is
    room for exact products behind them, should they fail.
    """
    if settings.hvp != "auto":
        return _solved(found, objective, moving, settings, settings.hvp, **options)
    least, room = settings.least_matvecs, settings.max_matvecs - 1  # one for what is spent on finding out
    if last_hvp != "finite-difference":
        fused = last_hvp is not None or settings.tol < DIFFERENCES_TOL or room < 2 * least + 1
        try:
            return _solved_by_default(found, objective, moving, settings, fused=fused, **options)
        except Fused:
            found, settings = (
                replace(found, cost=found.cost + COST_OF_LOSS),
                replace(settings, max_matvecs=room - least),
            )
    try:
        return _solved(found, objective, moving, settings, "finite-difference", **options)
    except MeasurementFailed as failed:
        room -= failed.num_matvecs
        if not failed.num_matvecs or room < least:
            raise
        doubted = failed
    found = replace(found, cost=doubted.cost, num_matvecs=doubted.num_matvecs)
    try:
        return _solved_by_default(
            found, objective, moving, replace(settings, max_matvecs=room), differences=False, **options
        )
    except (MemoryError, RuntimeError) as error:
        doubted.cost += COST_OF_GRAPH
        raise doubted from error


def _solved_by_default(
    found: Measurement,
    objective: Objective,
    moving: Sequence[Mover],
    settings: Settings,
    *,
    differences: bool = True,
    **options: Any,
) -> tuple[Measurement, Eigenproblem]:
    """Solves by exact products, lean ones where memory runs out, else by differences."""
    way = "exact" if len(objective.closures) == 1 else "lean"
    first: Exception | None = None
    while True:
        try:
            return _solved(found, objective, moving, settings, way, **options)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, (ClosureError, Fused)) or way == "finite-difference":
                raise first or error from None
            first = first or error
            short = isinstance(error, MemoryError) or "memory" in str(error)
            found = replace(found, cost=found.cost + COST_OF_GRAPH)
            if (way == "lean" and short) or not (short or differences):
                raise
            way = "lean" if short else "finite-difference"
        except ArithmeticError as error:
            if first is None or isinstance(error, MeasurementFailed):
                raise
            raise MeasurementFailed(f"{error}; a second derivative failed too ({_first_line(first)})") from first


def _solved(
    found: Measurement,
    objective: Objective,
    moving: Sequence[Mover],
    settings: Settings,
    hvp: str,
    *,
    seed: int,
    also: Collection[str],
    warm: dict[str, Tensor],
    fused: bool = True,
) -> tuple[Measurement, Eigenproblem]:
    """Solves with products made in one way; what was spent before, as `found` says, is counted with it."""
    curvature = objective.curvature([m.param for m in moving], hvp, fused=fused)
    before, products, per_product = found.cost + curvature.cost, found.num_matvecs, curvature.cost_of_product
    found = replace(found, loss=curvature.loss, hvp=curvature.hvp)
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
        del curvature
        found = replace(found, **problem.solve(settings.bound, also), num_matvecs=products + problem.num_matvecs)
    except MeasurementFailed as failed:
        failed.cost = before + per_product * failed.num_matvecs
        failed.num_matvecs += products
        raise
    return replace(found, cost=before + per_product * problem.num_matvecs), problem


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


def check_finite(loss: float | None) -> None:
    """Raises MeasurementFailed where a loss is NaN or Inf."""
    if loss is None or not math.isfinite(loss):
        raise MeasurementFailed(f"the loss is {loss}")
