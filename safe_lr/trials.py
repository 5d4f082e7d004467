"""Trial steps: what the coming step would do to the batch's loss, by forward passes alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from safe_lr.closures import leave_no_trace
from safe_lr.measurement import Measurement
from safe_lr.movers import MeasurementFailed, Mover, ascends, coming_steps
from safe_lr.objective import Closures, Objective
from safe_lr.settings import COST_OF_LOSS
from safe_lr.solving import check_finite

SEARCHES = 20
"""Trial steps of one search for the largest lr that lowers the loss: down to a millionth of where it began, at the cost
of a measurement."""


def search_step(moving: Sequence[Mover], closures: Closures, start: float, curvature: str = "hessian") -> Measurement:
    """Finds the largest lr, to a factor of two, at which the coming step does not make the batch's loss worse.

    This stands in for the limit where an optimizer has none. Forward passes only, at most SEARCHES: halving where the
    first lr is too large, doubling where it is not.

    Args:
        moving: The parameters that may move, with their training gradients.
        closures: Return the loss.
        start: The lr to begin with, in units of lr_ref.
        curvature: What the closures return.

    Returns:
        A `Measurement` with `curvature` "trial", that lr as `lr_limit`, and no eigenvalue; or a `failure`.
    """
    started = time.perf_counter()
    found = Measurement(curvature="trial", hvp="none", cost=COST_OF_LOSS)
    try:
        found = replace(found, maximize=ascends(moving))
        if start <= 0 or all(m.grad is None for m in moving):
            raise MeasurementFailed("there is no step to try: the lr is 0, or nothing has a gradient")
        with leave_no_trace([m.param for m in moving]) as untouched:
            objective = Objective(closures, untouched, curvature)
            loss = objective.loss()
            check_finite(loss)
            found, lr, factor = replace(found, loss=loss), start, 0.0
            steps = coming_steps(moving, [m.grad for m in moving])
            for _ in range(SEARCHES):
                tried = replace(found, trial_loss=objective.loss_after(steps(lr)))
                found = replace(found, cost=found.cost + COST_OF_LOSS)
                good = tried.trial_failed is False
                if good:
                    found = replace(found, lr_limit=lr)
                if factor and good == (factor < 1):
                    break  # from bad to good, or from good to bad
                factor = 2.0 if good else 0.5
                lr *= factor
            if math.isnan(found.lr_limit):
                raise MeasurementFailed(f"no step down to lr {lr:.3g} lowers the batch's loss")
    except MeasurementFailed as failed:
        found = replace(found, failure=str(failed))
    return replace(found, seconds=time.perf_counter() - started)


def try_steps(
    moving: Sequence[Mover],
    closures: Closures,
    next_lr: Callable[[Measurement], float | None],
    curvature: str = "hessian",
) -> Measurement:
    """Tries the coming step on the closure's batch, without any curvature: a forward pass, and one for each lr.

    Args:
        moving: The parameters that may move, with their training gradients.
        closures: Return the loss.
        next_lr: Given what was found so far, the lr (in units of lr_ref) to try next; asked again until it is None.
        curvature: What the closures return.

    Returns:
        A `Measurement` that holds `loss`, `maximize` and the last `trial_lr` and `trial_loss`, or a `failure`.
    """
    started = time.perf_counter()
    found = Measurement(cost=COST_OF_LOSS)
    try:
        found = replace(found, maximize=ascends(moving))
        with leave_no_trace([m.param for m in moving]) as untouched:
            objective = Objective(closures, untouched, curvature)
            loss = objective.loss()
            check_finite(loss)
            found = replace(found, loss=loss)
            steps = coming_steps(moving, [m.grad for m in moving])
            while (lr := next_lr(found)) is not None:
                found = replace(found, cost=found.cost + COST_OF_LOSS)
                found = replace(found, trial_lr=lr, trial_loss=objective.loss_after(steps(lr)))
    except MeasurementFailed as failed:
        found = replace(found, failure=str(failed))
    return replace(found, seconds=time.perf_counter() - started)
