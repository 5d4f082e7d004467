"""Lanczos' method on a symmetric operator that is known only by its products: the top, both ends, or all in outline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]
Array = npt.NDArray[np.float64]

SLICE = 1 << 16
"""Entries of each basis vector that a restart mixes at a time: what it holds beside the basis is a slice of it."""


@dataclass(frozen=True)
class EigenEstimate:
    """An eigenvalue and how far it can be trusted.

    Attributes:
        value: The Ritz value; never above the true largest eigenvalue, save for rounding.
        residual: `||A v - value v||` for the unit vector v: some eigenvalue lies within this distance of `value`.
        vector: The Ritz vector, shape (n,), unit norm.
        converged: Whether `residual <= tol * |value|`, or what stands for `tol` while products are few.
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
    matvec: Matvec,
    v0: Tensor,
    *,
    tol: float = 1e-3,
    max_matvecs: int = 100,
    min_matvecs: int = 3,
    settled: int = 1,
    max_basis: int | None = None,
    overwrite_v0: bool = False,
) -> EigenEstimate:
    """Estimates the largest algebraic (not largest in magnitude) eigenvalue of a symmetric operator.

    After k products the operator is known on the Krylov space K = span(v0, A v0, ..., A^{k-1} v0) as a tridiagonal
    matrix T; its largest eigenvalue is the Ritz value, and the residual is `beta_k |u_k|` with u the eigenvector of T.
    Every new basis vector is orthogonalised against the last two, then against all. It stops on the relative residual,
    never on a count, because products needed differ from task to task; `max_matvecs` is a stop for the operator that
    never converges.

    A start vector without a component along the top eigenvector makes the residual lie (late in training the gradient
    is such a vector: it converges with residual 3e-16 to the *smallest* eigenvalue). See `start_vector`.

    Args:
        matvec: v -> A v on vectors of shape (n,). What it returns is changed in place, unless it is v itself.
        v0: Start vector, shape (n,), not zero; its dtype and device are the arithmetic's (the small eigenproblem is
            solved in float64 on the host). One host synchronisation per product.
        tol: Relative residual at which to stop.
        max_matvecs: Largest number of products.
        min_matvecs: Smallest number of products: a fortunate start may look converged after one.
        settled: Products from which on `tol` counts in full. Before, the k-th product's residual must be
            `tol (k - 1) / (settled - 1)` at most: what converges early may be a smaller eigenvalue, of which the start
            vector has more, and whose residual soon grows again.
        max_basis: Largest number of basis vectors, 2 at least. Where it is reached, the upper half of the Ritz vectors
            stays and the rest goes (a thick restart). At most `max_basis + 1` vectors of shape (n,) then live at once,
            beside v0, which is the caller's, and what the matvec itself needs; products grow in number as the basis
            shrinks. None keeps all: one vector a product, and the fewest products.
        overwrite_v0: Whether v0 may serve as one of those vectors, and lose what it holds.

    Returns:
        The estimate; `converged` False, and the residual as large as it is, where `max_matvecs` came first. The value
        is NaN where a product was not finite.

    Raises:
        ValueError: v0 is not a vector, or is zero or not finite; `max_basis` is below 2.

    Example:
        >>> diagonal = torch.tensor([3.0, 1.0, -7.0], dtype=torch.float64)
        >>> estimate = lanczos(lambda v: diagonal * v, torch.ones(3, dtype=torch.float64), tol=1e-10)
        >>> round(estimate.value, 9), estimate.num_matvecs
        (3.0, 3)

    References:
        Lanczos 1950; Golub & Van Loan 2013, ch. 10; Paige 1971 for the residual bound; Wu & Simon 2000 for the restart.
    """
    return _ends(matvec, v0, (-1,), tol, max_matvecs, min_matvecs, settled, max_basis, overwrite_v0)[0]


def both_ends(
    matvec: Matvec,
    v0: Tensor,
    *,
    tol: float = 1e-3,
    max_matvecs: int = 100,
    min_matvecs: int = 3,
    settled: int = 1,
    max_basis: int | None = None,
    overwrite_v0: bool = False,
) -> tuple[EigenEstimate, EigenEstimate]:
    """Estimates the largest and the smallest algebraic eigenvalue from one Krylov space.

    As `lanczos`, continued until the smallest has converged too: to a residual of `tol * max(|value|, tol * |A|)`, for
    an eigenvalue of nearly zero has no relative precision.

    Args:
        matvec: v -> A v on vectors of shape (n,).
        v0: Start vector, shape (n,), with a random part: see `start_vector`.
        tol: Relative residual at which to stop.
        max_matvecs: Largest number of products.
        min_matvecs: Smallest number of products.
        settled: Products from which on `tol` counts in full, as in `lanczos`.
        max_basis: Largest number of basis vectors, 3 at least: a restart keeps both ends. None keeps all.
        overwrite_v0: Whether v0 may serve as one of those vectors, and lose what it holds.

    Returns:
        The largest and the smallest; `num_matvecs` of each counts all products.

    Raises:
        ValueError: v0 is not a vector, or is zero or not finite; `max_basis` is below 3.

    Example:
        >>> diagonal = torch.tensor([3.0, 1.0, -7.0], dtype=torch.float64)
        >>> [round(end.value, 9) for end in both_ends(lambda v: diagonal * v, torch.ones_like(diagonal))]
        [3.0, -7.0]
    """
    top, bottom = _ends(matvec, v0, (-1, 0), tol, max_matvecs, min_matvecs, settled, max_basis, overwrite_v0)
    return top, bottom


def _ends(
    matvec: Matvec,
    v0: Tensor,
    ends: tuple[int, ...],
    tol: float,
    max_matvecs: int,
    min_matvecs: int,
    settled: int,
    max_basis: int | None,
    overwrite_v0: bool,
) -> list[EigenEstimate]:
    """The Ritz pairs at the ends, counted as in a list of rising values: -1 the largest, 0 the smallest."""
    basis = [unit(v0, overwrite_v0)]
    least = 1 + len(ends)
    if max_basis is not None and not (isinstance(max_basis, int) and max_basis >= least):
        raise ValueError(f"max_basis must be an integer of at least {least}, or None for no bound; got {max_basis!r}")
    projected, num_matvecs, n, info = Projected(), 0, basis[0].numel(), torch.finfo(basis[0].dtype)
    while True:
        w, a, b = expand(matvec, basis)
        num_matvecs += 1
        if not (math.isfinite(a) and math.isfinite(b)):
            return [EigenEstimate(math.nan, math.inf, basis[0], False, num_matvecs)] * len(ends)
        projected.alphas.append(a)
        values, vectors = projected.ritz()
        scale = max(abs(float(values[0])), abs(float(values[-1])), info.tiny)
        floor = 10 * info.eps * scale
        exhausted = b <= floor or len(basis) == n
        residuals = [min(r, floor) if exhausted else r for r in (b * abs(float(vectors[-1, end])) for end in ends)]
        # The smallest may be nearly zero, and then has no relative precision.
        sizes = [max(abs(float(values[end])), 0.0 if end else tol * scale) for end in ends]
        allowed = tol * min(1.0, (num_matvecs - 1) / (settled - 1)) if settled > 1 else tol
        good = [exhausted or r <= allowed * size for r, size in zip(residuals, sizes, strict=True)]
        if exhausted or (all(good) and num_matvecs >= min_matvecs) or num_matvecs >= max_matvecs:
            break
        if len(basis) == max_basis:
            low = max(1, max_basis // 4) if 0 in ends else 0
            kept = [*range(low), *range(-max(1, max_basis // 2 - low), 0)]
            mix(basis, vectors[:, kept])
            projected = Projected(values[kept].tolist(), [], b * vectors[-1, kept])
        else:
            projected.betas.append(b)
        basis.append(w.div_(b))
        del w  # in the basis only: a restart frees it there
    del w
    enough = exhausted or num_matvecs >= min_matvecs
    found = zip(ends, residuals, good, strict=True)
    return [
        EigenEstimate(float(values[e]), r, combined(basis, vectors[:, e]), bool(known and enough), num_matvecs)
        for e, r, known in found
    ]


def quadrature(matvec: Matvec, v0: Tensor, num_matvecs: int) -> tuple[Array, Array]:
    """Returns nodes and weights with which `sum(weights * f(nodes))` is `v0' f(A) v0 / v0' v0`, for smooth f.

    Exact for polynomials up to degree `2 num_matvecs - 1`. The nodes are the Ritz values of Lanczos' method, the
    weights the squared first entries of the eigenvectors of T.

    Args:
        matvec: v -> A v on vectors of shape (n,).
        v0: Start vector, shape (n,), finite and not zero.
        num_matvecs: Products, and so nodes. Fewer where the Krylov space is exhausted before.

    Returns:
        Nodes, rising, and weights, which sum to one. Nodes are NaN where a product was not finite.

    Raises:
        ValueError: v0 is not a vector, or is zero or not finite.

    Example:
        >>> diagonal = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
        >>> nodes, weights = quadrature(lambda v: diagonal * v, torch.ones(3, dtype=torch.float64), 2)
        >>> [round(float(weights @ nodes**power), 9) for power in (0, 1, 2, 3)]     # moments: mean of 1^k, 2^k, 6^k
        [1.0, 3.0, 13.666666667, 75.0]

    References:
        Golub & Meurant 1994, "Matrices, moments and quadrature"; Ubaru, Chen & Saad 2017.
    """
    basis, projected = [unit(v0)], Projected()
    largest, eps = 0.0, torch.finfo(v0.dtype).eps
    while True:
        w, a, b = expand(matvec, basis)
        if not (math.isfinite(a) and math.isfinite(b)):
            return np.array([math.nan]), np.array([1.0])
        projected.alphas.append(a)
        largest = max(largest, abs(a) + b)
        if b <= 10 * eps * largest or len(basis) in (num_matvecs, v0.numel()):
            break
        projected.betas.append(b)
        basis.append(w.div_(b))
    nodes, vectors = projected.ritz()
    return nodes, vectors[0] ** 2


def start_vector(like: Tensor, seed: int, direction: Tensor | None = None, *, random: float = 1.0) -> Tensor:
    """Returns `direction` plus a seeded random vector; the random vector alone without a direction.

    A good direction (the preconditioned gradient, the last top eigenvector) saves products; the random part keeps a bad
    one from hiding the top eigenvector. Never touches a global random stream.

    Args:
        like: A vector of the wanted shape (n,), dtype and device.
        seed: Seed of the random part.
        direction: Shape (n,); ignored where it is zero or not finite.
        random: Norm of the random part in units of the direction's.

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
            direction = direction.to(like)
            if float(torch.dot(vector, direction)) < 0:
                vector.neg_()  # never cancel the direction: in one dimension nothing would be left
            vector.add_(direction, alpha=1 / (random * norm))
            vector /= torch.linalg.vector_norm(vector)
    return vector


# ---- the arithmetic of Krylov spaces


@dataclass
class Projected:
    """A on the basis: tridiagonal, save that after a restart the kept Ritz vectors all meet the next one, an arrow.

    Attributes:
        alphas: The diagonal.
        betas: Beside it, from the arrow's tip on.
        arrow: What the kept Ritz vectors have in common with the first vector after them.

    Example:
        >>> values, _ = Projected([2.0, 2.0], [1.0]).ritz()
        >>> values.round(9).tolist()
        [1.0, 3.0]
    """

    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    arrow: Array = field(default_factory=lambda: np.zeros(0))

    def ritz(self) -> tuple[Array, Array]:
        """Returns the eigenvalues, rising, and the eigenvectors, as columns."""
        kept = len(self.arrow)
        if not kept:
            values, vectors = scipy.linalg.eigh_tridiagonal(np.array(self.alphas), np.array(self.betas))
            return values, vectors
        matrix = np.diag(self.alphas)
        matrix[kept, :kept] = self.arrow
        for i, beta in enumerate(self.betas, start=kept):
            matrix[i + 1, i] = beta
        return np.linalg.eigh(matrix)  # it reads the lower half


def unit(v0: Tensor, overwrite: bool = False) -> Tensor:
    """Returns a start vector at unit norm, in place with `overwrite`.

    Raises:
        ValueError: It is no vector, or zero or not finite.

    Example:
        >>> unit(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    norm = float(torch.linalg.vector_norm(v0)) if v0.ndim == 1 else math.nan
    if not (math.isfinite(norm) and norm > 0):
        raise ValueError(f"v0 must be a finite, non-zero vector, got shape {tuple(v0.shape)} and norm {norm:g}")
    return v0.div_(norm) if overwrite else v0 / norm


def expand(matvec: Matvec, basis: Sequence[Tensor], locked: Sequence[Tensor] = ()) -> tuple[Tensor, float, float]:
    """Returns A times the last basis vector, less its part in the basis, and T's next alpha and beta.

    One host synchronisation. `locked` are vectors beside the basis that are to have no part in it either.

    Example:
        >>> diagonal = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> w, alpha, beta = expand(lambda v: diagonal * v, [unit(torch.ones(2, dtype=torch.float64))])
        >>> round(alpha, 9), round(beta, 9)
        (2.0, 1.0)
    """
    w = matvec(basis[-1])
    if w.untyped_storage().data_ptr() == basis[-1].untyped_storage().data_ptr():
        w = w.clone()  # ours to change: a matvec may return its argument
    alpha = torch.dot(w, basis[-1])
    without(basis[-2:], w)  # all that there is of A's, but for rounding and right after a restart
    without([*locked, *basis], w)
    a, b = torch.stack([alpha, torch.linalg.vector_norm(w)]).double().tolist()
    return w, a, b


def without(basis: Sequence[Tensor], w: Tensor) -> Tensor:
    """Takes an orthonormal basis out of w, in place, and returns w.

    Example:
        >>> without([torch.tensor([1.0, 0.0])], torch.tensor([2.0, 5.0]))
        tensor([0., 5.])
    """
    for q in basis:
        w.addcmul_(q, torch.dot(q, w), value=-1)
    return w


def combined(basis: Sequence[Tensor], weights: Array) -> Tensor:
    """Returns the combination of the basis that the weights tell.

    Example:
        >>> combined([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], np.array([2.0, 3.0]))
        tensor([2., 3.])
    """
    vector = torch.zeros_like(basis[0])
    for q, weight in zip(basis, weights, strict=True):
        vector.add_(q, alpha=float(weight))
    return vector


def mix(basis: list[Tensor], weights: Array) -> None:
    """Makes the basis the combinations that the columns of weights tell: in place, a slice at a time.

    Example:
        >>> basis = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
        >>> mix(basis, np.array([[0.6], [0.8]]))
        >>> basis
        [tensor([0.6000, 0.8000])]
    """
    turn = torch.as_tensor(np.ascontiguousarray(weights.T)).to(basis[0])
    for start in range(0, basis[0].numel(), SLICE):
        part = slice(start, start + SLICE)
        for q, mixed in zip(basis, turn @ torch.stack([q[part] for q in basis]), strict=False):
            q[part] = mixed
    del basis[len(turn) :]
