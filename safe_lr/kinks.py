"""Taking the kinks out of a loss: ReLU, max-pooling and their like do again what they did at the first evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_Function = Callable[..., Any]

_RELU: frozenset[_Function] = frozenset({F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})

_GATES: frozenset[_Function] = _RELU | {
    *(F.relu6, F.hardtanh, F.hardtanh_, F.threshold, F.hardshrink, F.softshrink),
    *(torch.clamp, torch.clamp_, torch.clip, torch.clip_, Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clip_),
    *(torch.clamp_min, torch.clamp_min_, torch.clamp_max, torch.clamp_max_),
    *(Tensor.clamp_min, Tensor.clamp_min_, Tensor.clamp_max, Tensor.clamp_max_),
}
"""Where open f(x) = x + constant, where shut a constant, element by element."""

_SLOPES: frozenset[_Function] = frozenset({F.leaky_relu, F.leaky_relu_, torch.abs, torch.abs_, Tensor.abs, Tensor.abs_})
"""f(x) = f'(x) x, element by element."""

_MAX_POOL: dict[_Function, int] = {
    F.max_pool1d: 1,
    F.max_pool2d: 2,
    F.max_pool3d: 3,
    F.adaptive_max_pool1d: 1,
    F.adaptive_max_pool2d: 2,
    F.adaptive_max_pool3d: 3,
}
"""With their number of spatial dimensions."""

_Piece = tuple[Tensor, Tensor | None]
"""The piece of a function that held: (slope, constant or None for zero), or (indices, None) for pooling."""

_opened: Callable[[Tensor, Tensor, float], Tensor] = torch.ops.aten.threshold_backward
"""(x, slope, 0) -> x where the slope is 1, else 0: how autograd differentiates ReLU. A product with the slope would
make NaN of an infinite x, or of an infinite derivative further on, behind a shut gate."""

CHANGED = "the loss meets other kinks than it did before: its control flow depends on the parameters"


class Changed(RuntimeError):
    """An evaluation does not meet the kinks that the first one met."""


class Kinks(TorchFunctionMode):
    """Makes every evaluation inside do at its kinks what the first one did.

    A function with kinks is one of its pieces, but for points on a kink:

        relu(x) = x where it was above 0 at the first evaluation, else 0

    There loss, gradient and Hessian are what autograd makes of the function itself, which takes its second derivative
    for zero. But the loss is smooth now: differences of its gradient tell that Hessian, where otherwise they count in
    what every kink that the step crosses adds. And autograd's graph has nodes in the function's place that
    `graphs.smooth` knows.

    Known are ReLU and the other piecewise linear functions of torch.nn.functional, `clamp`, `abs`, and max-pooling.
    Others are left alone, and what a checkpoint will compute again is, too: their kinks stay in the graph, to be seen.
    Each call keeps a slope of the size of its argument.

    Raises:
        Changed: An evaluation meets other kinks, or of another shape: control flow that depends on the parameters.

    Example:
        >>> kinks, x = Kinks(), torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> with kinks:
        ...     torch.relu(x).tolist()
        [0.0, 2.0]
        >>> with kinks:
        ...     torch.relu(x + torch.tensor([5.0, -5.0])).tolist()
        [0.0, -3.0]
    """

    def __init__(self) -> None:
        super().__init__()
        self._met: list[tuple[_Function, torch.Size, _Piece]] = []
        self._first, self._next = True, 0

    def __enter__(self) -> Kinks:
        self._next = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        missed = not self._first and self._next < len(self._met) and error[0] is None
        self._first = False
        if missed:
            raise Changed(CHANGED)

    def __torch_function__(
        self,
        func: _Function,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not (func in _GATES or func in _SLOPES or func in _MAX_POOL) or not _in_reach(func, args, kwargs):
            return func(*args, **kwargs)
        x = args[0]
        if self._first:
            piece = _piece(func, x.detach(), args[1:], kwargs)
            if piece is None:
                return func(*args, **kwargs)
            self._met.append((func, x.shape, piece))
        else:
            piece = self._known(func, x.shape)
        if func in _MAX_POOL:
            return _picked(x, piece[0], _MAX_POOL[func])
        made = x * piece[0] if func in _SLOPES else _through(piece, x)
        return x.copy_(made) if func.__name__.endswith("_") or kwargs.get("inplace") else made

    def _known(self, func: _Function, shape: torch.Size) -> _Piece:
        if self._next < len(self._met):
            known, size, piece = self._met[self._next]
            self._next += 1
            if known is func and size == shape:
                return piece
        raise Changed(CHANGED)


def _in_reach(func: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call's kinks are of the graph that is being made, and all that it does."""
    if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point() and args[0].requires_grad):
        return False
    if any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values())):  # bounds that may have a gradient; `out`
        return False
    if func in _MAX_POOL and (kwargs.get("return_indices") or any(a is True for a in args)):
        return False
    if func in _MAX_POOL and torch.are_deterministic_algorithms_enabled():
        return False  # gather's derivative adds up in any order on a GPU
    return torch.is_grad_enabled() and not _hooked() and torch._C._functorch.peek_interpreter_stack() is None


def _hooked() -> bool:
    """Whether what the graph saves may be dropped, and computed again later and out of sight (checkpoints).

    torch before 2.8 does not tell: there no kink is in reach.
    """
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(True) is not None


def _piece(func: _Function, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Piece | None:
    """The piece of a function at x, None where a kind of tensor does not allow to tell."""
    try:
        return (_picks if func in _MAX_POOL else _line)(func, x, rest, kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def _line(func: _Function, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Piece:
    """The line on which a piecewise linear function lies at x, by autograd: the same derivative on a kink, too."""
    x.requires_grad_()
    y = func(x.clone(), *rest, **kwargs)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    x, y = x.detach(), y.detach()
    slope = slope.masked_fill(x.isnan(), 1.0)  # lets NaN through
    if func in _RELU or func in _SLOPES:
        return slope, None
    return slope, torch.where(slope == 0, y, torch.where(x.isfinite(), y - x, 0.0))


def _through(gates: _Piece, x: Tensor) -> Tensor:
    opened, constant = _opened(x, gates[0], 0.0), gates[1]
    return opened if constant is None else opened + constant


def _picks(func: _Function, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Piece:
    """Which elements of x max-pooling picks, as positions in its flattened spatial dimensions."""
    return func(x, *rest, **{**kwargs, "return_indices": True})[1], None


def _picked(x: Tensor, picks: Tensor, spatial: int) -> Tensor:
    return x.flatten(-spatial).gather(-1, picks.flatten(-spatial)).view_as(picks)
