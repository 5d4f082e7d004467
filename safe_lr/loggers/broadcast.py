"""Telling several loggers at once, and letting none of them stop training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safe_lr.decisions import Decision
from safe_lr.loggers.bounded import is_stop_request
from safe_lr.loggers.protocol import Logger


class Broadcast:
    """Passes records on to every logger; one that raises is switched off with one warning.

    `start` is called on each logger just before its first record. The bare `Exception()` by which W&B's sweep agent
    stops a run is not a logger's failure and is passed on.

    Args:
        loggers: The loggers.
        config: Gives the settings that `start` receives, when they are needed.
    """

    def __init__(self, loggers: Sequence[Logger], config: Callable[[], Mapping[str, Any]]) -> None:
        self._loggers = list(loggers)
        self._config = config
        self.started = False

    def __bool__(self) -> bool:
        return bool(self._loggers)

    def decide(self, decision: Decision) -> None:
        self._tell(lambda logger: logger.decide(decision))

    def step(self, row: Mapping[str, Any]) -> None:
        self._tell(lambda logger: logger.step(row))

    def close(self, summary: Mapping[str, Any]) -> None:
        self._tell(lambda logger: logger.close(summary))
        self._loggers = []

    def _tell(self, say: Callable[[Logger], None]) -> None:
        if not self.started:
            self.started = True
            config = self._config()
            self._tell(lambda logger: logger.start(config))
        self._loggers = [logger for logger in self._loggers if self._heard(logger, say)]

    def _heard(self, logger: Logger, say: Callable[[Logger], None]) -> bool:
        try:
            say(logger)
        except Exception as error:
            if is_stop_request(error):
                raise
            warnings.warn(
                f"safe_lr switched off {type(logger).__name__}, which raised {type(error).__name__}: {error}. Training "
                "goes on.",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True
