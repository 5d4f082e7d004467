"""Sharpness as Sharpness-Aware Minimization measures it: how far the loss can rise within a small ball."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from safe_lr.closures import Closure, ClosureError, Untouched, leave_no_trace
from safe_lr.objective import Closures, Objective, as_list


def sam_sharpness(
    closure: Closures, params: Iterable[Tensor], rho: float = 0.05, steps: int = 1, *, seed: int = 0
) -> float:
    """Returns how far the loss rises within a distance of rho around the parameters.

        max over ||eps||_2 <= rho of L(w + eps) - L(w)                  (Eq. 24)

    The norm is that of all parameters together. Nothing is normalised: the result is in units of the loss, grows with
    rho and changes when layers are rescaled. Compare it at one rho and between equal networks only.

    What is returned is the rise at the best eps found, so never more than the maximum, and never below 0, the rise at
    eps = 0. One step is SAM's own approximation, `eps = rho g / ||g||`: right to first order in rho. More steps ascend
    from there along the gradient at w + eps, are projected onto the ball, and are taken only where the loss rises
    (their length then doubles, else it halves): more steps never find less. The ascent is a local one; in a wide ball
    with several hills it may climb the lower one. Parameters, gradients, buffers, modes and random streams are left as
    they were, bit for bit.

    Args:
        closure: Returns the scalar loss with its graph; no `backward()`. Or several, whose mean counts.
        params: The parameters w, leaf tensors. Those that do not require grad stay where they are.
        rho: The ball's radius, in parameters. The paper takes 0.05.
        steps: Gradients to spend. The cost is that many, and a third for the loss at the end.
        seed: Of the direction that is taken where the gradient is exactly zero and `steps` is above 1. With one step
            the result is then 0.0, for a gradient of zero points nowhere.

    Returns:
        The rise; `inf` where the loss within the ball is not finite.

    Raises:
        TypeError: The closure breaks its contract (`ClosureError`), or params are not tensors.
        ValueError: rho or steps is out of range, no parameter requires grad, or the loss at w or its gradient is not
            finite.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        >>> round(sam_sharpness(lambda: x @ x / 2, [x], rho=0.1), 9)        # rho ||x|| + rho^2 / 2
        0.505

    References:
        The source paper, Eq. 24. Foret et al. 2020, "Sharpness-aware minimization for efficiently improving
        generalization", arXiv:2010.01412.
    """
    closures, leaves = as_list(closure, "sam_sharpness()"), leaves_of(params)
    if not (isinstance(rho, (int, float)) and 0 < rho < math.inf):
        raise ValueError(f"rho is the radius of a ball, a number above 0 such as 0.05; got {rho!r}")
    if not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"steps must be an integer of at least 1; got {steps!r}")
    with leave_no_trace(leaves) as untouched:
        ball = _Ball(Objective([_anew(c) for c in closures], untouched), untouched, leaves)
        return ball.climb(float(rho), steps, seed)


def leaves_of(params: Iterable[Tensor]) -> list[Tensor]:
    """Returns the parameters that require grad, each once.

    Raises:
        TypeError: Something in it is not a tensor, or it is a single one.
        ValueError: One is not a leaf, or none requires grad.

    Example:
        >>> len(leaves_of(torch.nn.Linear(2, 2).parameters()))
        2
    """
    several: list[Any] = [] if isinstance(params, Tensor) else list(params)
    if isinstance(params, Tensor) or not all(isinstance(p, Tensor) for p in several):
        got = next((p for p in several if not isinstance(p, Tensor)), params)
        raise TypeError(f"params must be a list of tensors, model.parameters() or [x]; got {type(got).__name__}")
    if not all(p.is_leaf for p in several):
        raise ValueError("params must be leaf tensors, the parameters themselves; got the result of a computation")
    leaves = list(dict.fromkeys(p for p in several if p.requires_grad))
    if not leaves:
        raise ValueError(f"params must hold a tensor that requires grad; got {len(several)} and none of them does")
    return leaves


_STALE = (
    "the closure returned a loss that was computed before it was called, which cannot tell how the loss changes; let "
    "it compute the loss again: lambda: criterion(model(x), y)"
)


def _anew(closure: Closure) -> Closure:
    """The closure, held to return another tensor each time."""
    last: weakref.ref[Tensor] | None = None

    @functools.wraps(closure)  # through which its modules are found
    def checked() -> Tensor:
        nonlocal last
        returned = closure()
        if last is not None and returned is last():
            raise ClosureError(_STALE)
        last = weakref.ref(returned) if isinstance(returned, Tensor) else None
        return returned

    return checked


class _Ball:
    """Steps around w, as lists of tensors shaped like the parameters."""

    def __init__(self, objective: Objective, untouched: Untouched, params: list[Tensor]) -> None:
        self.objective, self.untouched, self.params = objective, untouched, params

    def climb(self, rho: float, steps: int, seed: int) -> float:
        here = [torch.zeros_like(p) for p in self.params]
        start, direction = self.slope(here)
        if not (math.isfinite(start) and math.isfinite(_norm(direction))):
            raise ValueError(
                f"the loss at the parameters is {start}, its gradient's norm {_norm(direction)}: no rise can be told; "
                "measure where both are finite"
            )
        if _norm(direction) == 0:
            if steps == 1:
                return 0.0
            direction = self._random(seed)
        best, length = start, rho
        for step in range(steps):
            tried = _within(here, direction, length, rho)
            last = step == steps - 1
            loss, slope = (self.objective.loss_after(tried), direction) if last else self.slope(tried)
            if not math.isfinite(loss):
                return math.inf
            if loss > best:
                best, here, length = loss, tried, 2 * length
                direction = slope if 0 < _norm(slope) < math.inf else direction
            else:
                length /= 2
        return best - start

    def slope(self, steps: list[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss and its gradient at w + steps."""
        with self.untouched.moved(steps):
            try:
                # No product is made. This way takes backward() where autograd.grad would miss checkpointed parameters.
                curvature = self.objective.curvature(self.params, "finite-difference")
            except RuntimeError as error:
                if "second time" not in str(error):
                    raise
                raise ClosureError(_STALE) from error
        return curvature.loss, curvature.gradient

    def _random(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)  # on the host: the same direction on every device
        return [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in self.params]


def _within(here: list[Tensor], direction: list[Tensor], length: float, rho: float) -> list[Tensor]:
    """`here` plus a step of that length, put back onto the ball where it leaves it."""
    scale = length / _norm(direction)
    moved = [h + d.to(h) * scale for h, d in zip(here, direction, strict=True)]
    norm = _norm(moved)
    return [m * (rho / norm) for m in moved] if norm > rho else moved


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(t).double().cpu() for t in tensors]).norm())
