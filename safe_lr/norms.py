"""What gradient norms tell without a measurement: that something looks wrong, or that P is no longer what it was."""

from __future__ import annotations

import math
from dataclasses import dataclass

WANDERED = 3.0
"""A measurement is due early where gradient norms, as running means of some 20 updates, have become this many times
larger or smaller since the last one: cadence thins out with age, and P, and gamma with it, will follow them. On the
stream of benchmarks/spikes.py losses fell thirtyfold between two measurements; gamma rose beyond the margin's reach,
and the loss went up ten-thousandfold over hundreds of updates of which none looked wrong beside the one before. 24
runs, two lrs: .6 spikes a run with 3, 1.8 with 5, some 4 without."""

RISEN = 1.5
"""Where the cap holds lr back and those running means have become this many times larger than the lowest one since the
last measurement, or cut, and the loss was not seen to fall, the margin is cut at once, at no cost. Most spikes on the
stream of benchmarks/spikes.py came in clusters, under limits hundreds of updates old, while norms and loss rose
tenfold and more; by the time the budget had a measurement the cluster was over, and trial steps mostly found nothing
wrong. Twenty seeds, lr .01 / .03, each rise cutting whatever the loss does: 2.1 / 3.5 spikes a run without, 1.4 / 1.8
with 2, .9 / 1.6 with 1.5, .8 / 1.4 with 1.3; at 2 with an early measurement in place of the cut 2.1 / 3.4, or 1.7 / 2.0
where it might spend what is kept for alarms. Of 32 runs of eight rows of the matrix, at the tuned lr and 100 times it,
one was cut, once, and was the better for it."""

ALARM_AFTER = 10
"""Gradient norms to have seen before one can look wrong."""

ALARM_MEMORY = 0.95
"""Decay of the running mean and variance of log gradient norms: the last ~20 updates."""

ALARM_DEVIATIONS = 4.0
"""How many standard deviations above the mean log norm is wrong, and at least ..."""

ALARM_FACTOR = 3.0
"""... this many times the (geometric) mean norm: a steady run has deviations too small to mean anything."""


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

    @property
    def known(self) -> float | None:
        """The mean log norm, None before ALARM_AFTER of them were seen."""
        return self.mean if self.count >= ALARM_AFTER else None

    def alarming(self, norm: float) -> bool:
        """Whether a gradient norm is out of all proportion, or not finite."""
        if not math.isfinite(norm):
            return True
        if self.count < ALARM_AFTER or norm <= 0:
            return False
        return math.log(norm) > self.mean + max(ALARM_DEVIATIONS * math.sqrt(self.variance), math.log(ALARM_FACTOR))

    def wandered(self, then: float | None) -> bool:
        """Whether gradient norms are out of proportion to those of another time, and by more than they scatter.

        A few odd gradients move the mean less than they widen the scatter; norms that stay at a new level move it by
        more after 14 updates.

        Args:
            then: The trend's mean at that time; None where it was not known, which nothing is out of proportion to.

        Example:
            >>> trend = NormTrend(mean=math.log(6.0), count=20)
            >>> [trend.wandered(math.log(norm)) for norm in (1.0, 3.0, 40.0)], trend.wandered(None)
            ([True, False, True], False)
            >>> trend.after(1e-12).wandered(trend.mean)
            False
        """
        if then is None or self.known is None:
            return False
        return abs(self.known - then) > max(math.log(WANDERED), math.sqrt(self.variance))

    def risen(self, lowest: float | None) -> bool:
        """Whether gradient norms have risen out of proportion, and by more than they scatter, since they were lowest.

        Args:
            lowest: The lowest mean so far; None where none was known.

        Example:
            >>> trend = NormTrend(mean=math.log(6.0), count=20)
            >>> [trend.risen(math.log(norm)) for norm in (3.0, 5.0, 40.0)], trend.risen(None)
            ([True, False, False], False)
            >>> NormTrend(mean=math.log(6.0), variance=1.0, count=20).risen(math.log(3.0))
            False
        """
        if lowest is None or self.known is None:
            return False
        return self.known - lowest > max(math.log(RISEN), math.sqrt(self.variance))

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
