"""An optimizer that nobody described: P inferred from what it does with a gradient."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
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
    2 <= 2 (1 + mu) for heavy ball, 2 / (1 + mu) <= 2 (1 + mu) / (1 + 2 mu) for Nesterov. It is a local scale where the
    step depends on the parameter's norm. Not defined for optimizers that step by signs of an average (those that step
    by the sign of the fresh gradient alone cannot be told from a young Adam).

    Each parameter rehearses alone, which costs two copies of it and of its state at a time, and does not see what the
    optimizer couples across parameters (a norm over all).

    Class: inferred.

    Args:
        optimizer: The optimizer; its class and attributes are used, nothing of it is touched.
    """

    kind = "inferred"

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        return self._inferred(group, state, g, torch.zeros_like(g))

    def root(self, group: Group, state: State, g: Tensor, param: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        p = self._inferred(group, state, g, param)
        scale = p.rsqrt()
        return (lambda v: v * scale), p

    def _inferred(self, group: Group, state: State, g: Tensor, param: Tensor) -> Tensor:
        typical = g.square().mean().sqrt()
        g = torch.where(g == 0, SMALL * torch.where(typical > 0, typical, 1.0), g)
        lr = float(group["lr"]) or 1.0
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

    def decay_of(self, group: Group, state: State, param: Tensor) -> tuple[float, float]:
        """The largest rate at which weight decay moves an entry, whether it goes through P (L2) or beside it.

        From rehearsals without gradient, with the decay and without it.
        """
        if not group.get("weight_decay", 0.0):
            return 0.0, 0.0
        lr, still = float(group["lr"]) or 1.0, torch.zeros_like(param)
        with_decay = self._rehearsed(group, state, param, still, lr)
        without = self._rehearsed({**group, "weight_decay": 0.0}, state, param, still, lr)
        rate = (without - with_decay) / (lr * param)
        return 0.0, max(0.0, float(torch.where(param == 0, torch.zeros_like(rate), rate).nan_to_num().max()))

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
        double.__dict__.update({n: _copied(value) for n, value in vars(self.optimizer).items() if n not in _OWN})
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
            inspect.unwrap(type(self.optimizer).step)(double)  # without torch's wrapper, which calls everyone's hooks
        return x.detach() - param.detach()


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 (what cannot be copied, a lock or a stream, is only looked at)
        return value


# What a schedule or a hook has put on the optimizer itself must not see the rehearsal.
_OWN = ("param_groups", "state", "step", "zero_grad")
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
