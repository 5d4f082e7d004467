"""The benchmark of predicted against actual limits, on few hyper-parameters, and the tools that it is made of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

import safe_lr
from benchmarks import stability_edge
from benchmarks.quadratics import EXACT, Quadratic, SetUp, first_unstable_lr
from benchmarks.stability_edge import edge_of, edge_of_stability, set_ups, transient


@pytest.mark.slow
def test_quick_benchmark_meets_its_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "result.json"
    monkeypatch.setattr("sys.argv", ["stability_edge", "--quick", "--json", str(out)])
    stability_edge.main()
    result = json.loads(out.read_text())
    assert set(result) == {
        "worst_relative_error", "worst_transient", "cases", "optimizers", "edge_of_stability", "local_scale"
    }  # fmt: skip
    assert set(result["optimizers"]) == {make.__name__ for make in EXACT}
    assert result["worst_relative_error"] < 1e-3
    assert result["worst_transient"] <= 4
    assert all(row["long_runs_agree"] for row in result["optimizers"].values())
    assert all(math.isfinite(row["utilisation"]["median"]) for row in result["local_scale"])
    shown = capsys.readouterr().out
    assert "worst error" in shown and "Adadelta" in shown


def test_recorded_result_meets_its_targets(root: Path) -> None:
    """The result that the docs show."""
    result = json.loads((root / "docs" / "results" / "stability_edge.json").read_text())
    assert result["worst_relative_error"] < 1e-3
    assert result["worst_transient"] <= 4
    assert set(result["optimizers"]) == {make.__name__ for make in EXACT}
    assert all(row["sets"] >= 12 and row["long_runs_agree"] for row in result["optimizers"].values())
    assert set(result["edge_of_stability"]) == {"GD", "heavy ball", "Adam", "RMSprop"}
    assert all(0.9 < row["median"] < 1.1 for row in result["edge_of_stability"].values())


@pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)
def test_limit_is_the_real_optimizers_with_mixed_groups(make: type[Optimizer]) -> None:
    setup = set_ups(make, 1, 1)[1]
    assert len(setup.groups) > 1
    assert edge_of(setup, seed=1, long_run=0)["relative_error"] < 1e-6


@pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)
def test_nothing_is_amplified_fourfold_on_quadratics_that_do_not_commute(make: type[Optimizer]) -> None:
    assert transient(set_ups(make, 1, 1)[0], seed=0, updates=60) <= 4


def test_transition_matrix_of_heavy_ball_is_the_books() -> None:
    """(x, buf)' = ((1 - lr h) x - lr mu buf, h x + mu buf)."""
    setup = SetUp(SGD, ({"momentum": 0.9, "share": 1.0},), {}, step=1)
    problem = Quadratic(setup, [1], seed=0, copies=2)
    h = float(problem.hessian)
    expected = torch.tensor([[1 - 0.3 * h, -0.3 * 0.9], [h, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(problem.transition_matrix(0.3), expected)


def test_wrong_limit_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the averages' constants (2 / gamma) the benchmark reports an error of more than a third."""
    setup = SetUp(AdamW, ({"betas": (0.9, 0.99), "share": 1.0}, {"betas": (0.0, 0.99), "share": 0.5}), {})
    row = edge_of(setup, seed=3, long_run=600)
    assert row["relative_error"] < 1e-6 and row["long_run_agrees"]
    measure = safe_lr.measure
    monkeypatch.setattr(safe_lr, "measure", lambda *args, **options: measure(*args, bound="coherence", **options))
    assert edge_of(setup, seed=3, long_run=0)["relative_error"] > 1 / 3


def test_trained_network_is_measured_along_the_way() -> None:
    row = edge_of_stability(Adam, {"lr": 0.05}, updates=40, warmup=20)
    assert [update for update, _ in row["trace"]] == [20, 40]
    assert row["reached_at"] in (None, 20, 40)
    assert row["final_loss"] < 1


def test_first_unstable_lr_finds_the_first_crossing() -> None:
    assert first_unstable_lr(lambda lr: 1.0 <= lr < 1.5 or lr > 3, 0.1, 1e-9) == pytest.approx(1.0, rel=1e-8)
    with pytest.raises(ArithmeticError, match="unstable at 2 already"):
        first_unstable_lr(lambda lr: lr > 1, 2.0, 1e-3)
    with pytest.raises(ArithmeticError, match="stable up to"):
        first_unstable_lr(lambda lr: False, 1.0, 1e-3)
