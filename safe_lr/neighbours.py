"""Guards side by side: one optimizer has one guard, and two on one loss are told that their limit is a joint one."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from safe_lr.closures import Closure
from safe_lr.decisions import Summary
from safe_lr.ensemble import Ensemble
from safe_lr.hooks import warn_user


class Guarding(Protocol):
    """What a guard is to its neighbours."""

    @property
    def ensemble(self) -> Ensemble:
        """The optimizers that it guards."""
        ...

    def summary(self) -> Summary:
        """What it has done so far."""
        ...

    def close(self) -> None:
        """Detaches it."""
        ...


class Neighbours:
    """The guards that are alive, and which parameters the loss of each one reaches."""

    def __init__(self) -> None:
        self._alive: weakref.WeakKeyDictionary[Guarding, set[int]] = weakref.WeakKeyDictionary()
        self._told: weakref.WeakSet[Guarding] = weakref.WeakSet()

    def succeed(self, guard: Guarding) -> None:
        """Adds a guard, which takes its optimizers over from earlier ones: two would take each other's caps for
        somebody's wish.
        """
        for earlier in self.on(guard.ensemble):
            if earlier.summary().steps:
                warn_user(
                    "this optimizer already had a safe_lr scheduler; that one is closed, the new one takes over. "
                    "close() the old one first to go without this warning."
                )
            earlier.close()
        self._alive[guard] = set()

    def leave(self, guard: Guarding) -> None:
        """Takes a guard out; one that is dropped leaves by itself."""
        self._alive.pop(guard, None)

    def on(self, ensemble: Ensemble) -> list[Guarding]:
        """Returns the guards that have one of these optimizers."""
        mine = {id(member) for member in ensemble.members}
        return [guard for guard in self._alive if mine & {id(member) for member in guard.ensemble.members}]

    def alone(self, guard: Guarding) -> bool:
        """Whether there is no other guard."""
        return all(other is guard for other in self._alive)

    def saw(self, guard: Guarding, loss: Tensor) -> None:
        """Notes which parameters a guard's loss reaches."""
        if not self._alive[guard]:
            self._alive[guard] = {id(leaf) for leaf in leaves(loss)}

    def watched(self, guard: Guarding, closures: list[Closure]) -> list[Closure]:
        """Returns a guard's closures, whose losses are seen here if there is another guard."""
        if self.alone(guard):
            return closures

        def watch(closure: Closure) -> Closure:
            @functools.wraps(closure)
            def watched() -> Tensor:
                loss = closure()
                if isinstance(loss, Tensor):
                    self.saw(guard, loss)
                return loss

            return watched

        return [watch(closure) for closure in closures]

    def newly_sharing(self, guard: Guarding) -> bool:
        """Whether the guard shares its loss with one that this was not yet said of."""
        others = self.sharing(guard)
        new = any(guard not in self._told or other not in self._told for other in others)
        self._told.update([guard, *others] if others else [])
        return new

    def sharing(self, guard: Guarding) -> list[Guarding]:
        """Returns the others on the same loss: each one's loss reaches the other's parameters.

        One way alone is no shared loss: a GAN's generator reaches its discriminator, not the other way round.
        """
        mine, reached = _ids(guard), self._alive[guard]
        return [
            other
            for other, reaches in self._alive.items()
            if other is not guard and reaches & mine and reached & _ids(other)
        ]


def leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yields the leaf tensors that a loss was computed from.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2)
        >>> [leaf is a for leaf in leaves((a * b).sum())]
        [True]
    """
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += [parent for parent, _ in node.next_functions]


def _ids(guard: Guarding) -> set[int]:
    return {id(p) for group in guard.ensemble.param_groups for p in group["params"]}
