"""Runs that are ended early because others did better: W&B's `early_terminate`, without its server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safe_lr.sweeps.checks import is_number

_MOST = 100  # bands that W&B looks at after min_iter


def bands(settings: Mapping[str, Any]) -> list[int]:
    """Returns after how many reports a run is compared with the others.

    min_iter, min_iter * eta, min_iter * eta^2, ...; or max_iter / eta, max_iter / eta^2, ..., of these s.

    Args:
        settings: The config's `early_terminate`.

    Example:
        >>> bands({"type": "hyperband", "min_iter": 3, "eta": 2})[:4], bands({"max_iter": 27, "s": 2})
        ([3, 6, 12, 24], [3, 9])
    """
    eta = settings.get("eta", 3)
    if "max_iter" in settings:
        found = [settings["max_iter"]]
        while len(found) <= settings["s"]:
            found.append(found[-1] / eta)
        return sorted(int(band) for band in found[1:] if band >= 1)
    found = [settings["min_iter"]]
    while len(found) < _MOST:
        found.append(found[-1] * eta)  # not a power: rounded as W&B rounds
    return [int(band) for band in found]


@dataclass
class Stopping:
    """Hyperband as W&B's server applies it: at each band a run must be among the best 1 / eta of all that came so far.

    A run whose value at its last band is beyond that of the best 1 / eta, itself counted, is to end; with `strict:
    false` one whose best value so far is. Runs come one after another here, so the first is never ended.

    Attributes:
        settings: The config's `early_terminate`.
        metric: What runs report.
        sign: 1 where less is better, else -1.
        histories: What each run has reported, times `sign`.
    """

    settings: Mapping[str, Any]
    metric: str
    sign: int
    histories: list[list[float]] = field(default_factory=list)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Stopping:
        """Returns what a config with `early_terminate` says."""
        metric = config.get("metric") or {}
        sign = -1 if metric.get("goal") == "maximize" else 1
        return cls(config["early_terminate"], metric.get("name", "val_loss"), sign)

    def begin(self) -> None:
        """A run begins; what is judged from now on is its own."""
        self.histories.append([])

    def judge(self, figures: Mapping[str, Any]) -> str | None:
        """Takes in what the run reports, and returns why it is to end, None while it may go on.

        A report is judged when the next one comes: the last one, which is a run's result, never ends it.

        Example:
            >>> stopping = Stopping({"type": "hyperband", "min_iter": 1}, "loss", 1)
            >>> for loss in (0.1, 0.2):
            ...     stopping.begin()
            ...     print([stopping.judge({"loss": loss}) for _ in range(2)])
            [None, None]
            [None, 'loss 0.2 after 1 reports is beyond 0.1, the bound of the best 1/3 of 2 runs (early_terminate)']
        """
        value = figures.get(self.metric)
        if not is_number(value):
            return None
        reason = self.verdict()
        self.histories[-1].append(self.sign * float(figures[self.metric]))
        return reason

    def verdict(self) -> str | None:
        """Returns why the last run is to end by what it has reported so far, None if it may go on."""
        history = self.histories[-1]
        band = max((band for band in bands(self.settings) if band <= len(history)), default=None)
        if band is None:
            return None
        eta = self.settings.get("eta", 3)
        values = sorted(other[band - 1] for other in self.histories if len(other) >= band)
        threshold = values[int(1 / eta * len(values))]  # in W&B's order: 1 / eta is rounded first
        value = history[band - 1] if self.settings.get("strict", True) else min(history)
        if value <= threshold:
            return None
        return (
            f"{self.metric} {self.sign * value:.4g} after {band} reports is beyond {self.sign * threshold:.4g}, the "
            f"bound of the best 1/{eta:g} of {len(values)} runs (early_terminate)"
        )
