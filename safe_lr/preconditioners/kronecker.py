"""Optimizers whose P is a product of small matrices, one for each side of the parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from safe_lr.preconditioners.base import Group, Preconditioner, State, decayed, second_moment
from safe_lr.stability import UpdateRule, warm_decay


class SOAP(Preconditioner):
    """Adam in the eigenbasis Q of Shampoo's Kronecker factors:

        P = Q diag((sqrt(v') + eps) / sqrt(1 - b2^t)) Q^T,    v' = b2 v + (1 - b2) (Q^T g)^2,    Q = Q_1 x Q_2 x ...

    times rms(update) + eps with `normalize_gradient`; without `correct_bias` the denominator is missing. The very first
    call of `step()` only founds the basis and moves nothing, whatever lr is; P is then that of the second with the same
    gradient. The basis is refreshed *after* a step, so the coming one always uses the stored basis.

    Decay comes after the step, x' = (1 - lr wd) (x - lr u). The coming step has that; the limit leaves out the factor,
    which shrinks the step and so errs on the safe side. `merge_dims` is followed for channels first only.

    Class: local scale.
    """

    kind = "local scale"
    on_optimizer = ("maximize", "preconditioning_compute_steps")
    decoupled = True
    second_moments: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        """P's eigenvalues, in the basis' order."""
        return self._entries(group, state, g, self._basis(group, state, g))

    def root(self, group: Group, state: State, g: Tensor, param: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        basis = self._basis(group, state, g)
        p = self._entries(group, state, g, basis)
        if any(q is not None for q in basis):
            p = _met(p, self._count(group))
        scale = p.rsqrt()
        return (lambda v: self._turned(group, self._turned(group, v, basis) * scale, basis, back=True)), p

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        b1 = float(group["betas"][0])
        return decayed(state, "exp_avg", b1, g).add_(g, alpha=1 - b1).div_(self._corrections(group)[0])

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        b1, t = float(group["betas"][0]), self._count(group)
        weight = (1 - b1**t) / self._corrections(group)[0]
        return UpdateRule(warm_decay(b1, t), from_average=weight, from_gradient=0.0)

    def floor(self, group: Group, state: State) -> float | None:
        if any(len(q) for q in state.get("Q") or [(0,)]) or group["normalize_gradient"]:
            return None  # P's entries are not the parameter's, or depend on each other
        return float(group["eps"]) / self._corrections(group)[1]

    def keys(self, group: Group) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq", "GG", "Q"

    def coming_step(
        self, group: Group, state: State, param: Tensor, grad: Tensor, lr: float, updates: int | None = None
    ) -> Tensor:
        if not group.get("step"):
            return torch.zeros_like(grad)
        g, x = self.descent_gradient(group, param, grad), param.detach()
        basis = self._basis(group, state, g)
        turned = self._turned(group, self.direction(group, state, g), basis) / self._entries(group, state, g, basis)
        step = -lr * self._turned(group, turned, basis, back=True)
        return step.add_(x + step, alpha=-lr * float(group["weight_decay"]))

    def _count(self, group: Group) -> int:
        """t of the coming update; the first call counts none."""
        return max(1, int(group.get("step", 0)))

    def _corrections(self, group: Group) -> tuple[float, float]:
        """1 - b1^t and sqrt(1 - b2^t), or ones."""
        if not group["correct_bias"]:
            return 1.0, 1.0
        (b1, b2), t = group["betas"], self._count(group)
        return 1 - float(b1) ** t, math.sqrt(1 - float(b2) ** t)

    def _entries(self, group: Group, state: State, g: Tensor, basis: Sequence[Tensor | None]) -> Tensor:
        b2, eps = float(group["betas"][1]), float(group["eps"])
        first, second = self._corrections(group)
        p = second_moment(state, "exp_avg_sq", b2, 1 - b2, self._turned(group, g, basis)).sqrt_().add_(eps)
        if group["normalize_gradient"]:
            update = self._turned(group, self.direction(group, state, g) * first, basis) / p
            update = self._turned(group, update, basis, back=True)  # the stored basis is orthogonal to 1e-7 only
            p = p * update.square().mean().sqrt().add(eps)
        return p / second

    def _basis(self, group: Group, state: State, g: Tensor) -> list[Tensor | None]:
        """Q's factors, None for those that are the identity; made of the gradient alone where none are stored."""
        if state:
            return [q.to(g) if len(q) else None for q in state["Q"]]
        if g.ndim == 1 and not group["precondition_1d"]:
            return [None]
        folded = self._folded(group, g)
        small = [size <= int(group["max_precondition_dim"]) for size in folded.shape]
        return [_eigenbasis(folded, dim) if fits else None for dim, fits in enumerate(small)]

    def _folded(self, group: Group, v: Tensor) -> Tensor:
        return v.reshape(_merged(v.shape, int(group["max_precondition_dim"]))) if group["merge_dims"] else v

    def _turned(self, group: Group, v: Tensor, basis: Sequence[Tensor | None], *, back: bool = False) -> Tensor:
        """Q^T v, or Q v, one dimension after the other; each goes to the end, so that all are in place again."""
        folded = self._folded(group, v)
        sizes = [size if q is None else len(q) for q, size in zip(basis, folded.shape, strict=False)]
        if sizes != list(folded.shape):
            raise ArithmeticError(
                f"SOAP's basis has the sizes {sizes} for a parameter of shape {tuple(v.shape)}: is it of another "
                "parameter, or merged with data_format='channels_last', which safe_lr does not follow?"
            )
        for q in basis:
            folded = folded.movedim(0, -1) if q is None else torch.tensordot(folded, q, dims=([0], [int(back)]))
        return folded.reshape(v.shape)


class Shampoo(Preconditioner):
    """Kronecker factors that sum up outer products of the gradient, one for each of its k dimensions:

        P^-1 = L_1^(-1/2k) x ... x L_k^(-1/2k),    L_i' = L_i + S_(i) S_(i)^T,    L_i = matrix_eps I at first

    with S the averaged gradient, weight decay added (or taken decoupled, with or without lr). Nothing damps S: like
    Adagrad's, P only grows. Between two refreshes (`preconditioning_compute_steps`) the stored roots are used; until
    the first the step is zero, and P that of a refresh now.

    With momentum the package feeds the *preconditioned* average back, b' = P^-1 ((1 - mu) g + mu b), so that along an
    entry p the limit in lr * gamma is 2 (1 + mu / p) / (1 - mu), and the buffer grows by itself where mu > p. The rule
    takes 2 / (1 - mu), right for p >> mu and never too large where p > mu. lr enters as a factor; `fixed_decay`, which
    has no lr, shrinks the limit by 1 - wd / 2.

    Class: local scale.
    """

    kind = "local scale"
    annealing = 0.0
    on_optimizer = ("maximize", "preconditioning_compute_steps")

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        """P's eigenvalues, without the weight decay's part in the gradient."""
        return _entries(self._factors(group, state, self.direction(group, state, g)), g)

    def root(self, group: Group, state: State, g: Tensor, param: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        factors = self._factors(group, state, self._averaged(group, state, g, param))
        p, bases = _met(_entries(factors, g), int(group.get("step", 0)) + 1), [vectors for vectors, _ in factors]
        scale, back = p.rsqrt(), [vectors.T for vectors in bases]
        return (lambda v: _kronecker(back, _kronecker(bases, v) * scale)), p

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        """The averaged gradient, without weight decay."""
        mu = float(group["momentum"])
        if mu == 0:
            return g
        # The first buffer is the gradient before `maximize` turns it round.
        start = -g if group.get("maximize", False) else g
        return g.lerp(state["momentum_buffer"] if state else start, mu)

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        fixed = float(group["weight_decay"]) if group["weight_decouple"] and group["fixed_decay"] else 0.0
        return UpdateRule(from_gradient=self._fresh(group, state) / (1 - fixed / 2))

    def decay(self, group: Group, state: State | None = None) -> tuple[float, float]:
        weight_decay = float(group["weight_decay"])
        if group["weight_decouple"]:
            return 0.0, 0.0 if group["fixed_decay"] else weight_decay
        return weight_decay / self._fresh(group, state or {}), 0.0

    def descent_gradient(self, group: Group, param: Tensor, grad: Tensor) -> Tensor:
        """The gradient without L2 decay, which this optimizer adds to the average instead."""
        return -grad if group.get("maximize", False) else grad

    def keys(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def coming_step(
        self, group: Group, state: State, param: Tensor, grad: Tensor, lr: float, updates: int | None = None
    ) -> Tensor:
        g, x = self.descent_gradient(group, param, grad), param.detach()
        averaged = self._averaged(group, state, g, x)
        inverses = [(vectors * inverse) @ vectors.T for vectors, inverse in self._factors(group, state, averaged)]
        step = -lr * _kronecker(inverses, averaged)
        if not self._refreshes(group) and not _founded(state):
            step = torch.zeros_like(step)
        fixed = group["weight_decouple"] and group["fixed_decay"]
        decay = float(group["weight_decay"]) if fixed else lr * self.decay(group, state)[1]
        return step.add(x, alpha=-decay)

    def _fresh(self, group: Group, state: State) -> float:
        """The weight of the fresh gradient; at first it is also the buffer."""
        return 1 - float(group["momentum"]) if state else 1.0

    def _averaged(self, group: Group, state: State, g: Tensor, param: Tensor) -> Tensor:
        average = self.direction(group, state, g)
        decays = group["weight_decay"] and not group["weight_decouple"]
        return average.add(param.detach(), alpha=float(group["weight_decay"])) if decays else average

    def _refreshes(self, group: Group) -> bool:
        return (int(group.get("step", 0)) + 1) % int(group.get("preconditioning_compute_steps", 1)) == 0

    def _factors(self, group: Group, state: State, averaged: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Eigenvectors and eigenvalues of each factor of P^-1."""
        stored = not self._refreshes(group) and _founded(state)
        factors = []
        for dim, size in enumerate(averaged.shape):
            if stored:
                inverse, vectors = _eigen(state[f"inv_pre_cond_{dim}"].to(averaged))
                factors.append((vectors, inverse.abs()))
                continue
            flat = averaged.movedim(dim, 0).reshape(size, -1)
            eye = torch.eye(size, dtype=averaged.dtype, device=averaged.device)
            past = state.get(f"pre_cond_{dim}", eye * float(group["matrix_eps"]))
            squares, vectors = _eigen(torch.addmm(past, flat, flat.T))
            factors.append((vectors, squares.abs() ** (-1 / (2 * averaged.ndim))))
        return factors


def _met(p: Tensor, updates: int) -> Tensor:
    """P's eigenvalues, none below rms(P) / t^2 after t gradients, for the limit alone.

    A basis turned towards few gradients has directions that none of them met: P = eps there by ignorance, and the next
    gradient that has a part in one makes P jump. With P as it is, the limit of SOAP's first steps is a millionth of the
    lr that is stable in fact, and an lr held to that never moves far enough to meet them.
    """
    return p.clamp(min=float(p.square().mean().sqrt()) / updates**2)


def _eigen(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric factor; one with NaN or Inf is a failed measurement."""
    if not bool(factor.isfinite().all()):
        raise ArithmeticError(
            f"a Kronecker factor of size {len(factor)} holds NaN or Inf, from the optimizer's state or the gradient"
        )
    values, vectors = torch.linalg.eigh(factor)
    return values, vectors


def _founded(state: State) -> bool:
    """Whether Shampoo's stored roots have ever been computed."""
    first = state.get("inv_pre_cond_0")
    return first is not None and bool(first.any())


def _kronecker(factors: Sequence[Tensor], v: Tensor) -> Tensor:
    """Applies one matrix's transpose to each dimension; each goes to the end, so that all are in place again."""
    for factor in factors:
        v = torch.tensordot(v, factor, dims=([0], [0]))
    return v


def _entries(factors: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """The eigenvalues of P, from those of the factors of P^-1."""
    p = torch.ones((), dtype=like.dtype, device=like.device)
    for _, inverse in factors:
        p = p.unsqueeze(-1) / inverse
    return p


def _eigenbasis(g: Tensor, dim: int) -> Tensor:
    """Eigenvectors of a gradient's outer product over all dimensions but one, the largest first."""
    flat = g.movedim(dim, 0).reshape(g.shape[dim], -1)
    return _eigen(flat @ flat.T)[1].flip(1)


def _merged(shape: Sequence[int], largest: int) -> list[int]:
    """Neighbouring dimensions merged while their product is at most `largest`, as pytorch_optimizer does.

    Where that leaves a single dimension, the package fails.

    Example:
        >>> _merged([1, 2, 512, 1, 2048, 1, 3, 4], 1024)
        [1024, 2048, 12]
    """
    merged, product = [], 1
    for size in shape:
        product *= size
        if product > largest:
            merged.append(product // size)
            product = size
    return [*merged, product]
