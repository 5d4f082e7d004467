"""Optimizers whose P is itself a function of the gradient or the parameter: a local scale, not a fixed one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from safe_lr.preconditioners.base import Group, Preconditioner, State, coming
from safe_lr.stability import UpdateRule


class Adafactor(Preconditioner):
    """Factored second moments, updates of limited size, steps relative to the parameter:

        P = sqrt(V') * max(1, rms(g / sqrt(V')) / d) / max(eps2, rms(x)),      lr counts up to 1 / sqrt(t)

    V' is rank one for matrices. rms(x) and the limit on the update's size change with every step, so P is a local
    scale.

    Class: local scale.
    """

    kind = "local scale"
    decoupled = True
    second_moments = ("row_var", "col_var", "variance")

    def _second_moment(self, group: Group, state: State, g: Tensor) -> Tensor:
        fresh, eps = coming(state) ** float(group["beta2_decay"]), group["eps"][0]
        # The precision of the parameters themselves: g is float32 where they are bfloat16.
        eps = torch.finfo(group["params"][0].dtype).eps if eps is None else float(eps)
        if g.ndim > 1:
            rows = _moved(state.get("row_var"), g.square().mean(-1, keepdim=True), fresh)
            columns = _moved(state.get("col_var"), g.square().mean(-2, keepdim=True), fresh)
            v = rows @ columns / rows.mean(-2, keepdim=True).clamp_(min=eps)
        else:
            v = _moved(state.get("variance"), g.square(), fresh)
        return v.clamp_(min=eps * eps)

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        p = self._second_moment(group, state, g).sqrt_()
        return p * (g / p).square().mean().sqrt().div_(float(group["d"])).clamp_(min=1.0)

    def root(self, group: Group, state: State, g: Tensor, param: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        p = self.diagonal(group, state, g) / self._size(group, param)
        scale = p.rsqrt()
        return (lambda v: v * scale), p

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        return g

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        return UpdateRule()

    def keys(self, group: Group) -> tuple[str, ...]:
        return ("step",)

    def coming_step(
        self, group: Group, state: State, param: Tensor, grad: Tensor, lr: float, updates: int | None = None
    ) -> Tensor:
        g, x = self.descent_gradient(group, param, grad), param.detach()
        used = min(lr, 1 / math.sqrt(coming(state)))
        step = -used * self._size(group, x) * g / self.diagonal(group, state, g)
        return step - lr * float(group["weight_decay"]) * x

    def _size(self, group: Group, param: Tensor) -> Tensor:
        return param.detach().square().mean().sqrt().clamp_(min=float(group["eps"][1]))


class Muon(Preconditioner):
    """Orthogonalised momentum: the step is U f(S) V^T of the averaged gradient M = U S V^T, times a factor by shape.

        P^-1 = a U (f(S / |M|) / S) U^T,       f: the Newton-Schulz polynomial, five times over

    as an operator on the shorter side of the matrix. The step does not shrink with the gradient, so near a minimum P
    goes to zero with it, no linear limit exists, and this one stands for the coming step alone.

    Class: local scale.

    References:
        Jordan 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    kind = "local scale"
    tolerance = 8.0  # a tuned Muon runs at 15-20 times the noise limit, others at 1-3 (benchmarks/lr_robustness.py)
    head_start, annealing = 3.0, 3.0
    """Nothing but a smaller lr makes its steps shorter, where Adam's m shrinks in noise: it takes a large lr at first
    and a small one later. The ViT's tuned lr over 1,000 steps is a third of that over 300, the GPT's over 3,000 a third
    of that over 1,000. What others gave: docs/benchmarks.md, "An lr that drifts up"."""

    decoupled = True

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        mu, buffer = float(group["momentum"]), state.get("momentum_buffer")
        average = (torch.zeros_like(g) if buffer is None else buffer).lerp(g, 1 - mu)
        return g.lerp(average, mu) if group["nesterov"] else average

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        mu = float(group["momentum"])
        if group["nesterov"]:
            return UpdateRule(mu, from_average=mu, from_gradient=1 - mu)
        return UpdateRule(mu, from_average=1.0, from_gradient=0.0)

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        return self._spectrum(group, state, g)[1]

    def root(self, group: Group, state: State, g: Tensor, param: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        vectors, p, wide = self._spectrum(group, state, g)
        operator = (vectors * p.rsqrt()) @ vectors.T
        return (lambda v: operator @ v if wide else v @ operator), p

    def coming_step(
        self, group: Group, state: State, param: Tensor, grad: Tensor, lr: float, updates: int | None = None
    ) -> Tensor:
        g = self.descent_gradient(group, param, grad)
        direction = self.direction(group, state, g, updates)
        step = _orthogonalised(direction, group).to(param.dtype) * self._shape_factor(group, g)
        return -lr * step.add(param.detach(), alpha=float(group["weight_decay"]))

    def _spectrum(self, group: Group, state: State, g: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Eigenvectors and eigenvalues of P on the shorter side, and whether that is the left one."""
        m = self.direction(group, state, g)
        wide = m.shape[0] <= m.shape[1]
        squares, vectors = torch.linalg.eigh(m @ m.T if wide else m.T @ m)
        norm = squares.clamp(min=0).sum().sqrt().clamp(min=float(group["eps"]))
        a, b, c = group["ns_coefficients"]
        s = squares.clamp(min=0).sqrt() / norm
        gain = torch.ones_like(s)  # f(s) / s, in a form that needs no division by s
        for _ in range(int(group["ns_steps"])):
            x = (s * gain).square()
            gain = gain * (a + b * x + c * x * x)
        return vectors, norm / (gain.abs() * self._shape_factor(group, g)), wide

    def _shape_factor(self, group: Group, g: Tensor) -> float:
        rows, columns = g.shape[:2]
        if group["adjust_lr_fn"] in (None, "original"):
            return math.sqrt(max(1, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))


def _moved(old: Tensor | None, new: Tensor, fresh: float) -> Tensor:
    return (torch.zeros_like(new) if old is None else old).lerp(new, fresh)


def _orthogonalised(m: Tensor, group: Group) -> Tensor:
    """Newton-Schulz in bfloat16, as the optimizer makes it."""
    a, b, c = group["ns_coefficients"]
    wide = m.shape[0] <= m.shape[1]
    x = m.bfloat16() if wide else m.bfloat16().T
    x = x / x.norm().clamp(min=float(group["eps"]))
    for _ in range(int(group["ns_steps"])):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
