"""The record of a run: one file, one JSON object a line."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import math
import os
import warnings
import weakref
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_lr.decisions import Decision
from safe_lr.loggers.rank import is_rank_zero
from safe_lr.loggers.sampling import Sampling

MOST_WAITING = 10_000
"""Lines kept in memory while the disk takes none, about 3 MB."""


class JsonlLogger:
    """Writes what happened to the learning rate to a file of JSON lines.

    Each line has a `kind`:

    | `kind` | written | holds |
    |---|---|---|
    | `run` | at the start, and again whenever a run resumes into the file | `version`, `config` |
    | `decision` | at each decision | the fields of `Decision` |
    | `step` | at every `every`-th step, the first, the last, and each step with a decision | the figures known then |
    | `summary` | at the end | `summary` |

    A line is handed to the system in one piece and not buffered: a killed run leaves a file that reads up to its last
    line. `NaN` and `Infinity`, which JSON does not have, are written as null. In a distributed job only rank 0 writes.
    `safe_lr.loggers.read_jsonl` reads the file back.

    A disk that is full, or goes away, costs one warning. The lines are then kept in memory, the last 10,000 of them,
    and written as soon as there is room: `unwritten` counts those that wait.

    Args:
        path: The file. Missing folders are made; an existing file is continued.
        every: Distance of `step` lines. At 10 a million steps make about 30 MB; decisions are never left out.

    Raises:
        ValueError: `every` is not a positive integer.
        OSError: The file cannot be opened for writing.

    Example:
        >>> import tempfile
        >>> from safe_lr.loggers import read_jsonl
        >>> path = Path(tempfile.mkdtemp()) / "decisions.jsonl"
        >>> logger = JsonlLogger(path, every=2)
        >>> logger.start({"bound": "momentum"})
        >>> for step in range(5):
        ...     logger.step({"step": step, "lr": 0.1, "gamma": None})
        >>> logger.close({"steps": 5})
        >>> [row["step"] for row in read_jsonl(path).rows]
        [0, 2, 4]
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int = 10) -> None:
        self._sampling = Sampling(every)
        self.path = Path(path)
        self._file = _open(self.path) if is_rank_zero() else None
        if self._file is not None:  # a logger that is dropped without `close` leaves no open file behind
            weakref.finalize(self, self._file.close)
        self._waiting: deque[bytes] = deque()  # lines to be written; the first may be a rest of one
        self._warned = False

    @property
    def every(self) -> int:
        """Distance of `step` lines."""
        return self._sampling.every

    @property
    def unwritten(self) -> int:
        """Lines that wait for room on the disk."""
        return len(self._waiting)

    def start(self, config: Mapping[str, Any]) -> None:
        """Writes the `run` line."""
        self._sampling.restart()
        self._write("run", version=_version(), config=config)

    def decide(self, decision: Decision) -> None:
        """Writes one `decision` line."""
        self._sampling.decided()
        self._write("decision", **decision.to_dict())

    def step(self, row: Mapping[str, Any]) -> None:
        """Writes a `step` line if this step is one of those to be written."""
        if self._sampling.picks(row):
            self._write_row(row)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Writes the last step and the `summary` line, and closes the file. Closing twice does nothing."""
        if self._file is None:
            return
        row = self._sampling.rest()
        if row is not None:
            self._write_row(row)
        self._write("summary", summary=summary)
        self._file.close()
        self._file = None

    def _write_row(self, row: Mapping[str, Any]) -> None:
        self._write("step", **{name: value for name, value in row.items() if value is not None})

    def _write(self, kind: str, **fields: Any) -> None:
        if self._file is None:  # not rank 0, or closed
            return
        line = json.dumps(_plain({"kind": kind, **fields}), allow_nan=False, separators=(",", ":")) + "\n"
        self._waiting.append(line.encode("ascii"))
        try:
            self._drain(self._file)
        except OSError as error:
            if len(self._waiting) > MOST_WAITING:
                del self._waiting[1]  # the oldest but the first, of which a part may be on the disk
            self._warn(error)

    def _drain(self, file: io.FileIO) -> None:
        while self._waiting:  # a full disk takes a part first and raises at the next call
            rest = self._waiting[0][file.write(self._waiting[0]) :]
            if rest:
                self._waiting[0] = rest
            else:
                self._waiting.popleft()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"safe_lr cannot write to {self.path} ({error.strerror or error}): training goes on, the record is "
                "kept in memory and written once there is room",
                RuntimeWarning,
                stacklevel=2,
            )


def _open(path: Path) -> io.FileIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and _is_torn(path)
        file = open(path, "ab", buffering=0)  # noqa: SIM115 (held until close)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot write the log there ({reason}): give a path to a file in a folder that you may write to"
        raise type(error)(error.errno, message, str(path)) from error
    if torn:
        with contextlib.suppress(OSError):  # a full disk: the first line will say so
            file.write(b"\n")
    return file


def _is_torn(path: Path) -> bool:
    """Whether the last line was cut off, so that a continued file must begin a new one."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        if not file.tell():
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _version() -> str:
    try:
        return importlib.metadata.version("safe-lr")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
