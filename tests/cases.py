"""The table of optimizers that every contract test walks: adding an optimizer adds a row (or a few)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop


@dataclass(frozen=True)
class Case:
    """An optimizer with hyper-parameters, and how to freeze its P at a given diagonal.

    Attributes:
        make: The optimizer class.
        options: Keyword arguments beside params and lr.
        c: The limit's constant in lr * gamma once every average has settled (worked out by hand, from the literature).
    """

    make: Callable[..., Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    c: float = 2.0

    def __str__(self) -> str:
        return self.make.__name__ + "".join(f"-{k}={v}" for k, v in self.options.items())

    def optimizer(self, params: Any, lr: float = 0.05) -> Optimizer:
        return self.make(params, lr=lr, **self.options)


CASES = [
    Case(SGD),
    Case(SGD, {"weight_decay": 0.1}),
    Case(SGD, {"momentum": 0.9}, c=2 * 1.9),
    Case(SGD, {"momentum": 0.9, "maximize": True}, c=2 * 1.9),
    Case(SGD, {"momentum": 0.9, "dampening": 0.9}, c=2 * 1.9 / 0.1),
    Case(SGD, {"momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1}, c=2 * 1.8 / 0.5),
    Case(SGD, {"momentum": 0.9, "nesterov": True}, c=2 * 1.9 / 2.8),
    Case(Adagrad),
    Case(Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3}),
    Case(RMSprop),
    Case(RMSprop, {"momentum": 0.9}, c=2 * 1.9),
    Case(RMSprop, {"momentum": 0.5, "centered": True, "weight_decay": 0.1}, c=3.0),
    Case(Adam, c=38.0),
    Case(Adam, {"betas": (0.8, 0.99), "amsgrad": True}, c=2 * 1.8 / 0.2),
    Case(Adam, {"weight_decay": 0.1, "maximize": True}, c=38.0),
    Case(AdamW, c=38.0),
    Case(AdamW, {"betas": (0.95, 0.98), "weight_decay": 0.3, "amsgrad": True}, c=2 * 1.95 / 0.05),
]


FREEZE_BETA = 1 - 1e-12


def frozen(case: Case, x: Tensor, lr: float) -> Optimizer:
    """Returns the case's optimizer on x, its second moment's decay so close to 1 that no gradient moves it."""
    options = dict(case.options)
    if case.make in (Adam, AdamW):
        options["betas"] = (options.get("betas", (0.9, 0.999))[0], FREEZE_BETA)
    if case.make is RMSprop:
        options["alpha"] = FREEZE_BETA
    options.pop("lr_decay", None)
    options.pop("initial_accumulator_value", None)
    return case.make([x], lr=lr, **options)


def freeze(optimizer: Optimizer, x: Tensor, p: Tensor, past: int) -> None:
    """Writes the second moment so that the coming step, number past + 1, is made with the preconditioner p.

    Where the optimizer has no state yet, one of `past` updates with zero gradients is made up.
    """
    state, group = optimizer.state[x], optimizer.param_groups[0]
    v = (p - group.get("eps", 0.0)) ** 2
    if "betas" in group:
        if not state:
            state.update(step=torch.tensor(float(past)), exp_avg=torch.zeros_like(x), exp_avg_sq=torch.zeros_like(x))
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(x)
        settled = v * (1 - FREEZE_BETA ** (past + 1)) / FREEZE_BETA
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            if name in state:
                state[name].copy_(settled)
    elif "alpha" in group:
        if not state:
            state.update(step=torch.tensor(float(past)), square_avg=torch.zeros_like(x))
            if group["momentum"] > 0:
                state["momentum_buffer"] = torch.zeros_like(x)
            if group["centered"]:
                state["grad_avg"] = torch.zeros_like(x)
        state["square_avg"].copy_(v / FREEZE_BETA)
    elif "sum" in state:
        state["sum"].copy_(v)


def preconditioner(case: Case, size: int, generator: torch.Generator) -> Tensor:
    """A diagonal P that the case's optimizer can be frozen at: 1 for SGD, huge for Adagrad, whose sum only grows."""
    if case.make is SGD:
        return torch.ones(size, dtype=torch.float64)
    spread = torch.rand(size, dtype=torch.float64, generator=generator) * 4 + 0.5
    return spread * 1e8 if case.make is Adagrad else spread


def quadratic(size: int, generator: torch.Generator) -> Tensor:
    """A random positive definite Hessian that commutes with nothing."""
    a = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return a @ a.T / size + 0.1 * torch.eye(size, dtype=torch.float64)
