"""benchmarks/lr_robustness.py: the cells, their cache and what is made of them."""

import json
import math
import statistics

import pytest
import torch

from benchmarks import cells, lr_robustness
from benchmarks.cells import Cache, canonical, key
from benchmarks.lr_robustness import Matrix, Row, best, draw, missing_beside, table
from benchmarks.tasks import OPTIMIZERS, TASKS
from benchmarks.training import Cell, make_optimizers, run, warmup_cosine

ROWS = [(task.name, optimizer) for task in TASKS.values() for optimizer in task.optimizers]


def test_every_task_has_two_optimizers_and_every_optimizer_two_tasks():
    used = [optimizer for _, optimizer in ROWS]
    assert all(len(task.optimizers) >= 2 for task in TASKS.values())
    assert set(used) == set(OPTIMIZERS)
    assert all(used.count(name) >= 2 for name in OPTIMIZERS)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_depends_on_its_seed_alone(name):
    task = TASKS[name]
    first, again, other = task.make_model(3), task.make_model(3), task.make_model(4)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))
    x, y = next(task.batches(3, 8))
    assert torch.equal(x, next(task.batches(3, 8))[0])
    loss = task.loss(first(x), y)
    assert loss.ndim == 0
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("name", ["vit", "gpt"])
def test_muon_and_adamw_share_the_parameters_out(name):
    model = TASKS[name].make_model(0)
    held = [id(p) for opt in make_optimizers("muon", model, 0.01) for g in opt.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_only_the_adapters_of_the_lora_task_train():
    model = TASKS["lora"].make_model(0)
    names = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"a", "b"}


@pytest.mark.parametrize("method", ["constant", "cosine", "safe", "safe_cosine"])
def test_a_run_repeats(method):
    cell = Cell("teacher", "rmsprop", method, 0.003, 1, 12)
    first, again = run(cell), run(cell)
    assert first["score"] == again["score"]
    assert first["score"] < first["initial"]
    assert not first["diverged"]
    assert ("measurements" in first) == method.startswith("safe")


def test_a_run_that_blows_up_is_a_divergence():
    result = run(Cell("teacher", "adagrad", "constant", 1e30, 1, 12))
    assert result["diverged"]
    assert result["score"] is None


def test_warm_up_and_cosine():
    factor = warmup_cosine(100)
    assert [factor(k) for k in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(factor(k + 1) < factor(k) for k in range(5, 99))


def test_the_digest_sees_code_and_nothing_else():
    assert canonical("x = 1  # one") == canonical('"""Says."""\nx = 1')
    assert canonical("x = 1") != canonical("x = 2")


def test_a_cell_of_ours_depends_on_the_library_and_a_baseline_does_not(monkeypatch):
    ours, theirs = Cell("teacher", "rmsprop", "safe", 0.1, 1, 5), Cell("teacher", "rmsprop", "constant", 0.1, 1, 5)
    before = key(ours), key(theirs)
    real = cells.digest
    monkeypatch.setattr(cells, "digest", lambda library: "other" if library else real(library))
    assert key(ours) != before[0]
    assert key(theirs) == before[1]


def test_nothing_is_computed_twice_and_a_torn_file_counts_as_none(tmp_path):
    cell, made = Cell("teacher", "rmsprop", "constant", 0.001, 1, 3), []
    cache = Cache(tmp_path)

    def make(cell):
        made.append(cell)
        return {"score": 1.0, "diverged": False}

    for _ in range(2):
        assert cache.run([cell, cell], workers=0, make=make) == [{"score": 1.0, "diverged": False}] * 2
    assert len(made) == 1
    (tmp_path / f"{key(cell)}.json").write_text('{"score": 1')
    cache.run([cell], workers=0, make=make)
    assert len(made) == 2


def test_the_committed_baselines_are_looked_into(tmp_path):
    cell = Cell("teacher", "rmsprop", "constant", 0.001, 1, 3)
    committed = tmp_path / "committed.json"
    committed.write_text(json.dumps({key(cell): {"score": 2.0}}))
    assert Cache(tmp_path / "cache", committed).get(cell) == {"score": 2.0}


def test_the_search_goes_on_until_the_best_lies_inside(tmp_path):
    scores = {k: (k - 3) ** 2 for k in range(-10, 10)}
    matrix = Matrix(Cache(tmp_path), [Row("teacher", "rmsprop")], steps=3)
    asked = []

    def fake(wanted, label):
        asked.append([cell.seed for cell in wanted])
        return [{"diverged": False, "score": scores[cell.seed]} for cell in wanted]

    matrix.run = fake
    found = matrix.search({"x": -4}, lambda _, k: Cell("teacher", "rmsprop", "constant", 1.0, k, 3), "")
    assert found == {"x": 3}
    assert missing_beside({k: scores[k] for k in range(-5, 5)}, -4) == []
    assert best({0: math.inf, 1: 2.0}) == 1
    assert sum(map(len, asked)) == 10


def test_a_small_matrix_from_the_grid_to_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(lr_robustness, "VARIANTS", {"default": {}, "margin_max=1": {"margin_max": 1.0}})
    rows = [Row("teacher", "rmsprop"), Row("teacher", "adagrad")]
    matrix = Matrix(Cache(tmp_path / "cells"), rows, seeds=(1, 2, 3), steps=10, workers=0, compared=2)
    matrix.baselines()
    matrix.ours()
    result = matrix.result()
    json.dumps(result, allow_nan=False)
    row, other = result["rows"]
    wanted = [matrix.gap(matrix.protected(rows[0], 2, seed), rows[0], seed) for seed in (1, 2, 3)]
    assert row["safe_lr"]["default"]["2"]["all"] == wanted
    assert len(row["safe_lr"]["margin_max=1"]["4"]["all"]) == 2 and not row["safe_lr"]["margin_max=1"]["2"]["all"]
    for name in ("default", "margin_max=1"):  # both on the first two seeds
        means = [statistics.fmean(of["safe_lr"][name]["4"]["all"][:2]) for of in (row, other)]
        shown = result["variants"][name]["4"]
        assert (shown["median"], shown["worst"]) == pytest.approx((statistics.median(means), max(means)))
    bare = [[matrix.gap(matrix.unprotected(of, 4, seed), of, seed) for seed in (1, 2)] for of in rows]
    assert result["variants"]["nothing"]["4"]["worst"] == pytest.approx(max(map(statistics.fmean, bare)))
    assert result["variants"]["nothing"]["0"] == {"median": 0.0, "worst": 0.0, "rows": 2}
    assert [len({cell.seed for cell in matrix.used if dict(cell.options).get("credit") == 15.0})] == [2]
    assert result["worst_gap_above"] >= result["median_gap_above"]
    assert result["divergences_default"] <= result["divergences"]
    assert "teacher/rmsprop" in table(result)
    draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    computed = matrix.cache.computed
    matrix.ours()
    assert matrix.cache.computed == computed
