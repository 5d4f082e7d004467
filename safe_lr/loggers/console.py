"""Shows how the learning rate fares in one line of the terminal."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from safe_lr.decisions import Decision
from safe_lr.loggers.alerts import Alerts
from safe_lr.loggers.extras import extra
from safe_lr.loggers.rank import is_rank_zero

CLOSE = 0.8
"""From this part of the cap on an lr is called close to it."""


def line(row: Mapping[str, Any]) -> str:
    """Says in words how lr stands to its cap.

    Args:
        row: What `Logger.step` receives.

    Returns:
        The line.

    Example:
        >>> print(line({"lr": 3e-4, "lr_desired": 1e-3, "cap": 3e-4, "capped": 1, "margin": 0.5, "gamma": 2e3}))
        lr 0.0003, capped (0.001 desired); margin 0.5; gamma 2e+03
        >>> print(line({"lr": 1e-3, "lr_desired": 1e-3, "cap": None, "capped": 0, "margin": 2.0}))
        lr 0.001, no limit known yet; margin 2
    """
    parts = [f"lr {row['lr']:.3g}, {_standing(row)}", f"margin {row['margin']:.3g}"]
    if row.get("gamma") is not None:
        parts.append(f"gamma {row['gamma']:.3g}")
    return "; ".join(parts)


def _standing(row: Mapping[str, Any]) -> str:
    beyond = ", beyond the linear limit" if (row.get("utilisation") or 0.0) > 1.0 else ""
    if row["capped"]:
        return f"capped ({row['lr_desired']:.3g} desired){beyond}"
    if row.get("cap") is None:
        return "no limit known yet"
    return ("close to" if row["lr"] >= CLOSE * row["cap"] else "clear of") + f" the cap {row['cap']:.3g}{beyond}"


class ConsoleLogger:
    """Shows a progress line, and what is wrong above it, while the run lasts. Needs the extra `console` (rich).

    It is quiet where the stream is no terminal (a log file, a pipe, CI), and on other ranks than 0: it then prints
    nothing and does not need rich. While the line is shown, rich leads what else is printed above it; beside another
    live line (tqdm's, say) leave this logger away.

    Args:
        total: Steps of the run; None shows no end.
        stream: Where to; None is standard error.
        refresh: Least time between two drawings, in seconds.
        clock: Tells the time, in seconds.

    Raises:
        ImportError: The stream is a terminal, and rich is not installed.

    Example:
        >>> import io
        >>> stream = io.StringIO()
        >>> logger = ConsoleLogger(stream=stream)
        >>> logger.start({})
        >>> logger.step({"step": 0, "lr": 0.1, "lr_desired": 0.1, "margin": 0.5, "capped": 0})
        >>> logger.close({})
        >>> stream.getvalue()  # no terminal
        ''
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        stream: TextIO | None = None,
        refresh: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = stream or sys.stderr
        self._shows = stream.isatty() and is_rank_zero()
        self._total, self._refresh, self._clock = total, refresh, clock
        self._drawn = -refresh
        self._alerts = Alerts(clock=clock)
        self._task: Any = None
        self._row: Mapping[str, Any] | None = None
        if self._shows:
            progress, console = extra("rich.progress", "console"), extra("rich.console", "console")
            self._progress = progress.Progress(
                progress.TextColumn("step {task.completed}{task.fields[end]}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.description}"),
                console=console.Console(file=stream),
                auto_refresh=False,  # no thread: it is drawn from `step`
            )
            weakref.finalize(self, self._progress.stop)  # a run that is never closed leaves no hidden cursor behind

    def start(self, config: Mapping[str, Any]) -> None:
        """Shows the line."""
        if self._shows and self._task is None:
            end = "" if self._total is None else f" of {self._total}"
            self._task = self._progress.add_task("", total=self._total, end=end)
            self._progress.start()

    def decide(self, decision: Decision) -> None:
        """Prints what is wrong, above the line."""
        for kind, text in self._alerts.of_decision(decision):
            self._print(f"safe_lr: {kind}: {text}")

    def step(self, row: Mapping[str, Any]) -> None:
        """Draws the line anew, if the last drawing is old enough."""
        if self._task is None:
            return
        self._row = row
        if self._clock() - self._drawn >= self._refresh:
            self._drawn = self._clock()
            self._draw(row)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Draws the last line, and leaves it."""
        if self._task is None:
            return
        if self._row is not None:
            self._draw(self._row)
        self._progress.stop()
        self._task = None

    def _draw(self, row: Mapping[str, Any]) -> None:
        self._progress.update(self._task, completed=row["step"] + 1, description=line(row), refresh=True)

    def _print(self, text: str) -> None:
        if self._task is not None:
            self._progress.console.print(text, markup=False, highlight=False)
