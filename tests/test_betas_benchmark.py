"""benchmarks/betas.py: tiny runs, and what is made of results whose answer is known."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import betas
from benchmarks.betas import METRICS, Benchmark, ending, groups_with, markdown, run_cell, variants_of
from benchmarks.lr_robustness import Row, spread
from benchmarks.tasks import TASKS
from benchmarks.training import Cell, make_optimizers, run

LORA, TEACHER = Row("lora", "adam"), Row("teacher", "rmsprop")


def tiny(tmp_path, **changes):
    settings = {"seeds": (1, 2), "steps": 12, "spike_steps": 0} | changes
    return Benchmark(tmp_path / "cells", [LORA, TEACHER], {LORA: -4, TEACHER: -5}, **settings)


def test_rows_have_only_the_settings_that_can_change_anything():
    assert list(variants_of(LORA)) == list(betas.VARIANTS)
    assert list(variants_of(TEACHER)) == ["off", "eps"]
    assert list(variants_of(Row("cnn", "sgd"))) == ["off"]
    assert len(betas.ROWS) == 9 and {optimizer for _, optimizer in betas.ROWS} == set(betas.FAMILY)


def test_off_is_the_run_of_the_other_benchmark_to_the_bit():
    row = LORA.cell(betas.METHOD, 0.1, 1, 12)
    mine, theirs = run_cell(row), run(Cell("lora", "adam", "safe", 0.1, 1, 12))
    assert all(mine[name] == theirs[name] for name in ("score", "val", "measurements", "capped", "losses"))
    assert mine["betas"] == (0.9, 0.999) and mine["moves"] == 0


def test_fixed_betas_are_the_optimizers_own():
    fixed = run_cell(LORA.cell(betas.METHOD, 0.1, 1, 12, betas=(0.95, 0.99)))
    assert fixed["betas"] == (0.95, 0.99)
    assert fixed["score"] != run_cell(LORA.cell(betas.METHOD, 0.1, 1, 12))["score"]


def test_the_end_is_measured_as_sharp_as_it_is():
    """A linear model's squared error has H = 2 X^T X / n; SGD's P is 1, so gamma is lambda_max."""
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Linear(3, 1, bias=False)
    task = SimpleNamespace(held_out=lambda: (x, torch.ones(200, 1)), loss=torch.nn.functional.mse_loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = ending(task, model, [optimizer])
    part = x[: betas.EXAMPLES]
    true = float(torch.linalg.eigvalsh(2 * part.T @ part / len(part))[-1])
    assert found["gamma"] == pytest.approx(true, rel=betas.TOL)
    assert found["lambda_max"] == pytest.approx(true, rel=betas.TOL)
    gradient = torch.autograd.grad(task.loss(model(part), torch.ones(len(part), 1)), model.weight)[0].norm()
    assert 0.05 * gradient <= found["sam"] <= 0.05 * gradient + 0.5 * true * 0.05**2 * (1 + 1e-3)
    assert groups_with("betas", [optimizer]) == [] and "betas" not in found


@pytest.mark.slow
def test_a_tiny_benchmark_from_the_cells_to_the_section(tmp_path):
    benchmark = tiny(tmp_path)
    cells = list(benchmark.cells())
    assert len(cells) == len(set(cells)) == 2 * 3 * (6 + 2)
    assert [dict(cell.options) for cell in cells[:6]] == list(betas.VARIANTS.values())  # side by side
    benchmark.run(workers=0)
    result = benchmark.result()
    json.dumps(result, allow_nan=False)
    assert set(result) >= {"betas_worst_loss", "betas_median_gain", "eps_median_gain", "spikes_off", "spikes_on"}
    by_hand = benchmark.gap(LORA, 2, 1, "both", "score")
    assert by_hand in result["rows"][1]["settings"]["both"]["score"]["all"]
    page = markdown(result)
    assert page.count("| lora/adam |") == page.count("| teacher/rmsprop |") == 3
    assert "| teacher/rmsprop | 1x |" in page
    assert benchmark.cache.computed == len(cells)
    again = tiny(tmp_path)
    again.run(workers=0)
    assert again.cache.computed == 0 and again.result() == result


def filled(tmp_path, monkeypatch, value):
    """A benchmark whose figures are `value(cell, variant)`, nothing run."""
    benchmark = tiny(tmp_path, seeds=(1, 2, 3))
    names = {json.dumps(sorted(options.items())): name for name, options in betas.VARIANTS.items()}

    def get(cell):
        found = value(cell, names[json.dumps(list(cell.options))])
        shared = {"initial": 4.0, "diverged": found is None, "moves": 2, "capped": 0.5}
        return dict.fromkeys(METRICS, found) | shared

    monkeypatch.setattr(benchmark.cache, "get", get)
    return benchmark


def test_gains_are_paired_and_signed(tmp_path, monkeypatch):
    """Seeds differ tenfold; betas lower losses by a tenth but raise them by half at 100x; eps raises all by a fifth."""

    def value(cell, variant):
        factor = {"off": 1.0, "betas": 1.5 if cell.lr > 0.5 else 0.9, "eps": 1.2}.get(variant, 2.0)
        return factor * 10.0**cell.seed

    result = filled(tmp_path, monkeypatch, value).result()
    assert result["betas_worst_loss"] == pytest.approx(0.5)
    assert result["betas_median_gain"] == pytest.approx(0.1)
    assert result["eps_median_gain"] == pytest.approx(-0.2)
    at = result["rows"][0]["settings"]["betas"]["gamma"]
    assert at["low"] == pytest.approx(-0.1) and at["high"] == pytest.approx(-0.1)  # paired: no scatter is left
    assert result["overall"]["eps"]["val"]["all"] == pytest.approx([0.2, 0.2])  # a row counts once
    assert result["overall"]["betas"]["score"]["mean"] == pytest.approx((0.5 - 0.1 - 0.1) / 3)


def test_the_default_is_on_where_no_row_is_worse_and_the_sum_better(tmp_path, monkeypatch):
    def default(tuned, far):
        def value(cell, variant):
            factor = {"off": 1.0, "betas": far if cell.lr > 0.5 else tuned}.get(variant, 2.0)
            return factor * 10.0**cell.seed

        return filled(tmp_path, monkeypatch, value).result()["betas_default"]

    assert default(0.9, 1.0) == {"on": True, "worse": [], "mean": pytest.approx(-0.2 / 3)}
    assert default(0.5, 1.1)["worse"] == ["lora/adam at 100x"] and not default(0.5, 1.1)["on"]  # better in sum alone
    assert not default(1.0, 1.0)["on"]


def test_a_diverged_run_counts_with_its_first_loss(tmp_path, monkeypatch):
    result = filled(tmp_path, monkeypatch, lambda cell, variant: 2.0 if variant == "off" else None).result()
    assert result["betas_worst_loss"] == pytest.approx(1.0)  # 4 / 2 - 1
    assert result["rows"][0]["settings"]["betas"]["val"] == spread([])
    assert result["rows"][0]["settings"]["betas"]["diverged"] == 3


def test_without_the_spike_task_its_figures_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(betas, "spikes_module", lambda: None)
    benchmark = tiny(tmp_path, spike_steps=100)
    assert benchmark.spike_steps == 0 and benchmark.result()["spikes_off"] is None


def test_spikes_off_and_on(tmp_path):
    pytest.importorskip("benchmarks.spikes", exc_type=ImportError)
    benchmark = Benchmark(tmp_path / "cells", [], {}, seeds=(1,), spike_steps=120)
    benchmark.run(workers=0)
    result = benchmark.result()
    assert result["spikes"]["off"]["all"] and math.isfinite(result["spikes_off"]) and math.isfinite(result["spikes_on"])
    assert "Spikes a run on a stream that shifts" in markdown(result)


def test_muon_and_its_companion_take_the_betas_where_they_have_them():
    optimizers = make_optimizers("muon", TASKS["gpt"].make_model(0), 0.1)
    assert len(groups_with("betas", optimizers)) == 1
