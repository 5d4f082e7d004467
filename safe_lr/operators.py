"""Curvature as an operator: a Hessian that is known only by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Curvature:
    """The loss's gradient and Hessian at one point, on one batch.

    Attributes:
        gradient: dL/dp for each parameter, detached, zeros where the loss does not use it.
        used: Whether the loss uses the parameter at all.
        product: v -> H v on lists of tensors shaped like the parameters. Valid while the `Curvature` lives.
    """

    gradient: list[Tensor]
    used: list[bool]
    product: Product


def exact_hessian(loss: Tensor, params: Sequence[Tensor]) -> Curvature:
    """Returns the Hessian of a loss by double backward on one retained graph.

        H v = d/dp (g(p) . v),    g = dL/dp

    The graph of g is built once (about one gradient's cost) and each product is one backward pass through it (about two
    gradients' cost), the cheapest exact product there is. Because the graph is one and the same, dropout's mask is
    frozen and the operator is symmetric.

    Args:
        loss: Scalar with its graph.
        params: Leaf tensors. Those that the loss does not use, or uses linearly, have zero rows in H.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> curvature = exact_hessian((x ** 3).sum(), [x])          # H = diag(6 x)
        >>> curvature.product([torch.ones(2)])
        [tensor([ 6., 12.])]

    References:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    made = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    grads = [None if g is None else _dense(g) for g in made]
    curved = [g for g in grads if g is not None and g.requires_grad]

    def product(vectors: Sequence[Tensor]) -> list[Tensor]:
        if not curved:
            return [torch.zeros_like(p) for p in params]
        weights = [v for v, g in zip(vectors, grads, strict=True) if g is not None and g.requires_grad]
        products = torch.autograd.grad(curved, params, weights, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if h is None else _dense(h) for h, p in zip(products, params, strict=True)]

    gradient = [torch.zeros_like(p) if g is None else _dense(g.detach()) for g, p in zip(grads, params, strict=True)]
    return Curvature(gradient, [g is not None for g in grads], product)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor  # an embedding's gradient
