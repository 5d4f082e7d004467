"""Runs that are ended early: the rule against W&B's own, and programs that are ended while they run."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from safe_lr.sweeps import Trial, best, program_of, search
from safe_lr.sweeps.search import make_engine
from safe_lr.sweeps.stopping import Stopping, bands

CONFIG: dict[str, Any] = {
    "method": "grid",
    "metric": {"name": "loss", "goal": "minimize"},
    "parameters": {"lr": {"values": [0.1, 0.2, 0.3]}},
    "program": "train.py",
    "early_terminate": {"type": "hyperband", "min_iter": 2},
}

SETTINGS: list[dict[str, Any]] = [
    {"min_iter": 1},
    {"min_iter": 2, "eta": 2},
    {"min_iter": 2, "eta": 2.5, "strict": False},
    {"min_iter": 3, "eta": 1.3},
    {"max_iter": 9, "s": 2},
    {"max_iter": 20, "s": 4, "eta": 2, "strict": True},
    {"max_iter": 9, "s": 2, "min_iter": 1},
    {"min_iter": 1, "eta": 900.0},
]


def told(settings: dict[str, Any], goal: str, histories: list[list[float]]) -> str | None:
    """What is said of the last of these runs."""
    config = CONFIG | {"early_terminate": {"type": "hyperband", **settings}, "metric": {"name": "loss", "goal": goal}}
    stopping = Stopping.of(config)
    for history in histories:
        stopping.begin()
        for value in history:
            stopping.judge({"loss": value})
    return stopping.verdict()


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_rule_is_wandbs(settings: dict[str, Any], goal: str) -> None:
    sweeps = pytest.importorskip("sweeps")
    config = CONFIG | {"early_terminate": {"type": "hyperband", **settings}, "metric": {"name": "loss", "goal": goal}}
    stream, seen = random.Random(0), set()
    for _ in range(200):
        counts = [stream.randint(1, 12) for _ in range(stream.randint(1, 14))]
        histories = [[round(stream.uniform(0, 3), 1) for _ in range(count)] for count in counts]
        runs = [
            sweeps.SweepRun(name=str(index), state=sweeps.RunState.finished, history=[{"loss": v} for v in history])
            for index, history in enumerate(histories)
        ]
        runs[-1].state = sweeps.RunState.running
        theirs = bool(sweeps.stop_runs(config, runs))
        assert (told(settings, goal, histories) is not None) is theirs
        seen.add(theirs)
    assert seen == {True, False}


def test_the_rule_on_numbers_that_can_be_checked_by_hand() -> None:
    earlier = [[3.0, 1.0, 1.0, 0.5], [3.0, 2.0, 2.0, 2.0]]
    for history, stopped in (
        ([9.0], False),  # no band yet
        ([9.0, 0.9], False),  # the best of three after 2
        ([9.0, 1.5], False),  # int(3 / 2) = 1: the second best still is among the best half
        ([9.0, 2.5], True),
        ([9.0, 0.9, 9.0], False),  # what comes between two bands does not count
        ([9.0, 0.9, 9.0, 9.0], True),
    ):
        assert (told({"min_iter": 2, "eta": 2}, "minimize", [*earlier, history]) is not None) is stopped
    assert told({"min_iter": 2, "eta": 2, "strict": False}, "minimize", [*earlier, [0.9, 2.5]]) is None
    assert told({"min_iter": 1}, "minimize", [[1.0, 1.0]]) is None, "the first has nobody to be worse than"
    assert told({"min_iter": 1}, "maximize", [[0.9], [0.5]]) == (
        "loss 0.5 after 1 report is beyond 0.9, the bound of the best 1/3 of 2 runs (early_terminate)"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_iter": 2, "s": 5}, []),
        ({"max_iter": -27, "s": 2}, []),
        ({"max_iter": 27, "s": 0}, []),
        ({"max_iter": 27, "s": 1.5}, [3, 9]),
        ({"max_iter": 27, "s": 2, "min_iter": 5}, [3, 9]),  # as W&B: max_iter is looked at first
        ({"max_iter": 27, "min_iter": 2**62}, [2**62]),  # without s it says nothing
        ({"min_iter": 1, "eta": 2000.0}, [1, 2000, 4 * 10**6, 8 * 10**9, 16 * 10**12, 32 * 10**15]),
        ({"min_iter": 1, "eta": 1e308}, [1]),
    ],
    ids=str,
)
def test_bands_that_can_be_counted_by_hand(settings: dict[str, Any], expected: list[int]) -> None:
    assert bands(settings) == expected
    config = CONFIG | {"early_terminate": {"type": "hyperband", **settings}}
    if expected:
        assert Stopping.of(config).bands == expected
    else:
        with pytest.raises(ValueError, match=r"^early_terminate: max_iter .* compares no run: raise max_iter and s"):
            Stopping.of(config)


def test_bands_are_looked_at_before_anything_runs(tmp_path: Path) -> None:
    config = written(tmp_path) | {"early_terminate": {"type": "hyperband", "max_iter": 2, "s": 5}}
    with pytest.raises(ValueError, match="max_iter 2, s 5 with eta 3 compares no run"):
        search(config, program_of(config, folder=tmp_path), engine="built-in")
    assert not list(tmp_path.glob("done-*"))


def test_a_value_that_is_not_finite_is_the_worst() -> None:
    for goal, bad in itertools.product(("minimize", "maximize"), (math.nan, math.inf, -math.inf)):
        assert told({"min_iter": 1}, goal, [[0.1], [bad]]) == (
            "loss that is not finite after 1 report is beyond 0.1, the bound of the best 1/3 of 2 runs"
            " (early_terminate)"
        )
        assert told({"min_iter": 1}, goal, [[bad], [0.1]]) is None
        assert told({"min_iter": 1}, goal, [[bad], [bad]]) is None, "nobody is better"
    assert told({"min_iter": 2, "strict": False}, "minimize", [[0.3, 0.2], [0.1, math.nan]]) is None


TRAIN = """
import argparse, json, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
lr = parser.parse_args().lr
print("begins")
{before}
for step in range(4):
    print(json.dumps({{"loss": lr, "step": step}}))
    if lr > 0.1 and step == 2:
        time.sleep(60)
pathlib.Path(f"done-{{lr}}").touch()
"""


def written(folder: Path, before: str = "") -> dict[str, Any]:
    (folder / "train.py").write_text(TRAIN.format(before=before))
    return CONFIG


def test_a_program_is_ended_while_it_runs(tmp_path: Path) -> None:
    config = written(tmp_path)
    started = time.perf_counter()
    trials = search(config, program_of(config, folder=tmp_path), engine="built-in", log_path=tmp_path / "trials.jsonl")
    assert time.perf_counter() - started < 30, "nobody waited for the sleepers"
    assert [trial.status for trial in trials] == ["finished", "pruned", "pruned"]
    assert trials[1].reason == (
        "loss 0.2 after 2 reports is beyond 0.1, the bound of the best 1/3 of 2 runs (early_terminate)"
    )
    assert best(trials) is trials[0]
    assert [path.name for path in tmp_path.glob("done-*")] == ["done-0.1"]
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["finished", "pruned", "pruned"]
    assert trials[1].value is None and trials[1].metrics == {
        "loss": 0.2,
        "step": 2,
        "safe_lr_pruned": trials[1].reason,
    }


def test_a_judged_program_prints_at_once_and_no_other_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    (tmp_path / "train.py").write_text(
        "import json, os\nprint(json.dumps({'loss': 1, 'unbuffered': os.environ.get('PYTHONUNBUFFERED')}))"
    )
    run = program_of(CONFIG, folder=tmp_path)
    assert run({}, judge=lambda figures: None)["unbuffered"] == "1"
    assert run({})["unbuffered"] is None
    monkeypatch.setenv("PYTHONUNBUFFERED", "0")
    assert run({}, judge=lambda figures: None)["unbuffered"] == "0", "what you say yourself counts"


BEHIND = """
import json, os, pathlib, signal, sys, time
{before}
pathlib.Path("pid").write_text(str(os.getpid()))
print(json.dumps({{"loss": 1.0}}), flush=True)
time.sleep(60)
"""
CLEANS_UP = """
def end(*_):
    time.sleep(0.5)
    pathlib.Path("cleaned").touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
"""


def behind_a_shell(folder: Path, before: str) -> Any:
    (folder / "train.py").write_text(BEHIND.format(before=before))
    (folder / "run.sh").write_text(f'"{sys.executable}" train.py "$@"\necho finished\n')
    return program_of(CONFIG | {"command": ["sh", "run.sh", "${args}"]}, folder=folder)


def lives(folder: Path) -> bool:
    """Whether the program behind the shell still does; a moment may pass until its end is seen, or for ever."""
    process = (folder / "pid").read_text()
    for _ in range(100):
        try:
            os.kill(int(process), 0)
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False  # dead, and nobody has asked how it ended
        except ProcessLookupError:
            return False
        except FileNotFoundError:
            pass  # no Linux, or gone by now
        time.sleep(0.02)
    return True


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no process groups")
def test_a_program_behind_a_shell_is_ended_with_it_and_may_clean_up(tmp_path: Path) -> None:
    run = behind_a_shell(tmp_path, CLEANS_UP)
    started = time.perf_counter()
    figures = run({"lr": 0.5}, judge=lambda figures: "enough" if figures else None)
    assert figures == {"loss": 1.0, "safe_lr_pruned": "enough"}
    assert (tmp_path / "cleaned").exists() and not lives(tmp_path)
    assert time.perf_counter() - started < 30


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no process groups")
def test_one_behind_a_shell_that_does_not_heed_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safe_lr.sweeps.programs.GRACE", 0.2)
    run = behind_a_shell(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    run({"lr": 0.5}, judge=lambda figures: "enough" if figures else None)
    assert not lives(tmp_path)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no process groups")
@pytest.mark.parametrize("twice", [False, True])
def test_an_interruption_ends_what_is_behind_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twice: bool
) -> None:
    """Ctrl-C reaches the program through us alone; a second one does not wait until it has cleaned up."""

    def interrupted(figures: dict[str, Any]) -> None:
        if figures:
            if twice:
                monkeypatch.setattr("safe_lr.sweeps.programs.time.sleep", interrupted_again)
            raise KeyboardInterrupt

    def interrupted_again(seconds: float) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    run = behind_a_shell(tmp_path, CLEANS_UP)
    with pytest.raises(KeyboardInterrupt):
        run({"lr": 0.5}, judge=interrupted)
    assert not lives(tmp_path)
    assert (tmp_path / "cleaned").exists() is not twice


def test_without_process_groups_the_program_itself_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "killpg", raising=False)
    config = written(tmp_path)
    started = time.perf_counter()
    figures = program_of(config, folder=tmp_path)({"lr": 0.5}, judge=lambda figures: "enough" if figures else None)
    assert figures["safe_lr_pruned"] == "enough"
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize("end", [{"loss": 2.5}, {"loss": math.nan}, {}], ids=str)
def test_what_a_pruned_run_had_reached_is_told_to_the_search(end: dict[str, float]) -> None:
    """As W&B's server knows it. A figure that is not finite is none."""
    config: dict[str, Any] = CONFIG | {"method": "bayes"}
    del config["program"], config["early_terminate"]
    trial = Trial(0, {"lr": 0.1}, "pruned", None, {**end, "safe_lr_pruned": "enough"}, "enough")
    reached = [2.5] if end == {"loss": 2.5} else []
    for name in ("sweeps", "optuna"):
        if importlib.util.find_spec(name) is None:
            continue
        engine: Any = make_engine(config, name, 0)
        engine.ask()
        engine.tell(trial)
        engine.ask()
        if name == "sweeps":
            run = engine._runs[0]
            assert run.state == ("finished" if reached else "failed")
            assert [figures["loss"] for figures in run.history or []] == reached
        else:
            (told_of,) = engine._study.get_trials(states=None)[:1]
            assert told_of.state.name == ("PRUNED" if reached else "FAIL")
            assert list(told_of.intermediate_values.values()) == reached


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="there is no such signal")
def test_one_that_does_not_heed_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safe_lr.sweeps.programs.GRACE", 0.2)
    config = written(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    started = time.perf_counter()
    assert program_of(config, folder=tmp_path)({"lr": 0.5}, judge=lambda figures: "enough" if figures else None) == {
        "loss": 0.5,
        "step": 0,
        "safe_lr_pruned": "enough",
    }
    assert time.perf_counter() - started < 30


def test_a_program_does_not_outlive_an_interruption(tmp_path: Path) -> None:
    config = written(tmp_path)

    def interrupted(figures: dict[str, Any]) -> None:
        if figures.get("step") == 2:
            raise KeyboardInterrupt

    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        program_of(config, folder=tmp_path)({"lr": 0.5}, judge=interrupted)
    assert time.perf_counter() - started < 30
    assert not list(tmp_path.glob("done-*"))


def test_a_last_report_never_ends_a_run_and_one_alone_is_said_to_be_too_few(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import sys, json\nprint(json.dumps({'loss': float(sys.argv[-1].split('=')[1])}))"
    )
    config = CONFIG | {"early_terminate": {"type": "hyperband", "min_iter": 1}}
    with pytest.warns(UserWarning, match="nothing to go by: no run printed more than one line of JSON with 'loss'"):
        trials = search(config, program_of(config, folder=tmp_path), engine="built-in")
    assert [trial.value for trial in trials] == [0.1, 0.2, 0.3]


def test_what_is_no_number_is_no_report() -> None:
    stopping = Stopping([1], "loss")
    stopping.begin()
    for value in (None, "0.1", "nan", True):
        assert stopping.judge({"loss": value}) is None
    assert list(itertools.chain(*stopping.histories)) == []
