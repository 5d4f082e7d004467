"""When to measure, try and look, and what it may cost: pure functions of numbers."""

from __future__ import annotations

import math

SETTLED = 1e-4
"""When the update rule's constant c moves the limit by less than this from one look to the next, it is left until
measured anew, or until someone moves a decay."""

FOLLOW_EACH, FOLLOW_EVERY = 100, 10
"""Up to this update c is followed at each, then at every tenth while no group's decays change: NAdam's c moves for
thousands of updates, by less than .1 % each, and reading it takes longer than all else between measurements."""

RESERVE = 0.25
"""Part of `credit` kept for alarms, so that routine measurements early in a run cannot spend what a spike will need."""

GAP_FIRST = 3
"""Updates between the first two routine measurements: with Adam the limit then rises a hundredfold."""

GAP_FACTOR = 3.0
"""Growth of that gap: measurements at 0, 3, 12, 39, 120, 363. Twice as dense ones spend the credit by the 20th update
and leave a ViT without a limit from its steady state."""

TRIAL_GAP = 20
"""Longest gap between trial steps on their own, in updates, as long as TRIAL_PART pays for them; shortest one between a
measurement and an early one."""

LONGEST_GAP = 10**9
"""Where gaps stop growing, far beyond any run."""

TRIAL_PART = 0.2
"""Part of the budget that trial steps between measurements may take; the rest keeps the limit itself fresh. In the
first 1,000 updates it pays for one run of them every 50 or so. With .375 the gaps of benchmarks/lr_robustness.py are
the same (.40 and .34 % in the mean on seeds 1 to 3, .44 and .65 % over 1,000 updates)."""


def next_gap(gap: int, *, alarm: bool, trial_failed: bool, early: bool = False) -> int:
    """Returns the updates until the next routine measurement.

    GAP_FIRST after the first one (gap 0) and after an alarm, as many as before after a failed trial or where this one
    came early, else GAP_FACTOR times as many.

    The budget (`affordable`) is what sets the gaps in the long run; growing ones spend the credit early, where the
    curvature moves fastest, and spread it over all scales of time.

    Example:
        >>> next_gap(0, alarm=False, trial_failed=False), next_gap(9, alarm=False, trial_failed=False)
        (3, 27)
        >>> next_gap(9, alarm=True, trial_failed=False), next_gap(9, alarm=False, trial_failed=True)
        (3, 9)
        >>> next_gap(9, alarm=False, trial_failed=False, early=True)
        9
    """
    if alarm or gap == 0:
        return GAP_FIRST
    return gap if trial_failed or early else round(GAP_FACTOR * min(gap, LONGEST_GAP))


def next_retry(retry: int) -> int:
    """Returns the updates until a failed measurement is tried again: 1, 2, 4, ... while it goes on failing.

    At once, because without a limit the run is unprotected or under an old one; ever more rarely, because what fails
    for ever (a closure that raises) must not eat the credit.

    Example:
        >>> next_retry(0), next_retry(1), next_retry(2)
        (1, 2, 4)
    """
    return max(1, 2 * retry)


def next_trial_gap(gap: int) -> int:
    """Returns the updates until the next trial step on its own, while the cap is what holds lr back.

    A trial costs two forward passes or three, a tenth of a measurement, and carries the margin over changes of the
    limit between measurements. Its gap grows by a quarter up to TRIAL_GAP.

    Example:
        >>> next_trial_gap(8), next_trial_gap(19)
        (10, 20)
    """
    return min(TRIAL_GAP, math.ceil(1.25 * gap))


def affordable(credit: float, max_overhead: float, *, updates: int, spent: float, alarm: bool) -> float:
    """Returns the gradient evaluations that a measurement may cost now; counts, never clocks, so that runs repeat.

        spent <= credit + max_overhead * updates

    Routine measurements leave RESERVE of the credit to alarms.

    Example:
        >>> affordable(60, 0.05, updates=200, spent=30, alarm=True)
        40.0
    """
    left = credit if alarm else (1 - RESERVE) * credit
    return left + (max_overhead * updates if updates else 0.0) - spent
