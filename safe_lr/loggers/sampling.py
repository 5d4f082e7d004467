"""Which of a run's rows are worth sending: one rule for every logger that does not want them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Sampling:
    """Picks the first rows, then every `every`-th, and each one that comes with a decision.

    Between decisions lr is a smooth schedule under a slowly moving cap, so little is lost; and the calls that send a
    row cost more than its figures are worth at each of a million steps.

    Args:
        every: Distance of the steps that are picked.
        dense: Rows that are all picked at the beginning, where most happens.

    Raises:
        ValueError: `every` is not a positive integer.

    Example:
        >>> sampling = Sampling(every=4, dense=2)
        >>> [step for step in range(8) if sampling.picks({"step": step})], sampling.rest()
        ([0, 1, 4], {'step': 7})
    """

    def __init__(self, every: int = 10, dense: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} is not a number of steps: give an integer of at least 1")
        self.every, self.dense = every, dense
        self.restart()

    def restart(self) -> None:
        """A run begins, or begins again: its first rows are picked."""
        self._seen, self._decided = 0, False
        self._passed: Mapping[str, Any] | None = None

    def decided(self) -> None:
        """There was a decision: the coming row is picked."""
        self._decided = True

    def picks(self, row: Mapping[str, Any]) -> bool:
        """Whether to send this row."""
        picked = self._seen < self.dense or self._decided or row["step"] % self.every == 0
        self._seen, self._decided = self._seen + 1, False
        self._passed = None if picked else row
        return picked

    def rest(self) -> Mapping[str, Any] | None:
        """The last row, where it was passed over: to be sent at the end. It is handed out once."""
        row, self._passed = self._passed, None
        return row
