"""An optimizer that nobody described: P inferred from what it does with a gradient."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from safe_lr.preconditioners.base import Group, Preconditioner, State
from safe_lr.stability import UpdateRule

SMALL = 1e-3
"""Size of the gradient that stands in for an exact zero, in units of the root mean square: a coordinate that the batch
does not touch still has a response."""

LEAST_DEFINED = 0.99
"""Part of the coordinates that must answer to the gradient's sign for P to be well defined."""


class FromUpdate(Preconditioner):
    """P from the optimizer's own update, by two rehearsals of its `step()` on copies, with g and with -g:

        1 / P = (step(-g) - step(g)) / (2 lr g)

    What does not depend on the gradient's sign cancels: momentum, decoupled weight decay. So this is the response to
    the fresh gradient alone, and the limit 2 / gamma that follows never exceeds that of an optimizer whose direction is
    an average with non-negative weights, in units of P: 2 / (1 - b1) <= 2 (1 + b1) / (1 - b1) with Adam's average,
    2 <= 2 (1 + mu) for heavy ball, 2 / (1 + mu) <= 2 (1 + mu) / (1 + 2 mu) for Nesterov. Not defined for optimizers
    that step by signs.

    Each parameter rehearses alone, which costs two copies of it and of its state at a time, and does not see what the
    optimizer couples across parameters (a norm over all).

    Args:
        optimizer: The optimizer; its class and attributes are used, nothing of it is touched.
    """

    kind = "inferred"

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        typical = g.square().mean().sqrt()
        g = torch.where(g == 0, SMALL * typical, g)
        lr, param = float(group["lr"]) or 1.0, torch.zeros_like(g)
        up, down = (self._rehearsed(group, state, param, sign * g, lr) for sign in (-1.0, 1.0))
        sign = -1.0 if group.get("maximize", False) else 1.0
        response = sign * (up - down) / (2 * lr * g)
        defined = (response > 0) & response.isfinite()
        if float(defined.float().mean()) < LEAST_DEFINED:
            raise ArithmeticError(
                f"preconditioner='from-update' is not well defined for {type(self.optimizer).__name__}: of its update, "
                f"{float((~defined).float().mean()):.0%} do not answer to the gradient's sign. Describe the optimizer "
                "with safe_lr.register()."
            )
        return torch.where(defined, response, response[defined].max()).reciprocal()

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        return g

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        return UpdateRule()

    def decay(self, group: Group, state: State | None = None) -> tuple[float, float]:
        return 0.0, float(group.get("weight_decay", 0.0))

    def descent_gradient(self, group: Group, param: Tensor, grad: Tensor) -> Tensor:
        return grad  # the rehearsal makes of it what the optimizer makes of it

    def coming_step(
        self, group: Group, state: State, param: Tensor, grad: Tensor, lr: float, updates: int | None = None
    ) -> Tensor:
        return self._rehearsed(group, state, param, grad, lr)

    def _rehearsed(self, group: Group, state: State, param: Tensor, grad: Tensor, lr: float) -> Tensor:
        """The change of one parameter in the optimizer's own `step()`, on copies."""
        x = torch.nn.Parameter(param.detach().clone())
        x.grad = grad.detach().clone()
        double: Any = object.__new__(type(self.optimizer))
        double.__dict__.update({name: value for name, value in vars(self.optimizer).items() if name not in _OWN})
        double.__dict__.update({name: OrderedDict() for name in _HOOKS if name in vars(self.optimizer)})
        own_lr = group["lr"]
        double.param_groups = [
            {
                **{name: copy.deepcopy(value) for name, value in group.items() if name not in ("params", "lr")},
                "params": [x],
                "lr": torch.full_like(own_lr, lr) if isinstance(own_lr, Tensor) else lr,
            }
        ]
        double.state = type(self.optimizer.state)(dict)
        if state:
            double.state[x] = copy.deepcopy(dict(state))
        with torch.no_grad():
            double.step()
        return x.detach() - param.detach()


# What a schedule or a hook has put on the optimizer itself must not see the rehearsal.
_OWN = ("param_groups", "state", "step", "zero_grad")
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
