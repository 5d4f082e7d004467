"""Runs that are ended early because others did better: W&B's `early_terminate`, without its server."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safe_lr.sweeps.metric import NAME, Metric

_MOST = 100  # bands that W&B looks at from min_iter on
_LONGEST = float(sys.maxsize)  # no run makes so many reports


def bands(settings: Mapping[str, Any]) -> list[int]:
    """Returns after how many reports a run is compared with the others.

    max_iter / eta, max_iter / eta^2, ..., s of these, where both are given; else min_iter, min_iter * eta,
    min_iter * eta^2, ... What is below 1 or beyond any run is left out.

    Args:
        settings: The config's `early_terminate`.

    Example:
        >>> bands({"type": "hyperband", "min_iter": 3, "eta": 2})[:4], bands({"max_iter": 27, "s": 2})
        ([3, 6, 12, 24], [3, 9])
    """
    eta = settings.get("eta", 3)
    found: list[int] = []
    if {"max_iter", "s"} <= set(settings):
        band = settings["max_iter"] / eta
        while len(found) < settings["s"] and band >= 1:
            found.insert(0, int(band))
            band /= eta
        return found
    band = settings["min_iter"]
    while len(found) < _MOST and band < _LONGEST:
        found.append(int(band))
        band *= eta  # not a power: rounded as W&B rounds
    return found


@dataclass
class Stopping:
    """Hyperband as W&B's server applies it: at each band a run must be among the best 1 / eta of all that came so far.

    A run whose value at its last band is beyond that of the best 1 / eta, itself counted, is to end; with `strict:
    false` one whose best value so far is. Runs come one after another here, so the first is never ended.

    A value that is not finite is the worst of all. (W&B leaves it out, and never ends a run that reports nothing else.)

    Attributes:
        bands: After how many reports a run is compared with the others.
        metric: What runs report.
        sign: 1 where less is better, else -1.
        eta: One of so many goes on.
        strict: Whether the value at the band counts, not the best so far.
        histories: What each run has reported, times `sign`; infinite where that was not finite.
    """

    bands: list[int]
    metric: str = NAME
    sign: int = 1
    eta: float = 3
    strict: bool = True
    histories: list[list[float]] = field(default_factory=list)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Stopping:
        """Returns what a config with `early_terminate` says.

        Raises:
            ValueError: No run would ever be compared.
        """
        settings, metric = config["early_terminate"], Metric.of(config)
        found = bands(settings)
        if not found:
            given = ", ".join(f"{name} {settings[name]}" for name in ("max_iter", "s", "min_iter") if name in settings)
            raise ValueError(
                f"early_terminate: {given} with eta {settings.get('eta', 3)} compares no run: raise max_iter and s"
                " (max_iter / eta must be at least 1), or give min_iter alone"
            )
        return cls(found, metric.name, metric.sign, settings.get("eta", 3), settings.get("strict", True))

    def begin(self) -> None:
        """A run begins; what is judged from now on is its own."""
        self.histories.append([])

    def judge(self, figures: Mapping[str, Any]) -> str | None:
        """Takes in what the run reports, and returns why it is to end, None while it may go on.

        A report is judged when the next one comes: the last one, which is a run's result, never ends it.

        Example:
            >>> stopping = Stopping([1, 3, 9], "loss")
            >>> for loss in (0.1, 0.2):
            ...     stopping.begin()
            ...     print([stopping.judge({"loss": loss}) for _ in range(2)])
            [None, None]
            [None, 'loss 0.2 after 1 report is beyond 0.1, the bound of the best 1/3 of 2 runs (early_terminate)']
        """
        value = figures.get(self.metric)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        reason = self.verdict()
        self.histories[-1].append(self.sign * float(value) if math.isfinite(value) else math.inf)
        return reason

    def verdict(self) -> str | None:
        """Returns why the last run is to end by what it has reported so far, None if it may go on."""
        history = self.histories[-1]
        band = max((band for band in self.bands if band <= len(history)), default=None)
        if band is None:
            return None
        values = sorted(other[band - 1] for other in self.histories if len(other) >= band)
        threshold = values[int(1 / self.eta * len(values))]  # in W&B's order: 1 / eta is rounded first
        value = history[band - 1] if self.strict else min(history)
        if value <= threshold:
            return None
        said = f"{self.sign * value:.4g}" if math.isfinite(value) else "that is not finite"
        return (
            f"{self.metric} {said} after {band} report{'s' * (band > 1)} is beyond {self.sign * threshold:.4g}, the "
            f"bound of the best 1/{self.eta:g} of {len(values)} runs (early_terminate)"
        )
