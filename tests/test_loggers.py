"""The loggers: what stands in the file, what W&B is told, and that neither can hurt a run."""

import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safe_lr.decisions import Decision
from safe_lr.loggers import (
    JsonlLogger,
    Logger,
    Records,
    WandbLogger,
    is_rank_zero,
    is_stop_request,
    read_jsonl,
    resolve,
)
from safe_lr.loggers.bounded import bounded
from safe_lr.loggers.facts import facts


def play(loggers: list[Logger], steps: int, *, seed: int = 0, first: int = 0, end: bool = True) -> dict[str, Any]:
    """Tells `loggers` of a made-up run: warm-up and cosine, a limit that sinks and swings, a learned margin, failures.

    Returns what it did: `decisions`, `rows`, `capped` (steps), `failures`.
    """
    told: dict[str, Any] = {"decisions": [], "rows": [], "capped": [], "failures": 0}
    rng, margin, cap, limit, gamma, cost = random.Random(seed), 0.5, None, None, None, 0.0
    for logger in loggers:
        logger.start({"bound": "momentum", "margin": "auto", "schedule": "CosineAnnealingLR", "seed": seed})
    lr = 0.0
    for step in range(first, first + steps):
        position = step / (first + steps)
        desired = 3e-3 * min(1.0, position / 0.05) * (0.5 + 0.5 * math.cos(math.pi * position))
        before, action, failure, reason = lr, None, None, ""
        if step % 25 == 0:
            cost += 6.5
            if step % 1000 == 475:
                action, failure = "hold", "loss is nan on the measured batch"
                reason = f"The measurement failed; the last cap {cap or math.nan:.3g} stays."
                told["failures"] += 1
            else:
                gamma = 3e4 * (1 + 9 * position) * math.exp(rng.gauss(0, 0.15)) * (8 if step == 1500 else 1)
                limit = 38.0 / gamma
                learned = min(1.6, margin * 1.05) if rng.random() < 0.6 else max(0.1, margin * 0.8)
                action = "margin" if step % 100 == 0 else "keep"
                margin, cap = learned, learned * limit
                reason = f"Trial loss fell: the margin moves to {margin:.3g} of the limit {limit:.3g}."
        lr = desired if cap is None else min(desired, cap)
        if action in ("keep", "margin") and lr < desired and lr < before:
            action, reason = "cap", f"lr {desired:.3g} is above the cap {cap:.3g} = {margin:.3g} * limit {limit:.3g}."
        elif action == "keep" and lr > before:
            action, reason = "raise", f"The cap rose to {cap:.3g}, and lr with it."
        figures = {
            "lr_limit": limit,
            "cap": cap,
            "margin": margin,
            "utilisation": lr / limit if limit else None,
            "gamma": gamma,
            "beta1": 0.9 + 0.05 * position,
            "beta2": 0.999,
        }
        sharpness = gamma / 2000 if gamma and step % 100 == 0 else None
        if action is not None:
            decision = Decision(
                step, 0, action, reason, desired, before, lr, **figures, lambda_max=sharpness, num_matvecs=5, cost=6.5,
                seconds=0.02, beyond_linear_limit=margin > 1, failure=failure,
            )  # fmt: skip
            told["decisions"].append(decision)
            for logger in loggers:
                logger.decide(decision)
        row = {"step": step, "lr": lr, "lr_desired": desired, "capped": int(lr < desired), "cost": cost, **figures}
        row |= {"lambda_max": sharpness, "p_min": None, "p_eff": None, "lr/g1": lr / 10, "lr_desired/g1": desired / 10}
        told["rows"].append(row)
        told["capped"] += [step] if lr < desired else []
        for logger in loggers:
            logger.step(row)
    summary = {
        "steps": first + steps,
        "capped_steps": len(told["capped"]),
        "first_capped_step": told["capped"][0] if told["capped"] else None,
        "failures": told["failures"],
        "cost": cost,
    }
    for logger in loggers if end else []:
        logger.close(summary)
    return told


def cap_at(step: int, **changes: Any) -> Decision:
    figures = {"utilisation": 0.5, "cap": 0.1, "lr_limit": 0.2, "gamma": 10.0, "num_matvecs": 4, "cost": 5.0} | changes
    return Decision(step, 0, "cap", "lr 1 is above the cap 0.1", 1.0, 1.0, 0.1, 0.5, **figures)


def in_another_process(code: str, *arguments: Any) -> int:
    """Runs code that may use this module's names; returns the exit status."""
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", f"from test_loggers import *; {code}", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": places}, check=False).returncode


def lines(path: Path) -> list[dict[str, Any]]:
    """The file's objects; anything that is not JSON, such as NaN, is an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# ---- JSONL


def test_the_file_has_the_run_every_tenth_step_those_after_decisions_and_the_last(tmp_path: Path) -> None:
    path = tmp_path / "made" / "for it" / "decisions.jsonl"
    logger = JsonlLogger(path)
    logger.start({"bound": "momentum"})
    for step in range(1, 26):
        if step == 7:
            logger.decide(cap_at(7))
        logger.step({"step": step, "lr": 0.5, "gamma": None})
    logger.close({"steps": 25})
    written = lines(path)
    assert written[0] == {"kind": "run", "version": written[0]["version"], "config": {"bound": "momentum"}}
    assert [line["step"] for line in written if line["kind"] == "step"] == [1, 7, 10, 20, 25]
    assert written[2] == {"kind": "decision", **cap_at(7).to_dict()}
    assert written[3] == {"kind": "step", "step": 7, "lr": 0.5}
    assert written[-1] == {"kind": "summary", "summary": {"steps": 25}}


def test_it_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    told = play([JsonlLogger(path, every=1)], 60)
    records = read_jsonl(path)
    assert records.decisions == told["decisions"]
    assert records.rows == [{k: v for k, v in row.items() if v is not None} for row in told["rows"]]
    assert records.summary is not None
    assert records.summary["steps"] == records.steps == 60
    assert (records.unreadable, records.superseded, records.name) == (0, 0, "run.jsonl")


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    logger = JsonlLogger(path)
    logger.start({"eps": math.inf, "nested": [{"x": math.nan}], "folder": tmp_path})
    logger.decide(Decision(0, 0, "hold", "loss is nan", 1.0, 1.0, math.nan, 0.5, loss=math.nan))
    logger.step({"step": 0, "lr": math.nan})
    logger.close({"worst": -math.inf})
    run, decision, step, summary = lines(path)
    assert run["config"] == {"eps": None, "nested": [{"x": None}], "folder": str(tmp_path)}
    assert decision["loss"] is None
    assert step["lr"] is None
    assert summary["summary"] == {"worst": None}
    records = read_jsonl(path)
    assert math.isnan(records.decisions[0].lr_after)
    assert records.rows == [{"step": 0}]


def test_a_killed_run_leaves_a_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    assert in_another_process("play([JsonlLogger(sys.argv[1], every=1)], 5, end=False); os._exit(9)", path) == 9
    assert [row["step"] for row in read_jsonl(path).rows] == [0, 1, 2, 3, 4]


def test_a_resumed_run_appends_and_its_steps_count_once(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    play([JsonlLogger(path, every=1)], 60, end=False)
    with path.open("ab") as file:
        file.write(b'{"kind":"step","step":60,"l')  # killed here; the checkpoint is that of step 30
    told = play([JsonlLogger(path, every=1)], 50, first=31, seed=1)
    records = read_jsonl(path)
    assert len(records.runs) == 2
    assert [row["step"] for row in records.rows] == list(range(81))
    assert records.decisions[-len(told["decisions"]) :] == told["decisions"]
    assert records.unreadable == 1
    assert records.superseded == 29 + 1  # rows 31 to 59, the decision at 50


def test_foreign_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    foreign = ["hello", "[1, 2]", '{"loss": 0.3}', '{"kind": "decision", "step": "x"}', '{"kind": "epoch"}', "\x00\xff"]
    path.write_text("\n".join(['{"kind":"run","config":{}}', *foreign, "", '{"kind":"step","step":0,"lr":1}\n']))
    records = read_jsonl(path)
    assert (len(records.runs), len(records.rows), records.unreadable) == (1, 1, len(foreign))


@pytest.mark.parametrize("text", ["", "loss,lr\n1,2\n"])
def test_a_file_without_records_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"not a safe_lr record: give the file that log_path="):
        read_jsonl(path)


def test_an_unwritable_path_says_what_and_how_to_mend(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="give a path to a file in a folder that you may write to"):
        JsonlLogger(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write the log there"):
        JsonlLogger(tmp_path / "file" / "run.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_raises_and_close_still_closes() -> None:
    logger = JsonlLogger("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        logger.start({})
    with pytest.raises(OSError, match="No space left"):
        logger.close({})
    logger.close({})


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "10"])
def test_every_must_be_a_number_of_steps(tmp_path: Path, every: Any) -> None:
    with pytest.raises(ValueError, match="integer of at least 1"):
        JsonlLogger(tmp_path / "run.jsonl", every=every)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "3"}, False), ({"SLURM_PROCID": "1"}, False), ({"RANK": ""}, True)],
)
def test_only_rank_zero_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: bool
) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_rank_zero() is expected
    play([JsonlLogger(tmp_path / "run.jsonl")], 3)
    assert (tmp_path / "run.jsonl").exists() is expected


def test_an_initialised_process_group_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setenv("RANK", "1")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert is_rank_zero()
    finally:
        dist.destroy_process_group()


# ---- facts


@pytest.mark.parametrize("end", [True, False])
def test_facts_agree_with_what_was_done(tmp_path: Path, end: bool) -> None:
    path = tmp_path / "run.jsonl"
    told = play([JsonlLogger(path)], 2000, end=end)
    found = facts(read_jsonl(path))
    assert found.steps == 2000 if end else 1991 <= found.steps <= 2000
    assert found.first_capped is not None
    assert found.first_capped - told["capped"][0] in ([0] if end else range(10))
    assert found.capped_share == pytest.approx(len(told["capped"]) / 2000, abs=1e-9 if end else 0.01)
    assert (found.measurements, found.failures) == (80, told["failures"] or 2)
    assert found.cost == pytest.approx(80 * 6.5)
    assert found.margin_high == max(row["margin"] for row in told["rows"])


def test_facts_of_nothing() -> None:
    found = facts(Records())
    assert (found.steps, found.capped_share, found.margin_last, found.measurements) == (0, 0.0, None, 0)


# ---- resolve


class Quiet:
    """The smallest Logger."""

    def start(self, config: Any) -> None: ...
    def decide(self, decision: Any) -> None: ...
    def step(self, row: Any) -> None: ...
    def close(self, summary: Any) -> None: ...


def test_resolve(tmp_path: Path) -> None:
    path, quiet = tmp_path / "run.jsonl", Quiet()
    assert resolve(None) == []
    assert [type(logger) for logger in resolve("auto", path)] == [JsonlLogger, WandbLogger]
    assert [type(logger) for logger in resolve(None, path)] == [JsonlLogger]
    assert resolve(quiet) == [quiet]
    assert resolve([quiet, quiet]) == [quiet, quiet]
    own = JsonlLogger(path)
    assert resolve([own], str(path)) == [own]  # no second logger for one file


@pytest.mark.parametrize("bad", ["wandb", 3, Quiet, [Quiet], [None], ["auto"], print])
def test_resolve_says_what_it_takes(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"give 'auto', None, a Logger \(start, decide, step, close\), or a list"):
        resolve(bad)


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
    with pytest.warns(RuntimeWarning, match="took longer than 0.3 s"):
        logger.close({"steps": 1})
    assert time.monotonic() - begun < 5.0
    assert len(run.of("log_artifact")) == 1


def test_alerts_are_few() -> None:
    run = FakeRun()
    logger = started(run, alert_every=600.0)
    for step in range(20):
        logger.decide(cap_at(step, failure="loss is nan"))
        logger.step({"step": step, "lr": 0.1, "utilisation": 1.4, "margin": 1.5})  # learned: no news
        logger.step({"step": step, "lr": 0.1, "utilisation": None if step < 9 else 1.4, "margin": 0.5})
    titles = [options["title"] for _, options in run.of("alert")]
    assert titles == ["safe_lr: measurement failed", "safe_lr: lr is beyond its limit"]
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


# ---- bounded


def test_bounded_passes_errors_on_but_lets_no_service_end_the_process() -> None:
    with pytest.raises(KeyError, match="x"):
        bounded(lambda: {}["x"], 5.0, "look-up")
    with pytest.raises(RuntimeError, match="exit ended with SystemExit"):
        bounded(lambda: sys.exit(3), 5.0, "exit")
    release = threading.Event()
    with pytest.raises(TimeoutError, match=r"wait took longer than 0.05 s"):
        bounded(release.wait, 0.05, "wait")
    release.set()
