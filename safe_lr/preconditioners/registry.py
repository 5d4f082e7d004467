"""Which optimizers are known, which cannot be, and how to make another one known."""

from __future__ import annotations

import torch

from safe_lr.preconditioners.base import Group, Preconditioner

_KNOWN: dict[type[torch.optim.Optimizer], Preconditioner] = {}
_BY_NAME: dict[str, Preconditioner] = {}
_REFUSED: dict[type[torch.optim.Optimizer], str] = {}


def register(optimizer: type[torch.optim.Optimizer], preconditioner: Preconditioner) -> None:
    """Makes an optimizer class known.

    Args:
        optimizer: The class; subclasses that do not override `step` are covered too.
        preconditioner: An instance of a `Preconditioner` subclass that describes it.

    Raises:
        TypeError: Either argument is not of its kind.

    Example:
        >>> from safe_lr.preconditioners import SGD
        >>> class SignlessSGD(torch.optim.SGD): ...
        >>> register(SignlessSGD, SGD())
        >>> type(preconditioner_of(SignlessSGD([torch.zeros(1)], lr=0.1))).__name__
        'SGD'
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise TypeError(f"register() takes a torch.optim.Optimizer class first, got {optimizer!r}")
    if not isinstance(preconditioner, Preconditioner):
        raise TypeError(f"register() takes an instance of a safe_lr Preconditioner second, got {preconditioner!r}")
    _KNOWN[optimizer] = preconditioner


def register_by_name(name: str, preconditioner: Preconditioner) -> None:
    """Makes a class of another package known without importing it: `package.ClassName`."""
    _BY_NAME[name] = preconditioner


def refuse(optimizer: type[torch.optim.Optimizer], why: str) -> None:
    """Makes an optimizer known as one that has no limit; `why` says what works instead."""
    _REFUSED[optimizer] = why


def refused(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether an optimizer is known to have no limit."""
    return isinstance(optimizer, tuple(_REFUSED))


def known() -> dict[str, Preconditioner]:
    """Returns what is known, by the name of the class."""
    return {cls.__name__: model for cls, model in _KNOWN.items()} | {
        name.rsplit(".", 1)[-1]: model for name, model in _BY_NAME.items()
    }


def preconditioner_of(optimizer: torch.optim.Optimizer) -> Preconditioner:
    """Returns what is known of an optimizer.

    Raises:
        TypeError: The class is unknown, or has no limit; the message lists the known ones and says what to do.

    Example:
        >>> type(preconditioner_of(torch.optim.AdamW([torch.zeros(1)]))).__name__
        'AdamW'
    """
    for cls in type(optimizer).__mro__:
        if cls in _KNOWN:
            return _KNOWN[cls]
        if cls in _REFUSED:
            raise TypeError(f"{cls.__name__} has no stability limit that lr could be held to: {_REFUSED[cls]}")
        named = f"{cls.__module__.split('.')[0]}.{cls.__name__}"
        if named in _BY_NAME:
            return _BY_NAME[named]
        if "step" in vars(cls):  # it updates in a way of its own, whatever it inherits
            break
    name = type(optimizer).__name__
    raise TypeError(
        f"safe_lr does not know the preconditioner of {name}; known: {', '.join(sorted(known()))}. Use one of them, or "
        f"describe it with a subclass of safe_lr.Preconditioner and safe_lr.register({name}, YourPreconditioner()), or "
        "try preconditioner='from-update'."
    )


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
