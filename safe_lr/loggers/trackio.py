"""Shows a run's learning-rate record in trackio, which keeps it on this machine."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from typing import Any

from safe_lr.decisions import Decision
from safe_lr.loggers.alerts import Alerts
from safe_lr.loggers.bounded import bounded
from safe_lr.loggers.extras import extra
from safe_lr.loggers.names import PREFIX, known
from safe_lr.loggers.rank import is_rank_zero
from safe_lr.loggers.sampling import Sampling


class TrackioLogger:
    """Logs `safe_lr/...` scalars by step to a trackio run of its own.

    It does not ride on the user's run: `trackio.log` counts steps in common for all that is logged there, so rows of
    ours would shift the user's. The run is opened where `trackio.init` sees no other one, for else it would finish the
    user's. Sent are the first 100 steps, every `every`-th later on, each with a decision and the last. What is wrong is
    told by `run.alert`. In a distributed job only rank 0 logs. Needs the extra `trackio`.

    Args:
        project: trackio project; give your own to have both runs side by side.
        every: Distance of the steps that are sent.
        timeout: Longest wait for opening and for finishing the run, in seconds.
        alert_every: Least time between two alerts of one kind, in seconds; `safe_lr.loggers.alerts` has the kinds.
        **options: More for `trackio.init`, such as `name=` or `space_id=`.

    Raises:
        ImportError: trackio is not installed.
        ValueError: `every` is not a positive integer.
    """

    def __init__(
        self,
        project: str = "safe-lr",
        *,
        every: int = 10,
        timeout: float = 5.0,
        alert_every: float = 600.0,
        **options: Any,
    ) -> None:
        self._trackio = extra("trackio", "trackio")
        self.timeout = timeout
        # It measures no machine: that is for the user's run.
        self._options = {"project": project, "auto_log_cpu": False, "auto_log_gpu": False, **options}
        self._context = contextvars.Context()  # empty: no run is current in it
        self._run: Any = None  # until `start`, and on other ranks
        self._sampling = Sampling(every, dense=100)
        self._alerts = Alerts(alert_every)

    def start(self, config: Mapping[str, Any]) -> None:
        """Opens the run, with the settings as its config."""
        self._sampling.restart()
        if is_rank_zero():
            self._run = self._bounded(lambda: self._trackio.init(**self._options, config=dict(config)), "init")

    def decide(self, decision: Decision) -> None:
        """Alerts where something is wrong; the reasons are the JSONL record's."""
        self._sampling.decided()
        if self._run is not None:
            for kind, text in self._alerts.of_decision(decision):
                self._alert(kind, text)

    def step(self, row: Mapping[str, Any]) -> None:
        """Logs the figures that are known, if this step is one of those to be sent."""
        if self._run is None:
            return
        if self._sampling.picks(row):
            self._log(row)
        for kind, text in self._alerts.of_row(row):
            self._alert(kind, text)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Logs the last step and the summary's numbers, and finishes the run."""
        run, row = self._run, self._sampling.rest()
        if run is None:
            return
        if row is not None:
            self._log(row)
        numbers = {
            f"{PREFIX}summary/{name}": value for name, value in summary.items() if isinstance(value, int | float)
        }
        run.log(numbers, step=summary.get("steps"))
        self._run = None
        self._bounded(run.finish, "finish")

    def _log(self, row: Mapping[str, Any]) -> None:
        self._run.log({PREFIX + name: value for name, value in known(row).items()}, step=row["step"])

    def _alert(self, kind: str, text: str) -> None:
        self._run.alert(title=f"safe_lr: {kind}", text=text)

    def _bounded(self, call: Callable[[], Any], what: str) -> Any:
        return bounded(lambda: self._context.run(call), self.timeout, f"trackio {what}")
