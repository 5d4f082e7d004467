"""Acting just before and just after each real update of an optimizer, however `step()` is called."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Guard(Protocol):
    """What is told of updates."""

    def before(self) -> None:
        """The gradients of an update are there."""

    def stepped(self, optimizer: Optimizer) -> None:
        """One optimizer has taken its part."""

    def resume(self) -> None:
        """Another of several optimizers is about to take its part in the update."""

    def pause(self) -> None:
        """One of several optimizers has taken its part, others have not."""

    def after(self, updated: bool) -> None:
        """The update is over; `updated` is False where it was dropped."""


def around_updates(optimizers: Sequence[Optimizer], guard: Guard) -> list[RemovableHandle]:
    """Calls `guard.before()` when the gradients of an update are there, and `guard.after(updated)` when it is over.

    In `optimizer.step(closure)` there are no gradients when torch's pre-hook runs: `before` then runs when that closure
    has run. A fused optimizer drops an update whose gradients overflowed (GradScaler): `before` is not called for it,
    and `updated` is False. Several optimizers make one update together: `before` runs before the first of them steps,
    `after` when the last one has, or when one is about to step again; in between, `pause` and `resume`.

    Args:
        optimizers: Whose updates.
        guard: Held weakly: the optimizer must not keep alive what everyone else has dropped.

    Returns:
        Handles to remove the hooks.

    Example:
        >>> import torch
        >>> class Watch:
        ...     def before(self): print("before")
        ...     def stepped(self, optimizer): pass
        ...     def after(self, updated): print("after", updated)
        >>> watch, x = Watch(), torch.zeros(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([x])
        >>> handles = around_updates([optimizer], watch)
        >>> x.sum().backward()
        >>> optimizer.step()
        before
        after True
    """
    update = _Update(len(optimizers), weakref.ref(guard))
    handles = []
    for optimizer in optimizers:
        handles.append(optimizer.register_step_pre_hook(update.pre_hook))
        handles.append(optimizer.register_step_post_hook(update.post_hook))
    return handles


class _Update:
    """One update, by as many optimizers as take part in it."""

    def __init__(self, members: int, guard: weakref.ReferenceType[Guard]) -> None:
        self.members, self.guard = members, guard
        self.stepped: set[int] = set()
        self.updated = self.begun = False

    def begin(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self.stepped:
            self.end()
        guard = self.guard()
        if guard is None or _dropped(optimizer):
            return
        if self.begun:
            guard.resume()
        else:
            guard.before()
            self.begun = True  # not where that has raised: the next step() is then an update of its own

    def end(self) -> None:
        updated, guard = self.updated, self.guard()
        self.stepped.clear()
        self.updated = self.begun = False
        if guard is not None:
            guard.after(updated)

    def pre_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.begin(optimizer)
            return None

        def then_begin() -> Any:
            loss = closure()
            self.begin(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_begin}
        return (args[0], then_begin, *args[2:]), kwargs

    def post_hook(self, optimizer: Optimizer, *_: object) -> None:
        self.stepped.add(id(optimizer))
        self.updated = self.updated or not _dropped(optimizer)
        guard = self.guard()
        if guard is not None and not _dropped(optimizer):
            guard.stepped(optimizer)
        if len(self.stepped) == self.members:
            self.end()
        elif guard is not None:
            guard.pause()


def warn_user(message: str) -> None:
    """Warns, pointing at the user's own line: the first frame outside safe_lr and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("safe_lr", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level + 1)


def _dropped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer is about to drop this update because a gradient overflowed."""
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
