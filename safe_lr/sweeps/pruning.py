"""Ending a sweep's run that is not worth its time, in good order."""

from __future__ import annotations

import math
import warnings
from typing import Any, Protocol

from safe_lr.decisions import Decision, Summary
from safe_lr.loggers import is_stop_request
from safe_lr.loggers.bounded import bounded

TAG = "safe_lr-unsafe"
PRUNED = "safe_lr_pruned"
FACTOR = 10.0
"""From this many times the cap on, the lr that the sweep asks for is not the one that is trained: every such point is
the same run at the cap, and its result would be booked under an lr that it never had."""

AFTER = 20
"""Updates before a run is judged: the first limits are far too small with adaptive optimizers."""

_TIMEOUT = 30.0


class Watched(Protocol):
    """What is judged: a `CoherenceScheduler` or `CoherenceGuard`."""

    @property
    def last_decision(self) -> Decision | None:
        """The newest decision."""

    def summary(self) -> Summary:
        """The run so far."""

    def close(self) -> None:
        """Ends the protection."""


def unsafe(scheduler: Watched, *, factor: float = FACTOR, after: int = AFTER) -> str | None:
    """Returns why a run's point is unsafe, None while it is not.

    Args:
        scheduler: The run's scheduler or guard.
        factor: How far above the cap the desired lr may be.
        after: Updates before anything counts.

    Raises:
        ValueError: `factor` is below 1 or `after` negative.
    """
    if factor < 1 or after < 0:
        raise ValueError(f"factor={factor!r} must be at least 1 and after={after!r} at least 0")
    steps, last = scheduler.summary().steps, scheduler.last_decision
    if last is None or steps < after:
        return None
    if last.failure is not None and last.loss is not None and not math.isfinite(last.loss):
        return f"step {steps}: the loss is {last.loss}"
    cap = scheduler.summary().cap
    if cap and last.lr_desired > factor * cap and math.isfinite(last.lr_desired):
        return f"step {steps}: lr {last.lr_desired:.3g} is {last.lr_desired / cap:.3g} times the cap {cap:.3g}"
    return None


def prune(run: Any, scheduler: Watched, *, factor: float = FACTOR, after: int = AFTER) -> str | None:
    """Ends the run of an unsafe point, normally: with a tag, a summary and the reason.

    Three runs that fail within a minute make a W&B agent give up; a run that is pruned has not failed. Call it in the
    training loop, and leave the loop when it returns a reason:

        if prune(wandb.run, scheduler):
            return

    The scheduler is closed (its table and record are complete), the run gets the tag `safe_lr-unsafe` and the summary
    keys `safe_lr_pruned` (the reason) and `safe_lr_pruned_step`, and is finished with exit code 0. Nothing that W&B
    raises comes out of here.

    Args:
        run: The W&B run, or None without one.
        scheduler: The run's scheduler or guard.
        factor, after: See `unsafe`.

    Returns:
        The reason, or None: the point is safe so far, nothing was done.

    Raises:
        ValueError: `factor` or `after` is out of range.
    """
    reason = unsafe(scheduler, factor=factor, after=after)
    if reason is None:
        return None
    steps = scheduler.summary().steps
    scheduler.close()
    if run is None:
        return reason

    def end() -> None:
        run.tags = (*(run.tags or ()), TAG)
        run.summary.update({PRUNED: reason, PRUNED + "_step": steps})
        run.finish(exit_code=0)

    try:
        bounded(end, _TIMEOUT, "W&B prune")
    except Exception as error:
        if is_stop_request(error):
            raise
        warnings.warn(
            f"W&B could not be told that the run was pruned ({type(error).__name__}: {error}); it ends all the same",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason
