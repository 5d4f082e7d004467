"""The eigenproblems of one measurement: D^1/2 H D^1/2 + diag(decay), with every parameter group folded into D."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from safe_lr.differences import Disagreement, First, checked, verified
from safe_lr.lanczos import EigenEstimate, Matvec, both_ends, lanczos, start_vector
from safe_lr.movers import MeasurementFailed, Mover, ascends, coming_steps
from safe_lr.operators import Curvature, Product

BOUNDS = ("lemma1", "coherence", "momentum")

MIN_MATVECS = 3
"""Fewer products do not tell an eigenvalue: two are right to 1 % on an MLP and 81 % off on a GPT."""

WARM_MATVECS = 2
"""Fewest products from an earlier eigenvector: two are right to 1.3 % where they look converged (four networks, 10
updates later), save where another eigenvalue lies close: a third product seldom tells it either."""

WARM_RANDOM = 4.0
"""Norm of the random part of a warm start in units of the eigenvector's. From .05 to 4 the products needed are the
same or fewer and the errors alike (docs/performance.md), for most of H's spectrum lies near zero: one product wipes the
random part out. What the size does buy is safety where the earlier vector is exactly that of a smaller eigenvalue. With
100,000 dimensions and a tenfold larger one to be found, two products miss it in 15 of 20 runs at .3, 2 at 1, none at 4.
One less than twice as large is missed at any of these sizes, and mostly by three products too."""

COLD_MATVECS = 3
"""Fewest products where no earlier eigenvector is known."""

COLD_SETTLED = 9
"""Products from which on a start that knows no earlier eigenvector may stop at the full tolerance; after three at a
quarter of it, after five at half. From the gradient a few products can look converged at a smaller eigenvalue (three,
with a residual of .09, at one 18 % too small on a GPT), at which the residual does not stay. Over four networks, half a
product more than with 5 finds the larger one in almost half of the cases that 5 misses (docs/performance.md)."""


def _is_one(p: Tensor) -> bool:
    return p.ndim == 0 and float(p) == 1.0


@dataclass(frozen=True)
class _Entries:
    """What is kept of one parameter's P: scalars, and a mask where no gradient was met so far."""

    low: Tensor
    high: Tensor
    met: Tensor  # the smallest entry that some gradient has met
    idle: Tensor | None  # where none has

    @staticmethod
    def of(p: Tensor, floor: float | None, whole: bool) -> _Entries:
        """Reads P; `floor` is its entry where no gradient was met, `whole` whether P has the parameter's shape."""
        low, high = p.min(), p.max()
        if floor is None or not whole:
            return _Entries(low, high, low, None)
        idle = p <= torch.tensor(floor, dtype=p.dtype, device=p.device)
        return _Entries(low, high, p.masked_fill(idle, math.inf).min(), idle)

    def smallest_curved(self, h: Tensor) -> Tensor:
        """The smallest entry but for the idle ones whose row of H is zero, as the product h shows."""
        return self.met if self.idle is None else torch.where((self.idle & (h != 0)).any(), self.low, self.met)


@dataclass(frozen=True)
class _Scaling:
    """D^1/2 and the decay, parameter by parameter; None stands for a P of one."""

    roots: Sequence[Matvec | None]
    scales: Sequence[float]
    decay: Sequence[float]

    def of(self, i: int, x: Tensor) -> Tensor:
        """D^1/2 x of the i-th parameter: x itself where D is one, without a copy."""
        root, scale = self.roots[i], self.scales[i]
        x = x if root is None else root(x)
        return x if scale == 1.0 else x * scale


class Eigenproblem:
    """The top eigenvalues of D^1/2 H D^1/2 + diag(decay) for several D on one Hessian.

    With `share_g = lr_g / lr_ref` the limit on lr_ref under each bound is 2 / top, where

        gamma       D = share / P                no decay
        coherence   D = share / P                decay share * wd
        momentum    D = (2 / c) share / P        decay share * wd
        lemma1      top = lambda_max(H) max(share / P) + max(share * wd)

    Different momenta, lrs and decoupled decay of the groups are so folded into one symmetric product; L2 decay adds to
    H's diagonal.

    Args:
        moving: The parameters that may move, in the order of the curvature's.
        curvature: Gradient and Hessian products.
        tol: Relative residual at which a solve stops.
        max_matvecs: Largest number of products for all solves together.
        max_basis: Largest number of Krylov vectors kept at a time; None keeps all. With a bound, P^-1/2 is not kept
            either, where it is a diagonal by formula, but made for each use.
        both_ends: Whether the smallest eigenvalue of H is found with its largest.
        cautious: Whether limits come from `upper` instead of `value`.
        seed: Seed of the start vectors.
        warm: Eigenvectors of an earlier measurement, by name.

    Raises:
        MeasurementFailed: No limit exists: nothing moves, P or the curvature is unusable.
    """

    def __init__(
        self,
        moving: Sequence[Mover],
        curvature: Curvature,
        *,
        tol: float,
        max_matvecs: int,
        max_basis: int | None = None,
        both_ends: bool = False,
        cautious: bool,
        seed: int,
        warm: dict[str, Tensor],
    ) -> None:
        self.curvature, self.tol, self.max_matvecs, self.cautious = curvature, tol, max_matvecs, cautious
        self.seed, self.warm, self.max_basis, self.both_ends = seed, warm, max_basis, both_ends
        self.everyone = moving
        # A parameter that the loss does not use, or that got no gradient while others did, is not moved by the step.
        trained = any(m.grad is not None for m in moving)
        self.kept = [u and (m.grad is not None or not trained) for u, m in zip(curvature.used, moving, strict=True)]
        self.movers = [m for m, keep in zip(moving, self.kept, strict=True) if keep]
        if not self.movers:
            raise MeasurementFailed("the loss uses none of the optimizer's parameters")
        own = [g for g, keep in zip(curvature.gradient, self.kept, strict=True) if keep]
        self.grads = [m.grad if m.grad is not None else g for m, g in zip(self.movers, own, strict=True)]
        self.sign = -1.0 if ascends(self.movers) else 1.0
        self.own = own
        decays = [m.decay() for m in self.movers]
        self.l2 = [l2 for l2, _ in decays]
        self.decay = [m.share * decoupled for m, (_, decoupled) in zip(self.movers, decays, strict=True)]
        self.roots: list[Matvec | None] = []
        self.p: list[_Entries] = []
        for m, g in zip(self.movers, self.grads, strict=True):
            root, p = m.root(g, hold=max_basis is None)  # bounded: a vector less, for some passes over it
            self.roots.append(None if _is_one(p) else root)
            self.p.append(_Entries.of(p, m.model.floor(m.group, m.real_state), p.shape == m.values.shape))
            del root, p
        self.sizes = [m.values.numel() for m in self.movers]
        dtype = torch.float32
        for m in self.movers:
            dtype = torch.promote_types(dtype, m.values.dtype)
        # Shape, dtype and device of a vector, without its memory.
        self.like = torch.empty(1, dtype=dtype, device=self.movers[0].param.device).expand(sum(self.sizes))
        self.num_matvecs = 0
        self.num_exact = 0  # of them exact ones that checked differences
        self.exact = curvature.exact  # what checks differences
        self.checks = int(curvature.again is not None)  # products that check each solve
        self.smallest, self.smallest_in_shares = self._smallest_p()
        self.smallest_curved: float | None = None  # known after the first product
        self.vectors: dict[str, Tensor] = {}
        self.lowest: EigenEstimate | None = None  # H's smallest

    @property
    def cost(self) -> float:
        """Gradient evaluations spent on products so far, and on what checks them."""
        cost = self.curvature.cost_of_product * (self.num_matvecs - self.num_exact)
        return cost if self.exact is None else cost + self.exact.cost_of_product * self.num_exact

    def coming_steps(self) -> Callable[[float], list[Tensor | None]]:
        """Each mover's change in the coming step (`movers.coming_steps`); ends the problem and frees its graph."""
        for name in ("curvature", "exact"):
            self.__dict__.pop(name, None)
        grads = iter(self.grads)
        return coming_steps(self.everyone, [next(grads) if keep else None for keep in self.kept])

    def solve(self, bound: str, also: Collection[str] = ()) -> dict[str, Any]:
        """Solves for gamma and the bound, and for others where asked or where they come free.

        Returns:
            `Measurement`'s figures by name.
        """
        reserved = MIN_MATVECS + self.checks if bound == "lemma1" else 0
        gamma = self._top(
            "gamma", [m.share for m in self.movers], reserved=reserved, both=self.both_ends and self._plain
        )
        limits: dict[str, float] = {}
        converged = gamma.converged
        for name, weights in (
            ("coherence", [1.0] * len(self.movers)),
            ("momentum", [2 / m.rule().flip for m in self.movers]),
        ):
            top = self._decayed(name, gamma, weights, solve=name == bound or name in also)
            if top is not None:
                limits[name] = 2 / self._eigenvalue(top)
                converged = converged and top.converged
        sharpness = self._sharpness(gamma, needed=bound == "lemma1", wanted="lemma1" in also)
        if sharpness is not None:
            limits["lemma1"] = 2 / (self._eigenvalue(sharpness) / self.smallest_in_shares + max(self.decay))
            converged = converged and sharpness.converged
        if self.lowest is not None:
            converged = converged and self.lowest.converged
        for name, limit in limits.items():
            if not limit > 0:
                raise MeasurementFailed(f"the limit under {name} is {limit:.3g}: is a weight decay negative?")
        shown = sharpness if sharpness is not None and bound == "lemma1" else gamma
        return {
            "gradient_ratio": self._gradient_ratio(),
            "lambda_max": sharpness.value if sharpness is not None else None,
            "lambda_min": self.lowest.value if self.lowest is not None else None,
            "p_min": self.smallest_curved,
            "p_min_all": self.smallest,
            "p_eff": sharpness.value / gamma.value if sharpness is not None else None,
            "gamma": gamma.value,
            "limits": {name: limits[name] for name in BOUNDS if name in limits},
            "lr_limit": limits[bound],
            "decay": max(self.decay),
            "residual": shown.residual,
            "upper": shown.upper,
            "converged": converged,
            "vectors": self.vectors,
        }

    def _gradient_ratio(self) -> float | None:
        """<training gradient, the closure's own> / <own, own>: about 1, k where k backward passes were added up."""
        if all(m.grad is None for m in self.movers):
            return None
        flats = ((self._flat([t]), self._flat([g])) for t, g in zip(self.grads, self.own, strict=True))
        along, square = torch.stack([torch.stack([t @ g, g @ g]) for t, g in flats]).sum(0).tolist()
        return along / square if square > 0 else None

    def _eigenvalue(self, estimate: EigenEstimate) -> float:
        return estimate.upper if self.cautious else estimate.value

    def _decayed(self, name: str, gamma: EigenEstimate, weights: list[float], *, solve: bool) -> EigenEstimate | None:
        """The top of `weights * (P^-1/2 H P^-1/2) + diag(decay)`: from gamma where that tells it, else if asked."""
        weight, decay = max(weights), max(self.decay)
        # By Weyl's inequality never too small, and by at most tol too large where all weights are one.
        above = replace(gamma, value=weight * gamma.value + decay, residual=weight * gamma.residual)
        if min(weights) == weight and decay - min(self.decay) <= self.tol * weight * gamma.value:
            return above
        if not solve:
            return None
        if self._left() < MIN_MATVECS + self.checks:
            return replace(above, converged=False)
        scaled = [w * m.share for w, m in zip(weights, self.movers, strict=True)]
        return self._top(name, scaled, self.decay, start=gamma.vector)

    def _sharpness(self, gamma: EigenEstimate, *, needed: bool, wanted: bool) -> EigenEstimate | None:
        if self._plain:
            return gamma
        if needed or ((wanted or self.both_ends) and self._left() >= MIN_MATVECS + self.checks):
            return self._top("lambda_max", None, both=self.both_ends)
        return None

    @property
    def _plain(self) -> bool:
        """Whether P and all shares are one: gamma is then lambda_max."""
        return not any(self.roots) and {m.share for m in self.movers} == {1.0}

    def _left(self) -> int:
        return self.max_matvecs - self.num_matvecs

    def _top(
        self,
        name: str,
        weights: list[float] | None,
        decay: Sequence[float] = (),
        *,
        start: Tensor | None = None,
        reserved: int = 0,
        both: bool = False,
    ) -> EigenEstimate:
        """The largest eigenvalue of D^1/2 H D^1/2 + diag(decay), D = weights / P (the identity without weights)."""
        scaling = _Scaling(
            self.roots if weights is not None else [None] * len(self.movers),
            [math.sqrt(w) for w in weights or [1.0] * len(self.movers)],
            decay or [0.0] * len(self.movers),
        )
        warm = self.warm.get(name)
        if warm is not None and warm.shape != self.like.shape:
            warm = None
        if warm is None and start is None:
            start = self._flat(
                [scaling.of(i, m.real(g)) for i, (m, g) in enumerate(zip(self.movers, self.grads, strict=True))]
            )
        if warm is None:
            v0 = start_vector(self.like, self.seed, start)
        else:
            v0 = start_vector(self.like, self.seed, warm, random=WARM_RANDOM)
        del start
        options: dict[str, Any] = {
            "tol": self.tol,
            "max_matvecs": max(MIN_MATVECS if self.checks else 1, self._left() - reserved - self.checks),
            "min_matvecs": COLD_MATVECS if warm is None else WARM_MATVECS,
            "settled": COLD_SETTLED if warm is None else 1,
            "max_basis": self.max_basis,
            "overwrite_v0": True,
        }
        matvec: Matvec = functools.partial(self._matvec, scaling=scaling)
        first = First(matvec, copy=self.max_basis is not None) if self.exact is not None else None
        if both:
            estimate, self.lowest = both_ends(first or matvec, v0, **options)
        else:
            estimate = lanczos(first or matvec, v0, **options)
        if not math.isfinite(estimate.value):
            raise MeasurementFailed("the curvature is not finite", self.num_matvecs)
        if estimate.value <= 0:
            raise MeasurementFailed(
                f"the loss curves nowhere upwards on this batch (largest eigenvalue {estimate.value:.3g})",
                self.num_matvecs,
            )
        if self.checks:
            estimate = self._believed(estimate, scaling, first)
        self.vectors[name] = estimate.vector
        return estimate

    def _believed(self, estimate: EigenEstimate, scaling: _Scaling, first: First | None) -> EigenEstimate:
        """The estimate that differences gave, with the error that a check shows taken out; `first` where it is exact.

        Raises:
            MeasurementFailed: The check shows that it is wrong.
        """
        again: Matvec = functools.partial(self._matvec, scaling=scaling, check=True)
        try:
            if first is not None:
                return verified(estimate, first, again)
            return checked(estimate, again, self.curvature.remainder)
        except Disagreement as differ:
            why = str(differ)
        # Raised outside, since an error holds what it was raised from, with all vectors there.
        raise MeasurementFailed(
            f"products by finite differences {why}: the loss has kinks (ReLU), or rounding errors are magnified by a "
            "tiny P or by half precision. Use a closure that can be differentiated twice",
            self.num_matvecs,
        )

    def _matvec(self, v: Tensor, scaling: _Scaling, check: bool = False) -> Tensor:
        """The product, or with `check` the one that checks it: exact where there is one, else by another step.

        Beside v, two more vectors live at once, of which one is returned; a third where l2 decay needs the parts.
        """
        self.num_matvecs += 1
        product: Product | None = self.curvature.product
        if check:
            self.num_exact += self.exact is not None
            product = self.curvature.again if self.exact is None else self.exact.product
        assert product is not None  # checks are for what has one
        parts = [
            scaling.of(i, part.view(m.values.shape))
            for i, (part, m) in enumerate(zip(torch.split(v, self.sizes), self.movers, strict=True))
        ]
        out = self._product(parts, product)
        if not any(self.l2):
            parts = []
        if self.smallest_curved is None:  # the start vector has a random part everywhere: a zero here is a zero row
            self.smallest_curved, self.p = self._smallest_curved_p(out), []
        flat = torch.empty_like(self.like, memory_format=torch.contiguous_format)
        pieces = zip(torch.split(flat, self.sizes), torch.split(v, self.sizes), scaling.decay, strict=True)
        for i, (piece, old, decay) in enumerate(pieces):
            h = out.pop(0) if self.sign > 0 else out.pop(0).neg()  # freed as it is copied
            h = scaling.of(i, h.add(parts[i], alpha=self.l2[i]) if self.l2[i] else h)
            piece.view(h.shape).copy_(h)
            if decay:
                piece.add_(old, alpha=decay)
        return flat

    def _product(self, parts: list[Tensor], product: Product) -> list[Tensor]:
        rest = iter([m.lift(part) for m, part in zip(self.movers, parts, strict=True)])
        everyone = [
            next(rest) if keep else torch.zeros_like(m.param) for keep, m in zip(self.kept, self.everyone, strict=True)
        ]
        products = product(everyone)
        return [m.real(h) for h, m, keep in zip(products, self.everyone, self.kept, strict=True) if keep]

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([Mover.real(t).to(self.like).reshape(-1) for t in tensors])

    def _smallest_p(self) -> tuple[float, float]:
        """The smallest entry of P, and the smallest entry in units of the group's share of lr_ref."""
        lowest = torch.stack([p.low.to(self.like) for p in self.p]).tolist()
        highest = torch.stack([p.high.to(self.like) for p in self.p]).tolist()
        for m, low, high in zip(self.movers, lowest, highest, strict=True):
            if not (low > 0 and math.isfinite(high)):
                raise MeasurementFailed(
                    f"parameter group {m.index}: the preconditioner of a parameter of shape {tuple(m.param.shape)} has "
                    f"the entries {low:g} to {high:g}: the gradient or the optimizer's state holds numbers that no "
                    "step can use"
                )
        return min(lowest), min(low / m.share for low, m in zip(lowest, self.movers, strict=True))

    def _smallest_curved_p(self, products: Sequence[Tensor]) -> float:
        """The smallest entry of P, without those that no gradient has met and whose row of H is zero."""
        curved = [p.smallest_curved(h).to(self.like) for p, h in zip(self.p, products, strict=True)]
        value = float(torch.stack(curved).min())
        return value if math.isfinite(value) else self.smallest
