"""Optimizers that step by the gradient's sign: no limit exists, the trial step alone holds lr."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_lr.preconditioners.base import Group, Preconditioner, State
from safe_lr.stability import UpdateRule


class Lion(Preconditioner):
    """x' = x - lr sign(b1 m + (1 - b1) g), decay decoupled: steps of one size, however small the gradient.

    On a quadratic it settles at about lr for every lr, so no lr is unstable and none is stable. The scheduler then
    takes, in the place of a limit, the largest lr at which the coming step does not raise the measured batch's loss.

    Class: trial.

    References:
        Chen et al. 2023, "Symbolic discovery of optimization algorithms", arXiv 2302.06675.
    """

    kind = "trial"
    decoupled = True

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        return self._average(group, state, g).abs()

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        return self._average(group, state, g)

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        return UpdateRule()

    def decay(self, group: Group, state: State | None = None) -> tuple[float, float]:
        weight_decay = float(group.get("weight_decay", 0.0))
        return (0.0, weight_decay) if group.get("weight_decouple", True) else (weight_decay, 0.0)

    def coming_step(
        self, group: Group, state: State, param: Tensor, grad: Tensor, lr: float, updates: int | None = None
    ) -> Tensor:
        g = self.descent_gradient(group, param, grad)
        _, decoupled = self.decay(group)
        factor = decoupled if group.get("fixed_decay", False) else lr * decoupled
        return -lr * torch.sign(self._average(group, state, g)) - factor * param.detach()

    def _average(self, group: Group, state: State, g: Tensor) -> Tensor:
        average = state.get("exp_avg")
        return (torch.zeros_like(g) if average is None else average).lerp(g, 1 - float(group["betas"][0]))
