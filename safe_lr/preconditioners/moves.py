"""Moving an optimizer's decays and its eps in the middle of a run, so that its averages go on as they were."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from safe_lr.preconditioners.base import Group, Preconditioner, State, coming

SAMPLE = 100_000
"""Entries of P, about, that `typical_root` looks at."""


def movable_decays(model: Preconditioner, group: Group) -> tuple[float | None, float | None]:
    """Returns the decays of the first and the second moment that may be moved; None for one that may not.

    Example:
        >>> from safe_lr.preconditioners import RMSprop
        >>> movable_decays(RMSprop(), {"alpha": 0.99, "momentum": 0.9})     # momentum is no average: it sums up
        (None, 0.99)
    """
    if "betas" in model.movable:
        return float(group["betas"][0]), float(group["betas"][1])
    return None, (float(group["alpha"]) if "alpha" in model.movable else None)


def move_decays(
    model: Preconditioner,
    group: MutableMapping[str, Any],
    states: Iterable[MutableMapping[str, Any]],
    decays: tuple[float | None, float | None],
) -> bool:
    """Writes decays into a group and rescales its averages, so that the optimizer sees them go on unchanged.

        average *= correction(new decays, t) / correction(old decays, t)         Adam: (1 - new^t) / (1 - old^t)

    Without it the next update would be wrong by the square root of that ratio: 3.1 times too large where b2 moves from
    .999 to .95 after 50 updates. There and back again gives the averages that there were, to rounding.

    Args:
        model: What the optimizer is.
        group: The parameter group; an option that is a tensor is written in place.
        states: The optimizer's states of the group's parameters, each with its own count of updates; changed in place.
        decays: Of the first and the second moment; None for one that may not be moved.

    Returns:
        Whether it was done; False, with nothing changed, where some average cannot go on unchanged.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.Adam([x], betas=(0.9, 0.999))
        >>> x.grad = torch.ones(1)
        >>> optimizer.step()
        >>> from safe_lr.preconditioners import preconditioner_of
        >>> move_decays(preconditioner_of(optimizer), optimizer.param_groups[0], optimizer.state.values(), (0.9, 0.99))
        True
        >>> round(float(optimizer.state[x]["exp_avg_sq"]), 6)                # (1 - .99) g^2, as with b2 = .99 all along
        0.01
    """
    first, second = decays
    options: dict[str, Any] = {"alpha": second}
    if "betas" in model.movable:
        options = {"betas": tuple(map(_rounded, group["betas"], (first, second)))}
    scaled: list[tuple[Tensor, float]] = []
    for state in states:
        if not state or not int(state["step"]):
            continue
        old, new = model.corrections(group, state), model.corrections({**group, **options}, state)
        if old is None or new is None:
            return False
        scaled += [(state[name], new[name] / old[name]) for name in new if name in state]
    if not all(isinstance(average, Tensor) for average, _ in scaled):
        return False  # all of them or none
    with torch.no_grad():
        for average, factor in scaled:
            average.mul_(factor)
    _write(group, options)
    return True


def move_eps(group: MutableMapping[str, Any], eps: float) -> None:
    """Writes eps into a group."""
    _write(group, {"eps": eps})


def age(states: Iterable[State]) -> int:
    """Returns how many updates the oldest of some states has seen.

    Example:
        >>> age([{}, {"step": torch.tensor(3.0)}])
        3
    """
    return max((coming(state) - 1 for state in states), default=0)


def typical_root(model: Preconditioner, group: Group, states: Sequence[State], part: float) -> float | None:
    """Returns the root of the second moment, in units of eps, that this part of the coordinates lies below.

    For Adam that is a quantile of sqrt(v / (1 - b2^t)). Coordinates that never had a gradient do not count.

    Args:
        model: What the optimizer is.
        group: The parameter group.
        states: The optimizer's states of its parameters; real, in single precision at least.
        part: In (0, 1).

    Returns:
        The quantile, of a sample of SAMPLE entries where there are more; None where nothing had a gradient yet.

    Example:
        >>> from safe_lr.preconditioners import RMSprop
        >>> state = {"step": 1, "square_avg": torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0, 25.0])}
        >>> typical_root(RMSprop(), {"alpha": 1.0, "eps": 1e-8, "centered": False}, [state], 0.5)
        3.0
    """
    known = [(state, state[model.second_moments[0]]) for state in states if state]
    stride = max(1, sum(v.numel() for _, v in known) // SAMPLE)
    roots = [torch.zeros(0)]
    for state, v in known:
        unit = model.floor({**group, "eps": 1.0}, state) or 1.0
        root = model.diagonal({**group, "eps": 0.0}, state, torch.zeros_like(v)).flatten()[::stride] / unit
        roots.append(root[root > 0].float().cpu())
    root = torch.cat(roots)
    return float(root.quantile(part)) if root.numel() else None


def _write(group: MutableMapping[str, Any], options: dict[str, Any]) -> None:
    for name, value in options.items():
        old = group[name]
        group[name] = tuple(map(_written, old, value)) if isinstance(value, tuple) else _written(old, value)


def _rounded(old: Any, new: Any) -> Any:
    """The new value as the old one's place will hold it."""
    return float(torch.as_tensor(new, dtype=old.dtype)) if isinstance(old, Tensor) else new


def _written(old: Any, new: float) -> Any:
    """The new value; in the old one's place where that is a tensor, which compiled optimizers hold on to."""
    return old.fill_(new) if isinstance(old, Tensor) else new
