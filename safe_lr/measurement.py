"""One measurement: how sharp the loss is as the optimizer sees it, and which lr that allows."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from safe_lr.closures import leave_no_trace
from safe_lr.eigenproblem import BOUNDS
from safe_lr.ensemble import Ensemble
from safe_lr.movers import MeasurementFailed, Mover, ascends, movers, shares
from safe_lr.objective import Closures, Objective, as_list
from safe_lr.preconditioners import Preconditioner
from safe_lr.settings import COST_OF_GRAPH, COST_OF_LOSS, Settings
from safe_lr.solving import solve

NOT_DETERMINISTIC = (
    "the closure gave two losses for one random state: it draws from a stream of its own, or changes what it reads"
)


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
        decay: Largest decoupled weight decay of a parameter, in 1 / lr; `lr_limit` is below 2 / decay. 0 where trial
            steps stand for a limit.
        residual: Residual norm of the eigenpair of gamma (of lambda_max under `lemma1`), in its unit.
        upper: That eigenvalue plus its residual: a heuristic for an upper bound, not a certificate.
        converged: Whether every eigenvalue's residual met the tolerance.
        num_matvecs: Hessian-vector products spent, over all eigenvalues.
        cost: Gradient evaluations spent: 1 for the graph, 2 a product (3 lean, 1 one-sided), 1/2 for a trial step.
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
    decay: float = 0.0
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
            solution = solve(objective, moving, settings, last_hvp, **options)
            found = replace(
                found,
                **solution.figures,
                loss=solution.loss,
                hvp=solution.hvp,
                num_matvecs=solution.spent.num_matvecs,
                cost=solution.spent.cost,
            )
            with contextlib.suppress(RuntimeError, MemoryError):  # out of memory: the limit stands by itself
                if check:
                    found = replace(found, cost=found.cost + COST_OF_LOSS)
                    if not objective.deterministic(found.loss or math.nan):
                        found = replace(found, note=NOT_DETERMINISTIC)
                steps = None
                while try_lr is not None and (lr := try_lr(found)) is not None:
                    found = replace(found, cost=found.cost + COST_OF_LOSS)
                    steps = steps or solution.problem.coming_steps()
                    found = replace(found, trial_lr=lr, trial_loss=objective.loss_after(steps(lr)))
        except MeasurementFailed as failed:
            found = replace(found, failure=str(failed), num_matvecs=failed.num_matvecs, cost=failed.cost)
        except ArithmeticError as failed:
            found = replace(found, failure=str(failed), cost=found.cost + COST_OF_GRAPH)
    return replace(found, seconds=time.perf_counter() - started)
