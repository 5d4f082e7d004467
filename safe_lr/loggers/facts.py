"""What a run's record says in a few numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from safe_lr.decisions import Decision
from safe_lr.loggers.records import Records, Row


@dataclass(frozen=True)
class Facts:
    """A run in numbers.

    Attributes:
        steps: Optimizer updates on record.
        first_step: The first of them.
        capped_share: Fraction of the steps at which the applied lr was below the desired one.
        first_capped: The first such step, None if there was none.
        measurements: Steps at which curvature was measured, failed ones included.
        failures: Those that failed.
        cost: Gradient evaluations spent on measurements and trial steps.
        seconds: Wall time spent on measuring.
        margin_first: Margin at the beginning, None if not on record.
        margin_last: Margin at the end.
        margin_low: Smallest margin.
        margin_high: Largest margin.
        first_beyond: First step with a margin above 1, None if there was none.
    """

    steps: int
    first_step: int
    capped_share: float
    first_capped: int | None
    measurements: int
    failures: int
    cost: float
    seconds: float
    margin_first: float | None
    margin_last: float | None
    margin_low: float | None
    margin_high: float | None
    first_beyond: int | None


def facts(records: Records) -> Facts:
    """Sums a record up.

    Where the run has ended in order, its own counts are used. Otherwise the share of capped steps is taken from the
    rows, each of which stands for the steps up to the next one. A measurement may lead to several decisions at its
    step; its cost counts once.

    Args:
        records: What `read_jsonl` returns.

    Returns:
        The numbers; zero or None where there is nothing on record.

    Example:
        >>> rows = [{"step": 0, "capped": 0}, {"step": 6, "capped": 1}, {"step": 9, "capped": 1}]
        >>> facts(Records(rows=rows)).capped_share
        0.4
    """
    measurements = {d.step: d for d in records.decisions if d.num_matvecs or d.failure is not None}
    capped = [d.step for d in records.decisions if d.capped] + [int(r["step"]) for r in records.rows if r.get("capped")]
    margins = [row["margin"] for row in records.rows if "margin" in row] or [d.margin for d in records.decisions]
    beyond = [d.step for d in records.decisions if d.beyond_linear_limit]
    known = [row["cost"] for row in records.rows if "cost" in row]
    share = _capped_share(_rows(records), records.steps)
    summary = records.summary or {}
    ended: dict[str, Any] = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    if ended.get("steps") and "capped_steps" in ended:
        share = ended["capped_steps"] / ended["steps"]
    return Facts(
        steps=records.steps,
        first_step=_first_step(records),
        capped_share=share,
        first_capped=ended.get("first_capped_step", min(capped, default=None)),
        measurements=ended.get("measurements", len(measurements)),
        failures=ended.get("failures", sum(d.failure is not None for d in measurements.values())),
        cost=ended.get("cost", max(known) if known else _spent(records.decisions, "cost")),
        seconds=ended.get("seconds", _spent(records.decisions, "seconds")),
        margin_first=margins[0] if margins else None,
        margin_last=margins[-1] if margins else None,
        margin_low=min(margins, default=None),
        margin_high=max(margins, default=None),
        first_beyond=min(beyond, default=None),
    )


def _first_step(records: Records) -> int:
    firsts = [int(row["step"]) for row in records.rows[:1]] + [decision.step for decision in records.decisions[:1]]
    return min(firsts, default=0)


def _rows(records: Records) -> list[Row]:
    """The rows, or what the decisions tell of them in a record that has none."""
    return records.rows or [{"step": d.step, "capped": float(d.capped)} for d in records.decisions]


def _capped_share(rows: list[Row], steps: int) -> float:
    if not rows:
        return 0.0
    ends = [row["step"] for row in rows[1:]] + [rows[0]["step"] + steps]
    capped = sum(end - row["step"] for row, end in zip(rows, ends, strict=True) if row.get("capped"))
    return capped / max(1, ends[-1] - rows[0]["step"])


def _spent(decisions: Iterable[Decision], name: str) -> float:
    return float(sum({decision.step: getattr(decision, name) for decision in decisions if decision.cost}.values()))
