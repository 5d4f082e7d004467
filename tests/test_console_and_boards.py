"""The console, TensorBoard and trackio loggers, and what they share: which rows are sent, what is worth an alert."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from safe_lr.decisions import Decision
from safe_lr.loggers import ConsoleLogger, TensorBoardLogger, TrackioLogger
from safe_lr.loggers.alerts import Alerts
from safe_lr.loggers.console import line
from safe_lr.loggers.names import METRICS
from safe_lr.loggers.sampling import Sampling
from tests.played import cap_at, play

# ---- which rows, which alerts


def test_rows_after_decisions_are_picked_and_the_last_is_handed_out_once() -> None:
    sampling, picked = Sampling(every=10, dense=2), []
    for step in range(3, 26):
        if step == 17:
            sampling.decided()
        if sampling.picks({"step": step}):
            picked.append(step)
    assert picked == [3, 4, 10, 17, 20]
    assert sampling.rest() == {"step": 25}
    assert sampling.rest() is None


def kinds(alerts: Alerts, decision: Decision, **options: Any) -> list[str]:
    return [kind for kind, _ in alerts.of_decision(decision, **options)]


def test_alerts_know_a_jump_a_spike_and_a_failure_from_noise() -> None:
    alerts = Alerts(every=0.0)
    for step, (gamma, loss) in enumerate([(10.0, 1.0), (39.0, 2.9), (11.0, 0.5)]):
        assert kinds(alerts, cap_at(step, gamma=gamma, loss=loss)) == []
    assert kinds(alerts, cap_at(3, gamma=44.0, loss=2.9 * 3)) == ["curvature jump"]
    assert kinds(alerts, cap_at(4, gamma=44.0, loss=8.8 * 3)) == ["instability"]
    assert kinds(alerts, cap_at(5, failure="loss is nan")) == ["measurement failed"]


def test_an_unsafe_sweep_point_is_told_once_and_only_in_a_sweep() -> None:
    alerts = Alerts(every=0.0)
    assert kinds(alerts, cap_at(0, lr_limit=0.5)) == []
    assert kinds(alerts, cap_at(0, lr_limit=1.5), swept=True) == []  # lr 1 is below it
    assert kinds(alerts, cap_at(0, lr_limit=0.5), swept=True) == ["unsafe sweep point"]
    assert kinds(alerts, cap_at(1, lr_limit=0.5), swept=True) == []


def test_alerts_of_one_kind_keep_their_distance() -> None:
    now = [0.0]
    alerts = Alerts(every=60.0, clock=lambda: now[0])
    told = []
    for second in range(0, 200, 10):
        now[0] = float(second)
        told += [second for _ in alerts.of_decision(cap_at(second, failure="x"))]
    assert told == [0, 60, 120, 180]


# ---- console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_stream_that_is_no_terminal_stays_empty_and_needs_no_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    stream = io.StringIO()
    play([ConsoleLogger(stream=stream)], 50)
    assert stream.getvalue() == ""


def test_a_terminal_without_rich_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"pip install 'safe_lr\[console\]'"):
        ConsoleLogger(stream=Terminal())


def test_a_terminal_shows_the_line_and_failures_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    stream, now = Terminal(), [0.0]
    logger = ConsoleLogger(total=600, stream=stream, clock=lambda: now[0])
    told = play([logger], 600)
    shown = stream.getvalue()
    assert "step 600 of 600" in shown
    assert line(told["rows"][-1]) in shown
    assert shown.count("step ") < 20  # the clock stands still: drawn at first, with what is printed, and at last
    assert "safe_lr: measurement failed: Step 475" in shown
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back
    drawn = len(shown)
    logger.close({})
    assert len(stream.getvalue()) == drawn


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"lr": 0.1, "capped": 1, "cap": 0.1}, "capped (1 desired)"),
        ({"lr": 0.1, "capped": 0, "cap": 0.12}, "close to the cap 0.12"),
        ({"lr": 0.1, "capped": 0, "cap": 1.0}, "clear of the cap 1"),
        ({"lr": 0.1, "capped": 0, "cap": None}, "no limit known yet"),
        ({"lr": 0.1, "capped": 1, "cap": 0.1, "utilisation": 1.2}, "beyond the linear limit"),
    ],
)
def test_the_line_says_it_in_words(figures: dict[str, Any], words: str) -> None:
    assert words in line({"lr_desired": 1.0, "margin": 0.5, **figures})


# ---- TensorBoard


def test_tensorboard_holds_the_figures_by_step_and_the_reasons(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = play([TensorBoardLogger(tmp_path)], 60)
    found = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    rows = {row["step"]: row for row in told["rows"]}
    scalars = {event.step: event.value for event in found.Scalars("safe_lr/lr")}
    assert set(scalars) == {0, 10, 20, 25, 30, 40, 50, 59}
    assert scalars == {step: pytest.approx(rows[step]["lr"]) for step in scalars}
    assert "safe_lr/lr/g1" in found.Tags()["scalars"]
    assert {name.split("/")[1] for name in found.Tags()["scalars"]} <= set(METRICS)
    reasons = [e.tensor_proto.string_val[0].decode() for e in found.Tensors("safe_lr/decisions/text_summary")]
    assert [reason.partition("** ")[2] for reason in reasons] == [decision.reason for decision in told["decisions"]]


def test_a_users_tensorboard_writer_stays_open(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path))
    play([TensorBoardLogger(writer)], 5)
    writer.add_scalar("loss", 1.0, 5)
    writer.close()
    with pytest.raises(TypeError, match="give a SummaryWriter, a folder, or None"):
        TensorBoardLogger(3)


# ---- trackio


class PlayedRun:
    """A trackio `Run`, as trackio documents it: `log`, `alert`, `finish`."""

    def __init__(self, project: str, config: dict[str, Any]) -> None:
        self.project, self.config = project, config
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.alerts: list[str] = []
        self.finished = False

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        assert not self.finished
        self.rows.append((step, metrics))

    def alert(self, title: str, text: str | None = None) -> None:
        self.alerts.append(title)

    def finish(self) -> None:
        self.finished = True


def test_trackio_gets_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[PlayedRun] = []

    def init(project: str, *, config: dict[str, Any], auto_log_cpu: bool, auto_log_gpu: bool) -> PlayedRun:
        runs.append(PlayedRun(project, config))
        return runs[-1]

    played = types.ModuleType("trackio")
    vars(played)["init"] = init
    monkeypatch.setitem(sys.modules, "trackio", played)
    told = play([TrackioLogger("mine")], 600)
    (run,) = runs
    assert (run.project, run.config["bound"], run.finished) == ("mine", "momentum", True)
    assert [step for step, _ in run.rows[:100]] == list(range(100))
    assert [step for step, _ in run.rows[-2:]] == [599, 600]
    assert run.rows[-1][1]["safe_lr/summary/failures"] == told["failures"]
    for step, figures in run.rows[:-1]:
        assert step is not None
        assert figures["safe_lr/lr"] == told["rows"][step]["lr"]
    assert "safe_lr: measurement failed" in run.alerts


def test_real_trackio_keeps_it_and_leaves_the_users_run_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trackio = pytest.importorskip("trackio")
    users = trackio.init(project="mine", name="users", auto_log_cpu=False, auto_log_gpu=False)
    loss = 0
    logger = TrackioLogger("mine", name="ours")
    told = play([logger], 20, end=False)
    trackio.log({"loss": loss})
    logger.close({"steps": 20})
    trackio.log({"loss": loss + 1})
    users.finish()
    trackio.context_vars.current_run.set(None)
    runs = {run.name: run for run in trackio.Api().runs("mine")}
    assert set(runs) == {"users", "ours"}
    assert runs["ours"].config["bound"] == "momentum"
    kept = {name: trackio.sqlite_storage.SQLiteStorage.get_logs("mine", name) for name in runs}
    assert [row["loss"] for row in kept["users"]] == [0, 1], "the user's rows and steps are their own"
    assert [row["step"] for row in kept["users"]] == [0, 1]
    assert [row["step"] for row in kept["ours"]] == [*range(20), 20]
    assert [row["safe_lr/lr"] for row in kept["ours"][:-1]] == [pytest.approx(row["lr"]) for row in told["rows"]]
    assert kept["ours"][-1]["safe_lr/summary/steps"] == 20


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, extra, make in (
        ("trackio", "trackio", TrackioLogger),
        ("torch.utils.tensorboard", "tensorboard", TensorBoardLogger),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"pip install 'safe_lr\[{extra}\]'"):
            make()
