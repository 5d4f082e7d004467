"""The W&B logger with the real client and a server on loopback: runs, resumed runs, sweeps, a server that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.logging import WHENS, Training, failure, spawn
from safe_lr.loggers import JsonlLogger, WandbLogger, read_jsonl
from safe_lr.loggers.names import METRICS
from tests.played import cap_at
from tests.wandb_server import FAILURES, Run, WandbServer

wandb = pytest.importorskip("wandb")

pytestmark = [  # wandb's own: its sweeps read a setting that it has deprecated, and leave their config files open
    pytest.mark.filterwarnings("ignore:.*app_url:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*/sweep-:pytest.PytestUnraisableExceptionWarning"),
]

AT_MOST_LATER = 5.0  # seconds


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that clients in this process find, and in processes that it starts."""
    wandb.teardown()  # a client keeps the settings that it began with
    with WandbServer() as found:
        for name, value in found.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        monkeypatch.setenv("WANDB_CONSOLE", "off")
        yield found
        assert found.unknown == []
        wandb.teardown()


def quiet(**options: Any) -> Any:
    return wandb.init(project="p", settings=wandb.Settings(disable_git=True, x_disable_stats=True), **options)


def ours(run: Run) -> dict[int, dict[str, float]]:
    """The run's rows that hold figures of ours, by their step, with the prefix taken off."""
    found = {}
    for row in run.history:
        figures = {name.removeprefix("safe_lr/"): value for name, value in row.items() if name.startswith("safe_lr/")}
        figures.pop("decisions", None)  # the table
        if "lr" in figures:
            found[int(figures["step"])] = figures
    return found


def test_an_online_run_holds_figures_settings_summary_table_artifact_and_the_users_rows(
    server: WandbServer, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    run = quiet()
    training = Training(log_path=path, lambda_every=1)
    for step in range(130):
        training.step()
        run.log({"loss": float(step)}, step=step)
    training.scheduler.close()
    run.finish()

    found = server.run(run.id)
    assert {row["_step"]: row["loss"] for row in found.history if "loss" in row} == {s: float(s) for s in range(130)}
    record = read_jsonl(path)
    written = {int(row["step"]): row for row in record.rows}
    shown = ours(found)
    assert {*range(1, 100), 100, 110, 120, 129} <= set(shown)  # W&B merges step 0's row into the next one's
    for step in set(shown) & set(written):
        assert shown[step] == pytest.approx(written[step])
    assert set(METRICS) <= set(shown[129])
    defined = {metric["1"] for metric in found.metrics}
    assert {f"safe_lr/{name}" for name in (*METRICS, "step")} <= defined
    assert found.settings["safe_lr_resolved"]["bound"] == "momentum"

    assert record.summary is not None
    summary = found.summary["safe_lr_summary"]
    assert summary == {**record.summary, "decisions": len(record.decisions)}
    assert {"capped_steps", "overhead", "worst_utilisation", "first_capped_step"} <= set(summary)

    artifacts = {item["input"]["artifactTypeName"]: item for item in server.artifacts.values()}
    assert artifacts["safe_lr_decisions"]["files"]["decisions.jsonl"] == path.read_bytes()
    (table,) = (content for name, content in artifacts["run_table"]["files"].items() if name.endswith(".table.json"))
    rows = json.loads(table)
    assert [row[rows["columns"].index("reason")] for row in rows["data"]] == [d.reason for d in record.decisions]
    assert all(item["state"] == "COMMITTED" for item in server.artifacts.values())


@pytest.mark.parametrize(
    ("stuck", "arrives"), [("run-{}-", "safe_lr_decisions"), ("safe_lr-{}", "run_table")], ids=["table", "artifact"]
)
def test_an_upload_that_hangs_does_not_cost_the_other(
    stuck: str, arrives: str, server: WandbServer, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    run = quiet()
    training = Training(loggers=[JsonlLogger(path), WandbLogger(jsonl=path)])
    for step in range(15):
        training.step()
        run.log({"loss": 1.0}, step=step)
    server.stuck = stuck.format(run.id)  # the client asks for the latest version of that name, in the caller's thread
    begun = time.monotonic()
    with pytest.warns(RuntimeWarning, match=r"W&B (table|artifact) failed \(TimeoutError") as caught:
        training.scheduler.close()
    assert time.monotonic() - begun < 3.0
    assert len([item for item in caught if "W&B" in str(item.message)]) == 1
    wait_until(lambda: [item["state"] for item in server.artifacts.values()] == ["COMMITTED"])
    assert [item["input"]["artifactTypeName"] for item in server.artifacts.values()] == [arrives]
    server.released.set()
    run.finish()
    assert server.run(run.id).summary["safe_lr_summary"]["steps"] == 15


def wait_until(fulfilled: Callable[[], bool]) -> None:
    for _ in range(200):
        if fulfilled():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def test_a_resumed_run_goes_on_where_it_was(server: WandbServer, tmp_path: Path) -> None:
    path, saved = tmp_path / "run.jsonl", {}
    for part in range(2):
        run = quiet(id="resumed", resume="allow")
        training = Training(log_path=path)
        if part:
            training.model.load_state_dict(saved["model"])
            training.optimizer.load_state_dict(saved["optimizer"])
            training.scheduler.load_state_dict(saved["scheduler"])
        for _ in range(40):
            training.step()
            run.log({"loss": training.loss().item()})
        owners = ("model", "optimizer", "scheduler")
        saved = {name: getattr(training, name).state_dict() for name in owners}
        training.scheduler.close()
        run.finish()
    found = server.run("resumed")
    assert found.state == "finished"
    assert sum("loss" in row for row in found.history) == 80
    assert list(ours(found)) == list(range(80))
    assert found.summary["safe_lr_summary"]["steps"] == 80


def test_alerts_reach_the_owner_few_and_named(server: WandbServer) -> None:
    run = quiet()
    logger = WandbLogger()
    logger.start({})
    for step in range(5):
        logger.decide(cap_at(step, failure="loss is nan", loss=None))
        logger.decide(cap_at(step, gamma=10.0**step, loss=1.0 if step < 4 else 9.0))
    logger.close({})
    run.finish()
    titles = [alert["title"] for alert in server.alerts]
    assert sorted(titles) == ["safe_lr: curvature jump", "safe_lr: instability", "safe_lr: measurement failed"]


def test_other_ranks_send_nothing(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = quiet()
    monkeypatch.setenv("RANK", "1")
    training = Training()
    for _ in range(5):
        training.step()
        run.log({"loss": 1.0})
    training.scheduler.close()
    run.finish()
    found = server.run(run.id)
    assert len(found.history) == 5
    assert "safe_lr" not in json.dumps([found.history, found.settings, found.metrics, found.summary])


def test_a_run_of_its_own_is_opened_beside_training_and_misses_no_early_step(server: WandbServer) -> None:
    training = Training(loggers=WandbLogger(init=True, timeout=30.0))
    for _ in range(60):
        training.step()
    training.scheduler.close()
    (found,) = server.runs.values()
    assert found.state == "finished"
    assert list(ours(found)) == list(range(60))
    assert wandb.run is None


SWEEP = {
    "method": "random",
    "metric": {"name": "loss", "goal": "minimize"},
    "parameters": {
        "lr": {"distribution": "log_uniform_values", "min": 0.01, "max": 100.0},
        "safe_lr.margin": {"min": 0.25, "max": 1.0},
    },
}


def point() -> None:
    """Trains one point of the sweep."""
    with quiet() as run:
        training = Training(margin=run.config["safe_lr.margin"])
        training.optimizer.param_groups[0]["lr"] = run.config["lr"]
        for _ in range(8):
            training.step()
            run.log({"loss": training.loss().item()})
        training.scheduler.close()


def check(server: WandbServer, sweep: str, count: int) -> None:
    runs = server.runs_of(sweep)
    assert [run.state for run in runs] == ["finished"] * count
    assert len({run.settings["lr"] for run in runs}) == count
    for run in runs:
        assert run.settings["safe_lr_resolved"]["margin"] == run.settings["safe_lr.margin"]
        assert ours(run)[7]["lr_desired"] == pytest.approx(run.settings["lr"])
    unsafe = [
        run
        for run in runs
        if any(row["safe_lr/lr_desired"] > row["safe_lr/lr_limit"] for row in run.history if "safe_lr/lr_limit" in row)
    ]
    warned = [alert["runName"] for alert in server.alerts if alert["title"] == "safe_lr: unsafe sweep point"]
    assert sorted(warned) == sorted(run.name for run in unsafe)
    assert unsafe  # or the line above shows nothing


@pytest.mark.slow
def test_a_sweep_of_eight_with_the_function_agent(server: WandbServer) -> None:
    sweep = wandb.sweep(SWEEP, project="p")
    wandb.agent(sweep, point, project="p", count=8)
    check(server, sweep, 8)


@pytest.mark.slow
def test_a_sweep_of_three_with_the_command_line_agent(server: WandbServer, root: Path, tmp_path: Path) -> None:
    command = ["${env}", sys.executable, "-m", "tests.test_wandb_online", "${args_no_boolean_flags}"]
    sweep = wandb.sweep({**SWEEP, "run_cap": 3, "command": command}, project="p")
    wandb.teardown()
    # A client's children take part in its service, which this one has stopped.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])}
    agent = [sys.executable, "-m", "wandb", "agent", f"p/{sweep}"]
    done = subprocess.run(agent, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    check(server, sweep, 3)


def hopeless() -> None:
    """A point that ends by an error at once."""
    raise ValueError("no data")


@pytest.mark.slow
def test_an_agent_tells_that_every_run_failed(server: WandbServer, root: Path) -> None:
    """A real agent of each kind: the function's and the command line's."""
    from safe_lr.__main__ import main

    sweep = wandb.sweep({**SWEEP, "run_cap": 2}, project="p")
    assert main(["sweep", "agent", f"p/{sweep}", "--count", "2", "--function", "tests.test_wandb_online:hopeless"]) == 1
    command = ["${env}", sys.executable, "-c", "raise SystemExit(3)"]
    sweep = wandb.sweep({**SWEEP, "run_cap": 2, "command": command}, project="p")
    wandb.teardown()
    assert main(["sweep", "agent", f"p/{sweep}", "--count", "2"]) == 1


@pytest.mark.parametrize("more", [[], ["--function", "tests.test_wandb_online:hopeless"]], ids=["program", "function"])
def test_an_agent_for_a_sweep_that_is_not_there_says_so(
    more: list[str], server: WandbServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safe_lr.__main__ import main

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for name, message in (
        ("p/nothere0", f"there is no sweep 'p/nothere0' at {server.url} ("),
        ("nothere0", "(missing project)): give ENTITY/PROJECT/ID, as it stands in the sweep's address"),
        ("a/b/c/d", "'a/b/c/d' names no sweep: give ENTITY/PROJECT/ID"),
    ):
        assert main(["sweep", "agent", name, *more]) == 2
        (said,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("safe-lr: error: "))
        assert message in said
    server.fail = "401"
    wandb.teardown()
    assert main(["sweep", "agent", "p/nothere0", *more]) == 2
    assert "safe-lr: error: W&B: Failed to verify credentials" in capfd.readouterr().err
    server.fail = None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:W&B attach failed:RuntimeWarning")
def test_an_unsafe_point_is_pruned_and_its_run_ends_normally(server: WandbServer, tmp_path: Path) -> None:
    from safe_lr.sweeps import prune

    run = quiet(tags=["mine"])
    training = Training(log_path=tmp_path / "run.jsonl")
    training.optimizer.param_groups[0]["lr"] = 1e4
    reason, steps = None, 0
    while reason is None and steps < 100:
        training.step()
        run.log({"loss": 1.0})
        steps += 1
        reason = prune(run, training.scheduler)
    assert reason is not None and "times the cap" in reason
    found = server.run(run.id)
    assert found.state == "finished"
    assert found.tags == ["mine", "safe_lr-unsafe"]
    assert (found.summary["safe_lr_pruned"], found.summary["safe_lr_pruned_step"]) == (reason, steps)
    assert found.summary["safe_lr_summary"]["steps"] == steps
    assert any(item["input"]["artifactTypeName"] == "safe_lr_decisions" for item in server.artifacts.values())
    assert sum("loss" in row for row in found.history) == steps
    assert wandb.run is None


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "raise ValueError('a bug of mine')", "sys.exit(3)"])
def test_a_script_that_never_closes_loses_nothing(end: str, server: WandbServer, root: Path, tmp_path: Path) -> None:
    """It ends in order, by an error of its own, or by exit: record, board and run are whole all the same."""
    script = f"""if True:
        import sys, wandb
        from benchmarks.logging import Training
        from safe_lr import TensorBoardLogger
        run = wandb.init(project="p", id="left-open", settings=wandb.Settings(disable_git=True, x_disable_stats=True))
        def train():
            training = Training(loggers=["wandb", TensorBoardLogger({str(tmp_path / "board")!r})], log_path="run.jsonl")
            for step in range(15):
                training.step()
                run.log({{"loss": 1.0}}, step=step)
            {end or "globals().update(kept=training)"}
        train()
    """
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == {"": 0, "sys.exit(3)": 3}.get(end, 1), done.stderr
    record = read_jsonl(tmp_path / "run.jsonl")
    assert record.summary is not None and record.rows[-1]["step"] == 14
    found = server.run("left-open")
    assert found.state == ("failed" if end else "finished")
    assert found.summary["safe_lr_summary"] == {**record.summary, "decisions": len(record.decisions)}
    assert any(item["input"]["artifactTypeName"] == "safe_lr_decisions" for item in server.artifacts.values())
    assert sum("loss" in row for row in found.history) == 15
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert board.Scalars("safe_lr/lr")[-1].step == 14


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run without W&B."""
    return spawn(tmp_path_factory.mktemp("plain") / "run", 150)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", *FAILURES])
@pytest.mark.parametrize(("owner", "when"), [(owner, when) for owner, whens in WHENS.items() for when in whens])
def test_a_failing_server_changes_nothing_and_costs_seconds_at_most(
    owner: str, when: str, mode: str, plain: dict[str, Any], tmp_path: Path
) -> None:
    """In a run of the logger's own, and in one that the user has opened, logs to and finishes."""
    found = failure(owner, when, mode, 150, tmp_path, plain)
    assert found["same_weights"]
    assert found["whole_record"]
    assert found["later_s"] + found["exit_s"] <= AT_MOST_LATER
    assert found["warnings"] == (mode != "none")


def test_a_server_that_is_gone_changes_nothing(server: WandbServer, tmp_path: Path) -> None:
    server.stop()
    weights = []
    for loggers in (None, [JsonlLogger(tmp_path / "run.jsonl", every=1), WandbLogger(init=True, timeout=0.5)]):
        training = Training(loggers=loggers)
        for _ in range(30):
            training.step()
        if loggers:
            with pytest.warns(RuntimeWarning, match="W&B init failed"):
                training.scheduler.close()
        weights.append(training.digest())
    assert weights[0] == weights[1]
    assert len(read_jsonl(tmp_path / "run.jsonl").rows) == 30


if __name__ == "__main__":  # the program of the command-line agent's runs: the config comes from the agent
    torch.set_num_threads(1)
    point()
