"""Curvature as an operator: a symmetric matrix that is known only by its products with vectors.

hessian           H = d^2 L / dp^2
gauss-newton      J' (d^2 L / df^2) J,      f the outputs, J = df / dp; never negative where L is convex in f
fisher            E_y [grad log p(y) grad log p(y)'] with one label y sampled from the model for each example
empirical-fisher  (1/B) sum_i grad l_i grad l_i',     l_i the loss of example i
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from safe_lr.graphs import hides_parameters, once_differentiable

Product = Callable[[Sequence[Tensor]], list[Tensor]]

Moved = Callable[[Sequence[Tensor], float], AbstractContextManager[None]]

DIFFERENCES = ("finite-difference", "one-sided")
"""Products that are not exact, and are made once more with another step to check what was found."""

CURVATURES = ("hessian", "gauss-newton", "fisher", "empirical-fisher")


class NoSecondDerivative(RuntimeError):
    """The graph cannot be differentiated twice."""


@dataclass(frozen=True)
class Curvature:
    """The loss's gradient and curvature at one point, on one batch.

    Attributes:
        loss: The loss.
        gradient: dL/dp for each parameter, detached, zeros where the loss does not use it.
        used: Whether the loss uses the parameter at all.
        product: v -> H v on lists of tensors shaped like the parameters. Valid while the `Curvature` lives.
        again: The same product by other numbers (another step), to check what was found; None where exact.
        remainder: The error of `again` in units of that of `product`, as Taylor's series has it.
        exact: The curvature that differences stand for, whose products are to check them; None to trust `again`.
        cost_of_product: Gradient evaluations that one product takes.
        cost: Gradient evaluations that were spent on making it.
        hvp: How products are made: `exact`, `lean`, `finite-difference` or `one-sided`.
    """

    loss: float
    gradient: list[Tensor]
    used: list[bool]
    product: Product
    again: Product | None = None
    remainder: float = 0.0
    exact: Curvature | None = None
    cost_of_product: float = 2.0
    cost: float = 1.0
    hvp: str = "exact"


def exact_hessian(loss: Tensor, params: Sequence[Tensor]) -> Curvature:
    """Returns the Hessian of a loss by double backward on one retained graph.

        H v = d/dp (g(p) . v),    g = dL/dp

    The graph of g is built once (about one gradient's cost) and each product is one backward pass through it (about two
    gradients' cost), the cheapest exact product there is. Because the graph is one and the same, dropout's mask is
    frozen and the operator is symmetric.

    Args:
        loss: Scalar with its graph.
        params: Leaf tensors. Those that the loss does not use, or uses linearly, have zero rows in H.

    Raises:
        NoSecondDerivative: Part of the graph is hidden from `torch.autograd.grad` (reentrant checkpointing).

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> curvature = exact_hessian((x ** 3).sum(), [x])          # H = diag(6 x)
        >>> curvature.product([torch.ones(2)])
        [tensor([ 6., 12.])]

    References:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    grads = _gradients_with_graph(loss, params)
    curved = [g for g in grads if g is not None and g.requires_grad]

    def product(vectors: Sequence[Tensor]) -> list[Tensor]:
        if not curved:
            return [torch.zeros_like(p) for p in params]
        weights = [v for v, g in zip(vectors, grads, strict=True) if g is not None and g.requires_grad]
        products = torch.autograd.grad(curved, params, weights, retain_graph=True, allow_unused=True)
        return _filled(products, params)

    return Curvature(float(loss.detach()), _detached(grads, params), [g is not None for g in grads], product)


def lean_hessian(evaluate: Callable[[], Tensor], params: Sequence[Tensor]) -> Curvature:
    """Returns the Hessian by double backward on a graph that is built anew for every product and dropped after it.

    Between products nothing is kept, and several losses share the memory of one; a product costs about three gradients.
    The graph is freed as the second pass goes through it, and the gradients' values before that pass, which needs only
    their nodes. What remains at the peak is everything that the forward pass and the first backward pass saved:
    2 to 3 times what a gradient takes (docs/performance.md).

    Args:
        evaluate: Returns the loss with its graph, always from the same random state.
        params: Leaf tensors.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> lean_hessian(lambda: (x ** 3).sum(), [x]).product([torch.ones(2)])
        [tensor([ 6., 12.])]
    """

    def product(vectors: Sequence[Tensor]) -> list[Tensor]:
        grads = _gradients_with_graph(evaluate(), params)
        curved = [g is not None and g.requires_grad for g in grads]
        edges = [get_gradient_edge(g) for g, c in zip(grads, curved, strict=True) if c and g is not None]
        del grads
        if not edges:
            return [torch.zeros_like(p) for p in params]
        weights = [v for v, c in zip(vectors, curved, strict=True) if c]
        return _filled(torch.autograd.grad(edges, params, weights, allow_unused=True), params)

    loss = evaluate()
    value, grads = float(loss.detach()), _gradients(loss, params)
    return Curvature(
        value, _detached(grads, params), [g is not None for g in grads], product, cost_of_product=3.0, hvp="lean"
    )


def finite_difference_hessian(
    evaluate: Callable[[], Tensor],
    params: Sequence[Tensor],
    *,
    one_sided: bool = False,
    loss: Tensor | None = None,
    exact: Curvature | None = None,
    moved: Moved | None = None,
) -> Curvature:
    """Returns the Hessian by differences of the gradient: what works without second derivatives.

        H v = |v| (g(p + e v/|v|) - g(p - e v/|v|)) / (2 e)      central, two gradients a product
        H v = |v| (g(p + e v/|v|) - g(p)) / e                    one-sided, one: g(p) is the measurement's own

    Central differences are right to a thousandth on most smooth networks in float32, one-sided ones to a few hundredths
    along the top eigenvector. `again` makes the product of an eigenvector with -1/4 of the step (one-sided; 1/4
    central). By Taylor's series its error is -1/4 (1/16) of the first one's, so the two together tell the eigenvalue to
    a thousandth, and where they are far apart the loss has kinks (ReLU: wrong at every step size), or rounding is
    magnified (half precision, a tiny P).

    Args:
        evaluate: Returns the loss with its graph, always from the same random state.
        params: Leaf tensors; moved and put back.
        one_sided: Whether to go ahead only.
        loss: What `evaluate` returned, where it has been called already; its graph is freed, unless ...
        exact: ... this stands on it, whose loss and gradient are then the differences' own.
        moved: Adds a multiple of some vectors to the parameters meanwhile; None to keep a copy of them for that.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True, dtype=torch.float64)
        >>> curvature = finite_difference_hessian(lambda: (x ** 3).sum(), [x])
        >>> [h.round(decimals=6) for h in curvature.product([torch.ones(2)])]
        [tensor([ 6., 12.], dtype=torch.float64)]
    """

    moved = moved or functools.partial(_moved, params)

    def at(vectors: Sequence[Tensor], length: float) -> list[Tensor]:
        with moved(vectors, length):
            return _detached(gradients(evaluate(), params), params)

    def difference(vectors: Sequence[Tensor], step: float) -> list[Tensor]:
        ahead = at(vectors, step)
        behind, width = (here, step) if one_sided else (at(vectors, -step), 2 * step)
        return [(ahead.pop(0) - b).div_(width) for b in behind]  # each freed with its difference

    def product(vectors: Sequence[Tensor], part: float = 1.0) -> list[Tensor]:
        size = float(torch.stack([torch.linalg.vector_norm(v).double() for v in vectors]).norm())
        if size == 0:
            return [torch.zeros_like(p) for p in params]
        return difference(vectors, part * step_size / size)

    loss = evaluate() if loss is None else loss
    gradients = _backward if hides_parameters(loss) else _gradients
    step_size = _step_size(params, one_sided)
    if exact is None:
        value, grads = float(loss.detach()), gradients(loss, params)
        here, used = _detached(grads, params), [g is not None for g in grads]
        del grads
    else:
        value, here, used = exact.loss, exact.gradient, exact.used
    del loss
    return Curvature(
        value,
        here,
        used,
        product,
        again=lambda vectors: product(vectors, -0.25 if one_sided else 0.25),
        remainder=-0.25 if one_sided else 0.0625,
        cost_of_product=1.0 if one_sided else 2.0,
        hvp="one-sided" if one_sided else "finite-difference",
        exact=exact,
    )


def gauss_newton(outputs: Tensor, loss: Tensor, params: Sequence[Tensor]) -> Curvature:
    """Returns the (generalised) Gauss-Newton matrix J' (d^2 L / df^2) J.

    Args:
        outputs: The model's outputs f, with their graph.
        loss: The loss, computed from `outputs`.
        params: Leaf tensors.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> f = x ** 2                                                    # J = 2 x = 6, L = f^2: d^2 L / df^2 = 2
        >>> gauss_newton(f, (f ** 2).sum(), [x]).product([torch.ones(1)])
        [tensor([72.])]

    References:
        Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """
    (slope,) = torch.autograd.grad(loss, [outputs], create_graph=True, allow_unused=True)
    if slope is None:
        raise TypeError("loss_of_outputs does not use its argument: lambda: (model(x), lambda f: criterion(f, y))")
    grads = _gradients(loss, params, retain_graph=True)

    def bend(tangent: Tensor) -> Tensor:
        if not slope.requires_grad:
            return torch.zeros_like(outputs)
        (bent,) = torch.autograd.grad(slope, [outputs], tangent, retain_graph=True, allow_unused=True)
        return torch.zeros_like(outputs) if bent is None else bent

    return _sandwich(loss, outputs, bend, grads, params)


def fisher(losses: Tensor, params: Sequence[Tensor], gradient_of: Tensor) -> Curvature:
    """Returns (1/B) sum_i grad l_i grad l_i', the second moment of the per-example gradients.

    The empirical Fisher where the l_i are the losses at the data's own labels; the (sampled) Fisher where they are
    those at labels drawn from the model.

    Args:
        losses: Shape (B,), with their graph.
        params: Leaf tensors.
        gradient_of: The scalar loss whose gradient the `Curvature` holds.

    Example:
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> losses = x * torch.tensor([1.0, 3.0])                        # (1 + 9) / 2
        >>> fisher(losses, [x], losses.mean()).product([torch.ones(1)])
        [tensor([5.])]

    References:
        The source paper, Sec. 4.1.1. Kunstner et al. 2019 on how the two differ.
    """
    grads = _gradients(gradient_of, params, retain_graph=True)
    return _sandwich(gradient_of, losses, lambda tangent: tangent / losses.numel(), grads, params)


def sampled_losses(logits: Tensor, seed: int) -> Tensor:
    """Returns -log p(y) for labels y drawn from softmax(logits), one an example, from a stream of its own.

    Args:
        logits: Shape (..., K), the classes last, at least two of them; every leading index is an example.
        seed: Of the draw.

    Raises:
        TypeError: One class only, or no class dimension.

    Example:
        >>> bool((sampled_losses(torch.tensor([[30.0, 0.0], [0.0, 30.0]]), seed=0) < 1e-6).all())    # both are certain
        True
    """
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise TypeError(
            'curvature="fisher" samples a class for each example: outputs must be logits of shape (..., K), K >= 2; '
            f"got {tuple(logits.shape)}. For one logit use curvature='gauss-newton', the same for cross-entropy"
        )
    flat = logits.reshape(-1, logits.shape[-1])
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    with torch.no_grad():
        labels = torch.multinomial(flat.detach().float().softmax(-1), 1, generator=generator).squeeze(-1)
    return torch.nn.functional.cross_entropy(flat, labels, reduction="none")


def _sandwich(
    loss: Tensor,
    outputs: Tensor,
    bend: Callable[[Tensor], Tensor],
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor],
) -> Curvature:
    """J' bend(J v): J' w by one backward pass, J v by a second one through J' w (which is linear in w)."""
    if hides_parameters(outputs):
        raise NoSecondDerivative("reentrant checkpointing cannot be differentiated twice; use_reentrant=False can")
    dummy = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, params, dummy, create_graph=True, allow_unused=True)
    if once_differentiable(g for g in pulled if g is not None):
        raise NoSecondDerivative("a custom function is marked @once_differentiable: it has no second derivative")
    reached = [g for g in pulled if g is not None and g.requires_grad]

    def product(vectors: Sequence[Tensor]) -> list[Tensor]:
        if not reached:
            return [torch.zeros_like(p) for p in params]
        weights = [v for v, g in zip(vectors, pulled, strict=True) if g is not None and g.requires_grad]
        (tangent,) = torch.autograd.grad(reached, [dummy], weights, retain_graph=True)
        products = torch.autograd.grad(outputs, params, bend(tangent), retain_graph=True, allow_unused=True)
        return _filled(products, params)

    return Curvature(float(loss.detach()), _detached(grads, params), [g is not None for g in pulled], product)


@contextlib.contextmanager
def _moved(params: Sequence[Tensor], vectors: Sequence[Tensor], length: float) -> Iterator[None]:
    values = [p.detach().clone() for p in params]
    try:
        for p, v in zip(params, vectors, strict=True):
            p.data.add_(v, alpha=length)
        yield
    finally:
        for p, value in zip(params, values, strict=True):
            p.data.copy_(value)


def _gradients(loss: Tensor, params: Sequence[Tensor], **options: Any) -> list[Tensor | None]:
    made = torch.autograd.grad(loss, params, allow_unused=True, **options)
    return [None if g is None else _dense(g) for g in made]


def _gradients_with_graph(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients with their graph, where it can be differentiated."""
    if hides_parameters(loss):
        raise NoSecondDerivative("reentrant checkpointing cannot be differentiated twice; use_reentrant=False can")
    grads = _gradients(loss, params, create_graph=True)
    if once_differentiable(g for g in grads if g is not None):  # torch would leave its part of H out, without a word
        raise NoSecondDerivative("a custom function is marked @once_differentiable: it has no second derivative")
    return grads


def _backward(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients by `backward()`, which reentrant checkpointing needs; the parameters' own are set aside."""
    held = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return [None if p.grad is None else _dense(p.grad) for p in params]
    finally:
        for p, g in zip(params, held, strict=True):
            p.grad = g


def _step_size(params: Sequence[Tensor], one_sided: bool) -> float:
    """eps^(1/3) / 4 of the coarsest arithmetic (one-sided eps^(1/2)), or two roundings of all parameters if that is
    more.
    """
    # The gradient's rounding, about eps, is divided by the step e; what the series leaves out grows like e^2 in a
    # central difference and like e in a one-sided one: the two errors meet at eps^(1/3) and eps^(1/2). In float32, on
    # five smooth networks 3 to 150 updates old: at 3e-4 the one-sided product of a top eigenvector is off by 3 % at
    # most (at 1e-3 by 9 %, at 3e-3 by 39 %), that of a random vector by 5 % of the top eigenvalue (at 1e-4 by 13 %).
    coarsest = max(torch.finfo(p.dtype).eps for p in params)
    size = float(torch.stack([torch.linalg.vector_norm(p.detach()).double() for p in params]).norm())
    step = float(coarsest ** (1 / 2)) if one_sided else float(coarsest ** (1 / 3)) / 4
    return max(step, 2 * coarsest * size)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor  # an embedding's gradient


def _detached(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(grads, params, strict=True)]


def _filled(products: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if h is None else _dense(h) for h, p in zip(products, params, strict=True)]
