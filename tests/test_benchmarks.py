"""The benchmarks of cost: their parts against oracles, their quick runs, and what they record."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from benchmarks import curvature, gpu, memory
from benchmarks.curvature import available, eigenthings, ours, peak_mib, pyhessian, side_effects, state_of, truth
from benchmarks.networks import TASKS, Point, mlp
from safe_lr.operators import exact_hessian

STARTS = ("cold", "warm", "cold_preconditioned", "warm_preconditioned")
SIZES = {"mlp": 100e3, "conv_bn": 285e3, "gpt_small": 0.8e6, "gpt_large": 5e6}


@pytest.fixture
def point() -> Point:
    """A network small enough for its dense Hessian, four Adam updates old, with a training gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    made = Point(model, torch.optim.Adam(model.parameters(), lr=0.01), torch.randn(16, 4), torch.randint(3, (16,)))
    for _ in range(4):
        made.optimizer.zero_grad()
        made.loss().backward()
        made.optimizer.step()
    return made


def dense(point: Point) -> torch.Tensor:
    """The Hessian of the batch's loss, in float64."""
    model = point.copy().model.double()
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = [part.view(s) for part, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        outputs = functional_call(model, dict(zip(names, parts, strict=True)), (point.inputs.double(),))
        return nn.functional.cross_entropy(outputs, point.targets)

    return hessian(loss, flat)


def test_truth_is_the_dense_hessians_largest_eigenvalue(point: Point) -> None:
    assert truth(point, False) == pytest.approx(float(torch.linalg.eigvalsh(dense(point))[-1]), rel=1e-9)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_our_rows_converge_to_the_truth(point: Point, preconditioned: bool) -> None:
    found = ours(preconditioned, tol=1e-4)(point, 0)
    assert found.value == pytest.approx(truth(point, preconditioned), rel=1e-4)
    assert found.upper is not None and found.upper >= found.value


def test_figures_over_seeds_are_medians_of_each_seeds_and_the_worst_of_all_runs() -> None:
    nothing = {"own_error": 0.0, "num_matvecs": 4, "gradients": 9.0, "wall_gradients": 9.0}
    nothing |= {"counted": None, "hvp": "exact", "left_behind": [], "note": None}
    seeds = [
        curvature.Row(ours(False), None, 1.0, runs=[{"error": error, **nothing} for error in errors])
        for errors in ([0.1, 0.3], [0.0, 0.0, 0.9], [0.4])
    ]
    found = curvature.summary(seeds)
    assert found["error_by_seed"] == pytest.approx([0.2, 0.0, 0.4])
    assert found["error"] == pytest.approx(0.2)
    assert (found["error_range"], found["repeats"]) == ([0.0, 0.9], 6)


def test_seeds_draw_other_batches() -> None:
    for name in TASKS:
        inputs = [curvature.seeded(name, True, seed).point.inputs for seed in (1, 1, 2)]
        assert torch.equal(inputs[0], inputs[1]) and not torch.equal(inputs[0], inputs[2])


def test_cost_does_not_grow_with_the_data_set() -> None:
    small, large = curvature.data_sets(quick=True)
    assert large["examples"] == 16 * small["examples"]
    assert large["num_matvecs"] == pytest.approx(small["num_matvecs"], abs=1)


def test_every_kind_of_trace_is_named(point: Point) -> None:
    changes: dict[str, Callable[[], object]] = {
        "parameters": lambda: point.params[0].data.add_(1e-6),
        "gradients": lambda: point.optimizer.zero_grad(),
        "buffers": lambda: point.model[1].running_mean.add_(1),
        "optimizer state": lambda: point.optimizer.state[point.params[0]]["exp_avg"].add_(1),
        "train/eval mode": lambda: point.model.eval(),
        "hooks": lambda: point.model.register_forward_hook(lambda *_: None),
        "random stream of torch": lambda: torch.rand(1),
        "random stream of NumPy": lambda: np.random.rand(),
        "random stream of Python": lambda: random.random(),
    }
    point.loss().backward()
    for name, change in changes.items():
        before = state_of(point)
        assert side_effects(before, state_of(point)) == []
        change()
        assert side_effects(before, state_of(point)) == [name]


@pytest.mark.parametrize("preconditioned", [False, True])
def test_our_rows_leave_nothing_behind(point: Point, preconditioned: bool) -> None:
    point.loss().backward()
    before = state_of(point)
    ours(preconditioned)(point, 0)
    assert side_effects(before, state_of(point)) == []


@pytest.mark.filterwarnings("ignore")
def test_peers_find_the_same_eigenvalue(point: Point) -> None:
    pytest.importorskip("pyhessian")
    pytest.importorskip("hessian_eigenthings")
    right = truth(point, False)
    assert eigenthings(1, which="LA", max_iter=30)(point.copy(), 0).value == pytest.approx(right, rel=1e-3)
    found = pyhessian(1e-6)(point.copy(), 0)
    assert found.value == pytest.approx(truth(point, False, train=False), rel=1e-2)  # it measures in eval mode
    assert found.products > 1


def test_a_peer_that_is_not_installed_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hessian_eigenthings", None)
    tools, skipped = available()
    assert "hessian_eigenthings" not in tools
    assert "hessian_eigenthings" in skipped["hessian_eigenthings_k10"]


def test_peak_memory_sees_an_array_that_is_gone() -> None:
    peak = peak_mib(lambda: torch.ones(2**24).sum())
    if peak is None:
        pytest.skip("the kernel does not tell peak memory here")
    assert 60 < peak < 80


def test_networks_have_the_sizes_that_they_are_called_by() -> None:
    for name, size in SIZES.items():
        assert sum(p.numel() for p in TASKS[name](False).point.params) == pytest.approx(size, rel=0.05)


def test_training_is_repeatable() -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        task = mlp(quick=True)
        task.train(5)
        losses.append(float(task.point.loss().detach()))
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_quick_curvature_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "result.json"
    monkeypatch.setattr("sys.argv", ["curvature", "--quick", "--json", str(out)])
    curvature.main()
    result = json.loads(out.read_text())
    check_curvature(result)
    assert [row["examples"] for row in result["data"]] == [64, 1024]
    assert {row["batch"] for row in result["data"]} == {16}
    assert "upper >= truth" in capsys.readouterr().out


def check_curvature(result: dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]) -> None:
    """Every promised key is there, and safe_lr left nothing behind."""
    assert set(result["tasks"]) == set(TASKS)
    for task in result["tasks"].values():
        for start in STARTS:
            row = task["safe_lr"][start]
            assert all(math.isfinite(row[key]) for key in ("error", "num_matvecs", "gradients"))
            assert row["left_behind"] == []
            assert len(row["gradients_by_seed"]) == len(curvature.SEEDS)
            assert row["error_range"][1] >= row["error"]
        for peer in set(curvature.PEERS) - set(result["skipped"]) - set(task["failed"]):
            assert all(math.isfinite(task[peer][key]) for key in ("error", "gradients"))


@pytest.mark.parametrize(
    "name",
    [
        "cold: worst error",
        "cold: gradients",
        "cold_preconditioned: worst error",
        "cold_preconditioned: gradients",
        "warm: worst error",
        "warm: gradients",
        "warm_preconditioned: worst error",
        "warm_preconditioned: gradients",
        "cold: gradients over the best peer's",
        "upper >= truth, share of the cold cases",
        "exponent of cost in parameters",
        "products on 16 times the data over those on the data",
        "side effects of safe_lr",
    ],
)
def test_recorded_curvature_result(root: Path, name: str) -> None:
    """The result that the docs show: whole, nothing left behind; docs/performance.md tells what it misses."""
    result = json.loads((root / "docs" / "results" / "curvature.json").read_text())
    check_curvature(result)
    assert result["targets"][name]["met"], result["targets"][name]


def test_counted_memory_is_what_was_allocated() -> None:
    found = memory.peak_of(
        lambda: (torch.ones(2**18) + torch.ones(2**18)).sum()
    )  # three of 1 MiB at most, 4 bytes left
    assert found.mib == 3 and 0 < found.left < 1e-3
    assert found == memory.peak_of(lambda: (torch.ones(2**18) + torch.ones(2**18)).sum())


def test_saved_memory_elsewhere_gives_the_same_product(point: Point) -> None:
    vectors = [torch.ones_like(p) for p in point.params]
    moved = memory._elsewhere(point.loss, point.params, vectors)
    torch.testing.assert_close(list(moved), exact_hessian(point.loss(), point.params).product(vectors))


@pytest.mark.slow
def test_quick_memory_benchmark_and_the_recorded_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "memory.json"
    monkeypatch.setattr("sys.argv", ["memory", "--quick", "--json", str(out)])
    memory.main()
    assert "one-sided" in capsys.readouterr().out
    recorded = json.loads((root / "docs" / "results" / "memory.json").read_text())
    for result in (json.loads(out.read_text()), recorded):
        assert set(result["tasks"]) == set(TASKS)
        for task in result["tasks"].values():
            mib = task["mib"]
            assert mib["gradient"] < mib["finite-difference"] <= mib["one-sided"]  # which keeps where it starts from
            assert mib["saved"] < mib["lean"] < mib["retained"]
            assert mib["one-sided"] < mib["lean"]
    assert not recorded["quick"] and recorded["aim"]["worst"] < 3.2  # docs/performance.md says why it is not 1.6


def test_gpu_benchmark_on_a_tiny_gpt_on_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--quick", "--json", str(out)])
    gpu.main()
    result = json.loads(out.read_text())
    assert result["device"] == "cpu" and result["hvp"] == "exact"
    assert result["product_gradients"] > 0 and result["run"]["measurements"] >= 1
    assert result["synchronisations"]["per_measurement"] is None  # only CUDA tells
    assert set(result["memory_mib"]) == {"gradient", "measurement", "parameters"}
    assert math.isfinite(result["run"]["overhead"])
    assert "overhead of 20 steps" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_gpu_benchmark_says_what_to_do_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--device cpu --quick" in capsys.readouterr().err


def test_the_large_gpt_of_the_gpu_benchmark_has_124_m_parameters() -> None:
    shape = gpu.Shape()
    with torch.device("meta"):
        model = gpu.GPT(
            width=shape.width, depth=shape.depth, heads=shape.heads, length=shape.length,
            vocabulary=shape.vocabulary, tied=True,
        )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(124e6, rel=0.01)
