"""What measures the coming step, again and again, within a budget: settings, start vectors, the way that worked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from safe_lr.accounts import State
from safe_lr.closures import Closure
from safe_lr.ensemble import Ensemble
from safe_lr.measurement import Measurement, measure_step
from safe_lr.movers import Mover, movers
from safe_lr.operators import DIFFERENCES
from safe_lr.settings import (
    COST_OF_GRAPH,
    COST_OF_LEAN_PRODUCT,
    COST_OF_LOSS,
    COST_OF_ONE_SIDED_PRODUCT,
    COST_OF_PRODUCT,
    Settings,
    least_matvecs,
)
from safe_lr.solving import products_to_verify
from safe_lr.trials import search_step, try_steps

SCALED = 100.0
"""From this ratio of the training gradient to the closure's own on, a GradScaler has not unscaled all of it."""

VERIFY_EVERY = 4
"""Measurements after which one-sided differences are checked by exact products again: for what a closure detaches may
come in later. It costs three gradients or so, and is left out where the budget is short."""

UNSCALED = "under a GradScaler call scaler.unscale_(optimizer) for every optimizer before the first one's scaler.step()"


class Instrument:
    """Measures the coming step of some optimizers.

    Args:
        ensemble: The optimizers.
        settings: What and how.
        lambda_every: Every how many measurements lambda_max itself is solved for.
        warm_start: Whether to start from the last eigenvectors.
        seed: Of the start vectors.

    Attributes:
        vectors: The last eigenvectors by name, for a warm start.
    """

    def __init__(
        self, ensemble: Ensemble, settings: Settings, lambda_every: int, *, warm_start: bool, seed: int
    ) -> None:
        self.ensemble, self.settings, self.lambda_every = ensemble, settings, lambda_every
        self.warm_start, self.seed = warm_start, seed
        self.vectors: dict[str, Tensor] = {}

    def can_measure(self, closures: Sequence[Closure], state: State, budget: float) -> bool:
        """Whether the budget has room for the fewest products that tell anything."""
        least = min(least_matvecs(self.settings.bound, self._hvp(state)), self.settings.max_matvecs)
        return self._products(closures, state, budget) >= least

    def measure(
        self,
        closures: list[Closure],
        shares: Sequence[float],
        state: State,
        *,
        budget: float,
        fixed: bool,
        search_from: float,
        try_lr: Callable[[Measurement], float | None],
    ) -> Measurement:
        """Measures the coming step; for optimizers without a limit, searches for the largest lr that lowers the loss.

        Args:
            closures: Whose mean loss.
            shares: Each group's lr in units of lr_ref.
            state: What the run remembers; whether the closure was checked is noted there.
            budget: Gradient evaluations to spend at most.
            fixed: Whether the closures are a probe: P is then that of a step taken on them.
            search_from: The lr to begin a search with.
            try_lr: Given the measurement, the lr to try on the batch, or None.
        """
        moving = self._movers(shares)
        if "trial" in self.ensemble.kinds:
            start = state.figures.get("lr_limit", search_from)
            return search_step(moving, closures, start, self.settings.curvature)
        if fixed:
            for mover in moving:
                mover.grad = None
        check = not state.checked and budget >= self.settings.least_cost + COST_OF_LOSS
        budget -= COST_OF_LOSS * check
        products, last_hvp = self._products(closures, state, budget), state.hvp
        exactly = self._products(closures, state, budget, "exact")
        if self._to_verify(state) and exactly >= products_to_verify(self.settings.bound):
            products, last_hvp = exactly, None
        found = measure_step(
            moving,
            closures,
            self._settings_now(products, state),
            seed=self.seed + state.measurements,
            also=("lemma1",) if (state.measurements + 1) % self.lambda_every == 0 else (),
            warm=self.vectors if self.warm_start else None,
            try_lr=try_lr,
            check=check,
            last_hvp=last_hvp,
        )
        if last_hvp is None and found.failure is None:
            state.verified_at = state.measurements
        if len(self.ensemble.members) > 1 and (found.gradient_ratio or 0.0) > SCALED:
            ratio = f"the gradients are {found.gradient_ratio:.3g} times those of the closure"
            found = replace(found, failure=f"{ratio}: {UNSCALED}", note=UNSCALED)
        state.checked = state.checked or (check and found.failure is None)
        return replace(found, inferred="inferred" in self.ensemble.kinds)

    def try_steps(
        self, closures: list[Closure], shares: Sequence[float], next_lr: Callable[[Measurement], float | None]
    ) -> Measurement:
        """Tries the coming step at some lrs, without any curvature."""
        return try_steps(self._movers(shares), closures, next_lr, self.settings.curvature)

    def keep(self, found: Measurement) -> None:
        """Keeps a measurement's eigenvectors for the next one."""
        self.vectors = found.vectors if self.warm_start else {}

    def _movers(self, shares: Sequence[float]) -> list[Mover]:
        return movers(self.ensemble, shares)

    def _products(self, closures: Sequence[Closure], state: State, budget: float, hvp: str | None = None) -> int:
        """How many products the budget has room for, beside the gradient and a trial step."""
        hvp = hvp or self._hvp(state)
        lean = hvp not in DIFFERENCES and (len(closures) > 1 or "lean" in (hvp, state.hvp))
        product = COST_OF_LEAN_PRODUCT if lean else COST_OF_PRODUCT
        if hvp == "one-sided":
            product = COST_OF_ONE_SIDED_PRODUCT
        return int(min((budget - COST_OF_GRAPH - COST_OF_LOSS) / product, self.settings.max_matvecs))

    def _to_verify(self, state: State) -> bool:
        """Whether one-sided differences that worked are to be checked by exact products again, if the budget allows."""
        asked = self.settings.hvp == "auto" and state.hvp == "one-sided"
        return asked and state.measurements - state.verified_at >= VERIFY_EVERY

    def _settings_now(self, products: int, state: State) -> Settings:
        """The settings, with what the budget allows."""
        least = least_matvecs(self.settings.bound, self._hvp(state))
        return replace(self.settings, max_matvecs=max(least, products))

    def _hvp(self, state: State) -> str:
        """How products will be made, as far as that is known."""
        if self.settings.hvp == "auto" and state.hvp in DIFFERENCES:
            return str(state.hvp)
        return self.settings.hvp
