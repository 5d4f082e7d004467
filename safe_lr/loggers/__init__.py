"""Loggers: where a run's decisions and figures go. Measuring is done elsewhere; a logger only receives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeGuard

from safe_lr.loggers.bounded import is_stop_request
from safe_lr.loggers.console import ConsoleLogger
from safe_lr.loggers.jsonl import JsonlLogger
from safe_lr.loggers.protocol import Logger
from safe_lr.loggers.rank import is_rank_zero
from safe_lr.loggers.records import Records, read_jsonl
from safe_lr.loggers.tensorboard import TensorBoardLogger
from safe_lr.loggers.trackio import TrackioLogger
from safe_lr.loggers.wandb import WandbLogger

__all__ = [
    "ConsoleLogger",
    "JsonlLogger",
    "Logger",
    "Records",
    "TensorBoardLogger",
    "TrackioLogger",
    "WandbLogger",
    "is_rank_zero",
    "is_stop_request",
    "read_jsonl",
    "resolve",
]

DEFAULT_PATH = Path("safe_lr.jsonl")
"""Where the logger named "jsonl" writes if `log_path=` does not say."""

_MAKERS: dict[str, Callable[[Path | None], Logger]] = {
    "wandb": lambda path: WandbLogger(jsonl=path),
    "console": lambda path: ConsoleLogger(),
    "tensorboard": lambda path: TensorBoardLogger(),
    "trackio": lambda path: TrackioLogger(),
}
_NAMES = ", ".join(map(repr, ("jsonl", *_MAKERS)))
_ALLOWED = f"give 'auto', None, one of {_NAMES}, a Logger (start, decide, step, close), or a list of these"


def resolve(
    loggers: str | Logger | Iterable[str | Logger] | None = "auto", log_path: str | os.PathLike[str] | None = None
) -> list[Logger]:
    """Turns the scheduler's `loggers=` and `log_path=` into a list of loggers.

    Args:
        loggers: None is no logger. A Logger, or several, are taken as they are; a name stands for one with its default
            settings: `"wandb"` (speaks once a W&B run is active and is silent where there is none), `"jsonl"` (writes
            to `log_path`, else to `safe_lr.jsonl`), `"console"`, `"tensorboard"`, `"trackio"`. `"auto"` is `"wandb"`.
        log_path: Adds a `JsonlLogger` to that file, first in the list, unless one of `loggers` writes there already.

    Returns:
        The loggers, to be told in this order: a record on disk is complete before W&B gets a copy.

    Raises:
        TypeError: `loggers` is something else.
        ValueError: A name that no logger has.
        ImportError: The package that a named logger needs is not installed.
        OSError: The record's file cannot be written to.

    Example:
        >>> [type(logger).__name__ for logger in resolve("auto")]
        ['WandbLogger']
        >>> resolve(None)
        []
    """
    path = None if log_path is None else Path(log_path)
    given: list[str | Logger]
    if loggers is None:
        given = []
    elif isinstance(loggers, str) or _is_logger(loggers):
        given = [loggers]
    elif isinstance(loggers, Iterable):
        given = list(loggers)
    else:
        raise TypeError(f"loggers={loggers!r}: {_ALLOWED}")
    if path is None and "jsonl" in [item for item in given if isinstance(item, str)]:
        path = DEFAULT_PATH
    chosen = [_one(item, path) for item in given if not (isinstance(item, str) and item == "jsonl")]
    if path is not None and not any(_writes_to(logger, path) for logger in chosen):
        chosen.insert(0, JsonlLogger(path))
    return chosen


def _one(item: str | Logger, path: Path | None) -> Logger:
    if isinstance(item, str):
        name = "wandb" if item == "auto" else item
        if name not in _MAKERS:
            raise ValueError(f"no logger is named {item!r}: {_ALLOWED}")
        return _MAKERS[name](path)
    if not _is_logger(item):
        raise TypeError(f"loggers holds {item!r}, which is no Logger: {_ALLOWED}")
    return item


def _is_logger(value: object) -> TypeGuard[Logger]:
    """Whether `value` is a Logger. A class has the methods too, but is not one yet."""
    return isinstance(value, Logger) and not isinstance(value, type)


def _writes_to(logger: Logger, path: Path) -> bool:
    return isinstance(logger, JsonlLogger) and logger.path.absolute() == path.absolute()
