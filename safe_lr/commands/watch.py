"""`safe-lr watch`: a run's record, followed in the terminal while it is written."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_lr.commands.parsers import NEGATIVE, add_command, add_json, as_json
from safe_lr.loggers.records import NOT_OURS, figures_of, no_record
from safe_lr.plots import number
from safe_lr.plots.timeline import IN_WORDS, STATES, State, state_of

_FIGURES = ("lr", "lr_desired", "cap", "lr_limit", "margin", "utilisation", "gamma", "lambda_max", "cost")
_REASONS = 5


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "watch",
        _run,
        brief="follow a run in the terminal",
        about="Follows a run's record while it is written: lr against its cap, in words, and the newest decisions.\n"
        "Ends with the run, or at Ctrl-C. In a terminal with `rich` installed it redraws one panel; elsewhere it\n"
        "prints a line whenever something has changed. Exit status 1: nothing new came for --timeout seconds.",
        examples=("watch decisions.jsonl", "watch decisions.jsonl --once --json"),
    )
    parser.add_argument("record", type=Path, help="the run's record; it need not be there yet")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="look every S seconds (default 1)")
    parser.add_argument("--timeout", type=float, metavar="S", help="give up when nothing new came for S seconds")
    parser.add_argument("--once", action="store_true", help="say how the run stands now, and end")
    add_json(parser)


@dataclass
class Status:
    """How a run stands, from the lines read so far."""

    row: dict[str, Any] = field(default_factory=dict)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    states: dict[State, int] = field(default_factory=lambda: dict.fromkeys(STATES, 0))
    failures: int = 0
    unreadable: int = 0
    summary: dict[str, Any] | None = None

    def take(self, line: bytes) -> None:
        """Takes one line in; one that is not ours is counted."""
        try:
            record = json.loads(line)
            kind = record.pop("kind")
            if kind == "step":
                row = figures_of(record)
                state = state_of(row)
                self.row, self.states[state] = row, self.states[state] + 1
            elif kind == "decision":
                shown = {"step": int(record["step"]), "action": str(record["action"]), "reason": str(record["reason"])}
                self.failures += record["failure"] is not None
                self.decisions = [*self.decisions, shown][-_REASONS:]
            elif kind == "summary":
                self.summary = dict(record["summary"])
            elif kind == "run":
                self.summary = None
            else:
                self.unreadable += 1
        except NOT_OURS:
            self.unreadable += 1

    @property
    def state(self) -> State:
        """How lr stands."""
        return state_of(self.row)

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON-ready values."""
        reason = self.decisions[-1]["reason"] if self.decisions else None
        return {
            "step": self.row.get("step"),
            "state": self.state if self.row else None,
            **{name: self.row.get(name) for name in _FIGURES},
            "reason": reason,
            "failures": self.failures,
            "unreadable": self.unreadable,
            "ended": self.summary is not None,
        }

    def __str__(self) -> str:
        if not self.row:
            foreign = f" ({self.unreadable:,} lines are not safe_lr's)" if self.unreadable else ""
            return f"no step is on record yet{foreign}"
        figures = "  ".join(f"{name} {number(self.row.get(name))}" for name in ("lr", "cap", "margin", "utilisation"))
        text = f"step {self.row['step']:,}  {self.state}  {figures}"
        return f"{text}  {self.decisions[-1]['reason']}" if self.decisions else text


class Tail:
    """Reads what was added to a file since the last look; a line counts once its end is there."""

    def __init__(self, path: Path) -> None:
        self.path, self._at, self._rest = path, 0, b""

    def lines(self) -> tuple[bool, list[bytes]]:
        """Returns whether the file was begun anew, and the whole lines that are new."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return False, []
        anew = size < self._at
        if anew:
            self._at, self._rest = 0, b""
        with open(self.path, "rb") as file:
            file.seek(self._at)
            self._rest += file.read()
            self._at = file.tell()
        *whole, self._rest = self._rest.split(b"\n")
        return anew, [line for line in whole if line.strip()]


def _run(args: argparse.Namespace) -> int:
    if args.every <= 0 or (args.timeout is not None and args.timeout <= 0):
        raise ValueError("--every and --timeout must be above 0 (seconds)")
    if args.once:
        args.record.stat()  # a file that is not there is an error now
        status = next(follow(args.record, every=args.every, timeout=None))
        if status.unreadable and not (status.row or status.decisions or status.summary):
            raise no_record(args.record, status.unreadable)
        print(as_json(status.to_dict()) if args.json else str(status))
        return 0
    plain = args.json or not sys.stdout.isatty() or importlib.util.find_spec("rich") is None
    show = _print_json if args.json else _print_line
    status = Status()
    try:
        if plain:
            for status in follow(args.record, every=args.every, timeout=args.timeout):
                show(status)
        else:
            status = _panel(args)
    except KeyboardInterrupt:
        return 0
    if status.summary is None:
        print(f"nothing new for {args.timeout:g} s: the run goes on elsewhere, or was killed", file=sys.stderr)
        return NEGATIVE
    return 0


def follow(
    path: Path, *, every: float, timeout: float | None, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Status]:
    """Yields the run's status now, and whenever lines have come; ends with the run's summary.

    Args:
        path: The record, which may not be there yet.
        every: Seconds between two looks.
        timeout: Seconds without a new line after which to end; None waits for ever.
        sleep: Waits.
    """
    tail, status, quiet, first = Tail(path), Status(), 0.0, True
    while True:
        anew, lines = tail.lines()
        status = Status() if anew else status
        for line in lines:
            status.take(line)
        quiet = 0.0 if lines else quiet
        if lines or first:
            yield status
        first = False
        if status.summary is not None or (timeout is not None and quiet >= timeout):
            return
        sleep(every)
        quiet += every


def _print_line(status: Status) -> None:
    print(status, flush=True)


def _print_json(status: Status) -> None:
    print(as_json(status.to_dict()), flush=True)


def _panel(args: argparse.Namespace) -> Status:
    from rich.live import Live

    status = Status()
    with Live(refresh_per_second=4) as live:
        for status in follow(args.record, every=args.every, timeout=args.timeout):
            live.update(panel(status, str(args.record)))
    return status


_STYLES = {"clear": "green", "close": "cyan", "capped": "yellow", "unprotected": "magenta", "beyond": "red"}


def panel(status: Status, title: str) -> Any:
    """Returns what a terminal shows: how lr stands, in words and colour, and the newest reasons."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    if not status.row:
        return Panel("no step is on record yet", title=title)
    head = Text(f"step {status.row['step']:,}  ")
    head.append(status.state, style=f"bold {_STYLES[status.state]}")
    head.append(f": {IN_WORDS[status.state]}")
    figures = Table.grid(padding=(0, 2))
    for name in _FIGURES:
        figures.add_row(name, number(status.row.get(name)))
    reasons = [Text(f"{item['step']:>7,}  {item['action']:<7} {item['reason']}") for item in status.decisions]
    ended = [Text("the run has ended")] if status.summary is not None else []
    return Panel(Group(head, figures, *reasons, *ended), title=title)
