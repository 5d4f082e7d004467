"""Whether the loss drifts up from one snapshot to the next, though no update looks wrong: numbers in, a verdict out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from safe_lr.rewind import Losses

WORSE = 1.5
"""A batch's loss that is this many times what it was under the last snapshot has drifted up. In ordinary runs it is
not: over 32 of eight rows of the matrix it was 1.47 times at most. On the stream of benchmarks/spikes.py (twenty seeds,
lr .01 / .03) .8 / .8 spikes a run were left where two batches together had to be twice as bad, at a floor of 1 for the
multiple and calm for a routine gap; .2 / 0 with one batch, 1.5 times as bad, at .25; none with a floor of .1 and
CALM_UPDATES as well. It is a rate, not a guarantee: of twenty runs on other seeds one has two."""

Seen = tuple[float, float]
"""A batch's loss under the present parameters and under those of the last snapshot, signed such that less is better."""


@dataclass
class Drift:
    """What looks back at the last snapshot have told so far.

    A run at the edge of stability drifts up over several updates of which none looks wrong. One batch is a poor
    witness of that, rare examples in it were met, or disturbed, since; but a cut too many only slows training down,
    and who asks for `rewind` asks for no spikes.

    Attributes:
        unit: The loss that the user tells in units of what the closure returns, None before both were seen. What is
            told may be a sum, or a micro-batch's part of the mean.

    Example:
        >>> drift, usual = Drift(), Losses((1.0,) * 10)
        >>> drift.seen_in((1.6, 1.0), usual), drift.seen_in((1.4, 1.0), usual)
        (True, False)
        >>> drift.learn(8.0, 2.0)
        >>> drift.unit, drift.expected(4.0)
        (4.0, 1.0)
    """

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
        """Whether a loss that was expected needs no second look: it is less than WORSE above or below the snapshot's.

        Beyond that the unit may have changed, or the told loss is of another dropout mask.
        """
        now, then = seen
        return math.isfinite(then) and abs(usual.above(now, then)) <= math.log(WORSE)

    def seen_in(self, seen: Seen, usual: Losses) -> bool:
        """Whether a batch shows that the loss has drifted up."""
        now, then = seen
        return math.isfinite(then) and usual.above(now, then) > math.log(WORSE)
