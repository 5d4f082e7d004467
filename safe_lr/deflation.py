"""The k largest eigenvalues: Lanczos' method again and again, on what is orthogonal to the pairs found so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from safe_lr.lanczos import EigenEstimate, Matvec, Projected, combined, expand, start_vector, unit, without


def several(
    matvec: Matvec, v0: Tensor, k: int, *, tol: float = 1e-3, max_matvecs: int = 500, seed: int = 0
) -> list[EigenEstimate]:
    """Estimates the k largest algebraic eigenvalues, each as often as it is repeated.

    A Krylov space never holds more than one eigenvector of a repeated eigenvalue. So once k pairs have converged, the
    same is run from a random vector orthogonal to them, until what it finds lies below the k-th, but for log(n)
    products at least: then, very likely, nothing was missed. If it lies above, it takes its place among them and the
    search goes on. (A block of k vectors finds repeated eigenvalues as well, but took up to twice the products on a
    network's Hessian: docs/performance.md.)

    Args:
        matvec: v -> A v on vectors of shape (n,).
        v0: Start vector, shape (n,), with a random part: see `start_vector`.
        k: How many, n at most.
        tol: Stops at residuals of `tol * max(|value|, tol * |A|)`: an eigenvalue of nearly zero is known to tol^2 of
            the operator's norm.
        max_matvecs: Largest number of products, 2 k at least; also of vectors kept.
        seed: Of the random vectors that the later searches start from.

    Returns:
        k estimates, the largest eigenvalue first; `num_matvecs` of each counts all products. Values are NaN where a
        product was not finite. Where `max_matvecs` came first, a repeated one may be missing.

    Raises:
        ValueError: k or `max_matvecs` is out of range; v0 is not a vector, or is zero or not finite.

    Example:
        >>> diagonal = torch.tensor([3.0, 3.0, -7.0, 1.0], dtype=torch.float64)     # 3 twice
        >>> [round(pair.value, 9) for pair in several(lambda v: diagonal * v, torch.ones_like(diagonal), k=3)]
        [3.0, 3.0, 1.0]

    References:
        Parlett 1998, "The symmetric eigenvalue problem", ch. 13.
    """
    if not 1 <= k <= v0.numel():
        raise ValueError(f"k must lie between 1 and the number of dimensions, {v0.numel()}; got {k!r}")
    if max_matvecs < 2 * k:
        raise ValueError(f"max_matvecs must be at least 2 k = {2 * k}, got {max_matvecs!r}")
    found: list[EigenEstimate] = []  # the largest first
    spent, norm, start, searches = 0, 0.0, v0, 0
    while True:
        missing, locked = k - len(found), [pair.vector for pair in found]
        bar = -math.inf if missing else found[-1].value
        budget = max_matvecs - spent - (max(missing, 1) if found else 0)  # a later find takes a product to check
        if budget < 1:
            break
        pairs, norm = _search(matvec, start, max(missing, 1), locked, bar, norm, tol, budget)
        spent += pairs[0].num_matvecs
        if not math.isfinite(pairs[0].value):
            return [replace(pairs[0], num_matvecs=spent)] * k
        if not missing and pairs[0].value <= bar + tol * max(abs(bar), tol * norm):
            break
        if found:
            pairs = [_checked(matvec, pair, norm, tol) for pair in pairs]
            spent += len(pairs)
        found = sorted([*found, *pairs], key=lambda pair: -pair.value)[:k]
        if k == 1 or len(found) == v0.numel():
            break
        searches += 1
        start = start_vector(v0, seed + searches)
    return [replace(pair, num_matvecs=spent) for pair in found]


def _search(
    matvec: Matvec,
    start: Tensor,
    wanted: int,
    locked: Sequence[Tensor],
    bar: float,
    norm: float,
    tol: float,
    max_matvecs: int,
) -> tuple[list[EigenEstimate], float]:
    """The wanted largest eigenpairs of A on what is orthogonal to the locked vectors; fewer where that is exhausted.

    Gives up where the largest lies below the bar. The norm is the largest magnitude of an eigenvalue met so far.
    """
    basis, projected, eps = (
        [unit(without(locked, without(locked, start.clone())))],
        Projected(),
        torch.finfo(start.dtype).eps,
    )
    sure = max(3, math.ceil(math.log(start.numel())))  # a random start hides what it misses by 1 / sqrt(n) at first
    while True:
        w, a, b = expand(matvec, basis, locked)
        if not (math.isfinite(a) and math.isfinite(b)):
            return [EigenEstimate(math.nan, math.inf, basis[0], False, len(basis))], norm
        projected.alphas.append(a)
        values, vectors = projected.ritz()
        values, vectors = values[::-1], vectors[:, ::-1]
        norm = max(norm, float(np.abs(values).max()), torch.finfo(start.dtype).tiny)
        residuals = b * np.abs(vectors[-1])
        exhausted = b <= 10 * eps * norm or len(basis) + len(locked) == start.numel()
        if exhausted:
            residuals = np.minimum(residuals, 10 * eps * norm)
        good = ((residuals <= tol * np.maximum(np.abs(values), tol * norm)) | exhausted)[:wanted]
        below = values[0] + residuals[0] <= bar and len(basis) >= sure
        done = len(good) == wanted and good.all() and len(basis) >= 3  # a fortunate start may look converged before
        if exhausted or done or below or len(basis) >= max_matvecs:
            break
        projected.betas.append(b)
        basis.append(w.div_(b))
    pairs = [
        EigenEstimate(float(values[i]), float(residuals[i]), combined(basis, vectors[:, i]), bool(known), len(basis))
        for i, known in enumerate(good)
    ]
    return pairs, norm


def _checked(matvec: Matvec, pair: EigenEstimate, norm: float, tol: float) -> EigenEstimate:
    """The pair with its residual under A itself: the search had left out the locked vectors' part."""
    w = matvec(pair.vector)
    value = float(torch.dot(pair.vector, w))
    residual = float(torch.linalg.vector_norm(w - value * pair.vector))
    floor = 10 * torch.finfo(w.dtype).eps * norm
    return replace(
        pair, value=value, residual=residual, converged=residual <= max(tol * max(abs(value), tol * norm), floor)
    )
