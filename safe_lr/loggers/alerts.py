"""What in a run deserves its owner's attention, in a sentence, and not too often."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from safe_lr.decisions import Decision

JUMP = 4.0
"""A gamma this many times the one before is a jump: up to 4 is what a small batch's noise does to it."""

SPIKE = 3.0
"""A measured loss this many times the largest of the last `REMEMBERED` is a spike."""

REMEMBERED = 5

Alert = tuple[str, str]


class Alerts:
    """Reads decisions and rows, and says what is wrong.

    | kind | when |
    |---|---|
    | `measurement failed` | a decision holds the last cap because nothing could be measured |
    | `curvature jump` | gamma is 4 times the one measured before |
    | `instability` | the applied lr is beyond its limit though no learned margin asked for it, or the measured batch's loss is 3 times the largest of the last five |
    | `unsafe sweep point` | in a sweep, the lr of this point is beyond what could be stable; told once |

    Args:
        every: Least time between two alerts of one kind, in seconds.
        clock: Tells the time, in seconds.

    Example:
        >>> alerts = Alerts(every=600.0)
        >>> row = {"step": 7, "lr": 0.3, "utilisation": 1.5, "margin": 0.5}
        >>> list(alerts.of_row(row)), list(alerts.of_row(row))  # the second comes too early
        ([('instability', 'Step 7: lr 0.3 is 1.5 times the largest stable lr.')], [])
    """  # noqa: E501 (a table's row is one line)

    def __init__(self, every: float = 600.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self._clock = every, clock
        self._told: dict[str, float] = {}
        self._gamma = math.inf
        self._losses: deque[float] = deque(maxlen=REMEMBERED)

    def of_decision(self, decision: Decision, *, swept: bool = False) -> Iterator[Alert]:
        """Yields what is due to be said of a decision.

        Args:
            decision: The decision.
            swept: Whether the run is a point of a sweep.
        """
        return self._due([*self._found(decision, swept)])

    def of_row(self, row: Mapping[str, Any]) -> Iterator[Alert]:
        """Yields what is due to be said of an update's figures."""
        used, margin = row.get("utilisation") or 0.0, row.get("margin") or 0.0
        if used > 1.0 and margin <= 1.0:  # a learned margin above 1 asks for it
            text = f"Step {row['step']}: lr {row['lr']:.3g} is {used:.3g} times the largest stable lr."
            return self._due([("instability", text)])
        return iter(())

    def _found(self, decision: Decision, swept: bool) -> Iterator[Alert]:
        at = f"Step {decision.step}:"
        if decision.failure is not None:
            yield "measurement failed", f"{at} {decision.failure}. {decision.reason}."
            return
        if decision.num_matvecs and decision.gamma is not None:
            if decision.gamma >= JUMP * self._gamma > 0:
                times = decision.gamma / self._gamma
                yield "curvature jump", f"{at} gamma is {decision.gamma:.3g}, {times:.3g} times the one before."
            self._gamma = decision.gamma
        if decision.loss is not None:
            usual = max(self._losses, default=math.inf)
            if decision.loss > SPIKE * usual > 0:
                yield "instability", f"{at} the loss is {decision.loss:.3g}; of late it was {usual:.3g} at most."
            self._losses.append(decision.loss)
        if swept and decision.lr_limit is not None and "unsafe sweep point" not in self._told:
            stable = max(1.0, decision.margin) * decision.lr_limit
            if decision.lr_desired > stable:
                what = f"lr {decision.lr_desired:.3g} is beyond the largest that could be stable, {stable:.3g}"
                yield "unsafe sweep point", f"{at} {what}; {decision.lr_after:.3g} is used."

    def _due(self, found: list[Alert]) -> Iterator[Alert]:
        for kind, text in found:
            now = self._clock()
            if now - self._told.get(kind, -math.inf) >= self.every:
                self._told[kind] = now
                yield kind, text
