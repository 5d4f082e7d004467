"""Optimizers of torch by name, as a sweep's config calls them, and those that stand in where none is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from safe_lr.preconditioners.registry import preconditioner_of

STAND_INS = ("SGD", "AdamW")
"""Who is tried where nobody is named: one whose lr is measured by curvature, one whose lr is the length of a step."""

MOMENTUM = 0.9
"""SGD's, where nothing else is known. torch's default of 0 is hardly ever trained with, and has half the limit."""

_CLASSES: dict[str, type[Optimizer]] = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
}


@dataclass(frozen=True)
class Named:
    """Makes one of torch's optimizers for a model's trained parameters.

    Attributes:
        cls: Its class.
        options: What it is made with; the rest are torch's defaults.

    Example:
        >>> made = Named(torch.optim.SGD, {"momentum": 0.5})
        >>> made.name, made(nn.Linear(1, 1)).param_groups[0]["momentum"]
        ('SGD with momentum 0.5', 0.5)
    """

    cls: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is, in words."""
        given = " and ".join(f"{key} {value:g}" for key, value in self.options.items())
        return f"{self.cls.__name__} {f'with {given}' if given else 'at its defaults'}"

    def __call__(self, model: nn.Module) -> Optimizer:
        """Returns the optimizer of a model.

        Raises:
            TypeError: It has no limit (Rprop, LBFGS).
            ValueError: It does not take this model's parameters (Muon takes matrices only).
        """
        optimizer = self.cls([p for p in model.parameters() if p.requires_grad], **self.options)
        preconditioner_of(optimizer)
        return optimizer


def named(name: object, momenta: Sequence[float] = (MOMENTUM,)) -> list[Named]:
    """Returns who is called by a name, upper case or lower, with `torch.optim.` before it or without.

    Args:
        name: The name.
        momenta: SGD's momenta, each for an optimizer of its own.

    Raises:
        ValueError: torch has no optimizer of that name.

    Example:
        >>> [one.name for one in named("adamw") + named("sgd", (0.0, 0.9))]
        ['AdamW at its defaults', 'SGD with momentum 0', 'SGD with momentum 0.9']
    """
    bare = name.lower().removeprefix("torch.").removeprefix("optim.") if isinstance(name, str) else ""
    if bare not in _CLASSES:
        has = ", ".join(sorted(cls.__name__ for cls in _CLASSES.values()))
        raise ValueError(f"{name!r} is no optimizer of torch.optim, which has {has}")
    cls = _CLASSES[bare]
    return [Named(cls, {"momentum": momentum}) for momentum in momenta] if cls is torch.optim.SGD else [Named(cls)]
