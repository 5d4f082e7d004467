"""The sweep benchmark: its arithmetic, its quick run, and the committed result."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest

from benchmarks import sweep

RESULT = Path(__file__).parents[1] / "docs" / "results" / "sweep.json"


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_expected_best_is_the_mean_over_all_draws(runs):
    losses = [0.3, 0.1, 0.7, None, 99.0]
    seen = [min(loss if loss is not None else math.inf, math.log(10)) for loss in losses]
    draws = [min(draw) for draw in itertools.product(seen, repeat=runs)]
    assert sweep.expected_best(losses, runs) == pytest.approx(sum(draws) / len(draws))


def test_best_after_counts_only_runs_that_ended_in_a_number():
    trials = [{"val_loss": None}, {"val_loss": 2.0}, {"val_loss": 1.0}]
    assert [sweep.best_after(trials, runs) for runs in (1, 2, 3)] == [math.inf, 2.0, 1.0]


def test_quick_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep", "--quick", "--json", str(tmp_path / "sweep.json")])
    sweep.main()
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert set(result["optimizers"]) == {"adam", "sgd"}
    for found in result["optimizers"].values():
        (row,) = found["seeds"]
        for plain, clipped in zip(row["trials"]["plain"], row["trials"]["clipped"], strict=True):
            assert clipped["lr"] < plain["lr"]  # the same draw, from a shorter range
            assert clipped["lr"] <= row["ceiling"]
    assert "expected 2" in capsys.readouterr().out


def test_quick_transfer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "OPTIMIZERS", {"adam": sweep.OPTIMIZERS["adam"]})
    monkeypatch.setattr(sweep, "GRIDS", {"lr": [0.01, 1e9], "margin": [0.1]})
    monkeypatch.setattr(sys, "argv", ["sweep", "--transfer", "--quick", "--json", str(tmp_path / "transfer.json")])
    sweep.main()
    result = json.loads((tmp_path / "transfer.json").read_text())
    found = result["optimizers"]["adam"]
    good, hopeless = found["lr"]["losses"]["wide"]
    assert 0 < good[0] < hopeless[0] == math.log(10)  # a run that learned nothing, or ended in NaN
    assert (found["lr"]["moved"], found["margin"]["lost"]) == (1.0, 0.0)
    assert "transferred" in capsys.readouterr().out


def test_the_committed_result_is_whole():
    result = json.loads(RESULT.read_text())
    assert (result["runs"], result["steps"]) == (8, sweep.STEPS)
    for found in result["optimizers"].values():
        assert len(found["seeds"]) == 5
        for arm in sweep.ARMS:
            losses = [trial["val_loss"] for row in found["seeds"] for trial in row["trials"][arm]]
            assert found["arms"][arm]["expected_after"]["8"] == pytest.approx(sweep.expected_best(losses, 8))
            assert len(losses) == 40


def test_the_committed_transfer_is_whole():
    result = json.loads((RESULT.parent / "sweep_transfer.json").read_text())
    assert (result["steps"], result["grids"], result["widths"]) == (sweep.TRANSFER_STEPS, sweep.GRIDS, sweep.WIDTHS)
    for found in result["optimizers"].values():
        for over, row in found.items():
            assert all(len(losses) == 3 for rows in row["losses"].values() for losses in rows)
            assert row.items() >= sweep.moved(sweep.GRIDS[over], row["losses"]).items()
