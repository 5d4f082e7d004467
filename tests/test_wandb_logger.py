"""The W&B logger: what a run is told, by a played client, by the real one offline, and that it is never in the way."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safe_lr.loggers import Logger, WandbLogger, is_stop_request, resolve
from tests.played import Quiet, cap_at, in_another_process, play

# ---- W&B, played


class FakeRun:
    """Remembers what it is told; `fails` maps a method's name to what it raises, or to seconds that it hangs."""

    id = "abc"

    def __init__(self, **fails: Exception | float) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails = fails
        self.config = self.summary = self

    def _call(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.calls.append((name, (args, kwargs)))
        fail = self.fails.get(name)
        if isinstance(fail, Exception):
            raise fail
        if fail is not None:
            time.sleep(fail)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._call(name, *args, **kwargs)

    def of(self, name: str) -> list[Any]:
        return [call for called, call in self.calls if called == name]


def started(run: FakeRun, **options: Any) -> WandbLogger:
    logger = WandbLogger(run, **options)
    logger.start({"bound": "momentum"})
    return logger


def rows(logger: Logger, count: int) -> None:
    for step in range(count):
        logger.step({"step": step, "lr": 0.1})


def test_it_rides_on_the_users_row() -> None:
    run = FakeRun()
    logger = started(run)
    logger.step({"step": 3, "lr": 0.1, "gamma": None, "lr/g1": 0.2, "note": "no metric"})
    assert run.of("log") == [(({"safe_lr/step": 3, "safe_lr/lr": 0.1, "safe_lr/lr/g1": 0.2},), {"commit": False})]
    assert run.of("update") == [(({"safe_lr_resolved": {"bound": "momentum"}},), {"allow_val_change": True})]
    defined = {args[0]: options for args, options in run.of("define_metric")}
    assert defined.pop("safe_lr/step") == {"hidden": True}
    assert "safe_lr/lr/g1" in defined
    assert len(defined) == len(run.of("define_metric")) - 1  # each once
    assert not any("*" in name for name in defined)
    assert {options["step_metric"] for options in defined.values()} == {"safe_lr/step"}


def test_a_sick_client_is_left_alone_after_three_failures() -> None:
    run = FakeRun(log=ConnectionError("refused"))
    logger = started(run)
    with pytest.warns(RuntimeWarning, match=r"W&B log failed \(ConnectionError: refused\)") as caught:
        rows(logger, 50)
    assert len(run.of("log")) == 3
    assert len(caught) == 2
    assert "training goes on" in str(caught[0].message)
    assert "no more is sent" in str(caught[1].message)
    logger.close({})
    assert len(run.of("log")) == 3


def test_a_client_that_cannot_be_attached_to_is_left_alone() -> None:
    run = FakeRun(define_metric=RuntimeError("no"))
    with pytest.warns(RuntimeWarning, match="W&B attach failed"):
        rows(started(run), 9)
    assert (len(run.of("define_metric")), run.of("log")) == (3, [])


@pytest.mark.parametrize("where", ["define_metric", "log", "alert"])
def test_the_sweep_agents_stop_is_passed_on(where: str) -> None:
    run = FakeRun(**{where: Exception()})

    def train() -> None:
        logger = started(run)
        logger.step({"step": 0, "lr": 0.1})
        logger.decide(cap_at(0, failure="nan"))

    with pytest.raises(Exception) as caught:
        train()
    assert is_stop_request(caught.value)


def test_a_hanging_server_costs_one_timeout() -> None:
    pytest.importorskip("wandb")
    run = FakeRun(log_artifact=30.0, update=0.0)
    logger = started(run, timeout=0.3, jsonl=__file__)
    logger.decide(cap_at(0))
    begun = time.monotonic()
    with pytest.warns(RuntimeWarning, match=r"took longer than 0.\d+ s"):
        logger.close({"steps": 1})
    assert time.monotonic() - begun < 5.0
    assert len(run.of("log_artifact")) == 1


def test_a_failing_artifact_is_reported_as_not_sent_and_the_table_is_sent() -> None:
    pytest.importorskip("wandb")
    run = FakeRun(log_artifact=ConnectionError("refused"))
    logger = started(run, jsonl=__file__)
    with pytest.warns(RuntimeWarning, match=r"W&B artifact failed \(ConnectionError: refused\).*it is not sent"):
        logger.close({"steps": 1})
    assert any("safe_lr/decisions" in args[0] for args, _ in run.of("log"))
    assert {"safe_lr_summary": {"steps": 1, "decisions": 0}} in [args[0] for args, _ in run.of("update")]


def test_alerts_are_few() -> None:
    run = FakeRun()
    logger = started(run, alert_every=600.0)
    for step in range(20):
        logger.decide(cap_at(step, failure="loss is nan"))
        logger.step({"step": step, "lr": 0.1, "utilisation": 1.4, "margin": 1.5})  # learned: no news
        logger.step({"step": step, "lr": 0.1, "utilisation": None if step < 9 else 1.4, "margin": 0.5})
    titles = [options["title"] for _, options in run.of("alert")]
    assert titles == ["safe_lr: measurement failed", "safe_lr: instability"]
    assert all(len(title) < 64 for title in titles)


def test_a_finished_run_is_let_go_of_quietly() -> None:
    run = FakeRun(log=RuntimeError("Run (abc) is finished. The call to `log` will be ignored."))
    logger = started(run)
    rows(logger, 5)
    logger.close({})
    assert len(run.of("log")) == 1


def test_it_is_silent_on_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    run = FakeRun()
    play([WandbLogger(run)], 30)
    assert run.calls == []


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match=r"is no W&B run: give what wandb.init\(\) returned"):
        WandbLogger("my-project")
    with pytest.raises(ValueError, match="timeout=0"):
        WandbLogger(timeout=0)


def test_no_wandb_is_imported_without_need() -> None:
    assert in_another_process("play([WandbLogger()], 30); sys.exit(any(n == 'wandb' for n in sys.modules))") == 0


# ---- W&B, the real client, offline


@pytest.fixture
def wandb(tmp_path: Path) -> Iterator[Any]:
    """The module, with its service stopped afterwards."""
    client = pytest.importorskip("wandb")
    yield client
    client.teardown()


def offline(client: Any, folder: Path) -> Any:
    settings = client.Settings(mode="offline", silent=True, console="off", disable_git=True, x_disable_stats=True)
    return client.init(dir=folder, project="test", settings=settings)


def inspect(client: Any, folder: Path) -> dict[str, list[Any]]:
    """Reads the only run below `folder` with W&B's own reader: records by type."""
    client.teardown()  # `finish` may return before the file is complete
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found: dict[str, list[Any]] = {}
    for record in map(json.loads, text.splitlines()):
        found.setdefault(record["type"], []).append(record.get(record["type"]))
    return found


def test_a_user_who_logs_with_step_loses_nothing(wandb: Any, tmp_path: Path) -> None:
    run = offline(wandb, tmp_path)
    run.define_metric("*", step_metric="epoch")  # as trainers do
    path = tmp_path / "decisions.jsonl"
    loggers = resolve("auto", path)

    class User(Quiet):
        def step(self, row: Any) -> None:
            run.log({"loss": 1.0 / (1 + row["step"])}, step=row["step"])

    told = play([*loggers, User()], 40)
    run.finish()
    found = inspect(wandb, tmp_path)
    history = [entry["item"] for entry in found["history"]]
    losses = {row["_step"]: row["loss"] for row in history if "loss" in row}
    assert losses == {step: pytest.approx(1.0 / (1 + step)) for step in range(40)}
    assert sum("safe_lr/lr" in row for row in history) >= 39
    for row in history:
        if "safe_lr/lr" in row:
            assert row["safe_lr/lr"] == pytest.approx(told["rows"][row["safe_lr/step"]]["lr"])
    assert any(key.startswith("safe_lr/decisions") for key in history[-1])  # the table
    assert len(found["artifact"]) >= 1
    metrics = {entry["name"]: entry for entry in found["metric"] if "name" in entry}
    assert metrics["safe_lr/gamma"]["step_metric"] == "safe_lr/step"
    configs = json.dumps([found.get("config"), found.get("run")])
    assert "safe_lr_resolved" in configs


def test_it_attaches_to_a_run_that_begins_later(wandb: Any, tmp_path: Path) -> None:
    logger = WandbLogger()
    logger.start({"bound": "momentum"})
    logger.step({"step": 0, "lr": 0.5})
    run = offline(wandb, tmp_path)
    logger.step({"step": 1, "lr": 0.25})
    run.log({"loss": 1.0})
    logger.close({"steps": 2})
    run.finish()
    history = [entry["item"] for entry in inspect(wandb, tmp_path)["history"]]
    assert [(row["safe_lr/step"], row["safe_lr/lr"]) for row in history if "loss" in row] == [(1, 0.25)]


def test_it_opens_commits_and_finishes_a_run_of_its_own(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    play([WandbLogger(init=True)], 12)
    assert wandb.run is None
    history = [entry["item"] for entry in inspect(wandb, tmp_path)["history"]]
    assert [row["safe_lr/step"] for row in history if "safe_lr/lr" in row] == list(range(12))


def test_a_run_that_cannot_be_opened_does_not_stop_training(wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise wandb.errors.CommError("refused")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.warns(RuntimeWarning, match="W&B init failed"):
        play([WandbLogger(init=True)], 5)
