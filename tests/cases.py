"""The table of optimizers that every contract test walks: adding an optimizer adds a row (or a few)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    SparseAdam,
)

from benchmarks.quadratics import freeze
from benchmarks.quadratics import random_hessian as quadratic

__all__ = ["CASES", "Case", "freeze", "frozen", "preconditioner", "quadratic"]


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
        if self.make is not SparseAdam:
            return self.make(params, lr=lr, **self.options)
        optimizer = self.make(params, lr=lr or 1.0, **self.options)  # it refuses to be made with lr 0
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.register_step_pre_hook(_make_gradients_sparse)
        return optimizer


def _make_gradients_sparse(optimizer: Optimizer, *_: Any) -> None:
    """SparseAdam takes nothing else; a 1-d parameter's rows are its entries."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and not p.grad.is_sparse:
                p.grad = p.grad.to_sparse(1)


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
    Case(Adamax, c=38.0),
    Case(Adamax, {"betas": (0.8, 0.99), "weight_decay": 0.1, "eps": 1e-6, "maximize": True}, c=2 * 1.8 / 0.2),
    # In the end mu_t = b1 and M_t = 0: the direction is (1 - b1) g + b1 m', so c = 2 (1 + b1) / ((1 - b1) (1 + 2 b1)).
    Case(NAdam, c=2 * 1.9 / (0.1 * 2.8)),
    Case(NAdam, {"betas": (0.8, 0.99), "weight_decay": 0.1, "maximize": True}, c=2 * 1.8 / (0.2 * 2.6)),
    Case(NAdam, {"weight_decay": 0.3, "decoupled_weight_decay": True}, c=2 * 1.9 / (0.1 * 2.8)),
    # Without momentum decay mu_t stays b1 / 2: the direction is (1 - b1 / 2) g + b1 / 2 m'.
    Case(NAdam, {"momentum_decay": 0.0}, c=2 * 1.9 / (0.45 * 0.1 + 0.55 * 1.9)),
    Case(RAdam, c=38.0),
    Case(RAdam, {"betas": (0.8, 0.99), "weight_decay": 0.1, "maximize": True}, c=2 * 1.8 / 0.2),
    Case(RAdam, {"weight_decay": 0.3, "decoupled_weight_decay": True}, c=38.0),
    Case(ASGD),
    Case(ASGD, {"lambd": 0.2, "alpha": 0.6, "weight_decay": 0.1, "maximize": True}),
    Case(SparseAdam, c=38.0),
    Case(SparseAdam, {"betas": (0.8, 0.99), "eps": 1e-7, "maximize": True}, c=2 * 1.8 / 0.2),
    Case(Adadelta),
    Case(Adadelta, {"rho": 0.8, "eps": 1e-4, "weight_decay": 0.1, "maximize": True}),
]


FREEZE_BETA = 1 - 1e-12
FREEZE_RADAM = 1 - 1e-6  # its rectification is a small difference of numbers near 1 / (1 - b2)


def frozen(case: Case, x: Tensor, lr: float) -> Optimizer:
    """Returns the case's optimizer on x, its second moment's decay so close to 1 that no gradient moves it.

    Where P depends on lr or on the count of steps alone (ASGD's alpha, Adagrad's lr_decay) that dependence is off.
    """
    options = dict(case.options)
    if case.make in (Adam, AdamW, Adamax, NAdam, RAdam, SparseAdam):
        keep = FREEZE_RADAM if case.make is RAdam else FREEZE_BETA
        options["betas"] = (options.get("betas", (0.9, 0.999))[0], keep)
    if case.make is RMSprop:
        options["alpha"] = FREEZE_BETA
    if case.make is Adadelta:
        options["rho"] = 1.0  # both accumulators keep what they hold
    if case.make is ASGD:
        options["alpha"] = 0.0
    options.pop("lr_decay", None)
    options.pop("initial_accumulator_value", None)
    return Case(case.make, options).optimizer([x], lr)


def preconditioner(case: Case, size: int, generator: torch.Generator) -> Tensor:
    """A diagonal P that the case's optimizer can be frozen at.

    1 for gradient descent; huge where a gradient of the size of P would move it (Adagrad's sum only grows, Adamax takes
    the maximum).
    """
    if case.make in (SGD, ASGD):
        return torch.ones(size, dtype=torch.float64)
    spread = torch.rand(size, dtype=torch.float64, generator=generator) * 4 + 0.5
    return spread * 1e8 if case.make in (Adagrad, Adamax) else spread
