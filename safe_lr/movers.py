"""What moves in the coming step: each parameter with its group, its optimizer's state, and what is made of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_lr.ensemble import Ensemble, unscaled
from safe_lr.preconditioners import Group, Preconditioner, State
from safe_lr.stability import UpdateRule


class MeasurementFailed(ArithmeticError):
    """Numbers that allow no limit; becomes `Measurement.failure`."""

    def __init__(self, reason: str, num_matvecs: int = 0) -> None:
        super().__init__(reason)
        self.num_matvecs = num_matvecs
        self.cost = 1.0 + 2.0 * num_matvecs  # gradient evaluations
        self.hvp = "exact"


def shares(lrs: Sequence[float], initial_lrs: Sequence[float]) -> tuple[float, list[float]]:
    """Returns `lr_ref`, the largest lr, and each group's lr in units of it.

    With all lrs zero (a warm-up that starts from 0) the shares are those of the initial lrs, and `lr_ref` is 0.

    Example:
        >>> shares([0.1, 0.05], [1.0, 1.0])
        (0.1, [1.0, 0.5])
        >>> shares([0.0, 0.0], [1.0, 2.0])
        (0.0, [0.5, 1.0])
    """
    lr_ref = max(lrs)
    scale = lr_ref if lr_ref > 0 else max(initial_lrs)
    return lr_ref, [lr / scale if scale > 0 else 1.0 for lr in (lrs if lr_ref > 0 else initial_lrs)]


def movers(ensemble: Ensemble, group_shares: Sequence[float], updates: int | None = None) -> list[Mover]:
    """Returns the parameters that can move: those that require grad, in groups whose lr is not zero."""
    return [
        Mover(
            p,
            group,
            optimizer.state.get(p, {}),
            model,
            group_shares[index],
            None if p.grad is None else unscaled(p.grad, optimizer),
            ensemble.coming(optimizer) if updates is None else updates,
            index,
        )
        for optimizer, model, index, group in ensemble.owned()
        for p in group["params"]
        if p.requires_grad and group_shares[index] > 0
    ]


def coming_steps(moving: Sequence[Mover], grads: Sequence[Tensor | None]) -> Callable[[float], list[Tensor | None]]:
    """Returns a function from lr (of lr_ref) to each parameter's change in the coming step, None where it stays.

    Where the step is proportional to lr it is made once, and scaled in place for every further lr: what was returned
    before is then overwritten.

    Args:
        moving: The parameters.
        grads: The gradient of each; None where it stays.
    """
    steps: list[Tensor | None] = [None] * len(moving)
    made_at = 0.0

    def at(lr: float) -> list[Tensor | None]:
        nonlocal made_at
        for index, (mover, grad) in enumerate(zip(moving, grads, strict=True)):
            step = steps[index]
            if grad is None:
                continue
            if step is not None and made_at > 0 and mover.proportional:
                step.mul_(lr / made_at)
            else:
                steps[index] = mover.coming_step(grad, lr)
        made_at = lr
        return steps

    return at


def ascends(moving: Sequence[Mover]) -> bool:
    """Whether the step climbs (`maximize`).

    Raises:
        MeasurementFailed: Some groups climb and others descend.
    """
    signs = {bool(m.group.get("maximize", False)) for m in moving}
    if len(signs) > 1:
        raise MeasurementFailed("some groups maximize and others minimize: no single limit exists")
    return True in signs


def real_state(state: State) -> State:
    """An optimizer's state of one parameter with its tensors as reals, in single precision at least."""
    return {
        name: Mover.real(value) if isinstance(value, Tensor) and value.ndim else value for name, value in state.items()
    }


@dataclass
class Mover:
    """A parameter that the coming step moves, with what its optimizer makes of it.

    Optimizers treat complex numbers as pairs of reals, and so do we; P is computed in single precision at least.
    """

    param: Tensor
    group: Group
    state: State
    model: Preconditioner
    share: float  # the group's lr in units of lr_ref
    grad: Tensor | None
    updates: int | None = None
    index: int = 0  # of the group

    def __post_init__(self) -> None:
        self.values = self.real(self.param.detach())
        self.real_state: State = real_state(self.state)

    @staticmethod
    def real(tensor: Tensor) -> Tensor:
        """A tensor as reals, in single precision at least."""
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def lift(self, values: Tensor) -> Tensor:
        """Reals as a tensor of the parameter's own kind."""
        values = values.view(self.values.shape)
        return torch.view_as_complex(values.contiguous()) if self.param.is_complex() else values.to(self.param.dtype)

    def rule(self) -> UpdateRule:
        """The update rule of the coming step."""
        with self._read():
            return self.model.rule(self.group, self.real_state, self.updates)

    def root(self, grad: Tensor, *, hold: bool = True) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """P^-1/2 as an operator, and P's entries.

        Without `hold` a diagonal that is a mere formula is made anew at each use of the operator, and dropped after it.
        """
        self._check_state()
        with self._read():
            root, entries = self._root(grad, self.real_state)
        if not hold and type(self.model).root is Preconditioner.root:  # no eigenvectors, no rehearsal to repeat
            # A step count on a device is fetched once, for every later look at it would wait for the device.
            near = {k: v.cpu() if isinstance(v, Tensor) and not v.ndim else v for k, v in self.real_state.items()}
            return (lambda v: self._root(grad, near)[0](v)), entries.detach()
        return root, entries.detach()

    def _root(self, grad: Tensor, state: State) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        g = self.model.descent_gradient(self.group, self.values, self.real(grad))
        return self.model.root(self.group, state, g, self.values)

    def decay(self) -> tuple[float, float]:
        """L2 and decoupled decay."""
        with self._read():
            return self.model.decay_of(self.group, self.real_state, self.values)

    @property
    def proportional(self) -> bool:
        """Whether the coming step is proportional to lr, and the parameter's dtype loses nothing of it."""
        exact = torch.promote_types(self.param.dtype, torch.float32) == self.param.dtype
        return exact and type(self.model).coming_step is Preconditioner.coming_step

    def coming_step(self, grad: Tensor, lr: float) -> Tensor:
        """The change of the parameter in a step of length lr (of lr_ref)."""
        with self._read():
            step = self.model.coming_step(
                self.group, self.real_state, self.values, self.real(grad), lr * self.share, self.updates
            )
        return self.lift(step)

    @property
    def _where(self) -> str:
        return f"parameter group {self.index}: the optimizer's state of a parameter of shape {tuple(self.param.shape)}"

    @contextlib.contextmanager
    def _read(self) -> Iterator[None]:
        """Turns what a state that does not fit makes of the formulas into a failure that names the group."""
        try:
            yield
        except MeasurementFailed:
            raise
        except (KeyError, ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
            raise MeasurementFailed(f"{self._where} cannot be read ({type(error).__name__}: {error})") from error

    def _check_state(self) -> None:
        """Raises MeasurementFailed where the optimizer's state is not that of this parameter under this optimizer."""
        missing = [key for key in self.model.keys(self.group) if key not in self.state] if self.state else []
        if missing:
            raise MeasurementFailed(
                f"{self._where} has no {', '.join(missing)} (it has {', '.join(map(str, self.state))}): was it loaded "
                "from another optimizer, or saved half-way?"
            )
        tensors = {
            k: v for k, v in self.real_state.items() if isinstance(v, Tensor) and v.is_floating_point() and v.numel()
        }
        for name, value in tensors.items():
            if self.model.kind == "exact" and value.ndim and value.shape != self.values.shape:
                raise MeasurementFailed(f"{self._where} holds {name} of shape {tuple(value.shape)}")
        if tensors:
            ends = torch.stack([torch.stack(v.aminmax()).double() for v in tensors.values()]).tolist()
            for name, (low, high) in zip(tensors, ends, strict=True):
                if not (math.isfinite(low) and math.isfinite(high)) or (low < 0 and name in self.model.second_moments):
                    kind = "negative numbers or NaN" if name in self.model.second_moments else "NaN or Inf"
                    raise MeasurementFailed(f"{self._where} holds {kind} in {name}")
        for name, number in self.group.items():
            if isinstance(number, float) and math.isnan(number):
                raise MeasurementFailed(f"parameter group {self.index}: {name} is {number}")
