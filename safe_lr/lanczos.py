"""Lanczos' method for the largest algebraic eigenvalue of a symmetric operator that is known only by its products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EigenEstimate:
    """An eigenvalue and how far it can be trusted.

    Attributes:
        value: The Ritz value; never above the true largest eigenvalue, save for rounding.
        residual: `||A v - value v||` for the unit vector v: some eigenvalue lies within this distance of `value`.
        vector: The Ritz vector, shape (n,), unit norm.
        converged: Whether `residual <= tol * |value|`.
        num_matvecs: Products spent.
    """

    value: float
    residual: float
    vector: Tensor = field(repr=False)
    converged: bool
    num_matvecs: int

    @property
    def upper(self) -> float:
        """`value + residual`: a measured heuristic for an upper bound, not a certificate.

        Some eigenvalue lies in [value - residual, value + residual]; that it is the *largest* one is what the random
        part of the start vector makes likely.
        """
        return self.value + self.residual


def lanczos(
    matvec: Matvec, v0: Tensor, *, tol: float = 1e-3, max_matvecs: int = 100, min_matvecs: int = 3
) -> EigenEstimate:
    """Estimates the largest algebraic (not largest in magnitude) eigenvalue of a symmetric operator.

    After k products the operator is known on the Krylov space K = span(v0, A v0, ..., A^{k-1} v0) as a tridiagonal
    matrix T; its largest eigenvalue is the Ritz value, and the residual is `beta_k |u_k|` with u the eigenvector of T.
    Every new basis vector is orthogonalised twice against all the earlier ones. It stops on the relative residual,
    never on a count, because products needed differ from task to task; `max_matvecs` is a stop for the operator that
    never converges.

    A start vector without a component along the top eigenvector makes the residual lie (late in training the gradient
    is such a vector: it converges with residual 3e-16 to the *smallest* eigenvalue). See `start_vector`.

    Args:
        matvec: v -> A v on vectors of shape (n,).
        v0: Start vector, shape (n,), not zero; its dtype and device are the arithmetic's (the small eigenproblem is
            solved in float64 on the host). One host synchronisation per product.
        tol: Relative residual at which to stop.
        max_matvecs: Largest number of products.
        min_matvecs: Smallest number of products: a fortunate start may look converged after one.

    Returns:
        The estimate; `converged` False, and the residual as large as it is, where `max_matvecs` came first. The value
        is NaN where a product was not finite.

    Raises:
        ValueError: v0 is not a vector, or is zero or not finite.

    Example:
        >>> diagonal = torch.tensor([3.0, 1.0, -7.0], dtype=torch.float64)
        >>> estimate = lanczos(lambda v: diagonal * v, torch.ones(3, dtype=torch.float64), tol=1e-10)
        >>> round(estimate.value, 9), estimate.num_matvecs
        (3.0, 3)

    References:
        Lanczos 1950; Golub & Van Loan 2013, ch. 10; Paige 1971 for the residual bound.
    """
    norm = float(torch.linalg.vector_norm(v0)) if v0.ndim == 1 else math.nan
    if not (math.isfinite(norm) and norm > 0):
        raise ValueError(f"v0 must be a finite, non-zero vector, got shape {tuple(v0.shape)} and norm {norm:g}")
    basis = [v0 / norm]
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        w = matvec(basis[-1]).clone()  # ours to change: a matvec may return its argument
        alpha = torch.dot(w, basis[-1])
        for _ in range(2):
            for q in basis:
                w.addcmul_(q, torch.dot(q, w), value=-1)
        beta = torch.linalg.vector_norm(w)
        a, b = torch.stack([alpha, beta]).double().tolist()
        if not (math.isfinite(a) and math.isfinite(b)):
            return EigenEstimate(math.nan, math.inf, basis[0], False, len(basis))
        alphas.append(a)
        values, vectors = scipy.linalg.eigh_tridiagonal(np.array(alphas), np.array(betas))
        value, weights = float(values[-1]), vectors[:, -1]
        residual = b * abs(float(weights[-1]))
        scale = max(abs(float(values[0])), abs(value), torch.finfo(v0.dtype).tiny)
        exhausted = b <= 10 * torch.finfo(v0.dtype).eps * scale or len(basis) == v0.numel()
        if exhausted:
            residual = min(residual, 10 * torch.finfo(v0.dtype).eps * scale)
        converged = exhausted or (residual <= tol * abs(value) and len(basis) >= min_matvecs)
        if converged or len(basis) >= max_matvecs:
            break
        betas.append(b)
        basis.append(w / b)
    vector = torch.zeros_like(v0)
    for q, weight in zip(basis, weights, strict=True):
        vector.add_(q, alpha=float(weight))
    return EigenEstimate(value, residual, vector, bool(converged), len(basis))


def start_vector(like: Tensor, seed: int, direction: Tensor | None = None) -> Tensor:
    """Returns `direction` plus a seeded random vector of the same norm; the random vector alone without a direction.

    A good direction (the preconditioned gradient, the last top eigenvector) saves products; the random part keeps a bad
    one from hiding the top eigenvector. Never touches a global random stream.

    Args:
        like: A vector of the wanted shape (n,), dtype and device.
        seed: Seed of the random part.
        direction: Shape (n,); ignored where it is zero or not finite.

    Returns:
        A vector of shape (n,) and unit norm.

    Example:
        >>> v = start_vector(torch.empty(1000), seed=0, direction=torch.eye(1000)[0])
        >>> round(float(v[0]), 1), round(float(v.norm()), 6)
        (0.7, 1.0)
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    vector = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    vector /= torch.linalg.vector_norm(vector)
    if direction is not None:
        norm = float(torch.linalg.vector_norm(direction))
        if math.isfinite(norm) and norm > 0:
            direction = direction.to(like) / norm
            if float(torch.dot(vector, direction)) < 0:
                vector = -vector  # never cancel the direction: in one dimension nothing would be left
            vector = vector + direction
            vector /= torch.linalg.vector_norm(vector)
    return vector
