"""The `Logger` protocol: what the scheduler tells, to whoever wants to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from safe_lr.decisions import Decision


@runtime_checkable
class Logger(Protocol):
    """Receives a run's settings, its decisions and one row of scalars a step.

    The scheduler calls `start` once, before the first record; `decide` at each decision; `step` once per optimizer
    update; `close` once, at the end (`scheduler.close()`, else when the scheduler is dropped or the interpreter exits).
    A logger may raise: the scheduler switches it off with one warning and training goes on.
    """

    def start(self, config: Mapping[str, Any]) -> None:
        """Receives the resolved settings (JSON-ready) before anything else."""

    def decide(self, decision: Decision) -> None:
        """Receives one decision."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Receives one update's scalars: `step`, `lr`, `lr_desired`, `lr_limit`, `cap`, `margin`, `utilisation`,
        `gamma`, `lambda_max`, `p_min`, `p_eff`, `beta1`, `beta2`, `capped` (0 or 1), `cost` (cumulative gradient
        evaluations), and `lr/g1`, `lr_desired/g1`, ... for further groups. Figures not known yet are None.
        """

    def close(self, summary: Mapping[str, Any]) -> None:
        """Receives the summary (JSON-ready) and releases whatever the logger holds."""
