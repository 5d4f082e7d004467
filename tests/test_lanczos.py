"""Lanczos against matrices with prescribed spectra, and against the traps that were found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_lr.lanczos import lanczos, start_vector


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with exactly these eigenvalues."""
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return q @ torch.diag(eigenvalues.double()) @ q.T


SPECTRA = {
    "spread": torch.linspace(-1, 5, 60),
    "outlier": torch.cat([torch.rand(80), torch.tensor([50.0])]),
    "larger in magnitude below": torch.cat([torch.tensor([-100.0]), torch.linspace(0, 3, 40)]),
    "negative definite": -torch.linspace(1, 9, 30),
    "clustered": torch.cat([torch.zeros(50), torch.tensor([2.0, 2.0, 2.0])]),
    "one by one": torch.tensor([4.0]),
    "two by two": torch.tensor([4.0, -1.0]),
}


@pytest.mark.parametrize("spectrum", SPECTRA, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_largest_algebraic_eigenvalue(spectrum: str, seed: int) -> None:
    matrix = with_spectrum(SPECTRA[spectrum], seed)
    truth = float(torch.linalg.eigvalsh(matrix)[-1])
    found = lanczos(lambda v: matrix @ v, start_vector(matrix[0], seed), tol=1e-10)
    assert found.converged
    assert found.value == pytest.approx(truth, rel=1e-9)
    assert float((matrix @ found.vector - found.value * found.vector).norm()) <= 1e-8 * matrix.norm()
    assert found.num_matvecs <= len(matrix)


def test_residual_is_the_residual() -> None:
    """And the Ritz value lies below the truth, which lies below `upper` where the top stands out, as in networks."""
    matrix = with_spectrum(torch.cat([torch.logspace(-2, 1, 200), torch.tensor([60.0, 80.0, 100.0])]))
    truth = float(torch.linalg.eigvalsh(matrix)[-1])
    above = 0
    for seed in range(20):
        found = lanczos(lambda v: matrix @ v, start_vector(matrix[0], seed), tol=0.1)
        error = matrix @ found.vector - found.value * found.vector
        assert found.residual == pytest.approx(float(error.norm()), rel=1e-6)
        assert found.residual <= 0.1 * found.value
        assert found.value <= truth + 1e-9
        above += truth <= found.upper + 1e-9
    assert above >= 17  # a heuristic, not a certificate


def test_stops_on_the_residual_and_not_before_three() -> None:
    matrix = with_spectrum(torch.cat([torch.linspace(0, 1, 100), torch.tensor([1000.0])]))
    top = torch.linalg.eigh(matrix)[1][:, -1]
    assert lanczos(lambda v: matrix @ v, top + 1e-9 * torch.randn(101, dtype=torch.float64), tol=0.1).num_matvecs == 3


def test_unconverged_is_said_not_raised() -> None:
    matrix = with_spectrum(torch.linspace(0.9, 1, 300))
    found = lanczos(lambda v: matrix @ v, start_vector(matrix[0], 0), tol=1e-8, max_matvecs=4)
    assert (found.converged, found.num_matvecs) == (False, 4)
    assert found.upper >= float(torch.linalg.eigvalsh(matrix)[-1]) - 1e-12


def test_gradient_start_is_a_trap_that_the_random_part_avoids() -> None:
    """After 3,000 steps of gradient descent the gradient lies along the smallest eigenvalue, with residual ~0."""
    h = torch.tensor([100.0, 1.0, 0.01])
    x = torch.ones(3)
    for _ in range(3000):
        x = x - 0.01 * h * x
    gradient = h * x
    trapped = lanczos(lambda v: h * v, gradient, tol=0.1, min_matvecs=1)
    assert trapped.value == pytest.approx(0.01, rel=1e-3)
    assert trapped.residual < 1e-6
    assert lanczos(lambda v: h * v, start_vector(x, 0, gradient), tol=0.1).value == pytest.approx(100.0, rel=1e-3)


def test_start_vector_is_seeded_and_leaves_the_global_stream_alone() -> None:
    like, direction = torch.empty(1000), torch.randn(1000)
    before = torch.get_rng_state()
    assert torch.equal(start_vector(like, 3, direction), start_vector(like, 3, direction))
    assert not torch.equal(start_vector(like, 3), start_vector(like, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert float(start_vector(like, 3, direction) @ direction / direction.norm()) == pytest.approx(2**-0.5, abs=0.05)
    for useless in (torch.zeros(1000), torch.full((1000,), math.nan)):
        assert torch.equal(start_vector(like, 3, useless), start_vector(like, 3))


@pytest.mark.parametrize("v0", [torch.zeros(3), torch.tensor([1.0, math.nan]), torch.ones(2, 2)])
def test_useless_start_is_refused(v0: Tensor) -> None:
    with pytest.raises(ValueError, match="finite, non-zero vector"):
        lanczos(lambda v: v, v0)


def test_product_that_is_not_finite() -> None:
    found = lanczos(lambda v: v * math.inf, torch.ones(3))
    assert math.isnan(found.value)
    assert not found.converged


def test_float32_stays_orthogonal() -> None:
    """Fifty products in float32 still give the eigenvalue to float32 precision, with no ghost copies."""
    matrix = with_spectrum(torch.cat([torch.linspace(0, 1, 400), torch.tensor([1.02])])).float()
    truth = np.linalg.eigvalsh(matrix.double().numpy())[-1]
    found = lanczos(lambda v: matrix @ v, start_vector(matrix[0], 1), tol=1e-5, max_matvecs=200)
    assert found.value == pytest.approx(truth, rel=1e-5)
