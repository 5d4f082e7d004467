"""Acting just before and just after each real update of an optimizer, however `step()` is called."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def around_updates(
    optimizer: Optimizer, before: Callable[[], None], after: Callable[[bool], None]
) -> list[RemovableHandle]:
    """Calls `before()` when the gradients of an update are there, and `after(updated)` when `step()` is over.

    In `optimizer.step(closure)` there are no gradients when torch's pre-hook runs: `before` then runs when that closure
    has run. A fused optimizer drops an update whose gradients overflowed (GradScaler): `before` is not called for it,
    and `updated` is False.

    Args:
        optimizer: Whose updates.
        before: A bound method, held weakly: the optimizer must not keep alive what everyone else has dropped.
        after: Likewise.

    Returns:
        Handles to remove the hooks.

    Example:
        >>> import torch
        >>> class Watch:
        ...     def before(self): print("before")
        ...     def after(self, updated): print("after", updated)
        >>> watch, x = Watch(), torch.zeros(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([x])
        >>> handles = around_updates(optimizer, watch.before, watch.after)
        >>> x.sum().backward()
        >>> optimizer.step()
        before
        after True
    """
    weak_before, weak_after = weakref.WeakMethod(before), weakref.WeakMethod(after)

    def act() -> None:
        method = weak_before()
        if method is not None and not _dropped(optimizer):
            method()

    def pre(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            act()
            return None

        def then_act() -> Any:
            loss = closure()
            act()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_act}
        return (args[0], then_act, *args[2:]), kwargs

    def post(*_: object) -> None:
        method = weak_after()
        if method is not None:
            method(not _dropped(optimizer))

    return [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]


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
