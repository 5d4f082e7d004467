"""Whether an eigenpair that was found with approximate products (differences of the gradient) can be believed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from safe_lr.lanczos import EigenEstimate, Matvec

DISAGREEMENT = 0.1
"""Relative difference of an eigenvector's products by two steps from which differences are not to be believed. The
whole product is compared: over kinks (ReLU) eigenvalues alone can agree by chance, three times the right one."""

MIXED = 3.0
"""How much of the start vector is mixed with the eigenvector whose product is made exactly. Where differences are blind
the two cancel at 1: an eigenvector is a polynomial of odd degree in the operator times the start vector, negative at
zero. On spectra of which differences hide a large part, as many wrong results are caught as by a product of each."""

MISMATCH = 0.2
"""Relative difference of that product from which differences are not to be believed. Those of smooth networks are off
by .04 at most, MIXED times what a random vector's product is off by included."""


class Disagreement(ArithmeticError):
    """Approximate products differ from those that check them."""


class First:
    """A matvec that keeps its first vector and product.

    Args:
        matvec: What to call.
        copy: Whether the vector is copied, for a solver that mixes its basis in place.

    Example:
        >>> first = First(lambda v: 2 * v, copy=True)
        >>> first(torch.ones(1)), first(torch.zeros(1)), first.vector, first.product
        (tensor([2.]), tensor([0.]), tensor([1.]), tensor([2.]))
    """

    def __init__(self, matvec: Matvec, *, copy: bool) -> None:
        self.matvec, self.copy = matvec, copy
        self.vector: Tensor | None = None
        self.product: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        found = self.matvec(v)
        if self.vector is None:
            self.vector, self.product = v.clone() if self.copy else v, found.clone()
        return found


def checked(estimate: EigenEstimate, again: Matvec, remainder: float) -> EigenEstimate:
    """Makes the eigenvector's product once more, by other differences, and takes out the error that shows.

        A' v - value v = (A' v - A v) + (A v - value v)

    The last term's norm is the residual: what is left of the first one's is an error of the products. Richardson's
    extrapolation of v' A v, of which v' A' v has `remainder` times the error:

        value = (v' A' v - remainder v' A v) / (1 - remainder)

    Args:
        estimate: Found with the differences A.
        again: A', differences of another step.
        remainder: The error of A' in units of that of A.

    Raises:
        Disagreement: The two products differ by more than `DISAGREEMENT` of the eigenvalue.

    Example:
        >>> found = EigenEstimate(1.04, 0.0, torch.ones(1), True, 3)          # the eigenvalue 1, off by .04
        >>> round(checked(found, lambda v: 1.01 * v, remainder=0.25).value, 6)
        1.0
    """
    v = estimate.vector
    found = again(v)
    along = torch.dot(v, found)
    off = torch.linalg.vector_norm(found.sub_(v, alpha=estimate.value))
    rest = torch.linalg.vector_norm(found.addcmul_(v, estimate.value - along))
    again_value, off_by, residual = torch.stack([along, off, rest]).double().tolist()
    _agree((off_by - estimate.residual) / estimate.value, DISAGREEMENT, "those by another step")
    value = (again_value - remainder * estimate.value) / (1 - remainder)
    return replace(estimate, value=value, residual=math.hypot(max(residual, estimate.residual), again_value - value))


def verified(estimate: EigenEstimate, first: First, exact: Matvec) -> EigenEstimate:
    """Makes one exact product, of the eigenvector v and the start vector s together, and compares it.

    Exact products tell more than another step does: differences also follow what a closure detaches, which H does not.
    The start vector takes part since an eigenvector of both need not be the top one of both. With A the exact operator,
    B the differences, E = A - B, and t = +-MIXED, the sign such that v and t s do not cancel,

        A (v + t s) - t B s - value v = E (v + t s) + (B v - value v)

    The last term, whose norm is the residual, has nothing to do with E: the norm of E's is taken to be the root of the
    difference of squares. Where E v = d v,

        v' A v = value + v' E (v + t s) / (1 + t v' s)

    (off by .2 % at most on five smooth networks, docs/performance.md). One part in 1 + MIXED of E (v + t s) is taken to
    be v's, and counts as residual.

    Args:
        estimate: Found with B.
        first: B, which has kept its first product.
        exact: A.

    Raises:
        Disagreement: A and B differ on v + t s by more than `MISMATCH` of the eigenvalue.

    Example:
        >>> first = First(lambda v: 1.05 * v, copy=True)
        >>> _ = first(torch.ones(1))
        >>> found = EigenEstimate(1.05, 0.0, torch.ones(1), True, 3)
        >>> round(verified(found, first, lambda v: 1.0 * v).value, 6)
        1.0
    """
    assert first.vector is not None
    assert first.product is not None
    v, s = estimate.vector, first.vector
    cosine = torch.dot(v, s)
    t = torch.where(cosine < 0, -MIXED, MIXED).to(v)
    error = exact(torch.addcmul(v, s, t)).addcmul_(first.product, -t).sub_(v, alpha=estimate.value)
    figures = torch.stack([torch.dot(v, error), cosine.abs(), torch.linalg.vector_norm(error)])
    along, overlap, size = figures.double().tolist()
    size = math.sqrt(max(0.0, size**2 - estimate.residual**2)) if math.isfinite(size) else math.nan
    _agree(size / estimate.value, MISMATCH, "and exact products")
    return replace(
        estimate,
        value=estimate.value + along / (1 + MIXED * overlap),
        residual=math.hypot(estimate.residual, size / (1 + MIXED)),
    )


def _agree(gap: float, allowed: float, other: str) -> None:
    if not gap <= allowed:
        raise Disagreement(f"{other} differ by {gap:.0%}")
