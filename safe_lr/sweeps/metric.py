"""What a sweep judges its runs by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

NAME = "val_loss"
"""The metric where a config names none."""


@dataclass(frozen=True)
class Metric:
    """A figure that runs report.

    Attributes:
        name: Its name.
        goal: `minimize` or `maximize`.

    Example:
        >>> Metric.of({}), Metric.of({"metric": {"name": "accuracy", "goal": "maximize"}}).sign
        (Metric(name='val_loss', goal='minimize'), -1)
    """

    name: str = NAME
    goal: Literal["minimize", "maximize"] = "minimize"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Metric:
        """Returns a sweep config's."""
        given = config.get("metric") or {}
        return cls(given.get("name", NAME), given.get("goal", "minimize"))

    @property
    def sign(self) -> int:
        """1 where less is better, else -1."""
        return -1 if self.goal == "maximize" else 1
