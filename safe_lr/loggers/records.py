"""Reads a run's record back: what `JsonlLogger` wrote, also where the run was killed or resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_lr.decisions import ACTIONS, Decision

Row = dict[str, float]

NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading a line raises that is cut off, not ours, or of a later version."""

_SHOWN = 5  # unreadable lines that are named


@dataclass(frozen=True)
class Records:
    """The contents of one record file.

    Where a run was resumed from a checkpoint, or started anew, into the same file, the steps that were taken again
    count once, as they were taken last.

    Attributes:
        runs: One dict for each time that a run started or resumed, with `version` and `config`, oldest first.
        decisions: The decisions, in order.
        rows: The `step` rows, in order; figures that were not known at a step are missing from its row.
        summary: The summary of the last run, None if it did not end in order.
        unreadable: Lines that are cut off or are not ours.
        unreadable_at: Numbers of the first few of them, counted from 1.
        superseded: Decisions and rows left out because a later run took their steps again.
        name: The file's name, for headings.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    unreadable: int = 0
    superseded: int = 0
    name: str = ""
    unreadable_at: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Optimizer updates seen, counted from the first to the last step on record.

        Example:
            >>> Records(rows=[{"step": 0, "lr": 0.1}, {"step": 40, "lr": 0.1}]).steps
            41
        """
        seen = [int(row["step"]) for row in self.rows[:1] + self.rows[-1:]]
        seen += [decision.step for decision in self.decisions[:1] + self.decisions[-1:]]
        return max(seen) - min(seen) + 1 if seen else 0


def read_jsonl(path: str | os.PathLike[str]) -> Records:
    """Reads a record file, whole or truncated.

    Lines that cannot be read are counted, not raised on: a killed run may leave half a line, and several programs may
    have written to one file.

    Args:
        path: A file written by `JsonlLogger`.

    Returns:
        What is whole in it.

    Raises:
        OSError: The file cannot be read.
        ValueError: There is no safe_lr record in it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "decisions.jsonl"
        >>> _ = path.write_text('{"kind":"run","config":{}}\\n{"kind":"step","step":0,"lr":0.1}\\n{"kind":"st')
        >>> records = read_jsonl(path)
        >>> len(records.rows), records.unreadable
        (1, 1)
    """
    reader = _Reader()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                reader.feed(line, number)
    if not (reader.runs or reader.decisions or reader.rows):
        raise no_record(path, reader.unreadable)
    return reader.records(Path(path).name)


def no_record(path: str | os.PathLike[str], unreadable: int) -> ValueError:
    """Returns the error to raise for a file without a line of ours.

    Example:
        >>> str(no_record("a.csv", 3)).partition(":")[0]
        'a.csv holds 3 lines of something else, not a safe_lr record'
    """
    found = f"{unreadable} lines of something else" if unreadable else "nothing"
    message = f"{os.fspath(path)} holds {found}, not a safe_lr record"
    return ValueError(f"{message}: give the file that log_path= or JsonlLogger(...) named")


class _Reader:
    """Takes lines one by one and keeps what is whole."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.decisions: list[Decision] = []
        self.rows: list[Row] = []
        self.summary: dict[str, Any] | None = None
        self.unreadable = 0
        self.unreadable_at: tuple[int, ...] = ()
        self.superseded = 0
        self._resumes = False

    def records(self, name: str) -> Records:
        counts = self.unreadable, self.superseded
        # In order already, but where several programs wrote to one file or somebody has put files together.
        decisions = sorted(self.decisions, key=lambda decision: decision.step)
        rows = sorted(self.rows, key=lambda row: row["step"])
        return Records(self.runs, decisions, rows, self.summary, *counts, name, self.unreadable_at)

    def feed(self, line: bytes, number: int) -> None:
        try:
            self._take(json.loads(line))
        except NOT_OURS:
            self.unreadable += 1
            if len(self.unreadable_at) < _SHOWN:
                self.unreadable_at += (number,)

    def _take(self, record: dict[str, Any]) -> None:
        match record.pop("kind"):
            case "run":
                self._take_run(record)
            case "decision":
                self._take_decision(record)
            case "step":
                self._take_step(record)
            case "summary":
                self.summary = dict(record["summary"])
            case kind:
                raise ValueError(f"kind {kind!r}")

    def _take_run(self, record: dict[str, Any]) -> None:
        config = record.get("config")
        self.runs.append({"version": str(record.get("version", "unknown")), "config": dict(config or {})})
        self.summary = None
        self._resumes = True

    def _take_decision(self, record: dict[str, Any]) -> None:
        decision = _decision(record)
        self._supersede(decision.step)
        self.decisions.append(decision)

    def _take_step(self, record: dict[str, Any]) -> None:
        row = figures_of(record)
        self._supersede(int(row["step"]))
        self.rows.append(row)

    def _supersede(self, step: int) -> None:
        """Drops what earlier runs did from `step` on, at the first record of a run that takes those steps again."""
        if not self._resumes:
            return
        self._resumes = False
        before = len(self.decisions) + len(self.rows)
        self.decisions = [decision for decision in self.decisions if decision.step < step]
        self.rows = [row for row in self.rows if row["step"] < step]
        self.superseded += before - len(self.decisions) - len(self.rows)


def figures_of(record: dict[str, Any]) -> Row:
    """Returns the figures of a `step` line.

    Raises:
        KeyError: Its step is missing, or no number.
    """
    row = {name: value for name, value in record.items() if _is_number(value)}
    row["step"] = int(row["step"])
    return row


def _decision(record: dict[str, Any]) -> Decision:
    """Builds the decision; fields of later versions are left out, a required number that was not finite is NaN."""
    values = {name: value for name, value in record.items() if name in _TYPES}
    for name, value in values.items():
        if value is None and _TYPES[name] == "float":
            values[name] = math.nan
        elif not (_READS[_TYPES[name]](value) if value is not None else "None" in _TYPES[name]):
            raise ValueError(f"{name} is {value!r}")
    return Decision(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


_TYPES = {item.name: str(item.type) for item in dataclasses.fields(Decision)}
_READS: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int,
    "float": _is_number,
    "float | None": _is_number,
    "bool": lambda value: isinstance(value, bool),
    "bool | None": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: isinstance(value, str),
    "Action": lambda value: value in ACTIONS,
    "dict[str, float] | None": lambda value: isinstance(value, dict),
}
