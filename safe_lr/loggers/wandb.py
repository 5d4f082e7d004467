"""Shows a run's learning-rate record in Weights & Biases, without ever being in training's way."""

from __future__ import annotations

import os
import sys
import threading
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
from safe_lr.loggers.bounded import Begun, bounded, is_stop_request
from safe_lr.loggers.names import METRICS, PREFIX, known
from safe_lr.loggers.rank import is_rank_zero
from safe_lr.loggers.sampling import Sampling

_SUMMARY = {"lambda_max": "max,last", "gamma": "max,last", "utilisation": "max,last"}
_COLUMNS: list[str | int] = [item.name for item in fields(Decision) if item.name != "limits"]
_MAX_FAILURES = 3
_INIT_TIMEOUT = 60.0  # nobody waits for it
_EARLY = 200  # rows and alerts kept while a run is being opened
_TO_BEGIN = 0.2  # a finish that has begun ends with the process; W&B waits seconds for one that has not
_DENSE = 100  # steps all sent at the beginning


class WandbLogger:
    """Logs rows of `safe_lr/...` scalars to a W&B run, and the decisions as a table at the end.

    It takes part in a run that is the user's, so it keeps to rules that leave the user's own rows alone:

    * Values ride on the user's row (`commit=False`) and never name a W&B step; `safe_lr/step` is their x axis. They
      show as often as the user logs: W&B holds a sample, `JsonlLogger` the record.
    * Sent are the first 100 steps, every `every`-th later on, each with a decision and the last: the client takes half
      a millisecond and more for each call.
    * Every metric is defined by its exact name. Settings go to the config key `safe_lr_resolved`, which no sweep locks.
    * Table and JSONL artifact wait for a server: they are sent once, from `close`, side by side, so that one which
      hangs does not cost the other. Close the scheduler before you finish the run.
    * Training does not wait for a run of the logger's own to be opened. Calls that fail later may make it wait
      `timeout` seconds, all together. What the run could not send in that time lies in its folder, for `wandb sync`.
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
        timeout: Longest that failing calls may make training wait, all together, in seconds. Raise it on a slow
            network.
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
        timeout: float = 2.0,
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
        self._opening: threading.Thread | None = None
        self._opened: Any = None  # the run that it opened, or why it could not
        self._early: deque[tuple[str, Callable[[], Any]]] = deque(maxlen=_EARLY)
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
            self._opening = threading.Thread(target=self._open, name="safe_lr W&B init", daemon=True)
            self._opening.start()
        self._attach()

    def decide(self, decision: Decision) -> None:
        """Keeps the decision for the table, and alerts where something is wrong."""
        if not self._rank_zero:
            return
        self._decisions += 1
        half = self._last.maxlen or 1
        (self._first if len(self._first) < half else self._last).append(decision)
        self._sampling.decided()
        attached = self._attach()
        if attached or self._opening is not None:
            swept = getattr(self._run, "sweep_id", None) or os.environ.get("WANDB_SWEEP_ID")
            self._alert(self._alerts.of_decision(decision, swept=bool(swept)))

    def step(self, row: Mapping[str, Any]) -> None:
        """Logs the figures that are known, and alerts where the lr that was applied is beyond its limit."""
        attached = self._attach()
        if attached or self._opening is not None:
            if self._sampling.picks(row):
                self._tell("log", lambda: self._log(row))
            self._alert(self._alerts.of_row(row))

    def close(self, summary: Mapping[str, Any]) -> None:
        """Sends the last row, summary, table and artifact, finishes a run of its own, and lets go of the run."""
        row = self._sampling.rest()
        if self._opening is not None:
            self._try("init", self._wait_for_run, fatal=True)
        if self._attach():
            if row is not None:
                self._tell("log", lambda: self._log(row))
            self._tell("final summary", partial(self._summarise, self._run, summary))
            decisions = [*self._first, *self._last]
            sending = [("table", partial(self._send_table, self._run, decisions))]
            if self.jsonl is not None and self.jsonl.is_file():
                sending.append(("artifact", partial(self._send_record, self._run, self.jsonl)))
            for what, call in [(what, Begun(call, f"W&B {what}")) for what, call in sending]:
                self._try(what, partial(call.result, self._patience), last=True)
        if self._owned and self._run is not None:
            self._try("finish", self._run.finish, wait=max(_TO_BEGIN, self._patience))
        self._rank_zero, self._run, self._given = False, None, None
        self._first.clear()
        self._last.clear()

    def _find(self) -> Any:
        """The given run, else the active one. A wandb that nobody has imported has none."""
        return self._given if self._given is not None else getattr(sys.modules.get("wandb"), "run", None)

    def _open(self) -> None:
        """Opens a run, in a thread of its own."""
        try:
            import wandb

            settings = wandb.Settings(init_timeout=_INIT_TIMEOUT, finish_timeout=self.timeout)
            self._opened = wandb.init(project=self.project, settings=settings)
            if self._opening is None:  # too late: nobody waits any longer
                self._opened.finish()
        except BaseException as error:  # noqa: BLE001 (reported from the training thread; it may not end the process)
            self._opened = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")

    def _wait_for_run(self) -> None:
        if self._opening is not None:
            self._opening.join(self._patience)
            if self._opening.is_alive():
                self._opening = None
                _abandon_service()
                raise TimeoutError(f"no run could be opened until {self.timeout:g} s after the end of training")
            self._take_over()

    def _take_over(self) -> None:
        self._opening = None
        if isinstance(self._opened, Exception):
            raise self._opened
        self._given, self._owned = self._opened, True

    def _attach(self) -> bool:
        """Whether there is a run to log to; introduces safe_lr to a new one."""
        if not self._rank_zero or self.failures >= _MAX_FAILURES:
            return False
        if self._opening is not None:
            if self._opening.is_alive():
                return False
            self._try("init", self._take_over, fatal=True)
        if self._run is None and self.failures < _MAX_FAILURES:
            found = self._find()
            if found is not None:
                self._try("attach", lambda: self._introduce(found), wait=self._patience)
        return self._run is not None

    def _introduce(self, run: Any) -> None:
        self._defined.clear()
        run.define_metric(PREFIX + "step", hidden=True)
        for name in METRICS:
            self._define(run, name)
        run.config.update({"safe_lr_resolved": self._config}, allow_val_change=True)
        self._run = run
        while self._early:
            self._try(*self._early.popleft())

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

    def _summarise(self, run: Any, summary: Mapping[str, Any]) -> None:
        run.summary.update({"safe_lr_summary": {**summary, "decisions": self._decisions}})

    def _send_table(self, run: Any, decisions: Iterable[Decision]) -> None:
        import wandb

        rows = [[item[str(name)] for name in _COLUMNS] for item in map(Decision.to_dict, decisions)]
        run.log({PREFIX + "decisions": wandb.Table(columns=_COLUMNS, data=rows)}, commit=self._owned)

    def _send_record(self, run: Any, path: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"safe_lr-{run.id}", type="safe_lr_decisions")
        artifact.add_file(str(path), name="decisions.jsonl")
        run.log_artifact(artifact)

    def _alert(self, alerts: Iterable[Alert]) -> None:
        for kind, text in alerts:
            self._tell("alert", partial(self._warn_owner, f"safe_lr: {kind}", text))

    def _warn_owner(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text, level="WARN")

    def _tell(self, what: str, call: Callable[[], Any]) -> None:
        """Makes a call that does not wait for a server; later, while a run is being opened."""
        if self._run is not None:
            self._try(what, call)
        else:
            self._early.append((what, call))

    @property
    def _patience(self) -> float:
        """Seconds that failing calls may still wait."""
        return max(0.0, self.timeout - self._waited)

    def _try(
        self,
        what: str,
        call: Callable[[], Any],
        *,
        wait: float | None = None,
        fatal: bool = False,
        last: bool = False,
    ) -> None:
        """Makes a call to W&B; an error is counted, not raised. One that hangs, or is `fatal`, counts as the last.

        Args:
            what: Names the call.
            call: Makes it.
            wait: Bounds one that may wait for a server, in seconds.
            fatal: Whether there is no use in going on without it.
            last: Whether it is one that is made once.
        """
        silent, begun = self.failures >= _MAX_FAILURES, time.monotonic()
        try:
            call() if wait is None else bounded(call, wait, f"W&B {what}")
        except Exception as error:
            if is_stop_request(error):
                raise
            if "is finished" in str(error):  # the user has finished the run: nothing is wrong, nothing is left to do
                self._run = self._given = None
                return
            self._waited += time.monotonic() - begun
            self.failures = _MAX_FAILURES if fatal or isinstance(error, TimeoutError) else self.failures + 1
            if not silent:
                self._report(what, error, last)

    def _report(self, what: str, error: Exception, last: bool) -> None:
        over = self.failures >= _MAX_FAILURES
        if over or self.failures == 1:
            then = "no more is sent to W&B" if over else "it is not sent" if last else "it is tried again"
            message = f"W&B {what} failed ({type(error).__name__}: {error}): training goes on, {then}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)


def _abandon_service() -> None:
    """Keeps W&B's exit hook from waiting for a run that is being opened; no run is active that this could hurt."""
    module = sys.modules.get("wandb")
    if module is not None and module.run is None:
        # The hook is taken away at once; what waits after that is a thread that ends with the process.
        threading.Thread(target=module.teardown, name="safe_lr W&B teardown", daemon=True).start()
        time.sleep(_TO_BEGIN)
