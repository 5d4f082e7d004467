"""What a run's record says in a few numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from safe_lr.advice import Course, advise
from safe_lr.decisions import Decision, Summary
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


def summary_of(records: Records) -> Summary:
    """Returns the run's summary, with its advice made anew.

    Its own one where it ended in order; whatever is missing there is taken from rows and decisions. What those do not
    hold (trial steps that changed nothing, how products were made) is then missing here too.

    Args:
        records: What `read_jsonl` returns.

    Example:
        >>> rows = [{"step": k, "lr": 0.1, "lr_desired": 0.4, "cap": 0.1, "capped": 1} for k in (0, 10, 20, 29)]
        >>> summary = summary_of(Records(rows=rows))
        >>> summary.capped_steps, summary.pressure_max, summary.cap_low
        (30, 4.0, 0.1)
    """
    found, rows, course = facts(records), records.rows, Course()
    follows = any(run["config"].get("follow_limit") is True for run in records.runs[-1:])
    for row, times in _weighed(rows, records.steps):
        _replay(course, row, times, follows=follows)
    for decision in records.decisions:
        course.decide(decision)
    last = rows[-1] if rows else {}
    numbers: dict[str, Any] = {
        "steps": found.steps,
        "measurements": found.measurements,
        "failures": found.failures,
        "num_matvecs": sum(decision.num_matvecs for decision in records.decisions),
        "cost": found.cost,
        "overhead": found.cost / max(1, found.steps),
        "capped_steps": round(found.capped_share * found.steps),
        "first_capped_step": found.first_capped,
        "worst_utilisation": max((d.utilisation for d in records.decisions if d.utilisation is not None), default=None),
        "margin": math.nan if found.margin_last is None else found.margin_last,
        "cap": last.get("cap"),
        "lr_limit": last.get("lr_limit"),
        "seconds": found.seconds,
    } | course.figures()
    own = records.summary or {}
    told = {item.name: own[item.name] for item in dataclasses.fields(Summary) if _fits(own.get(item.name, ""), item)}
    summary = Summary(**numbers | told)
    return dataclasses.replace(summary, advice=tuple(map(str, advise(summary))))


def _fits(value: Any, item: dataclasses.Field[Any]) -> bool:
    """Whether a value that was read may stand in that field of a summary: a number, or null where it may be missing."""
    return "None" in str(item.type) if value is None else isinstance(value, bool | int | float)


def _weighed(rows: list[Row], steps: int) -> list[tuple[Row, int]]:
    """Each row with the number of updates from it to the next one."""
    if not rows:
        return []
    ends = [int(row["step"]) for row in rows[1:]] + [int(rows[0]["step"]) + steps]
    return [(row, end - int(row["step"])) for row, end in zip(rows, ends, strict=True)]


def _replay(course: Course, row: Row, times: int, *, follows: bool) -> None:
    """Takes a row in, of the group with the largest desired lr."""
    groups = [name.removeprefix("lr_desired") for name in row if name.partition("/")[0] == "lr_desired"]
    group = max(groups, key=lambda group: row[f"lr_desired{group}"], default="")
    applied, desired = row.get(f"lr{group}"), row.get(f"lr_desired{group}")
    if applied is not None:
        course.step(
            int(row["step"]),
            desired=None if follows else desired,
            applied=applied,
            cap=row.get("cap"),
            lr_limit=row.get("lr_limit"),
            times=times,
        )


def _first_step(records: Records) -> int:
    firsts = [int(row["step"]) for row in records.rows[:1]] + [decision.step for decision in records.decisions[:1]]
    return min(firsts, default=0)


def _rows(records: Records) -> list[Row]:
    """The rows, or what the decisions tell of them in a record that has none."""
    return records.rows or [{"step": d.step, "capped": float(d.capped)} for d in records.decisions]


def _capped_share(rows: list[Row], steps: int) -> float:
    weighed = _weighed(rows, steps)
    return sum(times for row, times in weighed if row.get("capped")) / max(1, sum(times for _, times in weighed))


def _spent(decisions: Iterable[Decision], name: str) -> float:
    return float(sum({decision.step: getattr(decision, name) for decision in decisions if decision.cost}.values()))
