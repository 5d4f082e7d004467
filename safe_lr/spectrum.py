"""More of the spectrum than its top: several eigenpairs, and the density of all eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from safe_lr.closures import leave_no_trace
from safe_lr.deflation import several
from safe_lr.ensemble import Ensemble
from safe_lr.lanczos import Array, EigenEstimate, Matvec, quadrature, start_vector
from safe_lr.movers import MeasurementFailed, Mover, ascends, movers, shares
from safe_lr.objective import Closures, Objective, as_list
from safe_lr.operators import CURVATURES, DIFFERENCES, Curvature
from safe_lr.sharpness import leaves_of

Optimizers = Optimizer | Sequence[Optimizer]

HVPS = ("exact", "lean", *DIFFERENCES)

# Of a broadened density: a hundredth of the range, narrow enough to tell outliers from the bulk, and four points of the
# grid to a sigma, at which the sum over the grid is the integral to rounding.
SIGMAS_IN_RANGE, POINTS_IN_SIGMA, SIGMAS_BEYOND = 100, 4, 8


def eigenpairs(
    closure: Closures,
    params: Iterable[Tensor],
    k: int = 5,
    which: str = "largest",
    curvature: str = "hessian",
    optimizer: Optimizers | None = None,
    *,
    hvp: str = "exact",
    tol: float = 1e-3,
    max_matvecs: int = 500,
    seed: int = 0,
) -> list[EigenEstimate]:
    """Finds the k largest (or smallest) algebraic eigenvalues of a curvature, with their eigenvectors.

        A v_i = lambda_i v_i,    A = H, or with an optimizer (P^-1/2 H P^-1/2) times the group's share of lr_ref

    By Lanczos' method; a last search, orthogonal to what was found, makes it likely that a repeated eigenvalue is found
    as often as it is repeated. With an optimizer the first value is the `gamma` of `measure()`, P is that of a step
    taken on the closure's batch, and L2 decay is part of H's diagonal. Parameters, gradients, buffers, modes and random
    streams are left as they were, bit for bit.

    Args:
        closure: Returns what `curvature` needs, as for `measure()`; or several, whose mean counts.
        params: Leaf tensors, in the order of the vectors' entries; those that do not require grad are left out.
        k: How many. Each product of the first search keeps a vector of all parameters: 20 or 30 of them for k = 10.
        which: `largest` or `smallest`, algebraic: the most negative ones where the loss curves down.
        curvature: `hessian`, `gauss-newton`, `fisher` or `empirical-fisher`.
        optimizer: One or several that move the parameters. None leaves out P.
        hvp: `exact` (a retained graph), `lean` (rebuilt), `finite-difference` or `one-sided`. Several
            closures are lean but for the differences.
        tol: Stops at residuals of `tol * |value|` (of `tol^2` times the largest magnitude, where that is more).
        max_matvecs: Largest number of products, 2 k at least.
        seed: Of the start vectors, and of the labels of `fisher`.

    Returns:
        k estimates, the wanted end first. `vector` is flat, shape (n,): the parameters' entries one after another
        (complex ones as pairs); with an optimizer, those of P^1/2 w. `num_matvecs` is that of all together;
        `converged` is False, and the residual as large as it is, where `max_matvecs` came first.

    Raises:
        TypeError: The closure breaks its contract (`ClosureError`), or an optimizer has no P.
        ValueError: A choice that does not exist, a number out of range, a parameter that the optimizer does not move.
        MeasurementFailed: The loss, P or the curvature is not finite.

    Example:
        >>> x = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        >>> def loss():
        ...     return x ** 2 @ torch.tensor([2.0, 2.0, 0.5, -1.0], dtype=torch.float64)      # H = diag(4, 4, 1, -2)
        >>> [round(pair.value, 6) for pair in eigenpairs(loss, [x], k=3)]
        [4.0, 4.0, 1.0]
        >>> [round(pair.value, 6) for pair in eigenpairs(loss, [x], k=1, which="smallest")]
        [-2.0]

    References:
        Lanczos 1950; Parlett 1998, "The symmetric eigenvalue problem", ch. 13.
    """
    if which not in ("largest", "smallest"):
        raise ValueError(f"which must be 'largest' or 'smallest' (algebraic), got {which!r}")
    _check_count("k", k)
    _check_count("max_matvecs", max_matvecs, least=2 * k)
    if not (isinstance(tol, (int, float)) and 0 < tol < 1):
        raise ValueError(f"tol must lie in (0, 1), got {tol!r}")
    sign = 1.0 if which == "largest" else -1.0
    with _operator(closure, params, curvature, optimizer, hvp, seed) as (matvec, like):
        if k > like.numel():
            raise ValueError(f"k must be at most the number of parameters, {like.numel()}; got {k}")
        start = start_vector(like, seed)
        found = several(lambda v: matvec(v) * sign, start, k, tol=tol, max_matvecs=max_matvecs, seed=seed)
    if not math.isfinite(found[0].value):
        raise MeasurementFailed("the curvature is not finite", found[0].num_matvecs)
    return [replace(pair, value=sign * pair.value) for pair in found]


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The density of a curvature's eigenvalues, estimated.

    Attributes:
        grid: Eigenvalues, rising, shape (points,).
        density: Per unit of eigenvalue, shape (points,): the nodes broadened by Gaussians. Integrates to 1 over the
            default grid.
        nodes: Shape (num_probes, num_matvecs): each probe's Ritz values, rising.
        weights: Of the nodes; together they sum to 1. 0 where a probe was exhausted early.
        sigma: Width of the Gaussians.
        size: Number of eigenvalues, n: `size * density` counts them.
        num_matvecs: Products spent.
    """

    grid: Array = field(repr=False)
    density: Array = field(repr=False)
    nodes: Array = field(repr=False)
    weights: Array = field(repr=False)
    sigma: float
    size: int
    num_matvecs: int

    @property
    def mean(self) -> float:
        """Mean eigenvalue, trace / n: unbiased."""
        return float((self.weights * self.nodes).sum())

    @property
    def standard_error(self) -> float:
        """Of `mean`, from the scatter of the probes; NaN with a single one."""
        means = (self.weights * self.nodes).sum(axis=1) * len(self.nodes)
        return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan

    def below(self, values: npt.ArrayLike) -> Array:
        """Returns the share of eigenvalues at or below each value: the raw nodes', not broadened.

        Example:
            >>> found = SpectralDensity(*np.zeros((2, 9)), np.array([[1.0, 2.0]]), np.array([[0.25, 0.75]]), 0.1, 4, 2)
            >>> found.below([0.5, 1.0, 3.0]).tolist()
            [0.0, 0.25, 1.0]
        """
        at = np.asarray(values, float)
        order = np.argsort(self.nodes, axis=None)
        total = np.concatenate([[0.0], np.cumsum(self.weights.ravel()[order])])
        return np.asarray(total[np.searchsorted(self.nodes.ravel()[order], at, side="right")], float)


def spectral_density(
    closure: Closures,
    params: Iterable[Tensor],
    num_probes: int = 8,
    num_matvecs: int = 32,
    curvature: str = "hessian",
    optimizer: Optimizers | None = None,
    *,
    hvp: str = "exact",
    grid: npt.ArrayLike | None = None,
    sigma: float | None = None,
    seed: int = 0,
) -> SpectralDensity:
    """Estimates the density of all eigenvalues of a curvature by stochastic Lanczos quadrature.

        phi(t) = (1/n) sum_i N(t; lambda_i, sigma^2) = E_v [v' N(t; A, sigma^2) v],    v uniform on the sphere

    Each probe v takes `num_matvecs` products, whose Ritz values and squared first components are the nodes and weights
    of a Gauss quadrature for v' f(A) v; the probes are averaged. Exact in the tails (outliers are nodes), a sketch in
    the bulk; the error falls as 1 / sqrt(num_probes n). Parameters, gradients, buffers, modes and random streams are
    left as they were.

    Args:
        closure: Returns what `curvature` needs, as for `measure()`; or several, whose mean counts.
        params: Leaf tensors; those that do not require grad are left out.
        num_probes: Random vectors.
        num_matvecs: Products for each, and so nodes: features finer than about range / num_matvecs are not told apart.
            That many vectors of all parameters are kept.
        curvature: `hessian`, `gauss-newton`, `fisher` or `empirical-fisher`.
        optimizer: One or several that move the parameters, for P^-1/2 H P^-1/2 as in `eigenpairs`. None leaves out P.
        hvp: `exact` (a retained graph), `lean` (rebuilt), `finite-difference` or `one-sided`. Several
            closures are lean but for the differences.
        grid: Eigenvalues at which the density is wanted, rising. By default from 8 sigma below the lowest node to 8
            above the highest, 4 points to a sigma.
        sigma: Width of the Gaussians; by default a hundredth of the nodes' range.
        seed: Of the probes, and of the labels of `fisher`.

    Returns:
        A `SpectralDensity`; `safe_lr.plots.spectral_density` draws it.

    Raises:
        TypeError: The closure breaks its contract (`ClosureError`), or an optimizer has no P.
        ValueError: A choice that does not exist, a number out of range, a parameter that the optimizer does not move.
        MeasurementFailed: The loss, P or the curvature is not finite.

    Example:
        >>> x = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        >>> found = spectral_density(lambda: x @ x, [x], num_probes=1)                              # H = diag(2, 2)
        >>> round(found.mean, 9), round(float(found.density.sum() * np.diff(found.grid)[0]), 9)
        (2.0, 1.0)

    References:
        Ghorbani, Krishnan & Xiao 2019, "An investigation into neural net optimization via Hessian eigenvalue density",
        arXiv:1901.10159. Ubaru, Chen & Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature".
    """
    _check_count("num_probes", num_probes)
    _check_count("num_matvecs", num_matvecs)
    if sigma is not None and not 0 < sigma < math.inf:
        raise ValueError(f"sigma is the width of the Gaussians, a number above 0, or None; got {sigma!r}")
    at = None if grid is None else _checked_grid(grid)
    nodes, weights, spent = np.zeros((num_probes, num_matvecs)), np.zeros((num_probes, num_matvecs)), 0
    with _operator(closure, params, curvature, optimizer, hvp, seed) as (matvec, like):
        for probe in range(num_probes):
            found, share = quadrature(matvec, start_vector(like, seed * num_probes + probe), num_matvecs)
            if not np.isfinite(found).all():
                raise MeasurementFailed("the curvature is not finite", spent)
            spent += len(found)
            nodes[probe, : len(found)], nodes[probe, len(found) :] = found, found[-1]
            weights[probe, : len(found)] = share / num_probes
    low, high = float(nodes.min()), float(nodes.max())
    width = sigma if sigma is not None else (high - low or abs(high) or 1.0) / SIGMAS_IN_RANGE
    if at is None:
        low, high = low - SIGMAS_BEYOND * width, high + SIGMAS_BEYOND * width
        at = np.linspace(low, high, math.ceil((high - low) / width * POINTS_IN_SIGMA) + 1)
    return SpectralDensity(at, _broadened(at, nodes, weights, width), nodes, weights, width, like.numel(), spent)


def _broadened(grid: Array, nodes: Array, weights: Array, sigma: float) -> Array:
    density = np.zeros_like(grid)
    for node, weight in zip(nodes.ravel(), weights.ravel(), strict=True):  # one by one: a table might not fit
        if weight:
            density += weight * np.exp(-0.5 * ((grid - node) / sigma) ** 2)
    return np.asarray(density / (sigma * math.sqrt(2 * math.pi)), float)


@contextmanager
def _operator(
    closure: Closures,
    params: Iterable[Tensor],
    curvature: str,
    optimizer: Optimizers | None,
    hvp: str,
    seed: int,
) -> Iterator[tuple[Matvec, Tensor]]:
    """The curvature as a product on flat vectors, and a vector of their shape, dtype and device."""
    for name, value, choices in (("curvature", curvature, CURVATURES), ("hvp", hvp, HVPS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    closures, leaves = as_list(closure), leaves_of(params)
    moving = None if optimizer is None else _moving(optimizer, leaves)
    with leave_no_trace(leaves) as untouched:
        measured = Objective(closures, untouched, curvature, seed).curvature(leaves, hvp)
        if not math.isfinite(measured.loss):
            raise MeasurementFailed(f"the loss is {measured.loss}")
        yield _flat_product(measured, leaves, moving)


def _moving(optimizer: Optimizers, leaves: Sequence[Tensor]) -> list[Mover]:
    """What moves each parameter, in their order."""
    ensemble = Ensemble(optimizer)
    if "trial" in ensemble.kinds:
        raise TypeError(f"{ensemble.name} steps by signs: no P stands for it; leave out optimizer=")
    groups = ensemble.param_groups
    lrs = [float(group["lr"]) for group in groups]
    initial = [float(group.get("initial_lr", group["lr"])) for group in groups]
    owned = {m.param: m for m in movers(ensemble, shares(lrs, initial)[1])}
    stray = [tuple(p.shape) for p in leaves if p not in owned]
    if stray:
        raise ValueError(
            f"params holds a parameter of shape {stray[0]} that is in no group of the optimizer with lr > 0; hand over "
            "the optimizer's own parameters"
        )
    return [owned[p] for p in leaves]


def _flat_product(
    curvature: Curvature, leaves: Sequence[Tensor], moving: Sequence[Mover] | None
) -> tuple[Matvec, Tensor]:
    """v -> A v on flat vectors: D^1/2 (H + L2) D^1/2 with D = share / P where movers are given."""
    values = [Mover.real(p.detach()) for p in leaves]
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    like = torch.empty(sum(v.numel() for v in values), dtype=dtype, device=leaves[0].device)
    sizes = [v.numel() for v in values]
    sign = -1.0 if moving is not None and ascends(moving) else 1.0
    scaled = []
    if moving is not None:
        scaled = [_scaled(*of) for of in zip(moving, curvature.gradient, curvature.used, strict=True)]

    def flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([Mover.real(t).to(like).reshape(-1) for t in tensors])

    def matvec(v: Tensor) -> Tensor:
        parts = [part.view_as(value).to(value) for part, value in zip(torch.split(v, sizes), values, strict=True)]
        if moving is None:
            return flat(curvature.product([_lifted(x, p) for x, p in zip(parts, leaves, strict=True)]))
        parts = [scale(x) for x, (scale, _) in zip(parts, scaled, strict=True)]
        products = curvature.product([_lifted(x, p) for x, p in zip(parts, leaves, strict=True)])
        return flat(
            scale(sign * Mover.real(h) + l2 * x) for h, x, (scale, l2) in zip(products, parts, scaled, strict=True)
        )

    return matvec, like


def _scaled(mover: Mover, gradient: Tensor, used: bool) -> tuple[Matvec, float]:
    """D^1/2 of one parameter, and its L2 decay; zeros where the loss does not use it, for then no step moves it."""
    if not used:
        return torch.zeros_like, 0.0
    root, p = mover.root(gradient)
    low, high = torch.stack([p.min(), p.max()]).tolist()
    if not (low > 0 and math.isfinite(high)):
        raise MeasurementFailed(f"the preconditioner has the entries {low:g} to {high:g}, which no step can use")
    share = math.sqrt(mover.share)
    return (lambda x: root(x) * share), mover.decay()[0]


def _lifted(values: Tensor, param: Tensor) -> Tensor:
    """Reals as a tensor of the parameter's own kind."""
    return torch.view_as_complex(values.contiguous()) if param.is_complex() else values.to(param.dtype)


def _check_count(name: str, value: int, least: int = 1) -> None:
    if not (isinstance(value, int) and value >= least):
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")


def _checked_grid(grid: npt.ArrayLike) -> Array:
    at = np.asarray(grid, float)
    if at.ndim != 1 or len(at) < 2 or not (np.diff(at) > 0).all():
        raise ValueError(f"grid must be rising numbers, shape (points,), such as np.linspace(-1, 10, 500); got {at}")
    return at
