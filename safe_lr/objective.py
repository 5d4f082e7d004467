"""What the user's closures stand for: a loss to try steps on, and a curvature to measure."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from safe_lr.closures import Closure, ClosureError, Untouched, as_loss
from safe_lr.graphs import graph_time, size, slow_to_differentiate_twice, smooth
from safe_lr.kinks import Kinks
from safe_lr.operators import (
    DIFFERENCES,
    Curvature,
    NoSecondDerivative,
    Product,
    exact_hessian,
    finite_difference_hessian,
    fisher,
    gauss_newton,
    lean_hessian,
    sampled_losses,
)

DIFFERENCES_SIZE = 300_000
"""From this many numbers in the loss's graph (`graphs.size`) on one-sided differences are taken. On smaller ones Python
takes longer than the arithmetic, and exact products, which call the closure once, are as fast: MLPs, conv nets and GPTs
of 250 to 85,000 parameters, on batches of 2 to 1,024, break even at 150,000 to 300,000 (docs/performance.md)."""

Closures = Closure | Sequence[Closure]


def as_list(closures: Closures, taker: str = "safe_lr") -> list[Closure]:
    """Returns one closure or several as a list.

    Args:
        closures: What the user handed over.
        taker: Who takes it, for the error.

    Raises:
        TypeError: Something in it cannot be called, or it is empty.
    """
    several: list[Any] = list(closures) if isinstance(closures, (list, tuple)) else [closures]
    for closure in several:
        if not callable(closure):
            raise TypeError(
                f"{taker} takes a closure that returns the loss, lambda: criterion(model(x), y), or a list of them; "
                f"got {type(closure).__name__}"
            )
    if not several:
        raise TypeError(f"{taker} got an empty list: at least one closure is needed")
    return several


class Objective:
    """The mean loss of some closures, evaluated without a trace.

    Several closures (the micro-batches of one step) share the memory of one: every product builds each one's graph anew
    and drops it.

    Args:
        closures: Each returns what `kind` needs: the scalar loss ("hessian"), per-example losses of shape (B,)
            ("empirical-fisher"), or the pair (outputs, loss_of_outputs) ("gauss-newton", "fisher").
        untouched: Evaluates them.
        kind: The curvature.
        seed: Of the labels that "fisher" samples.
    """

    def __init__(self, closures: Closures, untouched: Untouched, kind: str = "hessian", seed: int = 0) -> None:
        self.closures, self.untouched, self.kind, self.seed = as_list(closures), untouched, kind, seed

    def loss(self) -> float:
        """Returns the mean loss, without keeping a graph."""
        return sum(float(self._loss(closure).detach()) for closure in self.closures) / len(self.closures)

    def loss_after(self, steps: Sequence[Tensor | None]) -> float:
        """Returns the mean loss with `steps` added to the parameters, which are put back."""
        with self.untouched.moved(steps):
            return self.loss()

    def deterministic(self, loss: float) -> bool:
        """Whether a second evaluation under the same random state gives the same loss, but for rounding."""
        again = self.loss()
        return abs(again - loss) <= 1e-5 * max(abs(loss), abs(again), 1e-30)

    def curvature(
        self, params: Sequence[Tensor], hvp: str, *, differences: bool = False, verify: bool = False
    ) -> Curvature:
        """Returns the curvature, its products made as `hvp` says.

        Args:
            params: Leaf tensors.
            hvp: `exact` (a retained graph), `lean` (rebuilt), `finite-difference` (central) or `one-sided`; all but the
                Hessian are exact or lean.
            differences: Whether one-sided products are taken instead where they are cheaper (of several closures, of a
                graph of `DIFFERENCES_SIZE`, or where a kernel is slow to differentiate twice) and the (first) loss's
                graph is smooth, or is without the kinks that `Kinks` takes out.
            verify: Whether those are to be checked by exact ones.

        Raises:
            NoSecondDerivative: The graph cannot be differentiated twice.
            ClosureError: A closure broke its contract.
        """
        if hvp in DIFFERENCES:
            if self.kind != "hessian":
                raise NoSecondDerivative(f"curvature={self.kind!r} has no {hvp} products")
            return self._by_differences(params, one_sided=hvp == "one-sided")
        loss = None
        if verify or not differences:
            self.untouched.differentiate_twice()
        if differences and self.kind == "hessian":
            kinks = [Kinks() for _ in self.closures]
            since = graph_time()
            loss = self._again(self.closures[0], kinks[0])()
            if smooth(loss, since) and self._cheaper_by_differences(loss):
                exact = self._to_check_by(params, hvp, loss) if verify else None
                return self._by_differences(params, one_sided=True, loss=loss, exact=exact, kinks=kinks)
        if differences and not verify:
            self.untouched.differentiate_twice()
            loss = None  # attention may have run on a kernel without a second derivative
        return self._twice(params, hvp, loss)

    def _cheaper_by_differences(self, loss: Tensor) -> bool:
        """Whether they are cheaper than exact products; than lean ones, of several closures, they always are."""
        return len(self.closures) > 1 or size(loss) >= DIFFERENCES_SIZE or slow_to_differentiate_twice(loss)

    def _twice(self, params: Sequence[Tensor], hvp: str, loss: Tensor | None = None) -> Curvature:
        """By differentiating twice; `loss` is what the first closure returned, where it has been called."""
        if len(self.closures) == 1 and hvp == "exact":
            return self._exact(self.closures[0], params, 0, loss)
        return _mean([self._lean(c, params, k) for k, c in enumerate(self.closures)])

    def _to_check_by(self, params: Sequence[Tensor], hvp: str, loss: Tensor) -> Curvature | None:
        """Exact products, on the very graph of that loss if it is the only one; None where there are none."""
        try:
            return self._twice(params, hvp, loss)
        except (MemoryError, RuntimeError):
            return None  # then two steps have to agree

    def _by_differences(
        self,
        params: Sequence[Tensor],
        *,
        one_sided: bool,
        loss: Tensor | None = None,
        exact: Curvature | None = None,
        kinks: Sequence[Kinks] = (),
    ) -> Curvature:
        first, *rest = [self._again(c, k) for c, k in itertools.zip_longest(self.closures, kinks)]
        make = functools.partial(
            finite_difference_hessian, params=params, one_sided=one_sided, moved=self.untouched.moved
        )
        if not rest:
            return make(first, loss=loss, exact=exact)
        parts = [make(first, loss=loss)]
        del loss
        parts += [make(evaluate) for evaluate in rest]
        found = _mean(parts)
        return found if exact is None else replace(found, exact=exact, cost=found.cost + exact.cost)

    def _exact(self, closure: Closure, params: Sequence[Tensor], index: int, returned: Any = None) -> Curvature:
        """`returned` is what the closure did return, where it has been called."""
        returned = self.untouched.call(closure) if returned is None else returned
        try:
            if self.kind == "hessian":
                return exact_hessian(as_loss(returned), params)
            if self.kind == "empirical-fisher":
                losses = _per_example(returned)
                return fisher(losses, params, losses.mean())
            outputs, loss = _outputs_and_loss(returned)
            if self.kind == "gauss-newton":
                return gauss_newton(outputs, loss, params)
            return fisher(sampled_losses(outputs, self.seed + index), params, loss)
        except TypeError as error:
            raise ClosureError(str(error)) from error
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise ClosureError(
                "the closure returned a loss whose graph backward() has freed; let it compute the loss again: "
                "lambda: criterion(model(x), y)"
            ) from error

    def _lean(self, closure: Closure, params: Sequence[Tensor], index: int) -> Curvature:
        if self.kind == "hessian":
            return lean_hessian(self._again(closure), params)
        first = self._exact(closure, params, index)
        value, gradient, used = first.loss, first.gradient, first.used
        del first

        def product(vectors: Sequence[Tensor]) -> list[Tensor]:
            return self._exact(closure, params, index).product(vectors)

        return Curvature(value, gradient, used, product, cost_of_product=3.0, hvp="lean")

    def _again(self, closure: Closure, kinks: Kinks | None = None) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            with kinks or contextlib.nullcontext():
                return as_loss(self.untouched.call(closure))

        return evaluate

    def _loss(self, closure: Closure) -> Tensor:
        returned = self.untouched.call(closure)
        if self.kind == "hessian":
            return as_loss(returned)
        return _per_example(returned).mean() if self.kind == "empirical-fisher" else _outputs_and_loss(returned)[1]


def _per_example(returned: Any) -> Tensor:
    if not (isinstance(returned, Tensor) and returned.ndim >= 1 and returned.is_floating_point()):
        got = f"shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else type(returned).__name__
        raise ClosureError(
            'for curvature="empirical-fisher" the closure must return the per-example losses, shape (B,): '
            f'criterion(model(x), y, reduction="none"); got {got}'
        )
    as_loss(returned.sum())
    return returned.reshape(-1)


def _outputs_and_loss(returned: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], Tensor)):
        raise ClosureError(
            'for curvature="gauss-newton" and "fisher" the closure must return the pair (outputs, loss_of_outputs): '
            f"lambda: (model(x), lambda f: criterion(f, y)); got {type(returned).__name__}"
        )
    outputs, loss_of = returned
    if not callable(loss_of):
        raise ClosureError(f"loss_of_outputs must be callable, outputs -> loss; got {type(loss_of).__name__}")
    return outputs, as_loss(loss_of(outputs))


def _mean(parts: Sequence[Curvature]) -> Curvature:
    """The mean of some curvatures."""
    if len(parts) == 1:
        return parts[0]

    def mean(products: Sequence[Product]) -> Product:
        def product(vectors: Sequence[Tensor]) -> list[Tensor]:
            total = products[0](vectors)
            for one in products[1:]:
                total = [a.add_(b) for a, b in zip(total, one(vectors), strict=True)]
            return [t.div_(len(products)) for t in total]

        return product

    again = [part.again for part in parts if part.again is not None]

    gradients = [torch.stack(g).mean(0) for g in zip(*(part.gradient for part in parts), strict=True)]
    used = [any(u) for u in zip(*(part.used for part in parts), strict=True)]
    return Curvature(
        sum(part.loss for part in parts) / len(parts),
        gradients,
        used,
        mean([part.product for part in parts]),
        again=mean(again) if again else None,
        remainder=parts[0].remainder,
        cost_of_product=parts[0].cost_of_product,  # in gradients of the whole
        cost=parts[0].cost,
        hvp=parts[0].hvp,
    )
