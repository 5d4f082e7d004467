"""One optimizer or several that act on one loss, seen as one list of parameter groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from safe_lr.policies import UNAVERAGED
from safe_lr.preconditioners import FromUpdate, Preconditioner, decays, preconditioner_of, refused
from safe_lr.stability import UpdateRule


class Ensemble:
    """Several optimizers on one loss (Muon for matrices beside AdamW for the rest), or a single one.

    Their limit is a joint one: with H = [[1, .95], [.95, 1]] each half alone is stable below 2, both together below
    1.03.

    Attributes:
        members: The optimizers.
        counts: How many updates each has made, for those that keep no count of their own; None where not all were seen.

    Args:
        optimizers: An optimizer, or several that share no parameter; wrappers are taken off, see `unwrapped`.
        preconditioner: What they are: None for what is registered, "from-update" to infer P from the update of those
            that are not, or a `Preconditioner` for all.

    Raises:
        TypeError: Not an optimizer, or one that is not known.
        ValueError: None at all, a parameter in two of them, or another word than "from-update".

    Example:
        >>> import torch
        >>> a, b = (torch.optim.SGD([torch.ones(1)], lr=lr) for lr in (0.1, 0.2))
        >>> [group["lr"] for group in Ensemble([a, b]).param_groups]
        [0.1, 0.2]
    """

    def __init__(
        self, optimizers: Optimizer | Sequence[Optimizer], preconditioner: str | Preconditioner | None = None
    ) -> None:
        several: list[Any] = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
        for optimizer in several:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    "optimizer must be a torch.optim.Optimizer, or a list of them where several act on one loss; got "
                    f"{type(optimizer).__name__}"
                )
        if not several:
            raise ValueError("optimizer is an empty list: at least one is needed")
        several = [unwrapped(optimizer) for optimizer in several]
        self.members: list[Optimizer] = several
        self.models = [_model(optimizer, preconditioner) for optimizer in several]
        self.counts: list[int | None] = [None] * len(several)
        owned = [id(p) for optimizer in several for group in optimizer.param_groups for p in group["params"]]
        if len(owned) != len(set(owned)):
            raise ValueError("a parameter belongs to two of the optimizers: who moves it must be one")

    def coming(self, optimizer: Optimizer) -> int | None:
        """Returns the number of a member's coming update, None where not all of them were counted."""
        count = self.counts[self.members.index(optimizer)]
        return None if count is None else count + 1

    def count_from_now(self) -> None:
        """Counts each member's updates from zero, where it has made none yet."""
        self.counts = [None if any(member.state.values()) else 0 for member in self.members]

    def count(self, optimizer: Optimizer) -> None:
        """Counts an update of one member."""
        index = self.members.index(optimizer)
        count = self.counts[index]
        self.counts[index] = None if count is None else count + 1

    @property
    def name(self) -> str:
        """The classes' names."""
        return " + ".join(type(optimizer).__name__ for optimizer in self.members)

    @property
    def kinds(self) -> set[str]:
        """What is known of the members' limits: see `Preconditioner.kind`."""
        return {model.kind for model in self.models}

    @property
    def tolerance(self) -> float:
        """The largest factor of a member's on the noise limit: see `Preconditioner.tolerance`."""
        return max(model.tolerance for model in self.models)

    @property
    def head_start(self) -> float:
        """The largest of the members' first multiples: see `Preconditioner.head_start`."""
        return max(model.head_start for model in self.models)

    @property
    def annealing(self) -> float:
        """The largest of the members' powers of annealing: see `Preconditioner.annealing`."""
        return max(model.annealing for model in self.models)

    @property
    def unaveraged(self) -> float:
        """How many times higher the noise limit is where steps are made of single gradients: the smallest of the
        members whose P is made of past ones, 1 where there is none."""
        return min((UNAVERAGED * model.unaveraged for model in self.models if model.second_moments), default=1.0)

    @property
    def adaptive(self) -> bool:
        """Whether some member's P is made of past gradients."""
        return any(model.second_moments for model in self.models)

    @property
    def follows_gradients(self) -> bool:
        """Whether some member's P is made of gradients, past ones or the coming step's own."""
        return self.adaptive or "local scale" in self.kinds

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, in order."""
        return [group for optimizer in self.members for group in optimizer.param_groups]

    def owned(self) -> Iterator[tuple[Optimizer, Preconditioner, int, dict[str, Any]]]:
        """Yields each group with its optimizer, what that is, and the group's index in `param_groups`."""
        index = 0
        for optimizer, model in zip(self.members, self.models, strict=True):
            own = {name: getattr(optimizer, name) for name in model.on_optimizer if hasattr(optimizer, name)}
            for group in optimizer.param_groups:
                yield optimizer, model, index, {**own, **group} if own else group
                index += 1

    def gradient_norm(self) -> float | None:
        """Returns the norm of all gradients, unscaled; None where there are none. One synchronisation a member."""
        norms = []
        for optimizer in self.members:
            grads = [g for group in optimizer.param_groups for p in group["params"] if (g := p.grad) is not None]
            if grads:
                total, scale = _norm(grads), getattr(optimizer, "grad_scale", None)
                norms.append(float(total if scale is None else total / scale.to(total.device)))
        return math.hypot(*norms) if norms else None

    def decays(self) -> list[tuple[float | None, float | None]]:
        """Returns each group's decays of the first and second moment, as they stand now."""
        return [decays(group) for group in self.param_groups]

    def moving(self) -> list[bool]:
        """Returns for each parameter whether it has a gradient and so takes part in the coming update."""
        return [p.grad is not None for group in self.param_groups for p in group["params"]]

    def rules(self) -> list[UpdateRule | None]:
        """Returns the update rule of the coming step for each parameter, None for those without gradient."""
        known: dict[tuple[int, int, int], UpdateRule] = {}
        rules: list[UpdateRule | None] = []
        for optimizer, model, index, group in self.owned():
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                key = index, len(state), int(state.get("step", 0))  # what a rule depends on
                if p.grad is not None and key not in known:
                    known[key] = model.rule(group, state, self.coming(optimizer))
                rules.append(known[key] if p.grad is not None else None)
        return rules


def _norm(grads: list[Tensor]) -> Tensor:
    """`get_total_norm`, to the bit; plain tensors of one kind, the usual case, need none of its sorting."""
    kinds = {(type(g), g.dtype, g.device, g.layout) for g in grads}
    if len(kinds) > 1 or type(grads[0]) is not Tensor or grads[0].is_sparse:
        return get_total_norm([g.coalesce().values() if g.is_sparse else g for g in grads])
    total: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return total.detach()  # under create_graph=True gradients have a graph; no_grad() at each update takes longer


def _model(optimizer: Optimizer, preconditioner: str | Preconditioner | None) -> Preconditioner:
    if isinstance(preconditioner, Preconditioner):
        return preconditioner
    if preconditioner not in (None, "from-update"):
        raise ValueError(
            f"preconditioner must be None, 'from-update' or a safe_lr.Preconditioner, got {preconditioner!r}"
        )
    try:
        return preconditioner_of(optimizer)
    except TypeError:
        if preconditioner is None or refused(optimizer):
            raise
        return FromUpdate(optimizer)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer inside a wrapper such as accelerate's, which makes the update and whose hooks are called.

    A wrapper is known by what it does not have: its groups and its state are those of its attribute `optimizer`. One
    that keeps state of its own (Lookahead's slow weights) makes an update of its own, and stays.

    Example:
        >>> import torch
        >>> class Wrapper(torch.optim.Optimizer):
        ...     def __init__(self, optimizer):
        ...         self.optimizer = optimizer
        ...     state = property(lambda self: self.optimizer.state)
        ...     param_groups = property(lambda self: self.optimizer.param_groups)
        >>> sgd = torch.optim.SGD([torch.ones(1)])
        >>> unwrapped(Wrapper(sgd)) is sgd, unwrapped(sgd) is sgd
        (True, True)
    """
    inner = getattr(optimizer, "optimizer", None)
    if not isinstance(inner, Optimizer) or inner is optimizer:
        return optimizer
    if inner.param_groups is not optimizer.param_groups or inner.state is not optimizer.state:
        return optimizer
    return unwrapped(inner)


def unscaled(grad: Tensor, optimizer: Optimizer) -> Tensor:
    """Returns a gradient, dense and detached, as the optimizer will use it: fused ones unscale inside `step()`."""
    grad = (grad.to_dense() if grad.is_sparse else grad).detach()
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return grad if scale is None else grad / scale.to(grad.device)
