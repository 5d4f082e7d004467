"""Whether the loss drifts up from one snapshot to the next, though no update looks wrong: numbers in, a verdict out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from safe_lr.rewind import JUMP, Losses

Seen = tuple[float, float]
"""A batch's loss under the present parameters and under those of the last snapshot, signed such that less is better."""

Verdict = Literal["sound", "doubtful", "drifting"]


@dataclass
class Drift:
    """What looks back at the last snapshot have told so far.

    A run at the edge of stability drifts up over several updates of which none looks wrong. One batch says little of
    that: rare examples in it were met, or disturbed, since. So the mean of two counts.

    Attributes:
        doubt: What a batch showed that was JUMP times worse than under the snapshot; the next one decides.
        unit: The loss that the user tells in units of what the closure returns, None before both were seen. What is
            told may be a sum, or a micro-batch's part of the mean.

    Example:
        >>> drift, usual = Drift(), Losses((1.0,) * 10)
        >>> drift.weigh((3.0, 1.0), usual), drift.weigh((2.0, 1.0), usual)
        (('doubtful', (3.0, 1.0)), ('drifting', (2.5, 1.0)))
        >>> drift.learn(8.0, 2.0)
        >>> drift.unit, drift.expected(4.0)
        (4.0, 1.0)
    """

    doubt: Seen | None = None
    unit: float | None = None

    def expected(self, told: float | None) -> float | None:
        """Returns what the closure should return where this loss was told; None where that is not known."""
        return None if told is None or self.unit is None else told / self.unit

    def learn(self, told: float | None, now: float) -> None:
        """Takes in what the closure returned where a loss was told."""
        if told is not None:
            unit = told / now if now else 0.0
            self.unit = unit if 0 < unit < math.inf else None

    def believes(self, seen: Seen, usual: Losses) -> bool:
        """Whether a loss that was expected needs no second look: it is less than JUMP above or below the snapshot's.

        Beyond that the unit may have changed, or the told loss is of another dropout mask.
        """
        now, then = seen
        return math.isfinite(then) and abs(usual.above(now, then)) <= math.log(JUMP)

    def weigh(self, seen: Seen, usual: Losses) -> tuple[Verdict, Seen]:
        """Takes a batch in; returns what it says, and the mean of it and of the one in doubt before it."""
        before, self.doubt = self.doubt, None
        if before is not None:
            seen = (before[0] + seen[0]) / 2, (before[1] + seen[1]) / 2
        now, then = seen
        if not (math.isfinite(then) and usual.above(now, then) > math.log(JUMP)):
            return "sound", seen
        if before is not None:
            return "drifting", seen
        self.doubt = seen
        return "doubtful", seen
