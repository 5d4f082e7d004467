"""Shows a run's learning-rate record in Weights & Biases, without ever being in training's way."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safe_lr.decisions import Decision
from safe_lr.loggers.bounded import bounded, is_stop_request
from safe_lr.loggers.rank import is_rank_zero

PREFIX = "safe_lr/"
METRICS = (
    *("lr", "lr_desired", "lr_limit", "cap", "margin", "utilisation", "gamma", "lambda_max", "p_min", "p_eff"),
    *("beta1", "beta2", "capped", "cost"),
)
_SUMMARY = {"lambda_max": "max,last", "gamma": "max,last", "utilisation": "max,last"}
_COLUMNS: list[str | int] = [item.name for item in fields(Decision) if item.name != "limits"]
_MAX_FAILURES = 3
_INIT_TIMEOUT, _FINISH_TIMEOUT = 20, 30


class WandbLogger:
    """Logs one row of `safe_lr/...` scalars a step to a W&B run, and the decisions as a table at the end.

    It takes part in a run that is the user's, so it keeps to rules that leave the user's own rows alone:

    * Values ride on the user's row (`commit=False`) and never name a W&B step; `safe_lr/step` is their x axis. They
      show as often as the user logs: W&B holds a sample, `JsonlLogger` the record.
    * Every metric is defined by its exact name. Settings go to the config key `safe_lr_resolved`, which no sweep locks.
    * Table and JSONL artifact wait for a server: they are sent once, from `close`, and waited for `timeout` seconds.
      Close the scheduler before you finish the run.
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
        timeout: Longest wait for a call that may reach the server, in seconds.
        table_rows: Decisions in the table; where there were more, the first and last halves.
        alert_every: Least time between two alerts of one kind, in seconds. Alerts tell of a failed measurement, and of
            an lr beyond the linear limit that no learned margin has asked for.

    Raises:
        TypeError: `run` has no `log`.
        ValueError: `timeout` or `table_rows` is not positive.

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
        timeout: float = 5.0,
        table_rows: int = 10_000,
        alert_every: float = 600.0,
    ) -> None:
        if run is not None and not callable(getattr(run, "log", None)):
            raise TypeError(f"run={run!r} is no W&B run: give what wandb.init() returned, or None for the active run")
        if timeout <= 0 or table_rows <= 0:
            raise ValueError(f"timeout={timeout!r} and table_rows={table_rows!r} must be above 0")
        self.init, self.project, self.timeout, self.alert_every = init, project, timeout, alert_every
        self.jsonl = None if jsonl is None else Path(jsonl)
        self.failures = 0
        self._given = run
        self._run: Any = None  # the run that is logged to, once it has been introduced
        self._owned = False
        self._rank_zero = False  # until `start`
        self._config: dict[str, Any] = {}
        self._defined: set[str] = set()
        self._first: list[Decision] = []
        self._last: deque[Decision] = deque(maxlen=max(1, table_rows // 2))
        self._alerted: dict[str, float] = {}

    def start(self, config: Mapping[str, Any]) -> None:
        """Takes the settings, and opens a run if there is none and `init` was given."""
        self._rank_zero = is_rank_zero()
        self._config = dict(config)
        if self.init and self._rank_zero and self._find() is None:
            self._try("init", self._open, _INIT_TIMEOUT + self.timeout, fatal=True)
        self._attach()

    def decide(self, decision: Decision) -> None:
        """Keeps the decision for the table, and alerts where a measurement failed."""
        if not self._rank_zero:
            return
        half = self._last.maxlen or 1
        (self._first if len(self._first) < half else self._last).append(decision)
        if decision.failure is not None:
            self._alert("measurement failed", f"Step {decision.step}: {decision.failure}. {decision.reason}")

    def step(self, row: Mapping[str, Any]) -> None:
        """Logs the figures that are known, and alerts where the lr that was applied is beyond its limit."""
        if self._attach():
            self._try("log", lambda: self._log(row))
            used, margin = row.get("utilisation") or 0.0, row.get("margin") or 0.0
            if used > 1.0 and margin <= 1.0:  # a learned margin above 1 asks for it
                text = f"Step {row['step']}: lr {row['lr']:.3g} is {used:.3g} times the largest stable lr"
                self._alert("lr is beyond its limit", text)

    def close(self, summary: Mapping[str, Any]) -> None:
        """Sends summary, table and artifact, finishes a run of its own, and lets go of the run."""
        if self._attach():
            self._try("final table", lambda: self._send(summary), self.timeout)
            if self._owned and self._run is not None:
                self._try("finish", self._run.finish, _FINISH_TIMEOUT + self.timeout)
        self._rank_zero, self._run, self._given = False, None, None
        self._first.clear()
        self._last.clear()

    def _find(self) -> Any:
        """The given run, else the active one. A wandb that nobody has imported has none."""
        return self._given if self._given is not None else getattr(sys.modules.get("wandb"), "run", None)

    def _open(self) -> None:
        import wandb

        settings = wandb.Settings(init_timeout=_INIT_TIMEOUT, finish_timeout=_FINISH_TIMEOUT)
        self._given = wandb.init(project=self.project, settings=settings)
        self._owned = True

    def _attach(self) -> bool:
        """Whether there is a run to log to; introduces safe_lr to a new one."""
        if not self._rank_zero or self.failures >= _MAX_FAILURES:
            return False
        if self._run is None:
            found = self._find()
            if found is not None:
                self._try("attach", lambda: self._introduce(found), self.timeout)
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
        known = {name: value for name, value in row.items() if value is not None and name.partition("/")[0] in METRICS}
        for name in known:
            self._define(self._run, name)  # the further groups' names (`lr/g1`) show up here
        payload = {PREFIX + "step": row["step"], **{PREFIX + name: value for name, value in known.items()}}
        self._run.log(payload, commit=self._owned)

    def _send(self, summary: Mapping[str, Any]) -> None:
        import wandb

        decisions = [decision.to_dict() for decision in (*self._first, *self._last)]
        self._run.summary.update({"safe_lr_summary": dict(summary)})
        table = wandb.Table(columns=_COLUMNS, data=[[item[str(name)] for name in _COLUMNS] for item in decisions])
        self._run.log({PREFIX + "decisions": table}, commit=self._owned)
        if self.jsonl is not None and self.jsonl.is_file():
            artifact = wandb.Artifact(f"safe_lr-{self._run.id}", type="safe_lr_decisions")
            artifact.add_file(str(self.jsonl), name="decisions.jsonl")
            self._run.log_artifact(artifact)

    def _alert(self, kind: str, text: str) -> None:
        now = time.monotonic()
        if not self._attach() or now - self._alerted.get(kind, -self.alert_every) < self.alert_every:
            return
        self._alerted[kind] = now
        run = self._run
        self._try("alert", lambda: run.alert(title=f"safe_lr: {kind}", text=text, level="WARN"), self.timeout)

    def _try(self, what: str, call: Callable[[], Any], timeout: float | None = None, *, fatal: bool = False) -> None:
        """Makes a call to W&B; an error is counted, not raised. One that hangs, or is `fatal`, counts as the last."""
        try:
            call() if timeout is None else bounded(call, timeout, f"W&B {what}")
        except Exception as error:
            if is_stop_request(error):
                raise
            if "is finished" in str(error):  # the user has finished the run: nothing is wrong, nothing is left to do
                self._run = self._given = None
                return
            self.failures = _MAX_FAILURES if fatal or isinstance(error, TimeoutError) else self.failures + 1
            self._report(what, error)

    def _report(self, what: str, error: Exception) -> None:
        over = self.failures >= _MAX_FAILURES
        if over or self.failures == 1:
            then = "no more is sent to W&B" if over else "it is tried again"
            message = f"W&B {what} failed ({type(error).__name__}: {error}): training goes on, {then}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
