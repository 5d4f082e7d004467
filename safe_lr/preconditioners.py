"""What each optimizer is: its preconditioner P, its update rule, and its coming step.

The only module that names optimizers. To add one, write one class here (three or four short methods), register it, and
add one row to the tests' case table; CONTRIBUTING.md walks through it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from safe_lr.stability import UpdateRule, warm_decay

Group = Mapping[str, Any]
State = Mapping[str, Any]


class Preconditioner(ABC):
    """One optimizer, as a preconditioned average of gradients.

    With g the descent gradient (sign of `maximize` and L2 decay folded in), the coming step is

        x' = x - lr * (direction / P + weight_decay * x)

    Subclasses say what P, the direction and the update rule are; `coming_step` follows, and is tested equal to the real
    `optimizer.step()`. `updates` is the number of the coming update (1 for the first) as counted by the scheduler, for
    optimizers that keep no count of their own; None where nobody counted.
    """

    decoupled: ClassVar[bool] = False
    """Whether `weight_decay` acts on the parameters directly instead of through the gradient."""

    @abstractmethod
    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        """Returns P of the coming step: positive, broadcastable to g's shape. g enters the second moment."""

    @abstractmethod
    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        """Returns the update rule of the coming step, bias correction and early average included."""

    @abstractmethod
    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        """Returns what the coming step divides by P: the gradient, averaged as the optimizer averages."""

    def floor(self, group: Group) -> float | None:
        """Returns P's entry where every gradient so far was exactly zero; None where P does not depend on gradients."""
        return None

    def decay(self, group: Group) -> tuple[float, float]:
        """Returns (L2 decay, decoupled decay). L2 adds to H's diagonal; decoupled decay acts beside the gradient."""
        weight_decay = float(group.get("weight_decay", 0.0))
        decoupled = group.get("decoupled_weight_decay", self.decoupled)
        return (0.0, weight_decay) if decoupled else (weight_decay, 0.0)

    def descent_gradient(self, group: Group, param: Tensor, grad: Tensor) -> Tensor:
        """Returns the gradient that the optimizer averages: negated under `maximize`, L2 decay added."""
        g = -grad if group.get("maximize", False) else grad
        l2, _ = self.decay(group)
        return g.add(param.detach(), alpha=l2) if l2 else g

    def coming_step(
        self, group: Group, state: State, param: Tensor, grad: Tensor, lr: float, updates: int | None = None
    ) -> Tensor:
        """Returns the change of `param` in the step that the optimizer is about to make with this gradient and lr."""
        g = self.descent_gradient(group, param, grad)
        step = self.direction(group, state, g, updates) / self.diagonal(group, state, g)
        _, decoupled = self.decay(group)
        return -lr * (step.add(param.detach(), alpha=decoupled) if decoupled else step)


_REGISTRY: dict[type[torch.optim.Optimizer], Preconditioner] = {}


def register(optimizer: type[torch.optim.Optimizer], preconditioner: Preconditioner) -> None:
    """Makes an optimizer class known.

    Args:
        optimizer: The class; subclasses that do not override `step` are covered too.
        preconditioner: An instance of a `Preconditioner` subclass that describes it.

    Raises:
        TypeError: Either argument is not of its kind.

    Example:
        >>> class SignlessSGD(torch.optim.SGD): ...
        >>> register(SignlessSGD, SGD())
        >>> type(preconditioner_of(SignlessSGD([torch.zeros(1)], lr=0.1))).__name__
        'SGD'
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise TypeError(f"register() takes a torch.optim.Optimizer class first, got {optimizer!r}")
    if not isinstance(preconditioner, Preconditioner):
        raise TypeError(f"register() takes an instance of a safe_lr Preconditioner second, got {preconditioner!r}")
    _REGISTRY[optimizer] = preconditioner


def preconditioner_of(optimizer: torch.optim.Optimizer) -> Preconditioner:
    """Returns what is known of an optimizer.

    Raises:
        TypeError: The class is unknown; the message lists the known ones and says how to register another.

    Example:
        >>> type(preconditioner_of(torch.optim.AdamW([torch.zeros(1)]))).__name__
        'AdamW'
    """
    for cls in type(optimizer).__mro__:
        if cls in _REGISTRY:
            return _REGISTRY[cls]
        if "step" in vars(cls):  # it updates in a way of its own, whatever it inherits
            break
    known = ", ".join(sorted(cls.__name__ for cls in _REGISTRY))
    raise TypeError(
        f"safe_lr does not know the preconditioner of {type(optimizer).__name__}; known: {known}. Describe it with a "
        f"subclass of safe_lr.Preconditioner and safe_lr.register({type(optimizer).__name__}, YourPreconditioner())."
    )


class SGD(Preconditioner):
    """Gradient descent, heavy ball, dampening and Nesterov: P = 1.

        buf' = mu buf + (1 - dampening) g        (the first: buf' = g)
        x'   = x - lr buf'                       (Nesterov: x - lr (g + mu buf'))

    The buffer is the sum W of its weights times a normalised average. Limits in lr * lambda once W has settled: 2
    without momentum, 2 (1 + mu) / (1 - dampening) heavy ball, 2 (1 + mu) / (1 + 2 mu) Nesterov.
    """

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        return torch.ones((), dtype=g.dtype, device=g.device)

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        mu, buffer = float(group["momentum"]), state.get("momentum_buffer")
        if mu == 0:
            return g
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


class Adagrad(Preconditioner):
    """Sum of squares, no momentum: P = sqrt(sum + g^2) + eps, lr shrunk by 1 / (1 + (t - 1) lr_decay)."""

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        return _second_moment(state, "sum", 1.0, 1.0, g).sqrt().add_(group["eps"])

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        return g / (1 + (_coming(state) - 1) * float(group["lr_decay"]))

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        return UpdateRule(from_gradient=1 / (1 + (_coming(state) - 1) * float(group["lr_decay"])))

    def floor(self, group: Group) -> float | None:
        # Exactly zero so far only if the accumulator started at zero.
        return float(group["eps"]) if not group["initial_accumulator_value"] else None


class RMSprop(Preconditioner):
    """Running mean of squares: P = sqrt(v') + eps with v' = alpha v + (1 - alpha) g^2, centered: v' - mean(g)^2.

    With momentum, buf' = mu buf + g / P: heavy ball on the preconditioned gradient.
    """

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        alpha = float(group["alpha"])
        v = _second_moment(state, "square_avg", alpha, 1 - alpha, g)
        if group["centered"]:
            mean = _decayed(state, "grad_avg", alpha, g).add_(g, alpha=1 - alpha)
            v = v.addcmul(mean, mean, value=-1).clamp_(min=0)
        return v.sqrt_().add_(group["eps"])

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        mu, buffer = float(group["momentum"]), state.get("momentum_buffer")
        if mu == 0 or buffer is None:
            return g
        return g.addcmul(buffer, self.diagonal(group, state, g), value=mu)  # the buffer holds preconditioned gradients

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        mu, t = float(group["momentum"]), _coming(state)
        if mu == 0:
            return UpdateRule()
        return UpdateRule(warm_decay(mu, t), from_average=(1 - mu**t) / (1 - mu), from_gradient=0.0)

    def floor(self, group: Group) -> float | None:
        return float(group["eps"])


class Adam(Preconditioner):
    """Adam and AdamW: P = sqrt(v' / (1 - b2^t)) + eps with v' = b2 v + (1 - b2) g^2 (amsgrad: the maximum so far).

    The direction is the bias-corrected average of gradients, so the limit is 2 (1 + b1 - 2 b1^t) / (1 - b1) in lr *
    gamma: 2 at the first update, 2 (1 + b1) / (1 - b1) in the end.
    """

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        b2 = float(group["betas"][1])
        v = _second_moment(state, "exp_avg_sq", b2, 1 - b2, g)
        if group["amsgrad"] and state:
            v = torch.maximum(v, state["max_exp_avg_sq"])
        return v.sqrt_().div_(math.sqrt(1 - b2 ** _coming(state))).add_(group["eps"])

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        return UpdateRule(warm_decay(float(group["betas"][0]), _coming(state)), from_average=1.0, from_gradient=0.0)

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        b1 = float(group["betas"][0])
        return _decayed(state, "exp_avg", b1, g).add_(g, alpha=1 - b1).div_(1 - b1 ** _coming(state))

    def floor(self, group: Group) -> float | None:
        return float(group["eps"])


class AdamW(Adam):
    """Adam with decoupled weight decay; current torch marks its groups so, older ones do not."""

    decoupled = True


def _coming(state: State) -> int:
    """The number of the coming update, from the optimizer's own count (1 for the first)."""
    return int(state.get("step", 0)) + 1


def _decayed(state: State, name: str, keep: float, like: Tensor) -> Tensor:
    """`keep` times a state tensor, as a new tensor; zeros where the optimizer has made none yet."""
    value = state.get(name)
    return torch.zeros_like(like) if value is None else value * keep


def _second_moment(state: State, name: str, keep: float, fresh: float, g: Tensor) -> Tensor:
    return _decayed(state, name, keep, g).addcmul_(g, g, value=fresh)


register(torch.optim.SGD, SGD())
register(torch.optim.Adagrad, Adagrad())
register(torch.optim.RMSprop, RMSprop())
register(torch.optim.Adam, Adam())
register(torch.optim.AdamW, AdamW())


def decays(group: Group) -> tuple[float | None, float | None]:
    """Returns a group's first- and second-moment decay, under whatever names its optimizer gives them; None where it
    has none.

    Example:
        >>> decays({"betas": (0.9, 0.999)}), decays({"momentum": 0.9}), decays({"alpha": 0.99, "momentum": 0.0})
        ((0.9, 0.999), (0.9, None), (0.0, 0.99))
    """
    if "betas" in group:
        return float(group["betas"][0]), float(group["betas"][1])
    first, second = group.get("momentum"), group.get("alpha")
    return (None if first is None else float(first)), (None if second is None else float(second))
