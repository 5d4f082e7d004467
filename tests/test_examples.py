"""The examples run as a user runs them; the demo keeps what it promises."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*arguments, **environment):
    """Runs an example in a process of its own, with warnings as errors, and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | environment,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_quickstart_lowers_the_loss_at_a_hundredfold_lr():
    printed = run(EXAMPLES / "quickstart.py")
    losses = [float(line.split()[3]) for line in printed.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.5 * losses[0]
    assert "capped" in printed


def test_subset_is_balanced_and_comes_from_the_full_set(example):
    data = example("fashion_mnist").load("subset")
    assert data.train_images.shape == (800, 1, 28, 28)
    assert data.val_images.shape == (200, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [80] * 10
    assert data.val_labels.bincount().tolist() == [20] * 10
    assert abs(data.train_images.mean()) < 0.1
    assert abs(data.train_images.std() - 1) < 0.1


def test_subset_is_what_its_script_makes(example, monkeypatch):
    fashion = example("fashion_mnist")
    monkeypatch.delenv("SAFE_LR_FASHION_MNIST", raising=False)
    if fashion.full_folder() is None:
        pytest.skip("the full Fashion-MNIST is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES / "data"))
    made = importlib.import_module("make_subset").make_subset()
    with np.load(fashion.SUBSET) as kept:
        assert set(kept) == set(made)
        assert all(np.array_equal(kept[name], made[name]) for name in made)


def test_loader_says_where_to_get_the_full_set(example, monkeypatch, tmp_path):
    fashion = example("fashion_mnist")
    monkeypatch.setenv("SAFE_LR_FASHION_MNIST", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="SAFE_LR_FASHION_MNIST names .* unset it"):
        fashion.load()
    monkeypatch.delenv("SAFE_LR_FASHION_MNIST")
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path)
    assert fashion.load().source == "subset"
    assert "subset" in fashion.load().where
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion.load("full")
    with pytest.raises(ValueError, match="use 'auto', 'full' or 'subset'"):
        fashion.load("half")


def test_runs_of_one_seed_are_alike(example):
    cnn = example("fashion_cnn")
    task = cnn.make_task("subset")
    assert all(
        torch.equal(a, b) for a, b in zip(cnn.make_model(3).parameters(), cnn.make_model(3).parameters(), strict=True)
    )
    first, second = task.batches(3), task.batches(3)
    for _ in range(30):  # over the end of an epoch: 800 images are 12 full batches of 64
        (x1, y1), (x2, y2) = next(first), next(second)
        assert torch.equal(x1, x2)
        assert torch.equal(y1, y2)
        assert len(x1) == task.batch_size


def test_tuning_script_writes_its_json(tmp_path):
    run(EXAMPLES / "tune_demo.py", "--source", "subset", "--quick", "--json", tmp_path / "tuned.json")
    result = json.loads((tmp_path / "tuned.json").read_text())["subset"]
    assert result["tuned"] == min(result["means"], key=lambda row: row["val_loss"])
    assert len(result["runs"]) == len(result["means"]) * len(result["seeds"])


def test_committed_tuning_is_a_full_scan_with_its_best_inside():
    tuning = json.loads((EXAMPLES / "data" / "tuned_lr.json").read_text())
    assert not tuning["quick"]
    for source in ("full", "subset"):
        means = tuning[source]["means"]
        assert tuning[source]["tuned"] == min(means, key=lambda row: row["val_loss"])
        lrs = [row["lr"] for row in means]
        assert lrs[0] < tuning[source]["tuned"]["lr"] < lrs[-1]
        assert len(tuning[source]["seeds"]) == 3


def test_demo_writes_all_it_announces(tmp_path):
    printed = run(EXAMPLES / "demo.py", "--quick", "--source", "subset", "--out", tmp_path)
    check_demo(tmp_path, printed)
    assert list(tmp_path.glob("wandb/offline-run-*")), "W&B's offline run lies in the output folder"


@pytest.mark.slow
def test_demo_runs_without_wandb(tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('no wandb here')\n")
    printed = run(
        EXAMPLES / "demo.py", "--quick", "--source", "subset", "--out", tmp_path / "out", PYTHONPATH=str(tmp_path)
    )
    check_demo(tmp_path / "out", printed)
    assert "without W&B: no wandb here" in printed


def check_demo(out, printed):
    for name in ("decisions.jsonl", "report.html", "lr.png", "summary.json"):
        assert (out / name).stat().st_size > 0
        assert str(out / name) in printed
    summary = json.loads((out / "summary.json").read_text())
    tuned, unprotected, protected = (summary[name] for name in ("tuned", "unprotected", "protected"))
    assert protected["lr"] == unprotected["lr"] == pytest.approx(100 * tuned["lr"])
    assert protected["measurements"] > 0
    assert protected["num_matvecs"] >= 3
    assert protected["capped_steps"] > 0
    assert protected["final_lr"] < protected["lr"]
    return summary


@pytest.mark.slow
def test_demo_keeps_its_promise(tmp_path):
    """At 100 times the tuned lr, safe_lr comes close to the tuned run, and the same run unprotected does not."""
    started = time.perf_counter()
    printed = run(EXAMPLES / "demo.py", "--out", tmp_path)
    assert time.perf_counter() - started < 240
    summary = check_demo(tmp_path, printed)
    tuned, unprotected, protected = (summary[name] for name in ("tuned", "unprotected", "protected"))
    harm = unprotected["val_loss"] - tuned["val_loss"]
    assert harm > 0.1
    assert protected["val_loss"] - tuned["val_loss"] < 0.25 * harm
    assert protected["val_accuracy"] > tuned["val_accuracy"] - 0.03
    assert protected["failures"] == 0
    assert protected["overhead_counted"] < 0.05 + 121 / summary["task"]["steps"]


def test_the_sweep_example_runs_by_itself_and_in_a_local_search(tmp_path, example):
    settings = ["--steps=60", "--safe_lr.margin=0.2", "--safe_lr.follow_limit", "--schedule=cosine"]
    printed = run(EXAMPLES / "sweep.py", *settings)
    alone = json.loads(printed.splitlines()[-1])
    assert alone["val_loss"] < 2.0  # log 10 = 2.30 is a network that knows nothing
    sweep = example("sweep")
    config = {"safe_lr.margin": 0.2, "safe_lr.follow_limit": True, "schedule": "cosine"}
    assert sweep.train(config, steps=60) == pytest.approx(alone)
    assert sweep.train({"lr": 1e4}, steps=60)["safe_lr_pruned"].startswith("step 20: lr 1e+04 is ")


def test_the_sweep_examples_config_is_one_that_wandb_takes():
    pytest.importorskip("yaml")
    from safe_lr.sweeps import load_config

    assert load_config(EXAMPLES / "sweep.yaml")["program"] == "examples/sweep.py"
