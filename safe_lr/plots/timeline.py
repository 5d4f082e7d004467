"""How lr stood against its cap through a run, in words."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from safe_lr.loggers.records import Records, Row

State = Literal["clear", "close", "capped", "unprotected", "beyond"]
STATES: tuple[State, ...] = get_args(State)
"""From the least to the most remarkable: of a stretch that must be told in one word, the last counts."""

IN_WORDS: Mapping[State, str] = {
    "clear": "lr is below half its cap",
    "close": "lr is between half its cap and the cap",
    "capped": "the cap holds lr below what the schedule asks for",
    "unprotected": "no cap yet: nothing has been measured",
    "beyond": "lr is beyond the linear limit, as far as the learned margin allows",
}
CLOSE = 0.5
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Stretch:
    """Steps during which lr stood alike.

    Attributes:
        first, last: The steps, both included.
        state: How it stood.
    """

    first: int
    last: int
    state: State

    @property
    def steps(self) -> int:
        """How many steps that is."""
        return self.last - self.first + 1


def state_of(row: Mapping[str, float | None]) -> State:
    """Returns how lr stands at one step.

    Args:
        row: Scalars as loggers get them: `lr`, `cap`, `capped`, `utilisation`; what is missing is not known.

    Example:
        >>> state_of({"lr": 0.1, "cap": 0.4}), state_of({"lr": 0.3, "cap": 0.4, "utilisation": 0.5})
        ('clear', 'close')
        >>> state_of({"lr": 0.4, "cap": 0.4, "capped": 1}), state_of({"lr": 0.4, "cap": 0.4, "utilisation": 1.5})
        ('capped', 'beyond')
    """
    cap, lr = row.get("cap"), row.get("lr")
    if (row.get("utilisation") or 0.0) > _ROUNDING:
        return "beyond"
    if row.get("capped"):
        return "capped"
    if cap is None or lr is None:
        return "unprotected"
    return "close" if lr > CLOSE * cap else "clear"


def stretches(records: Records, most: int | None = None) -> list[Stretch]:
    """Returns a run as stretches of steps; a row stands for the steps up to the next.

    Args:
        records: A run's record.
        most: Most stretches; a run that changes more often is told in equal parts, each by the most remarkable state
            in it.

    Example:
        >>> rows = [{"step": 0, "lr": 1.0}, {"step": 1, "lr": 0.4, "cap": 0.4, "capped": 1.0}]
        >>> rows += [{"step": 9, "lr": 0.1, "cap": 0.4}]
        >>> [(part.first, part.last, part.state) for part in stretches(Records(rows=rows))]
        [(0, 0, 'unprotected'), (1, 8, 'capped'), (9, 9, 'clear')]
    """
    rows = records.rows or _rows(records)
    if not rows:
        return []
    ends = [int(row["step"]) for row in rows[1:]] + [int(rows[-1]["step"]) + 1]
    parts = [
        Stretch(int(row["step"]), end - 1, state_of(row))
        for row, end in zip(rows, ends, strict=True)
        if end > int(row["step"])
    ]
    joined = _joined(parts)
    if most is None or len(joined) <= most:
        return joined
    first, last = joined[0].first, joined[-1].last
    bounds = [first + (last + 1 - first) * index // most for index in range(most + 1)]
    equal = []
    for low, high in itertools.pairwise(bounds):
        inside = [part.state for part in joined if part.first < high and part.last >= low]
        equal.append(Stretch(low, high - 1, max(inside, key=STATES.index)))
    return _joined([part for part in equal if part.steps > 0])


def shares(parts: list[Stretch]) -> dict[State, float]:
    """Returns the fraction of the steps spent in each state that occurs, the longest first.

    Example:
        >>> shares([Stretch(0, 0, "unprotected"), Stretch(1, 3, "capped")])
        {'capped': 0.75, 'unprotected': 0.25}
    """
    total = sum(part.steps for part in parts)
    found: dict[State, int] = {}
    for part in parts:
        found[part.state] = found.get(part.state, 0) + part.steps
    return {state: steps / total for state, steps in sorted(found.items(), key=lambda item: -item[1])}


def _joined(parts: list[Stretch]) -> list[Stretch]:
    """Neighbours of one state as one."""
    joined = []
    for state, group in itertools.groupby(parts, key=lambda part: part.state):
        members = list(group)
        joined.append(Stretch(members[0].first, members[-1].last, state))
    return joined


def _rows(records: Records) -> list[Row]:
    """What the decisions tell, in a record without rows."""
    rows: dict[int, Row] = {}
    for decision in records.decisions:
        known = {"lr": decision.lr_after, "cap": decision.cap, "utilisation": decision.utilisation}
        row = {"step": float(decision.step), "capped": float(decision.capped)}
        rows[decision.step] = row | {name: value for name, value in known.items() if value is not None}
    return list(rows.values())
