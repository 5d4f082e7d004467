"""Shows a run's learning-rate record in TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safe_lr.decisions import Decision
from safe_lr.loggers.extras import extra
from safe_lr.loggers.names import PREFIX, known
from safe_lr.loggers.rank import is_rank_zero
from safe_lr.loggers.sampling import Sampling


class TensorBoardLogger:
    """Writes `safe_lr/...` scalars by step, and each decision's reason as text, to a TensorBoard event file.

    Sent are the first step, every `every`-th, each with a decision and the last. Settings and summary are texts.
    In a distributed job only rank 0 writes. Needs the extra `tensorboard`.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter` of yours, which is flushed but never closed here; or a folder,
            which gets an event file of its own; None takes TensorBoard's default, `runs/<date>_<host>`.
        every: Distance of the steps that are sent.

    Raises:
        ImportError: tensorboard is not installed.
        TypeError: `writer` is neither a writer nor a folder.
        ValueError: `every` is not a positive integer.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> logger = TensorBoardLogger(folder)
        >>> logger.start({"bound": "momentum"})
        >>> logger.step({"step": 0, "lr": 0.1})
        >>> logger.close({"steps": 1})
        >>> len(list(folder.glob("events.out.tfevents.*")))
        1
    """

    def __init__(self, writer: Any = None, *, every: int = 10) -> None:
        self._writes = extra("torch.utils.tensorboard", "tensorboard")
        if not (writer is None or isinstance(writer, str | os.PathLike) or hasattr(writer, "add_scalar")):
            raise TypeError(
                f"writer={writer!r}: give a SummaryWriter, a folder, or None for TensorBoard's default folder"
            )
        self._given = writer
        self._writer: Any = None  # until `start`, and on other ranks
        self._sampling = Sampling(every)

    def start(self, config: Mapping[str, Any]) -> None:
        """Opens the event file, and writes the settings."""
        self._sampling.restart()
        if is_rank_zero():
            own = self._given is None or isinstance(self._given, str | os.PathLike)
            folder = None if self._given is None else str(self._given)
            self._writer = self._writes.SummaryWriter(folder) if own else self._given
            self._writer.add_text(PREFIX + "settings", _listed(config))

    def decide(self, decision: Decision) -> None:
        """Writes what was done and why."""
        self._sampling.decided()
        if self._writer is not None:
            self._writer.add_text(PREFIX + "decisions", f"**{decision.action}** {decision.reason}", decision.step)

    def step(self, row: Mapping[str, Any]) -> None:
        """Writes the figures that are known, if this step is one of those to be sent."""
        if self._writer is not None and self._sampling.picks(row):
            self._write(row)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Writes the last step and the summary, and closes the file if it is the logger's own."""
        if self._writer is None:
            return
        row = self._sampling.rest()
        if row is not None:
            self._write(row)
        self._writer.add_text(PREFIX + "summary", _listed(summary))
        self._writer.flush()
        if self._writer is not self._given:
            self._writer.close()
        self._writer = None

    def _write(self, row: Mapping[str, Any]) -> None:
        for name, value in known(row).items():
            self._writer.add_scalar(PREFIX + name, value, row["step"])


def _listed(values: Mapping[str, Any]) -> str:
    """A Markdown list, as TensorBoard shows it."""
    return "\n".join(f"- {name}: `{json.dumps(value, default=str)}`" for name, value in values.items())
