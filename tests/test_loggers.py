"""The loggers: what stands in the file, what W&B is told, and that neither can hurt a run."""

import math
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from safe_lr import CoherenceScheduler
from safe_lr.decisions import Decision
from safe_lr.loggers import (
    DEFAULT_PATH,
    JsonlLogger,
    Records,
    WandbLogger,
    is_rank_zero,
    read_jsonl,
    resolve,
)
from safe_lr.loggers.bounded import bounded
from safe_lr.loggers.broadcast import Broadcast
from safe_lr.loggers.facts import facts
from tests.played import Quiet, cap_at, in_another_process, lines, play

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
    foreign.append("[" * 200_000)
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


@pytest.mark.parametrize("folder", ["/proc", "/sys"])
def test_a_folder_that_takes_no_files_is_named_before_training_and_leaves_no_hook(folder: str) -> None:
    if not Path(folder).is_dir():
        pytest.skip(f"needs {folder}")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    with pytest.raises(OSError, match="give a path to a file in a folder that you may write to"):
        CoherenceScheduler(optimizer, log_path=f"{folder}/safe_lr/run.jsonl")
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_one_warning_and_the_history_goes_on() -> None:
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.ones(2))
    scheduler = CoherenceScheduler(torch.optim.SGD([x], lr=10.0), margin=0.5, log_path="/dev/full", loggers=None)
    with pytest.warns(RuntimeWarning, match="No space left on device.*training goes on, the record is kept") as caught:
        for _ in range(30):
            (x**2).sum().backward()
            scheduler.observe(lambda: (x**2).sum())
            scheduler.optimizer.step()
            scheduler.step()
            x.grad = None
        scheduler.close()
    assert len(caught) == 1
    assert float(x.detach().abs().max()) < 1e-3
    assert len(scheduler.history) >= 3
    assert scheduler.summary().steps == 30


def test_what_a_full_disk_refused_is_written_once_there_is_room(tmp_path: Path) -> None:
    path, limits = tmp_path / "run.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    logger = JsonlLogger(path, every=1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # the 2000th byte is in the middle of a line
        with pytest.warns(RuntimeWarning, match="File too large") as caught:
            told = play([logger], 20, end=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caught) == 1
    assert path.stat().st_size == 2000
    assert logger.unwritten > 0
    logger.close({"steps": 20})
    records = read_jsonl(path)
    assert (records.decisions, len(records.rows), records.unreadable) == (told["decisions"], 20, 0)
    assert logger.unwritten == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_the_lines_that_wait_are_bounded_and_none_is_torn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("safe_lr.loggers.jsonl.MOST_WAITING", 5)
    logger = JsonlLogger("/dev/full", every=1)
    with pytest.warns(RuntimeWarning, match="cannot write"):
        for step in range(20):
            logger.step({"step": step, "lr": 0.1})
    assert logger.unwritten == 5
    with (tmp_path / "run.jsonl").open("wb", buffering=0) as file:
        logger._drain(file)
    assert [line["step"] for line in lines(tmp_path / "run.jsonl")] == [0, 16, 17, 18, 19]
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


def test_resolve(tmp_path: Path) -> None:
    path, quiet = tmp_path / "run.jsonl", Quiet()
    assert resolve(None) == []
    assert [type(logger) for logger in resolve("auto", path)] == [JsonlLogger, WandbLogger]
    assert [type(logger) for logger in resolve(None, path)] == [JsonlLogger]
    assert resolve(quiet) == [quiet]
    assert resolve([quiet, quiet]) == [quiet, quiet]
    own = JsonlLogger(path)
    assert resolve([own], str(path)) == [own]  # no second logger for one file


@pytest.mark.parametrize("bad", [3, Quiet, [Quiet], [None], print])
def test_resolve_says_what_it_takes(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"give 'auto', None, one of 'jsonl', 'wandb', 'console', .* or a list"):
        resolve(bad)


@pytest.mark.parametrize("bad", ["tensorbord", ["wandb", "W&B"]])
def test_a_name_that_no_logger_has_lists_those_that_exist(bad: Any) -> None:
    with pytest.raises(
        ValueError, match=r"no logger is named '.*'jsonl', 'wandb', 'console', 'tensorboard', 'trackio'"
    ):
        resolve(bad)


def test_names_and_objects_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = Quiet()
    found = resolve(["wandb", "jsonl", quiet, "console"])
    assert [type(logger).__name__ for logger in found] == ["JsonlLogger", "WandbLogger", "Quiet", "ConsoleLogger"]
    assert isinstance(found[0], JsonlLogger) and isinstance(found[1], WandbLogger)
    assert found[0].path == found[1].jsonl == DEFAULT_PATH
    (own,) = resolve("jsonl", tmp_path / "own.jsonl")
    assert isinstance(own, JsonlLogger) and own.path == tmp_path / "own.jsonl"


class Failing(Quiet):
    """Raises at its third step."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self, row: Any) -> None:
        self.steps += 1
        if self.steps == 3:
            raise ConnectionError("the cat ate it")


def test_a_logger_that_raises_is_switched_off_with_one_warning_and_the_others_go_on(tmp_path: Path) -> None:
    failing, jsonl = Failing(), JsonlLogger(tmp_path / "run.jsonl", every=1)
    broadcast = Broadcast([failing, jsonl], dict)
    with pytest.warns(RuntimeWarning, match="switched off Failing, which raised ConnectionError: the cat") as caught:
        for step in range(10):
            broadcast.step({"step": step, "lr": 0.1})
        broadcast.close({})
    assert len(caught) == 1
    assert failing.steps == 3
    assert len(read_jsonl(tmp_path / "run.jsonl").rows) == 10


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
