"""Eigenpairs and the spectral density of small networks against their dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safe_lr import SpectralDensity, eigenpairs, measure, spectral_density
from safe_lr.closures import ClosureError
from safe_lr.movers import MeasurementFailed
from safe_lr.operators import Curvature, exact_hessian, fisher, gauss_newton, sampled_losses

CLOSURES: dict[str, Callable[..., Any]] = {
    "hessian": lambda model, x, y: lambda: F.cross_entropy(model(x), y),
    "gauss-newton": lambda model, x, y: lambda: (model(x), lambda f: F.cross_entropy(f, y)),
    "fisher": lambda model, x, y: lambda: (model(x), lambda f: F.cross_entropy(f, y)),
    "empirical-fisher": lambda model, x, y: lambda: F.cross_entropy(model(x), y, reduction="none"),
}


def network(width: int = 6) -> tuple[nn.Module, list[nn.Parameter], Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()
    return model, list(model.parameters()), torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 3, (30,))


def dense(kind: str, model: nn.Module, params: list[nn.Parameter], x: Tensor, y: Tensor) -> Tensor:
    """The matrix, from its products with all unit vectors; those are tested against Jacobians in test_curvatures."""
    outputs = model(x)
    curvature: Curvature = {
        "hessian": lambda: exact_hessian(F.cross_entropy(outputs, y), params),
        "gauss-newton": lambda: gauss_newton(outputs, F.cross_entropy(outputs, y), params),
        "fisher": lambda: fisher(sampled_losses(outputs, 0), params, F.cross_entropy(outputs, y)),
        "empirical-fisher": lambda: fisher(F.cross_entropy(outputs, y, reduction="none"), params, outputs.sum()),
    }[kind]()
    sizes = [p.numel() for p in params]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        parts = [v.view_as(p) for v, p in zip(unit.split(sizes), params, strict=True)]
        columns.append(torch.cat([h.reshape(-1) for h in curvature.product(parts)]))
    return torch.stack(columns, 1)


def integral(y: np.ndarray, x: np.ndarray) -> float:
    return float(((y[1:] + y[:-1]) * np.diff(x)).sum() / 2)


def trained(model: nn.Module, params: list[nn.Parameter], x: Tensor, y: Tensor, **options: Any) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(params, lr=1e-2, **options)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("kind", CLOSURES)
def test_eigenpairs_of_every_curvature(kind: str, which: str) -> None:
    model, params, x, y = network()
    found = eigenpairs(CLOSURES[kind](model, x, y), params, k=4, which=which, curvature=kind, tol=1e-6)
    matrix = dense(kind, model, params, x, y)
    truth = torch.linalg.eigvalsh(matrix)
    norm = float(truth.abs().max())
    wanted = truth.flip(0)[:4] if which == "largest" else truth[:4]
    assert [pair.value for pair in found] == pytest.approx(wanted.tolist(), rel=1e-5, abs=1e-10 * norm)
    for pair in found:
        error = float((matrix @ pair.vector - pair.value * pair.vector).norm())
        assert error == pytest.approx(pair.residual, rel=1e-2, abs=1e-12 * norm)
        assert pair.converged and float(pair.vector.norm()) == pytest.approx(1.0)


def test_with_an_optimizer_they_are_those_of_the_preconditioned_hessian() -> None:
    """And the first is the gamma of measure(), with L2 decay on the diagonal and with groups of unequal lr."""
    model, params, x, y = network()
    optimizer = trained(model, params, x, y, weight_decay=0.05)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 1e-3})  # which the loss does not use
    closure = CLOSURES["hessian"](model, x, y)
    optimizer.param_groups[0]["lr"] = 5e-4  # half of the largest
    found = eigenpairs(closure, params, k=3, optimizer=optimizer, tol=1e-8)
    grads = torch.autograd.grad(closure(), params)
    steps = 61
    g = torch.cat([(grad + 0.05 * p.detach()).reshape(-1) for grad, p in zip(grads, params, strict=True)])
    v = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in params]) * 0.999 + 0.001 * g**2
    scale = 0.5**0.5 * ((v / (1 - 0.999**steps)).sqrt() + 1e-8).rsqrt()
    matrix = dense("hessian", model, params, x, y) + 0.05 * torch.eye(len(v), dtype=torch.float64)
    truth = torch.linalg.eigvalsh(scale[:, None] * matrix * scale).flip(0)[:3]
    assert [pair.value for pair in found] == pytest.approx(truth.tolist(), rel=1e-6)
    assert measure(optimizer, closure, tol=1e-8).gamma == pytest.approx(found[0].value, rel=1e-6)
    everyone = [*params, *optimizer.param_groups[1]["params"]]  # unused parameters add zeros
    wider = eigenpairs(closure, everyone, k=3, optimizer=optimizer, tol=1e-8)
    assert [pair.value for pair in wider] == pytest.approx(truth.tolist(), rel=1e-6)
    assert float(wider[0].vector[-2:].norm()) < 1e-6


def test_an_optimizer_that_climbs_sees_the_negative_hessian() -> None:
    model, params, x, y = network()
    closure = CLOSURES["hessian"](model, x, y)
    climbing = torch.optim.SGD(params, lr=0.1, maximize=True)
    up = eigenpairs(closure, params, k=2, optimizer=climbing, tol=1e-6)
    down = eigenpairs(closure, params, k=2, which="smallest", tol=1e-6)
    assert [pair.value for pair in up] == pytest.approx([-pair.value for pair in down], rel=1e-5)


def test_a_repeated_top_eigenvalue_of_a_network() -> None:
    """Two networks with the same weights on a shared loss: every eigenvalue is there twice."""
    model, params, x, y = network()
    twin, twins, _, _ = network()
    found = eigenpairs(
        lambda: F.cross_entropy(model(x), y) + F.cross_entropy(twin(x), y), [*params, *twins], k=4, tol=1e-6
    )
    top = torch.linalg.eigvalsh(dense("hessian", model, params, x, y)).flip(0)[:2].tolist()
    assert [pair.value for pair in found] == pytest.approx([top[0], top[0], top[1], top[1]], rel=1e-5)


def test_every_way_of_making_products_and_several_closures() -> None:
    model, params, x, y = network()
    closure = CLOSURES["hessian"](model, x, y)
    top = eigenpairs(closure, params, k=2, tol=1e-6)
    halves = [CLOSURES["hessian"](model, part, labels) for part, labels in ((x[:15], y[:15]), (x[15:], y[15:]))]
    others = [
        eigenpairs(closure, params, k=2, tol=1e-6, hvp="lean"),
        eigenpairs(closure, params, k=2, tol=1e-3, hvp="finite-difference"),
        eigenpairs(halves, params, k=2, tol=1e-6),
    ]
    for other in others:
        assert [pair.value for pair in other] == pytest.approx([pair.value for pair in top], rel=1e-4)


def test_frozen_complex_and_half_precision_parameters() -> None:
    c = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    half = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def loss() -> Tensor:
        return (3 * c.real**2 + c.imag**2).sum() + (4 * half.float() ** 2).sum() + frozen.sum() * c.real.sum()

    found = eigenpairs(loss, [c, half, frozen], k=6)  # real parts 6, imaginary parts 2, half 8
    assert [pair.value for pair in found[:2]] == pytest.approx([8.0, 8.0], rel=2**-8)  # to the digits of bfloat16
    assert [pair.value for pair in found[2:]] == pytest.approx([6.0, 6.0, 2.0, 2.0], rel=1e-2)
    assert found[0].vector.shape == (6,)


def test_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    x = torch.randn(6, 3)
    model(x).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads, stream = [p.grad for p in model.parameters()], torch.get_rng_state()

    def loss() -> Tensor:
        return model(x).square().mean()

    first, second = (eigenpairs(loss, model.parameters(), k=2)[0].value for _ in range(2))
    assert first == second
    one, two = (spectral_density(loss, model.parameters(), 2, 5).density for _ in range(2))
    assert np.array_equal(one, two)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("kind", CLOSURES)
def test_density_has_the_moments_and_the_distribution_of_the_dense_matrix(kind: str) -> None:
    model, params, x, y = network()
    found = spectral_density(CLOSURES[kind](model, x, y), params, 40, 30, kind)
    truth = torch.linalg.eigvalsh(dense(kind, model, params, x, y)).numpy()
    reach = truth.max() - truth.min()
    assert (found.size, found.nodes.shape) == (len(truth), (40, 30))
    assert found.num_matvecs <= 40 * 30
    assert found.weights.sum() == pytest.approx(1.0, rel=1e-9)
    mass = integral(found.density, found.grid)
    assert mass == pytest.approx(1.0, rel=1e-6)
    assert integral(found.density * found.grid, found.grid) == pytest.approx(found.mean, abs=1e-6 * reach)
    assert 0 < found.standard_error < 0.05 * reach
    assert abs(found.mean - truth.mean()) < 3 * found.standard_error
    # 40 probes of 51 dimensions tell a share of 1/2 to about .5 sqrt(2 / (40 51)) = .016; three times that
    at = np.linspace(truth.min() - 0.1 * reach, truth.max() + 0.1 * reach, 400)
    at = at[np.abs(at[:, None] - truth).min(axis=1) > 1e-4 * reach]  # not on a step
    exact = (truth <= at[:, None]).mean(axis=1)
    assert np.abs(found.below(at) - exact).max() < 0.05
    assert found.nodes.max() == pytest.approx(truth.max(), rel=1e-6)
    centred = (at[:, None] - truth) / found.sigma
    smooth = np.exp(-0.5 * centred**2).mean(axis=1) / (found.sigma * math.sqrt(2 * math.pi))
    there = np.interp(at, found.grid, found.density)
    assert np.abs(there - smooth).sum() * (at[1] - at[0]) < 0.15  # of a total of 1 each


def test_density_with_an_optimizer_and_a_grid_of_ones_own() -> None:
    model, params, x, y = network()
    optimizer = trained(model, params, x, y)
    closure = CLOSURES["hessian"](model, x, y)
    top = eigenpairs(closure, params, k=1, optimizer=optimizer, tol=1e-8)[0].value
    found = spectral_density(closure, params, 3, 40, optimizer=optimizer, grid=[0.0, top], sigma=0.01 * top)
    assert found.nodes.max() == pytest.approx(top, rel=1e-6)
    assert found.grid.tolist() == [0.0, top]
    assert found.density[0] > found.density[1] > 0
    assert found.sigma == 0.01 * top


def test_the_error_falls_with_the_probes() -> None:
    model, params, x, y = network()
    closure = CLOSURES["gauss-newton"](model, x, y)
    truth = float(dense("gauss-newton", model, params, x, y).trace()) / 51
    spread = {
        probes: np.std([spectral_density(closure, params, probes, 1, "gauss-newton", seed=s).mean for s in range(30)])
        for probes in (1, 16)
    }
    assert 2 < spread[1] / spread[16] < 8  # 4, within what 30 repetitions tell
    reported = np.mean(
        [spectral_density(closure, params, 16, 1, "gauss-newton", seed=s).standard_error for s in range(9)]
    )
    assert reported == pytest.approx(spread[16], rel=0.5)
    assert abs(spectral_density(closure, params, 16, 1, "gauss-newton").mean - truth) < 4 * spread[16]
    assert math.isnan(spectral_density(closure, params, 1, 1, "gauss-newton").standard_error)


def test_a_krylov_space_that_ends_early() -> None:
    x = nn.Parameter(torch.ones(5, dtype=torch.float64))
    found = spectral_density(lambda: x @ x * 3, [x], 4, 8)
    assert found.num_matvecs == 4
    assert found.mean == pytest.approx(6.0) and found.standard_error == pytest.approx(0.0, abs=1e-9)
    assert found.below([5.9, 6.1]) == pytest.approx([0.0, 1.0])
    flat = spectral_density(lambda: x.sum(), [x], 2, 8)
    assert flat.mean == 0.0 and integral(flat.density, flat.grid) == pytest.approx(1.0)


def stray() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.mark.parametrize(
    ("call", "options", "error", "message"),
    [
        (eigenpairs, {"which": "top"}, ValueError, "'largest' or 'smallest'.*got 'top'"),
        (eigenpairs, {"k": 0}, ValueError, "k must be an integer of at least 1; got 0"),
        (eigenpairs, {"k": 4}, ValueError, "k must be at most the number of parameters, 3; got 4"),
        (eigenpairs, {"k": 2, "max_matvecs": 3}, ValueError, "max_matvecs must be an integer of at least 4; got 3"),
        (eigenpairs, {"k": 1, "tol": 1.0}, ValueError, "tol must lie in .* got 1.0"),
        (eigenpairs, {"k": 1, "curvature": "bend"}, ValueError, "curvature must be one of 'hessian'.*got 'bend'"),
        (eigenpairs, {"k": 1, "hvp": "auto"}, ValueError, "hvp must be one of 'exact'.*got 'auto'"),
        (eigenpairs, {"k": 1, "optimizer": stray()}, ValueError, r"shape \(3,\) that is in no group"),
        (eigenpairs, {"k": 1, "optimizer": 3}, TypeError, "must be a torch.optim.Optimizer.*got int"),
        (eigenpairs, {"k": 1, "closure": lambda: 3.0}, ClosureError, "drop .item"),
        (spectral_density, {"num_probes": 0}, ValueError, "num_probes must be an integer of at least 1; got 0"),
        (spectral_density, {"num_matvecs": 2.5}, ValueError, "num_matvecs must be.*got 2.5"),
        (spectral_density, {"sigma": -1.0}, ValueError, "sigma is the width.*got -1.0"),
        (spectral_density, {"grid": [1.0, 0.0]}, ValueError, "grid must be rising"),
        (spectral_density, {"closure": lambda: None}, ClosureError, "forget to return"),
        (spectral_density, {"params": []}, ValueError, "requires grad"),
    ],
)
def test_bad_arguments_are_named(call: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    x = nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=message):
        call(**{"closure": lambda: x @ x, "params": [x], **options})


def test_numbers_that_are_not_finite_are_a_failure() -> None:
    x = nn.Parameter(torch.ones(3))
    for call in (eigenpairs, spectral_density):
        with pytest.raises(MeasurementFailed, match="the loss is nan"):
            call(lambda: x.sum() * math.nan, [x], 1)
        with pytest.raises(MeasurementFailed, match="the curvature is not finite"):
            call(lambda: ((x - 1).abs() ** 1.5).sum(), [x], 1)  # its second derivative at 1 is infinite


def test_sign_descent_has_no_preconditioner() -> None:
    x = nn.Parameter(torch.ones(3))
    signs = torch.optim.Rprop([x], lr=0.1)
    with pytest.raises(TypeError):
        eigenpairs(lambda: x @ x, [x], 1, optimizer=signs)


def test_picture_shows_density_nodes_and_a_single_eigenvalues_height(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    from safe_lr.plots import spectral_density as draw

    found = SpectralDensity(
        np.linspace(-1, 3, 41),
        np.linspace(0, 1, 41),
        np.array([[0.0, 2.0], [0.5, 2.0]]),
        np.full((2, 2), 0.25),
        0.1,
        50,
        4,
    )
    ax = draw(found)
    curve, alone, ticks = ax.lines
    assert np.array_equal(curve.get_xdata(), found.grid) and np.array_equal(curve.get_ydata(), found.density)
    assert alone.get_ydata()[0] == pytest.approx(1 / (50 * 0.1 * math.sqrt(2 * math.pi)))
    assert ticks.get_xdata().tolist() == [0.0, 2.0, 0.5, 2.0]
    assert ax.get_yscale() == "log" and ax.get_xlim() == (-1.0, 3.0)
    assert draw(found, ax) is ax
    ax.figure.savefig(tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > 10_000
