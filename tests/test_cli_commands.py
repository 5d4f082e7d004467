"""The commands measure, watch, sweep and demo, and report with several records: answers, exit status, JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_loggers import play

from safe_lr.__main__ import main
from safe_lr.commands.watch import Status, Tail, follow, panel
from safe_lr.decisions import Decision
from safe_lr.loggers import JsonlLogger, Records
from safe_lr.plots.timeline import STATES, Stretch, shares, stretches

ROOT = Path(__file__).parents[1]

MODULE = """
import torch
from torch import nn

def make(lr=0.1, closure=None):
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    curvature = torch.tensor([2.0, 0.5])                                  # H = diag(4, 1): lr_limit = 2 / 4
    return model, optimizer, closure or (lambda: (curvature * model.weight**2).sum())

def close(): return make(0.4)[1:]
def adaptive():
    model, _, closure = make()
    return torch.optim.Adam(model.parameters(), lr=0.1), closure
def both():
    model, _, closure = make()
    extra = torch.nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam([extra], lr=0.1)]
    return optimizers, lambda: closure() + (extra**2).sum()
def beyond():
    _, optimizer, closure = make(2.0)
    return {"optimizer": optimizer, "closure": closure}
def flat(): return make(closure=lambda: torch.zeros((), requires_grad=True) * 1.0)
def wrong(): return 3
def vector():
    model, optimizer, closure = make()
    return optimizer, lambda: model.weight**2
def number(): return make()[1], lambda: 1.0
def greedy():
    _, optimizer, closure = make()
    def stepped():
        loss = closure()
        loss.backward()
        return loss
    return optimizer, stepped
def tired():
    _, optimizer, closure = make()
    left = [3]
    def counted():
        left[0] -= 1
        if left[0] < 0: raise RuntimeError("no more data")
        return closure()
    return optimizer, counted
def data():
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(16, 2), torch.arange(16) % 3
def pair():
    model, optimizer, x, y = data()
    return optimizer, lambda: (model(x), lambda outputs: nn.functional.cross_entropy(outputs, y))
def examples():
    model, optimizer, x, y = data()
    return optimizer, lambda: nn.functional.cross_entropy(model(x), y, reduction="none")
def no_closure(): return make()[1], None
def broken(): raise RuntimeError("no data")
def loud():
    print("loading")
    model, optimizer, closure = make()
    return optimizer, lambda: (print("loss"), closure())[1]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"made_for_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


# ---- measure


def test_measure_tells_curvature_limits_and_a_verdict(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", f"{module}:make", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lambda_max"] == pytest.approx(4.0, rel=1e-3)
    assert found["gamma"] == pytest.approx(4.0, rel=1e-3)
    assert found["p_min"] == 1.0
    assert found["limits"] == {name: pytest.approx(0.5, rel=1e-3) for name in ("lemma1", "coherence", "momentum")}
    assert (found["lr"], found["verdict"]) == (0.1, "clear")
    assert main(["measure", f"{module}:close"]) == 0
    out = capsys.readouterr().out
    assert "verdict: close: lr 0.4 is 0.8 times the momentum limit 0.5" in out
    assert out.count("limit") >= 4 and "note: " not in out


@pytest.mark.parametrize(
    ("target", "after", "noted"),
    [("make", 0, False), ("adaptive", 0, True), ("adaptive", 3, False), ("both", 0, True)],
)
def test_measure_notes_that_an_adaptive_optimizers_limit_is_still_to_grow(
    module: str, target: str, after: int, noted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """And only that: P of gradient descent is 1 from the first update on, though it never has a state."""
    arguments = ["measure", f"{module}:{target}", "--after", str(after)]
    assert main(arguments) in (0, 1)
    assert ("note: the optimizer has made no update yet, and it is adaptive" in capsys.readouterr().out) is noted
    assert main([*arguments, "--json"]) in (0, 1)
    assert (json.loads(capsys.readouterr().out)["note"] is not None) is noted


def test_measure_ends_with_1_where_the_answer_is_no(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", f"{module}:beyond", "--bound", "coherence"]) == 1
    assert "verdict: beyond: lr 2 is 4 times the coherence limit 0.5" in capsys.readouterr().out
    assert main(["measure", f"{module}:beyond", "--after", "3", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["loss"] < 1e3, "the updates before are protected"
    assert main(["measure", f"{module}:flat", "--json"]) == 1
    failed = json.loads(capsys.readouterr().out)
    assert failed["verdict"] == "failed" and failed["lr_limit"] is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("wrong", "returned int: return (optimizer, closure)"),
        ("no_closure", "needs a closure"),
        ("mkae", "has no 'mkae'"),
        ("", "is not module:function"),
    ],
)
def test_measure_says_what_is_to_be_mended(
    module: str, target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", f"{module}:{target}"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert main(["measure", f"{module}:make", "--after", "-1"]) == 2


@pytest.mark.parametrize(
    ("closure", "status", "message"),
    [
        ("vector", 2, "the closure must return one real number, got shape (1, 2)"),
        ("number", 2, "the closure must return the loss as a tensor, got float; drop .item()"),
        ("greedy", 2, "the closure called backward()"),
        ("tired", 2, "an update of {}:tired raised RuntimeError: no more data"),
        ("flat", 1, "verdict: failed"),
    ],
)
def test_measure_after_updates_says_what_is_wrong_with_the_closure(
    module: str, closure: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["measure", f"{module}:{closure}", "--after", "3"]) == status  # 1 is a verdict
    out, err = capsys.readouterr()
    assert message.format(module) in out + err.splitlines()[-1] if status == 2 else message in out


@pytest.mark.parametrize("curvature", ["gauss-newton", "fisher", "empirical-fisher"])
def test_measure_trains_on_what_other_curvatures_closures_return(
    module: str, curvature: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = "examples" if curvature == "empirical-fisher" else "pair"
    losses = []
    for after in ("0", "5"):
        assert main(["measure", f"{module}:{target}", "--curvature", curvature, "--after", after, "--json"]) in (0, 1)
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[1] < losses[0]


def test_measure_tells_a_bug_of_the_users_from_a_verdict(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", f"{module}:broken"]) == 2  # 1 is the verdict that lr is beyond the limit
    err = capsys.readouterr().err
    assert "in broken" in err and err.splitlines()[-1].endswith(f"{module}:broken raised RuntimeError: no data")


def test_measure_keeps_standard_output_for_json(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", f"{module}:loud", "--after", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["verdict"] == "clear"
    assert err.startswith("loading\nloss\n")


# ---- report


def test_report_compares_runs_and_leaves_out_what_is_foreign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / name / "decisions.jsonl" for name in ("first", "second", "third")]
    for path, steps in zip(paths[:2], (120, 80), strict=True):
        play([JsonlLogger(path)], steps, seed=steps)
    paths[2].parent.mkdir()
    paths[2].write_text("step,lr\n1,2\n")
    out = tmp_path / "comparison.html"
    assert main(["report", *map(str, paths), "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run.get("steps") for run in told["runs"]] == [120, 80, None]
    assert "holds 2 lines of something else" in told["runs"][2]["failure"]
    page = out.read_text()
    assert "2 runs side by side" in page
    assert "Left out: " in page and "holds 2 lines of something else" in page
    assert "Settings that differ" in page and "<script>" in page
    assert main(["report", *[str(paths[2])] * 2, "-o", str(out)]) == 2
    assert main(["report", *[str(paths[0])] * 9, "-o", str(out)]) == 2
    assert "9 records were given: a comparison takes two to 8" in capsys.readouterr().err
    assert main(["report", str(paths[0]), str(paths[1]), "-o", str(paths[1])]) == 2
    assert "would replace its own source" in capsys.readouterr().err


def test_the_report_says_which_lines_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    play([JsonlLogger(path)], 60)
    lines = path.read_bytes().split(b"\n")
    lines[3:3] = [b"noise"]
    path.write_bytes(b"\n".join(lines)[:-60])
    assert main(["report", str(path)]) == 0
    page = path.with_suffix(".html").read_text()
    assert f"2 lines of the file are cut off or foreign and left out (at 4, {len(lines) - 1})" in page


# ---- the timeline


def test_a_long_timeline_keeps_what_is_most_remarkable() -> None:
    rows: list[dict[str, float]] = [
        {"step": float(i), "lr": 0.1 if i % 2 else 0.3, "cap": 0.4, "utilisation": 2.0 if i == 777 else 0.1}
        for i in range(1000)
    ]
    records = Records(rows=rows)
    exact = stretches(records)
    assert len(exact) == 1000
    assert [part.state for part in exact[776:779]] == ["close", "beyond", "close"]
    few = stretches(records, most=10)
    assert [part for part in few if part.state == "beyond"] == [Stretch(700, 799, "beyond")]
    assert (few[0].first, few[-1].last) == (0, 999)
    assert all(before.last + 1 == after.first for before, after in itertools.pairwise(few))
    assert shares(exact) == {"close": 0.5, "clear": 0.499, "beyond": 0.001}


def test_a_record_without_rows_has_a_timeline_from_its_decisions() -> None:
    decisions = [
        Decision(0, 0, "keep", "", 1.0, 1.0, 1.0, 0.5),
        Decision(4, 0, "cap", "", 1.0, 1.0, 0.2, 0.5, cap=0.2, utilisation=0.5),
    ]
    found = stretches(Records(decisions=decisions))
    assert found == [Stretch(0, 3, "unprotected"), Stretch(4, 4, "capped")]
    assert stretches(Records()) == []


# ---- watch


def test_watch_follows_a_run_while_it_is_written(tmp_path: Path) -> None:
    path, told = tmp_path / "late" / "run.jsonl", []

    def write() -> None:
        time.sleep(0.1)
        play([JsonlLogger(path)], 300)

    writer = threading.Thread(target=write)
    writer.start()
    for status in follow(path, every=0.01, timeout=20.0):
        told.append(status.row.get("step"))
    writer.join()
    assert told[0] is None and told[-1] == 299
    assert status.summary is not None
    assert status.state in STATES


def test_a_line_counts_once_it_is_whole_and_a_new_file_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    tail = Tail(path)
    assert tail.lines() == (False, [])
    path.write_bytes(b'{"kind":"step","step":1}\n{"kind":')
    assert tail.lines() == (False, [b'{"kind":"step","step":1}'])
    with open(path, "ab") as file:
        file.write(b'"run"}\n')
    assert tail.lines() == (False, [b'{"kind":"run"}'])
    path.write_bytes(b"{}\n")
    assert tail.lines() == (True, [b"{}"])
    status = Status()
    assert str(status) == "no step is on record yet"
    foreign = [b"{}", b"[1]", b"3", b'{"kind":"step"}', b'{"kind":"decision"}', b'{"kind":"?"}', b"\xff"]
    foreign += [b'{"kind":"decision","failure":null}', b"[" * 200_000]
    for line in foreign:
        status.take(line)
    assert (status.unreadable, status.row, status.decisions, status.failures) == (len(foreign), {}, [], 0)
    assert str(status) == f"no step is on record yet ({len(foreign)} lines are not safe_lr's)"


def test_watch_says_how_a_run_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    assert main(["watch", str(path), "--once"]) == 2
    assert "No such file" in capsys.readouterr().err
    play([JsonlLogger(path)], 300)
    assert main(["watch", str(path), "--json"]) == 0  # it has ended: so does watching
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["step"], last["ended"], last["unreadable"]) == (299, True, 0)
    assert last["state"] in STATES
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:-2]) + b"\n")
    assert main(["watch", str(path), "--every", "0.01", "--timeout", "0.05"]) == 1
    assert "nothing new for 0.05 s" in capsys.readouterr().err
    assert main(["watch", str(path), "--every", "0"]) == 2
    path.write_text("hello\n[1, 2]\n")
    capsys.readouterr()
    assert main(["watch", str(path), "--once"]) == 2
    assert "holds 2 lines of something else, not a safe_lr record" in capsys.readouterr().err


def test_the_panel_has_words_beside_colours(tmp_path: Path) -> None:
    rich = pytest.importorskip("rich.console")
    path = tmp_path / "run.jsonl"
    play([JsonlLogger(path)], 300)
    status = next(follow(path, every=1.0, timeout=None))
    console = rich.Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 (as long as the test)
    console.print(panel(status, "run.jsonl"))
    console.print(panel(Status(), "empty"))
    console.file.close()
    text = console.export_text()
    assert f"step 299  {status.state}: " in text
    assert "the run has ended" in text and "no step is on record yet" in text


# ---- sweep


def test_sweep_init_writes_what_the_example_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = pytest.importorskip("yaml")
    example = (ROOT / "examples" / "sweep.yaml").read_text()
    made_by = next(line for line in example.splitlines() if line.startswith("# Made by: safe-lr "))
    assert main(made_by.removeprefix("# Made by: safe-lr ").split()) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(example)
    out = tmp_path / "made" / "lr.yaml"
    assert main(["sweep", "init", "--lr", "1e-4:1", "--method", "random", "-o", str(out)]) == 0
    assert yaml.safe_load(out.read_text())["parameters"]["lr"]["min"] == 1e-4
    assert main(["sweep", "init", "--lr", "1:0.1"]) == 2
    assert "parameters.lr: min 1.0 is not below max 0.1" in capsys.readouterr().err


CONFIG = {
    "method": "grid",
    "metric": {"name": "val_loss"},
    "parameters": {"lr": {"values": [0.1, 0.5]}, "safe_lr.follow_limit": {"value": True}},
    "program": "train.py",
}


def test_sweep_run_local_by_program_and_by_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps(CONFIG))
    (tmp_path / "train.py").write_text(
        "import json, sys\n"
        "lr = float(sys.argv[1].removeprefix('--lr='))\n"
        "assert sys.argv[2:] == ['--safe_lr.follow_limit']\n"
        "print(json.dumps({'val_loss': (lr - 0.4) ** 2}))\n"
    )
    (tmp_path / "swept_function.py").write_text("def train(p):\n print('noise')\n return (p['lr'] - 0.4) ** 2\n")
    answers = []
    for more in ([], ["--function", "swept_function:train"]):
        out = tmp_path / "trials.jsonl"
        arguments = ["sweep", "run", "--local", "sweep.json", "--engine", "built-in", "--json", "-o", str(out), *more]
        assert main(arguments) == 0
        answers.append(json.loads(capsys.readouterr().out))
        assert len(out.read_text().splitlines()) == 2
    for answer in answers:
        assert answer["best"]["params"]["lr"] == 0.5
        assert [trial["value"] for trial in answer["trials"]] == [pytest.approx(0.09), pytest.approx(0.01)]
    assert main(["sweep", "run", "--local", "sweep.json", "--engine", "built-in"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "best: run 1, 0.01 with --lr=0.5 --safe_lr.follow_limit", "as the program takes it"
    for more in (["--json"], ["-o", "trials.jsonl"]):
        assert main(["sweep", "run", "sweep.json", *more]) == 2
        assert "go with --local" in capsys.readouterr().err
    (tmp_path / "train.py").write_text("raise SystemExit('no data')")
    assert main(["sweep", "run", "--local", "sweep.json", "--engine", "built-in"]) == 1
    out = capsys.readouterr().out
    assert "failed: RuntimeError: train.py ended with status 1: no data" in out
    assert out.splitlines()[-1] == "no run has finished"


def test_a_local_sweep_that_is_interrupted_tells_the_best_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps(CONFIG))
    (tmp_path / "impatient.py").write_text(
        "def train(p):\n    if p['lr'] == 0.5: raise KeyboardInterrupt\n    return 1.0\n"
    )
    assert (
        main(["sweep", "run", "--local", "sweep.json", "--engine", "built-in", "--function", "impatient:train"]) == 130
    )
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "best: run 0, 1 with --lr=0.1 --safe_lr.follow_limit"
    assert err == "safe-lr: interrupted\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named_and_does_not_end_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps(CONFIG))
    (tmp_path / "patient.py").write_text("def train(p): return p['lr']\n")
    command = ["sweep", "run", "--local", "sweep.json", "--engine", "built-in", "--function", "patient:train"]
    with pytest.warns(UserWarning, match="/dev/full: No space left on device: the search goes on") as caught:
        assert main([*command, "-o", "/dev/full"]) == 0
    assert len(caught) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("best: run 0, 0.1 with ")
    play([JsonlLogger(tmp_path / "run.jsonl")], 30)
    for arguments in (["report", "run.jsonl"], ["sweep", "init"]):
        assert main([*arguments, "-o", "/dev/full"]) == 2
        assert capsys.readouterr().err == "safe-lr: error: /dev/full: No space left on device\n"


def test_sweep_without_wandb_and_bad_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({**CONFIG, "method": "bayes", "metric": None}))
    assert main(["sweep", "run", "--local", str(path)]) == 2
    assert "metric: bayes needs" in capsys.readouterr().err
    path.write_text(json.dumps(CONFIG))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["sweep", "run", str(path)]) == 2
    assert main(["sweep", "agent", "abc"]) == 2
    assert capsys.readouterr().err.count("this needs W&B: pip install wandb") == 2


def test_agents_are_wandbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    asked: list[Any] = []
    monkeypatch.setattr(wandb, "sweep", lambda config, project: asked.append((config, project)) or "abc")
    monkeypatch.setattr(wandb, "agent", lambda sweep, **more: asked.append((sweep, more)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agents_function.py").write_text("def under_wandb(): pass\n")
    (tmp_path / "sweep.json").write_text(json.dumps(CONFIG))
    function = ["--function", "agents_function:under_wandb"]
    assert main(["sweep", "run", "sweep.json", "--project", "mine", "--runs", "3", *function]) == 0
    assert asked[0] == (CONFIG, "mine")
    assert asked[1][0] == "mine/abc" and asked[1][1]["count"] == 3
    ran: list[Any] = []

    def started(command: list[str], *, env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
        ran.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setattr("safe_lr.commands.sweep._find", asked.append)
    assert main(["sweep", "agent", "team/mine/abc", "--count", "2"]) == 0
    assert asked[-1] == "team/mine/abc"
    command, environment = ran[0]
    assert command[1:] == ["-m", "safe_lr.sweeps.agent", "--count", "2", "team/mine/abc"]
    assert "WANDB_SERVICE" not in environment
    assert Path(str(shutil.which("python", path=environment["PATH"]))).samefile(sys.executable)


@pytest.mark.parametrize(
    ("ends", "status"),
    [(["fine"], 0), (["fails", "fine"], 0), (["fails", "fails"], 1), (["is stopped"], 0), ([], 0)],
)
def test_an_agent_whose_runs_all_failed_ends_with_1(
    ends: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With W&B's function agent, which catches what a run raises, and with its command, which ends with 0 always."""
    wandb = pytest.importorskip("wandb")
    cli = pytest.importorskip("wandb.cli.cli")
    errors = {"fine": None, "fails": ValueError("no data"), "is stopped": Exception()}
    left = [errors[end] for end in ends]

    def agent(sweep: str, *, function: Any, count: Any) -> None:
        for _ in ends:
            with contextlib.suppress(Exception):
                function()

    def under_wandb() -> None:
        if (error := left.pop(0)) is not None:
            raise error

    monkeypatch.setattr(wandb, "agent", agent)
    monkeypatch.setattr("safe_lr.commands.sweep._find", lambda sweep: None)
    monkeypatch.setattr("safe_lr.sweeps.load_function", lambda target: under_wandb)
    assert main(["sweep", "agent", "abc", "--function", "any:thing"]) == status

    statuses = {"fine": 0, "fails": 1, "is stopped": -15}

    class Process:
        def __init__(self, end: str) -> None:
            self.polls: list[int | None] = [None, statuses[end]]

        def poll(self) -> int | None:
            return self.polls.pop(0)

    def command(arguments: list[str], *, prog_name: str) -> None:
        assert arguments == ["agent", "abc"]
        for process in [Process(end) for end in ends]:
            process.poll()
            process.poll()
        raise SystemExit(0)

    from safe_lr.sweeps.agent import work

    monkeypatch.setattr("wandb.wandb_agent.AgentProcess", Process)
    monkeypatch.setattr(cli, "cli", command)
    poll = Process.poll
    assert work(["abc"]) == status
    assert Process.poll is poll


def test_wandbs_own_command_failing_is_to_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    cli = pytest.importorskip("wandb.cli.cli")
    from safe_lr.sweeps.agent import work

    def command(arguments: list[str], *, prog_name: str) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(cli, "cli", command)
    assert work(["abc"]) == 2


# ---- demo, help


def test_demo_protects_and_writes_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--steps", "150", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    losses = told["losses"]
    assert losses["protected"] < 0.1 * losses["unprotected"]
    assert told["lr"] == 100 * told["lr_tuned"]
    assert Path(told["report"]).read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "command",
    [["report"], ["watch"], ["measure"], ["demo"], ["sweep", "init"], ["sweep", "run"], ["sweep", "agent"]],
    ids=" ".join,
)
def test_every_command_has_examples_in_its_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert f"example: safe-lr {' '.join(command)} " in capsys.readouterr().out


def test_the_general_help_tells_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "exit status:" in out
    for name in ("report", "watch", "measure", "sweep", "demo"):
        assert f"\n    {name} " in out
