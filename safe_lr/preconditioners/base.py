"""What an optimizer is to safe_lr: a preconditioner P, an update rule, and the step it is about to make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from safe_lr.stability import UpdateRule

Group = Mapping[str, Any]
State = Mapping[str, Any]


class Preconditioner(ABC):
    """One optimizer, as a preconditioned average of gradients.

    With g the descent gradient (sign of `maximize` and L2 decay folded in), the coming step is

        x' = x - lr * (direction / P + weight_decay * x)

    Subclasses say what P, the direction and the update rule are; `coming_step` follows, and is tested equal to the real
    `optimizer.step()`. `updates` is the number of the coming update (1 for the first) as counted by the scheduler, for
    optimizers that keep no count of their own; None where nobody counted.

    Complex parameters come as pairs of reals, half-precision states as float32.
    """

    kind: ClassVar[str] = "exact"
    """`exact`: the limit is where the optimizer turns unstable on a quadratic with this P. `local scale`: P is itself a
    function of the gradient or the parameter, and stands for the coming step alone. `trial`: no limit exists, trial
    steps alone hold lr. `inferred`: P is read off the optimizer's own update."""

    tolerance: ClassVar[float] = 1.0
    """What a learned margin multiplies the noise limit by (`policies.noise_share`), where tuned runs were seen to stand
    more of it than those of other optimizers do."""

    unaveraged: ClassVar[float] = 1.0
    """What `policies.UNAVERAGED` is multiplied by: how much more noise is stood where P is made of gradients, and steps
    of single ones."""

    head_start: ClassVar[float] = 1.0
    """What `policies.MULTIPLE_START` is multiplied by where a run begins; later it is what it is for others."""

    annealing: ClassVar[float] = 1.0
    """Power of what `policies.annealed` leaves of the noise limit. 0 where P is a sum that grows for ever: steps of one
    lr then shrink by themselves as the run goes on, the limit rises, and a cap that does not rise with it
    (`policies.next_crest`) is enough. More than 1 where nothing but lr makes steps shorter."""

    decoupled: ClassVar[bool] = False
    """Whether `weight_decay` acts on the parameters directly instead of through the gradient."""

    second_moments: ClassVar[tuple[str, ...]] = ()
    """Names of state tensors that are sums of squares, or maxima of magnitudes: never negative."""

    on_optimizer: ClassVar[tuple[str, ...]] = ("maximize",)
    """Options that some optimizers keep as attributes of their own; where a group lacks them, it is given them."""

    movable: ClassVar[tuple[str, ...]] = ()
    """Options that may be moved in the middle of a run: `betas`, or `alpha` (a second moment's decay alone), whose
    averages then go on by `corrections`; `eps`, with which P rises."""

    weighs_fresh: ClassVar[bool] = False
    """Whether b1 is also the weight of the fresh gradient, which no correction keeps as it was."""

    @abstractmethod
    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        """Returns P of the coming step: positive, broadcastable to g's shape. g enters the second moment."""

    @abstractmethod
    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        """Returns the update rule of the coming step, bias correction and early average included."""

    @abstractmethod
    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        """Returns what the coming step divides by P: the gradient, averaged as the optimizer averages."""

    def root(self, group: Group, state: State, g: Tensor, param: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Returns the operator P^-1/2, and P's entries (its eigenvalues, where P is no diagonal)."""
        p = self.diagonal(group, state, g)
        scale = p.rsqrt()
        return (lambda v: v * scale), p

    def floor(self, group: Group, state: State) -> float | None:
        """Returns P's entry where every gradient so far was exactly zero; None where P does not depend on gradients."""
        return None

    def keys(self, group: Group) -> tuple[str, ...]:
        """Returns the names that an initialised state must have; one that lacks some was made by another optimizer."""
        return ()

    def decay(self, group: Group, state: State | None = None) -> tuple[float, float]:
        """Returns (L2 decay, decoupled decay). L2 adds to H's diagonal; decoupled decay acts beside the gradient."""
        weight_decay = float(group.get("weight_decay", 0.0))
        decoupled = group.get("decoupled_weight_decay", self.decoupled)
        return (0.0, weight_decay) if decoupled else (weight_decay, 0.0)

    def decay_of(self, group: Group, state: State, param: Tensor) -> tuple[float, float]:
        """Returns `decay`, for one parameter where it has to be found out there."""
        return self.decay(group, state)

    def corrections(self, group: Group, state: State) -> dict[str, float] | None:
        """Returns what the last step divided each average of the state by; one used as it is (a 1) may be left out.

        When a decay moves, an average that is rescaled by the new correction over the old one goes on unchanged as the
        optimizer sees it. None where no factor does that.
        """
        return {}

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
        _, decoupled = self.decay(group, state)
        return -lr * (step.add(param.detach(), alpha=decoupled) if decoupled else step)


def coming(state: State) -> int:
    """The number of the coming update, from the optimizer's own count (1 for the first)."""
    return int(state.get("step", 0)) + 1


def decayed(state: State, name: str, keep: float, like: Tensor) -> Tensor:
    """`keep` times a state tensor, as a new tensor; zeros where the optimizer has made none yet."""
    value = state.get(name)
    return torch.zeros_like(like) if value is None else value * keep


def second_moment(state: State, name: str, keep: float, fresh: float, g: Tensor) -> Tensor:
    """keep v + fresh g^2."""
    return decayed(state, name, keep, g).addcmul_(g, g, value=fresh)
