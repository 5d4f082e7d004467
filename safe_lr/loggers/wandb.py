"""Shows a run's learning-rate record in Weights & Biases, without ever being in training's way."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from safe_lr.decisions import Decision
from safe_lr.loggers.alerts import Alert, Alerts
from safe_lr.loggers.bounded import bounded, is_stop_request
from safe_lr.loggers.names import METRICS, PREFIX, known
from safe_lr.loggers.rank import is_rank_zero
from safe_lr.loggers.sampling import Sampling

_SUMMARY = {"lambda_max": "max,last", "gamma": "max,last", "utilisation": "max,last"}
_COLUMNS: list[str | int] = [item.name for item in fields(Decision) if item.name != "limits"]
_MAX_FAILURES = 3
_DENSE = 100  # steps all sent at the beginning


class WandbLogger:
    """Logs rows of `safe_lr/...` scalars to a W&B run, and the decisions as a table at the end.

    It takes part in a run that is the user's, so it keeps to rules that leave the user's own rows alone:

    * Values ride on the user's row (`commit=False`) and never name a W&B step; `safe_lr/step` is their x axis. They
      show as often as the user logs: W&B holds a sample, `JsonlLogger` the record.
    * Sent are the first 100 steps, every `every`-th later on, each with a decision and the last: the client takes half
      a millisecond and more for each call.
    * Every metric is defined by its exact name. Settings go to the config key `safe_lr_resolved`, which no sweep locks.
    * Table and JSONL artifact wait for a server: they are sent once, from `close`. Close the scheduler before you
      finish the run.
    * All calls that may wait for a server, from first to last, wait `timeout` seconds together. What a run of the
      logger's own could not send in that time lies in its folder, for `wandb sync`.
    * An error of W&B's is never raised. The first is reported in one warning; after three, or one call that hangs, the
      logger falls silent. A sweep agent's request to stop the run is passed on.

    With neither `run` nor `init` it uses the run that is active (`wandb.run`), from whatever step there is one, and is
    silent until then. wandb is imported only to open a run or to build the table. In a distributed job only rank 0
    logs.

    Args:
        run: A W&B run. None takes the active one.
        init: Opens a run if there is none by `start`. That run is the logger's own: it commits each row and finishes
            the run.
        project: W&B project of a run that it opens.
        jsonl: A file of `JsonlLogger`'s, attached to the run as an artifact at the end.
        timeout: Longest that W&B may make training wait, all calls together, in seconds. Raise it for a run of the
            logger's own on a slow network.
        table_rows: Decisions in the table; where there were more, the first and last halves.
        alert_every: Least time between two alerts of one kind, in seconds; `safe_lr.loggers.alerts` has the kinds.
        every: Distance of the steps that are sent; 1 sends all.

    Raises:
        TypeError: `run` has no `log`.
        ValueError: `timeout` or `table_rows` is not positive, or `every` no positive integer.

    Example:
        >>> logger = WandbLogger()
        >>> logger.start({"bound": "momentum"})
        >>> logger.step({"step": 0, "lr": 0.1})  # no run is active: nothing happens
        >>> logger.close({})
    """

    def __init__(
        self,
        run: Any = None,
        *,
        init: bool = False,
        project: str = "safe-lr",
        jsonl: str | os.PathLike[str] | None = None,
        timeout: float = 4.0,
        table_rows: int = 10_000,
        alert_every: float = 600.0,
        every: int = 10,
    ) -> None:
        if run is not None and not callable(getattr(run, "log", None)):
            raise TypeError(f"run={run!r} is no W&B run: give what wandb.init() returned, or None for the active run")
        if timeout <= 0 or table_rows <= 0:
            raise ValueError(f"timeout={timeout!r} and table_rows={table_rows!r} must be above 0")
        self.init, self.project, self.timeout = init, project, timeout
        self.jsonl = None if jsonl is None else Path(jsonl)
        self.failures = 0
        self._given = run
        self._run: Any = None  # the run that is logged to, once it has been introduced
        self._owned = False
        self._rank_zero = False  # until `start`
        self._waited = 0.0
        self._config: dict[str, Any] = {}
        self._defined: set[str] = set()
        self._decisions = 0
        self._first: list[Decision] = []
        self._last: deque[Decision] = deque(maxlen=max(1, table_rows // 2))
        self._sampling = Sampling(every, dense=_DENSE)
        self._alerts = Alerts(alert_every)

    def start(self, config: Mapping[str, Any]) -> None:
        """Takes the settings, and opens a run if there is none and `init` was given."""
        self._rank_zero = is_rank_zero()
        self._config = dict(config)
        self._sampling.restart()
        if self.init and self._rank_zero and self._find() is None:
            self._try("init", self._open, waits=True, fatal=True)
        self._attach()

    def decide(self, decision: Decision) -> None:
        """Keeps the decision for the table, and alerts where something is wrong."""
        if not self._rank_zero:
            return
        self._decisions += 1
        half = self._last.maxlen or 1
        (self._first if len(self._first) < half else self._last).append(decision)
        self._sampling.decided()
        if self._attach():
            self._alert(self._alerts.of_decision(decision, swept=bool(getattr(self._run, "sweep_id", None))))

    def step(self, row: Mapping[str, Any]) -> None:
        """Logs the figures that are known, and alerts where the lr that was applied is beyond its limit."""
        if self._attach():
            if self._sampling.picks(row):
                self._try("log", lambda: self._log(row))
            self._alert(self._alerts.of_row(row))

    def close(self, summary: Mapping[str, Any]) -> None:
        """Sends the last row, summary, table and artifact, finishes a run of its own, and lets go of the run."""
        row = self._sampling.rest()
        if self._attach():
            if row is not None:
                self._try("log", lambda: self._log(row))
            self._try("final table", lambda: self._send(summary), waits=True)
        if self._owned and self._run is not None:
            self._try("finish", self._run.finish, waits=True)
        self._rank_zero, self._run, self._given = False, None, None
        self._first.clear()
        self._last.clear()

    def _find(self) -> Any:
        """The given run, else the active one. A wandb that nobody has imported has none."""
        return self._given if self._given is not None else getattr(sys.modules.get("wandb"), "run", None)

    def _open(self) -> None:
        import wandb

        settings = wandb.Settings(init_timeout=self.timeout, finish_timeout=self.timeout)
        run = wandb.init(project=self.project, settings=settings)
        if self.failures >= _MAX_FAILURES:  # too late: nobody waits any longer
            run.finish()
            return
        self._given, self._owned = run, True

    def _attach(self) -> bool:
        """Whether there is a run to log to; introduces safe_lr to a new one."""
        if not self._rank_zero or self.failures >= _MAX_FAILURES:
            return False
        if self._run is None:
            found = self._find()
            if found is not None:
                self._try("attach", lambda: self._introduce(found), waits=True)
        return self._run is not None

    def _introduce(self, run: Any) -> None:
        self._defined.clear()
        run.define_metric(PREFIX + "step", hidden=True)
        for name in METRICS:
            self._define(run, name)
        run.config.update({"safe_lr_resolved": self._config}, allow_val_change=True)
        self._run = run

    def _define(self, run: Any, name: str) -> None:
        """Defines one metric by its exact name: a trainer's earlier `define_metric("*")` beats any pattern."""
        if name not in self._defined:
            summary = _SUMMARY.get(name.partition("/")[0], "last")
            run.define_metric(PREFIX + name, step_metric=PREFIX + "step", summary=summary)
            self._defined.add(name)

    def _log(self, row: Mapping[str, Any]) -> None:
        figures = known(row)
        for name in figures:
            self._define(self._run, name)  # the further groups' names (`lr/g1`) show up here
        payload = {PREFIX + "step": row["step"], **{PREFIX + name: value for name, value in figures.items()}}
        self._run.log(payload, commit=self._owned)

    def _send(self, summary: Mapping[str, Any]) -> None:
        import wandb

        decisions = [decision.to_dict() for decision in (*self._first, *self._last)]
        self._run.summary.update({"safe_lr_summary": {**summary, "decisions": self._decisions}})
        table = wandb.Table(columns=_COLUMNS, data=[[item[str(name)] for name in _COLUMNS] for item in decisions])
        self._run.log({PREFIX + "decisions": table}, commit=self._owned)
        if self.jsonl is not None and self.jsonl.is_file():
            artifact = wandb.Artifact(f"safe_lr-{self._run.id}", type="safe_lr_decisions")
            artifact.add_file(str(self.jsonl), name="decisions.jsonl")
            self._run.log_artifact(artifact)

    def _alert(self, alerts: Iterable[Alert]) -> None:
        for kind, text in alerts:
            alert = partial(self._run.alert, title=f"safe_lr: {kind}", text=text, level="WARN")
            self._try("alert", alert, waits=True)

    def _try(self, what: str, call: Callable[[], Any], *, waits: bool = False, fatal: bool = False) -> None:
        """Makes a call to W&B; an error is counted, not raised. One that hangs, or is `fatal`, counts as the last.

        Args:
            what: Names the call.
            call: Makes it.
            waits: Whether it may wait for a server: then what is left of `timeout` bounds it.
            fatal: Whether there is no use in going on without it.
        """
        silent, begun = self.failures >= _MAX_FAILURES, time.monotonic()
        try:
            bounded(call, max(0.0, self.timeout - self._waited), f"W&B {what}") if waits else call()
        except Exception as error:
            if is_stop_request(error):
                raise
            if "is finished" in str(error):  # the user has finished the run: nothing is wrong, nothing is left to do
                self._run = self._given = None
                return
            self.failures = _MAX_FAILURES if fatal or isinstance(error, TimeoutError) else self.failures + 1
            if not silent:
                self._report(what, error)
        finally:
            self._waited += (time.monotonic() - begun) * waits

    def _report(self, what: str, error: Exception) -> None:
        over = self.failures >= _MAX_FAILURES
        if over or self.failures == 1:
            then = "no more is sent to W&B" if over else "it is tried again"
            message = f"W&B {what} failed ({type(error).__name__}: {error}): training goes on, {then}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
