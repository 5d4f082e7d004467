"""Whether an eigenpair that was found with approximate products (differences of the gradient) can be believed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from safe_lr.lanczos import EigenEstimate, Matvec

DISAGREEMENT = 0.1
"""Relative difference of an eigenvector's two products from which differences are not to be believed. The whole product
is compared: over kinks (ReLU) eigenvalues alone can agree by chance, three times the right one."""


class Disagreement(ArithmeticError):
    """Approximate products differ from those that check them."""


class First:
    """A matvec that keeps its first vector and product.

    Example:
        >>> first = First(lambda v: 2 * v)
        >>> first(torch.ones(1)), first(torch.zeros(1)), first.vector, first.product
        (tensor([2.]), tensor([0.]), tensor([1.]), tensor([2.]))
    """

    def __init__(self, matvec: Matvec) -> None:
        self.matvec = matvec
        self.vector: Tensor
        self.product: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        found = self.matvec(v)
        if not hasattr(self, "vector"):
            self.vector, self.product = v.clone(), found.clone()  # the solver changes both in place
        return found


def checked(estimate: EigenEstimate, again: Matvec, remainder: float) -> EigenEstimate:
    """Makes the eigenvector's product once more, by other differences, and takes out the error that shows.

    Richardson's extrapolation of v' A v, of which v' A' v has `remainder` times the error:

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
    found = again(estimate.vector)
    along = torch.dot(estimate.vector, found)
    return _agreed(estimate, found, along, (along - remainder * estimate.value) / (1 - remainder), "by another step")


def verified(estimate: EigenEstimate, first: First, exact: Matvec) -> EigenEstimate:
    """Makes one exact product, of the eigenvector v and the start vector s together, and compares it.

    Exact products tell more than another step does: differences also follow what a closure detaches, which H does not.
    The start vector takes part since an eigenvector of both need not be the top one of both. With A the exact operator,
    B the differences, and q = A (v +- s), the sign such that the two do not cancel,

        v' A v = v' q / (1 + |v' s|)

    as far as v is an eigenvector of A too: Lanczos' method leaves a residual that is orthogonal to s. Off by .1 % at
    most on five smooth networks (docs/performance.md).

    Args:
        estimate: Found with B.
        first: B, which has kept its first product.
        exact: A.

    Raises:
        Disagreement: A and B differ on v and s by more than `DISAGREEMENT` of the eigenvalue.

    Example:
        >>> first = First(lambda v: 1.05 * v)
        >>> _ = first(torch.ones(1))
        >>> found = EigenEstimate(1.05, 0.0, torch.ones(1), True, 3)
        >>> round(verified(found, first, lambda v: 1.0 * v).value, 6)
        1.0
    """
    v, s = estimate.vector, first.vector
    cosine = torch.dot(v, s)
    sign = torch.where(cosine < 0, -1.0, 1.0).to(v)
    found = exact(torch.addcmul(v, s, sign))
    value = torch.dot(v, found) / (1 + cosine.abs())
    found.addcmul_(first.product, -sign)
    return _agreed(estimate, found, torch.dot(v, found), value, "and exact products")


def _agreed(estimate: EigenEstimate, found: Tensor, along: Tensor, value: Tensor, other: str) -> EigenEstimate:
    """The estimate with its value mended, if another product of its vector is near enough to its own.

        A' v - value v = (A' v - A v) + (A v - value v)

    The last term's norm is the residual: what is left of the first one's is an error of the products.

    Args:
        estimate: What is to be checked.
        found: A' v, which is changed.
        along: v' A' v.
        value: The better eigenvalue.
        other: What made A' v, for the error.
    """
    off = torch.linalg.vector_norm(found.sub_(estimate.vector, alpha=estimate.value))
    rest = torch.linalg.vector_norm(found.addcmul_(estimate.vector, estimate.value - along))
    again, mended, off_by, residual = torch.stack([along, value, off, rest]).double().tolist()
    gap = (off_by - estimate.residual) / estimate.value
    if not gap <= DISAGREEMENT:
        raise Disagreement(f"{other} differ by {gap:.0%}")
    return replace(estimate, value=mended, residual=math.hypot(max(residual, estimate.residual), again - mended))
