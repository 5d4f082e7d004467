"""Gradient descent and its averages: P = 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safe_lr.preconditioners.base import Group, Preconditioner, State
from safe_lr.stability import UpdateRule, warm_decay


class SGD(Preconditioner):
    """Gradient descent, heavy ball, dampening and Nesterov: P = 1.

        buf' = mu buf + (1 - dampening) g        (the first: buf' = g)
        x'   = x - lr buf'                       (Nesterov: x - lr (g + mu buf'))

    The buffer is the sum W of its weights times a normalised average. Limits in lr * lambda once W has settled: 2
    without momentum, 2 (1 + mu) / (1 - dampening) heavy ball, 2 (1 + mu) / (1 + 2 mu) Nesterov.

    Class: exact.
    """

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        return torch.ones((), dtype=g.dtype, device=g.device)

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        mu, buffer = float(group["momentum"]), state.get("momentum_buffer")
        if mu == 0:
            return g
        if buffer is not None and buffer.is_sparse:  # that of an embedding's sparse gradients
            buffer = buffer.to_dense()
        average: Tensor = g if buffer is None else (mu * buffer).add_(g, alpha=1 - float(group["dampening"]))
        return g.add(average, alpha=mu) if group["nesterov"] else average

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        mu, fresh = float(group["momentum"]), 1 - float(group["dampening"])
        if mu == 0:
            return UpdateRule()
        t = 1 if state.get("momentum_buffer") is None else math.inf if updates is None else updates
        if mu >= 1:
            raise ValueError(f"momentum {mu:g} never forgets: a limit is known below 1 only")
        first = mu ** (t - 1)  # the weight of the first gradient, which enters the buffer undampened
        weight = first + fresh * (1 - first) / (1 - mu)
        # An average in which the first gradient weighs that much is as young as a bias-corrected one that gives it the
        # same weight; without dampening that is t itself.
        share = first / weight * mu / (1 - mu)
        age = math.log(share / (1 + share)) / math.log(mu) if share > 0 else math.inf
        decay = warm_decay(mu, max(1.0, age))
        # While that gradient dominates, it pushes x for 1 / (1 - mu) updates with 1 / fresh times its due; 2.5 keeps
        # the swing below 4-fold (momenta up to .99, any dampening).
        weight *= max(1.0, first / weight / (2.5 * fresh)) if fresh else 1.0
        if group["nesterov"]:
            return UpdateRule(decay, from_average=mu * weight, from_gradient=1.0)
        return UpdateRule(decay, from_average=weight, from_gradient=0.0)


class ASGD(Preconditioner):
    """Averaged SGD: x' = (1 - lambd eta) x - eta g, with a step eta of its own.

        eta = lr / (1 + lambd lr t)^alpha,      P = lr / eta

    eta is made at the end of each update for the next one, so a new lr acts one update late (from the first update on
    it acts at once). The average `ax` moves nothing.

    Class: exact.
    """

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        shrunk = 1 + float(group["lambd"]) * float(group["lr"]) * float(state.get("step", 0))
        return torch.full((), shrunk ** float(group["alpha"]), dtype=g.dtype, device=g.device)

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        return UpdateRule()

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        return g

    def decay(self, group: Group, state: State | None = None) -> tuple[float, float]:
        shrunk = 1 + float(group["lambd"]) * float(group["lr"]) * float((state or {}).get("step", 0))
        return float(group["weight_decay"]), float(group["lambd"]) / shrunk ** float(group["alpha"])

    def keys(self, group: Group) -> tuple[str, ...]:
        return "step", "eta"

    def coming_step(
        self, group: Group, state: State, param: Tensor, grad: Tensor, lr: float, updates: int | None = None
    ) -> Tensor:
        g = self.descent_gradient(group, param, grad)
        eta = float(state["eta"] if state else torch.tensor(lr))  # in the precision that the optimizer keeps it in
        return -eta * g.add(param.detach(), alpha=float(group["lambd"]))
