"""What to do about an update whose gradient or loss looks wrong: pure functions of numbers.

The question is who is to blame, the batch or the parameters. The batch's loss under the present parameters and under
those of a snapshot a few updates older tells: two forward passes when something looks wrong, and mostly one before each
new snapshot, where the cap holds lr back, for a loss that drifts up though no update looks wrong.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from safe_lr.norms import ALARM_AFTER, ALARM_FACTOR, NormTrend

MOST = 5
"""Rewinds without healthy progress between them that `rewind=True` allows: by then lr is cut eightfold."""

EVERY = 10
"""Updates between snapshots: as much progress is lost at most, and a copy every ten updates costs next to nothing."""

OUTLIER = 30.0
"""From this many times the usual norm on a gradient can only do harm, and its update is dropped: with b2 = .999 its
square then outweighs all others in the second moment, 1 / sqrt(1 - b2) = 32, and Adam crawls for a thousand updates."""

FAR_OUT = 6.0
"""... if it is also this many standard deviations (of log norms) above the mean."""

DROPS = 2
"""Updates dropped in a row because of gradients that are not finite; after that it is the parameters' fault. And
batches far out that may be dropped one after the other ..."""

REFILL = 100
"""... and one more in each REFILL updates. What is more frequent belongs to the data: rare tokens, for example, have
gradients far out, and must be learned too."""

JUMP = 2.0
"""The loss has jumped if it is this many times what it was, on the same batch. Where the usual losses are known it may
be less: SPREADS times their spread, but at least ..."""

LEAST = 1.1
"""... this many times."""

SPREADS = 6.0
"""A loss this many (robust) standard deviations above the median is worth a closer look."""

KNOWN = 50
"""Losses to remember ..."""

TRUSTED = 8
"""... and from how many on their spread is trusted."""

Action = Literal["apply", "drop", "rewind"]


# ---- deciding, from numbers


def rewinds_allowed(rewind: bool | int) -> int:
    """Returns how many rewinds the argument `rewind=` allows: 0 for False, MOST for True.

    Raises:
        ValueError: Another thing than True, False or a whole number of at least 1.

    Example:
        >>> rewinds_allowed(False), rewinds_allowed(True), rewinds_allowed(1)
        (0, 5, 1)
    """
    if isinstance(rewind, bool):
        return MOST if rewind else 0
    if not isinstance(rewind, int) or rewind < 1:
        raise ValueError(
            f"rewind must be True, False or the most rewinds, a whole number of at least 1; got {rewind!r}"
        )
    return rewind


@dataclass(frozen=True)
class Losses:
    """The newest losses of healthy updates: what is usual. Signed such that less is better.

    Losses are compared by the log of their ratio, as gradient norms are; where one is not positive, by their difference
    in units of what is usual.

    Example:
        >>> usual = Losses(tuple(1.0 + 0.01 * (-1) ** k for k in range(10)))
        >>> usual.jumped(1.05, 1.0), usual.jumped(1.2, 1.0), Losses().jumped(1.2, 1.0), Losses().jumped(2.1, 1.0)
        (False, True, False, True)
        >>> usual.suspicious(1.05), usual.suspicious(1.2)
        (False, True)
    """

    last: tuple[float, ...] = ()

    @functools.cached_property
    def median(self) -> float:
        """Their median, 0 where none is known."""
        return statistics.median(self.last) if self.last else 0.0

    @functools.cached_property
    def spread(self) -> float | None:
        """Their standard deviation by the median of deviations, None before enough are known."""
        if len(self.last) < TRUSTED:
            return None
        return 1.4826 * statistics.median(abs(self.above(loss, self.median)) for loss in self.last)

    def above(self, loss: float, other: float) -> float:
        """Returns how far a loss is above another: the log of their ratio, where there is one."""
        if not math.isfinite(loss):
            return math.inf
        if loss > 0 and other > 0:
            return math.log(loss / other)
        return (loss - other) / max(abs(other), abs(self.median), 1e-30)

    def jumped(self, now: float, then: float) -> bool:
        """Whether a batch's loss is worse than it was by more than updates explain, or no longer finite."""
        if not math.isfinite(then):
            return False
        tolerated = math.log(JUMP)
        if self.spread is not None:
            tolerated = min(tolerated, max(SPREADS * self.spread, math.log(LEAST)))
        return self.above(now, then) > tolerated

    def deviations(self, loss: float) -> float:
        """Returns how many standard deviations a loss is above the median; 0 before enough are known."""
        if self.spread is None:
            return 0.0
        above = self.above(loss, self.median)
        return max(0.0, above / self.spread if self.spread > 0 else math.copysign(math.inf, above) if above else 0.0)

    def suspicious(self, loss: float) -> bool:
        """Whether a batch's loss is far from the usual; never before enough are known, unless it is not finite."""
        far = self.deviations(loss) > SPREADS and self.above(loss, self.median) > math.log(LEAST)
        return far or not math.isfinite(loss)

    def after(self, loss: float) -> Losses:
        """Returns the losses with one more in it; one that is not finite is left out."""
        return Losses((*self.last[1 - KNOWN :], loss)) if math.isfinite(loss) else self


def outlying(norm: float, usual: NormTrend, loss: float | None = None, losses: Losses | None = None) -> bool:
    """Whether a batch is so far out that its gradient can only do harm.

    By its gradient norm alone, from OUTLIER times the usual on; or by norm and loss together: ALARM_FACTOR and JUMP
    times the usual, and both deviations together (the root of their squares) more than FAR_OUT.

    Example:
        >>> usual, losses = NormTrend(mean=0.0, variance=0.1, count=50), Losses((1.0, 1.1, 1.2) * 4)
        >>> outlying(29.0, usual), outlying(31.0, usual), outlying(5.0, usual, 9.0, losses)
        (False, True, True)
    """
    if usual.count < ALARM_AFTER or not 0 < norm < math.inf:
        return False
    above, deviation = math.log(norm) - usual.mean, math.sqrt(usual.variance)
    deviations = above / deviation if deviation > 0 else math.copysign(math.inf, above)
    if above > math.log(OUTLIER) and deviations > FAR_OUT:
        return True
    if loss is None or losses is None or not losses.above(loss, losses.median) > math.log(JUMP):
        return False
    return above > math.log(ALARM_FACTOR) and math.hypot(deviations, losses.deviations(loss)) > FAR_OUT


@dataclass(frozen=True)
class Signs:
    """What is seen of a suspicious update, before it is made.

    Attributes:
        finite: Whether gradient and loss are.
        intact: Whether the parameters are finite.
        outlier: Whether the batch is far out (see `outlying`, or by what it has done to a buffer) and may be dropped.
        now: The batch's loss under the present parameters; None where it could not be evaluated.
        then: The same under the snapshot's.
        drops: Updates dropped just before.
    """

    finite: bool = True
    intact: bool = True
    outlier: bool = False
    now: float | None = None
    then: float | None = None
    drops: int = 0


def judge(signs: Signs, usual: Losses) -> Action:
    """Returns what to do about a suspicious update.

    `rewind` where the parameters are to blame: they are not finite, or were better at the snapshot on this very batch.
    `drop` the update where the batch is: a gradient that is not finite, or out of all proportion. Else `apply` it.

    Example:
        >>> usual = Losses((1.0,) * 10)
        >>> judge(Signs(now=3.0, then=1.0), usual), judge(Signs(now=3.0, then=3.1), usual)
        ('rewind', 'apply')
        >>> judge(Signs(finite=False, now=math.nan, then=math.nan), usual), judge(Signs(outlier=True), usual)
        ('drop', 'drop')
        >>> judge(Signs(finite=False, drops=DROPS), usual), judge(Signs(), usual)
        ('rewind', 'apply')
    """
    worse = signs.now is not None and signs.then is not None and usual.jumped(signs.now, signs.then)
    if not signs.intact or worse or (not signs.finite and signs.drops >= DROPS):
        return "rewind"
    return "drop" if signs.outlier or not signs.finite else "apply"


# ---- what was done, and giving up


@dataclass(frozen=True)
class Trouble:
    """An update that was not made.

    Attributes:
        step: Updates made before it.
        action: Which of both.
        back_to: Updates made before the snapshot.
        norm: The gradient's norm.
        usual_norm: The (geometric) mean norm before.
        loss_now: The batch's loss, None where it was not evaluated.
        loss_then: The same under the snapshot's parameters.
        lr: The lr (of the reference group) in use.
        margin: The margin after it.
        cap: The cap after it, None where there is none.
        cost: Gradient evaluations spent on finding out.
    """

    step: int
    action: Literal["drop", "rewind"]
    back_to: int
    norm: float
    usual_norm: float
    loss_now: float | None
    loss_then: float | None
    lr: float
    margin: float
    cap: float | None
    cost: float

    @property
    def reason(self) -> str:
        """One plain sentence with the figures."""
        seen = f"the gradient norm is {self.norm:.3g}, usual is {self.usual_norm:.3g}"
        if self.loss_now is not None and self.loss_then is not None:
            seen += f"; the batch's loss is {self.loss_now:.4g}, under the last snapshot it is {self.loss_then:.4g}"
        if self.action == "drop":
            return f"update dropped, the batch is to blame: {seen}"
        cut = "no cap to cut yet" if self.cap is None else f"margin now {self.margin:.3g}, cap {self.cap:.3g}"
        return f"back from update {self.step} to {self.back_to}: {seen}; {cut}"


class RewindsExhausted(RuntimeError):
    """Going back did not help: as often as `rewind=` allows, without healthy progress in between.

    The parameters and the optimizer are those of the last snapshot, finite and whole: save them, then look at what is
    said here.

    Attributes:
        tries: What was done, oldest first: the updates that were dropped, and the rewinds.
    """

    def __init__(self, tries: Sequence[Trouble]) -> None:
        self.tries = list(tries)
        rewinds = [t for t in self.tries if t.action == "rewind"]
        told = "\n".join(f"  lr {t.lr:.3g}: {t.reason}" for t in self.tries)
        broken = sum(not math.isfinite(t.norm) for t in self.tries)
        guess = (
            "lr is not what is wrong if a smaller one changed nothing: look at these batches, the loss, the precision"
        )
        if broken == len(self.tries):
            guess = "every gradient was not finite: look for NaN or Inf in the data, log or sqrt of 0, 0 / 0, overflow"
        super().__init__(
            f"{len(rewinds)} rewinds in a row did not help; parameters and optimizer are those of update "
            f"{self.tries[-1].back_to}. What was tried:\n{told}\n{guess}. rewind= sets how many are allowed."
        )
