"""From a measurement to a learning rate: pure functions of numbers.

The rule is `lr = min(desired lr, cap)` with `cap = margin * lr_limit`. The functions here say how the cap follows the
limit, how the margin learns, when to measure, and when something looks wrong. They hold no state and see no tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MARGIN_START = 2.0
"""Where the learned margin starts. A tuned RMSprop or Adagrad runs at 1-4 times the limit of its small batches, a tuned
Adam at .1-.5 (benchmarks/lr_robustness.py): too large a start is cut by the first trial steps, too small a one starves
the run for good."""

MARGIN_SEARCHED = 0.5
"""Where it starts, and stays below, where the limit is itself the result of trial steps (Lion): nothing lies beyond."""

MARGIN_MIN = 0.05
"""The learned margin's floor after an alarm."""

NOISE_LIMIT = 2.0
"""A failed trial step does not cut the margin below NOISE_LIMIT / c, where the cap is 2 / gamma, the limit without
momentum. What momentum adds to that (19 times as much with Adam) holds for steady gradients and must prove itself;
below it, it is the noise of one batch that makes trial steps fail, and cutting further starves the run."""

SMALL_BATCH = 2.0
"""That floor is this many times higher where P is made of gradients: a gamma measured on a training batch is then two
to four times that of a large one (RMSprop; with SGD batches of all sizes agree)."""

MEMORY = 0.5
"""Weight of a new measurement in the (geometric) mean limit that a learned margin is a margin of. Over batches limits
vary by a factor of two and more; a cap that falls at once and rises slowly would follow its low side."""

HALVINGS = 6
"""Halvings of the trial step in a young run: the limit rises a hundredfold within ten updates there, and a margin that
was right for the first ones would let lr overshoot."""

MARGIN_MAX_LEAST = 0.05
"""The smallest `margin_max`; one below the floor of failed trial steps is then that floor."""

AGING = 0.5
"""While the margin is learned the cap may rise like this power of the run's length, once that is slower than `growth`.
Trial steps on one batch are forgiving where BatchNorm lets weights grow with lr: at 2 % an update the demo drifts up
fivefold late in the run."""

MARGIN_UP = 1.15
"""Growth of the margin at a good trial: a good one is weak evidence. 1.6 let RMSprop's margin run away."""

MARGIN_DOWN = 1.5
"""Cut of the margin at a bad trial: lower at once, raise slowly."""

BINDING = 0.9
"""The cap counts as what holds lr back from this fraction of it on."""

FREE_UPDATES = 10
"""Updates in which the cap follows each measurement freely, 1 / (1 - b1) at the usual b1 = .9: until then the limit of
the coming step itself rises tenfold, and no earlier cap is worth holding on to."""

SETTLED = 1e-4
"""When the update rule's constant c moves the limit by less than this in one update, it is left until measured anew."""

RESERVE = 0.25
"""Part of `credit` kept for alarms, so that routine measurements early in a run cannot spend what a spike will need."""

GAP_FIRST = 2
"""Updates between the first two routine measurements: with Adam the limit then rises a hundredfold."""

GAP_FACTOR = 2.5
"""Growth of that gap: measurements at 0, 2, 7, 19, 49, 124 spend the usual credit just as `max_overhead` takes over."""

LONGEST_GAP = 10**9
"""Where gaps stop growing, far beyond any run."""

TRIAL_PART = 0.25
"""Part of the budget that trial steps between measurements may take; the rest keeps the limit itself fresh."""

ALARM_AFTER = 10
"""Gradient norms to have seen before one can look wrong."""

ALARM_MEMORY = 0.95
"""Decay of the running mean and variance of log gradient norms: the last ~20 updates."""

ALARM_DEVIATIONS = 4.0
"""How many standard deviations above the mean log norm is wrong, and at least ..."""

ALARM_FACTOR = 3.0
"""... this many times the (geometric) mean norm: a steady run has deviations too small to mean anything."""


@dataclass(frozen=True)
class Policy:
    """The policy's settings. Checked when made.

    Attributes:
        margin: A number in (0, 1], kept strictly, or "auto": learned inside [MARGIN_MIN, margin_max].
        margin_max: Largest learned margin; 1 never leaves the linearly stable region.
        trial_slack: The trial step is the coming step lengthened by `1 / trial_slack`; in (0, 1].
        growth: Largest factor by which the cap rises in one update; at least 1.
        max_overhead: Gradient evaluations spent on measuring per update, in the long run.
        credit: Gradient evaluations that may be spent on top of that.
        follow_limit: Whether lr is the cap itself, whatever lr the optimizer was given.

    Raises:
        TypeError: Not a number.
        ValueError: A number out of its range.
    """

    margin: float | str = "auto"
    margin_max: float = 8.0
    trial_slack: float = 0.25
    growth: float = 1.02
    max_overhead: float = 0.05
    credit: float = 60.0
    follow_limit: bool = False

    def __post_init__(self) -> None:
        if self.margin != "auto" and not (
            isinstance(self.margin, (int, float)) and not isinstance(self.margin, bool) and 0 < self.margin <= 1
        ):
            raise ValueError(
                f'margin must be a number in (0, 1], the fraction of the stability limit to use, or "auto"; '
                f"got {self.margin!r}"
            )
        if not isinstance(self.follow_limit, bool):
            raise TypeError(f"follow_limit must be True or False, got {self.follow_limit!r}")
        for name in ("margin_max", "trial_slack", "growth", "max_overhead", "credit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        for name, ok, allowed in (
            ("margin_max", self.margin_max >= MARGIN_MAX_LEAST, f"at least {MARGIN_MAX_LEAST}"),
            ("trial_slack", 0 < self.trial_slack <= 1, "in (0, 1]"),
            ("growth", self.growth >= 1, "at least 1 (1.02 lets the cap rise by 2 % an update)"),
            ("max_overhead", self.max_overhead >= 0, "at least 0 (gradient evaluations an update)"),
            ("credit", self.credit >= 0, "at least 0 (gradient evaluations)"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    @property
    def learns(self) -> bool:
        """Whether the margin is learned."""
        return self.margin == "auto"

    @property
    def first_margin(self) -> float:
        """The margin before anything was learned."""
        return min(MARGIN_START, self.margin_max) if self.margin == "auto" else float(self.margin)

    def least_margin(self, flip: float, *, adaptive: bool) -> float:
        """Returns the floor of the learned margin under failed trial steps.

        Args:
            flip: The update rule's constant c.
            adaptive: Whether P is made of gradients.

        Example:
            >>> Policy().least_margin(38.0, adaptive=False), Policy().least_margin(2.0, adaptive=True)
            (0.05263157894736842, 2.0)
        """
        return min((SMALL_BATCH if adaptive else 1.0) * NOISE_LIMIT / flip, self.margin_max)


def next_cap(cap: float | None, target: float, growth: float, *, free: bool) -> float:
    """Returns the cap of the coming update: down to the target at once, up by at most `growth`.

    Only the cap's rise is limited, never the schedule's: a schedule below the cap keeps its own lr to the bit.

    Args:
        cap: The cap so far, None before the first measurement.
        target: margin * lr_limit of the last measurement.
        growth: Largest factor of a rise.
        free: Whether the run is young enough for the cap to follow freely.

    Example:
        >>> next_cap(0.1, 0.05, 1.02, free=False), next_cap(0.1, 1.0, 1.02, free=False)
        (0.05, 0.10200000000000001)
        >>> next_cap(None, 1.0, 1.02, free=False)
        1.0
    """
    return target if cap is None or free else min(target, cap * growth)


def learned_growth(growth: float, *, updates: int, stalled: bool) -> float:
    """Returns the largest rise of the cap in the coming update while the margin is learned.

    No rise where the last trial step failed; else the smaller of `growth` and what makes the cap rise like the run's
    length to the power AGING.

    Example:
        >>> learned_growth(1.02, updates=10, stalled=False), learned_growth(1.02, updates=500, stalled=False)
        (1.02, 1.001)
        >>> learned_growth(1.02, updates=10, stalled=True)
        1.0
    """
    return 1.0 if stalled else 1 + min(growth - 1, AGING / max(1, updates))


def learned_margin(
    margin: float,
    *,
    planned: float,
    desired: float,
    lr_limit: float,
    trial_failed: bool,
    alarm: bool,
    margin_max: float,
    least: float = MARGIN_MIN,
    found: float | None = None,
) -> float:
    """Returns the margin after one trial step.

    If the lengthened step would raise the batch's loss, or a spike was seen, the margin falls below what was planned;
    if it is fine and the cap is what holds lr back, the margin grows a little; else it stays.

    Args:
        margin: The margin so far.
        planned: The lr of the coming step under that margin.
        desired: The lr that the schedule asks for.
        lr_limit: The measured limit.
        trial_failed: Whether the loss would rise or be not finite.
        alarm: Whether the gradients looked wrong.
        margin_max: Largest margin.
        least: What a failed trial step may cut it to; an alarm cuts to MARGIN_MIN.
        found: The lr below the planned one that a search found to be fine; None without one.

    Example:
        >>> learned_margin(0.6, planned=0.6, desired=9.0, lr_limit=1.0, trial_failed=True, alarm=False, margin_max=8)
        0.39999999999999997
        >>> learned_margin(0.6, planned=0.3, desired=0.3, lr_limit=1.0, trial_failed=False, alarm=False, margin_max=8)
        0.6
    """
    floor = MARGIN_MIN if alarm else least
    if found is not None and found < planned and not alarm:
        return min(margin, max(floor, found / lr_limit))
    if trial_failed or alarm:
        used = planned / lr_limit if planned > 0 else margin
        return min(margin, max(floor, min(margin, used) / MARGIN_DOWN))
    if planned < desired and planned >= BINDING * margin * lr_limit:
        return max(margin, min(margin_max, margin * MARGIN_UP))
    return margin


def mean_limit(before: float | None, measured: float, *, free: bool) -> float:
    """Returns the limit that a learned margin is a margin of: a running geometric mean of the measured ones.

    Args:
        before: The mean so far, None before the first measurement.
        measured: The newest.
        free: Whether the run is so young that only the newest counts.

    Example:
        >>> mean_limit(None, 4.0, free=False), mean_limit(1.0, 4.0, free=True), mean_limit(1.0, 4.0, free=False)
        (4.0, 4.0, 2.0)
    """
    return measured if before is None or free else before ** (1 - MEMORY) * measured**MEMORY


def next_gap(gap: int, *, alarm: bool, trial_failed: bool) -> int:
    """Returns the updates until the next routine measurement.

    GAP_FIRST after the first one (gap 0) and after an alarm, as many as before after a failed trial, else GAP_FACTOR
    times as many.

    The budget (`affordable`) is what sets the gaps in the long run; growing ones spend the credit early, where the
    curvature moves fastest, and spread it over all scales of time.

    Example:
        >>> next_gap(0, alarm=False, trial_failed=False), next_gap(12, alarm=False, trial_failed=False)
        (2, 30)
        >>> next_gap(12, alarm=True, trial_failed=False), next_gap(12, alarm=False, trial_failed=True)
        (2, 12)
    """
    if alarm or gap == 0:
        return GAP_FIRST
    return gap if trial_failed else round(GAP_FACTOR * min(gap, LONGEST_GAP))


def next_retry(retry: int) -> int:
    """Returns the updates until a failed measurement is tried again: 1, 2, 4, ... while it goes on failing.

    At once, because without a limit the run is unprotected or under an old one; ever more rarely, because what fails
    for ever (a closure that raises) must not eat the credit.

    Example:
        >>> next_retry(0), next_retry(1), next_retry(2)
        (1, 2, 4)
    """
    return max(1, 2 * retry)


def next_trial_gap(gap: int, *, failed: bool, max_overhead: float) -> int:
    """Returns the updates until the next trial step on its own, while the cap is what holds lr back.

    A trial costs two forward passes, a tenth of a measurement, and carries the margin over changes of the limit between
    measurements. Its gap grows by a quarter, or halves after a failure, up to where trials take TRIAL_PART of
    `max_overhead`.

    Example:
        >>> next_trial_gap(8, failed=False, max_overhead=0.05), next_trial_gap(8, failed=True, max_overhead=0.05)
        (10, 4)
    """
    longest = max(2, math.ceil(2 / 3 / (TRIAL_PART * max_overhead))) if max_overhead > 0 else 1_000
    return max(2, gap // 2) if failed else min(longest, math.ceil(1.25 * gap))


def affordable(policy: Policy, *, updates: int, spent: float, alarm: bool) -> float:
    """Returns the gradient evaluations that a measurement may cost now; counts, never clocks, so that runs repeat.

        spent <= credit + max_overhead * updates

    Routine measurements leave RESERVE of the credit to alarms.

    Example:
        >>> affordable(Policy(max_overhead=0.05, credit=60), updates=200, spent=30, alarm=True)
        40.0
    """
    credit = policy.credit if alarm else (1 - RESERVE) * policy.credit
    return credit + (policy.max_overhead * updates if updates else 0.0) - spent


@dataclass(frozen=True)
class NormTrend:
    """Running mean and variance of log gradient norms: what a usual gradient looks like.

    Attributes:
        mean: Mean of log norms.
        variance: Their variance.
        count: Norms seen.
    """

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def alarming(self, norm: float) -> bool:
        """Whether a gradient norm is out of all proportion, or not finite."""
        if not math.isfinite(norm):
            return True
        if self.count < ALARM_AFTER or norm <= 0:
            return False
        return math.log(norm) > self.mean + max(ALARM_DEVIATIONS * math.sqrt(self.variance), math.log(ALARM_FACTOR))

    def after(self, norm: float) -> NormTrend:
        """Returns the trend with one more norm in it.

        Example:
            >>> trend = NormTrend()
            >>> for _ in range(20):
            ...     trend = trend.after(1.0)
            >>> trend.alarming(2.0), trend.alarming(4.0)
            (False, True)
        """
        if not math.isfinite(norm) or norm <= 0:
            return self
        keep = min(ALARM_MEMORY, self.count / (self.count + 1))
        deviation = math.log(norm) - self.mean
        return NormTrend(
            self.mean + (1 - keep) * deviation, keep * (self.variance + (1 - keep) * deviation**2), self.count + 1
        )
