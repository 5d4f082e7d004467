"""Loggers: where a run's decisions and figures go. Measuring is done elsewhere; a logger only receives."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard

from safe_lr.loggers.bounded import is_stop_request
from safe_lr.loggers.jsonl import JsonlLogger
from safe_lr.loggers.protocol import Logger
from safe_lr.loggers.rank import is_rank_zero
from safe_lr.loggers.records import Records, read_jsonl
from safe_lr.loggers.wandb import WandbLogger

__all__ = [
    "JsonlLogger",
    "Logger",
    "Records",
    "WandbLogger",
    "is_rank_zero",
    "is_stop_request",
    "read_jsonl",
    "resolve",
]

_ALLOWED = "give 'auto', None, a Logger (start, decide, step, close), or a list of Loggers"


def resolve(
    loggers: str | Logger | Iterable[Logger] | None = "auto", log_path: str | os.PathLike[str] | None = None
) -> list[Logger]:
    """Turns the scheduler's `loggers=` and `log_path=` into a list of loggers.

    Args:
        loggers: `"auto"` is a `WandbLogger`, which speaks once a W&B run is active and is silent where there is none.
            None is no logger. A Logger, or several, are taken as they are.
        log_path: Adds a `JsonlLogger` to that file, first in the list, unless one of `loggers` writes there already.

    Returns:
        The loggers, to be told in this order: the record on disk is complete before W&B gets a copy.

    Raises:
        TypeError: `loggers` is something else.
        OSError: `log_path` cannot be written to.

    Example:
        >>> [type(logger).__name__ for logger in resolve("auto")]
        ['WandbLogger']
        >>> resolve(None)
        []
    """
    chosen: list[Logger]
    if loggers is None:
        chosen = []
    elif loggers == "auto":
        chosen = [WandbLogger(jsonl=log_path)]
    elif _is_logger(loggers):
        chosen = [loggers]
    elif isinstance(loggers, Iterable) and not isinstance(loggers, str):
        chosen = list(loggers)
    else:
        raise TypeError(f"loggers={loggers!r}: {_ALLOWED}")
    for logger in chosen:
        if not _is_logger(logger):
            raise TypeError(f"loggers holds {logger!r}, which is no Logger: {_ALLOWED}")
    if log_path is not None and not any(_writes_to(logger, Path(log_path)) for logger in chosen):
        chosen.insert(0, JsonlLogger(log_path))
    return chosen


def _is_logger(value: object) -> TypeGuard[Logger]:
    """Whether `value` is a Logger. A class has the methods too, but is not one yet."""
    return isinstance(value, Logger) and not isinstance(value, type)


def _writes_to(logger: Logger, path: Path) -> bool:
    return isinstance(logger, JsonlLogger) and logger.path.absolute() == path.absolute()
