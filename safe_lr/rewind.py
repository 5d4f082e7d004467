"""What to do about an update whose gradient or loss looks wrong: pure functions of numbers.

The question is who is to blame, the batch or the parameters. The batch's loss under the present parameters and under
those of a snapshot a few updates older tells: two forward passes, only when something looks wrong.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from safe_lr.policies import NormTrend

MOST = 5
"""Rewinds without healthy progress between them that `rewind=True` allows: by then the margin is cut eightfold."""

EVERY = 10
"""Updates between snapshots: as much progress is lost at most, and a copy every ten updates costs next to nothing."""

OUTLIER = 30.0
"""From this many times the usual norm on a gradient can only do harm, and its update is dropped: with b2 = .999 its
square then outweighs all others in the second moment, 1 / sqrt(1 - b2) = 32, and Adam crawls for a thousand updates."""

OUTLIER_DEVIATIONS = 6.0
"""... if it is also this many standard deviations (of log norms) above the mean."""

DROPS = 2
"""Updates dropped in a row. After that an outlier is what gradients have come to look like, and is let through; and
gradients that are still not finite are the parameters' fault."""

JUMP = 1.5
"""The loss has jumped if it is this many times what it was, on the same batch ..."""

SPREADS = 6.0
"""... or, where the usual losses are known, higher by this many times their spread, and by at least ..."""

LEAST = 0.1
"""... this part of their median."""

KNOWN = 20
"""Losses to remember; from 8 on their spread is trusted."""

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

    Example:
        >>> usual = Losses(tuple(1.0 + 0.01 * (-1) ** k for k in range(10)))
        >>> usual.jumped(1.05, usual.median), usual.jumped(1.2, usual.median), Losses().jumped(1.2, 1.0)
        (False, True, False)
    """

    last: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Their median, 0 where none is known."""
        return statistics.median(self.last) if self.last else 0.0

    def jumped(self, now: float, then: float) -> bool:
        """Whether a loss is worse than an earlier one by more than losses usually differ, or no longer finite."""
        if not math.isfinite(then):
            return False
        if not math.isfinite(now):
            return True
        tolerated = (JUMP - 1) * max(abs(then), abs(self.median))
        if len(self.last) >= 8:
            spread = 1.4826 * statistics.median(abs(loss - self.median) for loss in self.last)
            tolerated = min(tolerated, max(SPREADS * spread, LEAST * abs(self.median)))
        return now - then > tolerated

    def suspicious(self, loss: float) -> bool:
        """Whether a batch's loss is far from the usual; never before 8 are known."""
        return not math.isfinite(loss) or (len(self.last) >= 8 and self.jumped(loss, self.median))

    def after(self, loss: float) -> Losses:
        """Returns the losses with one more in it; one that is not finite is left out."""
        return Losses((*self.last[1 - KNOWN :], loss)) if math.isfinite(loss) else self


def outlying(norm: float, usual: NormTrend) -> bool:
    """Whether a gradient is so far out that it can only do harm.

    Example:
        >>> usual = NormTrend(mean=0.0, variance=0.01, count=50)
        >>> outlying(29.0, usual), outlying(31.0, usual)
        (False, True)
    """
    if not usual.alarming(norm) or not math.isfinite(norm):
        return False
    return math.log(norm) - usual.mean > max(math.log(OUTLIER), OUTLIER_DEVIATIONS * math.sqrt(usual.variance))


@dataclass(frozen=True)
class Signs:
    """What is seen of a suspicious update, before it is made.

    Attributes:
        finite: Whether gradient and loss are.
        intact: Whether the parameters are finite.
        outlier: See `outlying`.
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
        >>> judge(Signs(finite=False, drops=DROPS), usual), judge(Signs(outlier=True, drops=DROPS), usual)
        ('rewind', 'apply')
    """
    worse = signs.now is not None and signs.then is not None and usual.jumped(signs.now, signs.then)
    if not signs.intact or worse or (not signs.finite and signs.drops >= DROPS):
        return "rewind"
    return "drop" if not signs.finite or (signs.outlier and signs.drops < DROPS) else "apply"


# ---- what was done, and giving up


@dataclass(frozen=True)
class Trouble:
    """An update that was not made.

    Attributes:
        step: Updates made before it.
        action: "drop" or "rewind".
        back_to: Updates made before the snapshot.
        norm: The gradient's norm.
        usual_norm: The (geometric) mean norm before.
        loss_now: The batch's loss, None where it was not evaluated.
        loss_then: The same under the snapshot's parameters.
        lr: The lr (of the reference group) in use.
        margin: The margin after it.
        cost: Gradient evaluations spent on finding out.
    """

    step: int
    action: str
    back_to: int
    norm: float
    usual_norm: float
    loss_now: float | None
    loss_then: float | None
    lr: float
    margin: float
    cost: float

    @property
    def reason(self) -> str:
        """One plain sentence with the figures."""
        seen = f"the gradient norm is {self.norm:.3g}, usual is {self.usual_norm:.3g}"
        if self.loss_now is not None and self.loss_then is not None:
            seen += f"; the batch's loss is {self.loss_now:.4g}, under the last snapshot it is {self.loss_then:.4g}"
        if self.action == "drop":
            return f"update dropped, the batch is to blame: {seen}"
        return f"back from update {self.step} to {self.back_to}: {seen}; margin now {self.margin:.3g}"


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
