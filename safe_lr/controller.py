"""Between a measurement and the applied lr: the policy's functions at work on what a run remembers."""

from __future__ import annotations

from dataclasses import replace

from safe_lr.accounts import State
from safe_lr.measurement import COST_OF_LOSS, Measurement
from safe_lr.policies import (
    BINDING,
    FREE_UPDATES,
    HALVINGS,
    MARGIN_SEARCHED,
    SETTLED,
    TRIAL_PART,
    Policy,
    affordable,
    learned_growth,
    learned_margin,
    mean_limit,
    next_cap,
    next_gap,
    next_retry,
    next_trial_gap,
)
from safe_lr.tuning import pressure


class Controller:
    """Decides when to measure and how margin and cap move. Sees numbers only; all it remembers is in `state`.

    Args:
        policy: The settings.
        least_cost: Gradient evaluations below which no measurement is worth starting.
        adaptive: Whether P is made of gradients.
        searched: Whether the limit is found by trial steps instead of measured.

    Attributes:
        state: What a resumed run must remember.

    Example:
        >>> controller = Controller(Policy(margin=0.5), least_cost=8.0)
        >>> controller.due(), controller.state.cap
        (True, None)
        >>> controller.settle(Measurement(lr_limit=0.2), lr_ref=1.0, jump=None)
        (False, None)
        >>> controller.due(), controller.state.cap                   # the next measurement is due in four updates
        (False, 0.1)
    """

    def __init__(self, policy: Policy, least_cost: float, *, adaptive: bool = False, searched: bool = False) -> None:
        if searched and policy.learns:
            policy = replace(policy, margin_max=min(policy.margin_max, MARGIN_SEARCHED))
        self.policy, self.least_cost, self.adaptive = policy, least_cost, adaptive
        self.state = State(margin=policy.first_margin, expected_cost=least_cost)

    def restore(self, state: State) -> None:
        """Goes on from a saved state, under the present policy."""
        self.state = state
        self.state.margin = (
            min(state.margin, self.policy.margin_max) if self.policy.learns else self.policy.first_margin
        )

    # ---- when

    def due(self, *, alarm: bool = False) -> bool:
        """Whether the coming update is to measure, in time and in cost. An alarm needs no more than the least cost."""
        state = self.state
        if not (alarm or state.updates >= state.due_at):
            return False
        return self.affordable(alarm=alarm) >= (self.least_cost if alarm else state.expected_cost)

    def affordable(self, *, alarm: bool) -> float:
        """Returns the gradient evaluations that a measurement may cost now."""
        return affordable(self.policy, updates=self.state.updates, spent=self.state.cost, alarm=alarm)

    def trial_due(self, lr_ref: float) -> bool:
        """Whether the coming update is to try its step without a measurement."""
        state = self.state
        binding = state.cap is not None and lr_ref > state.cap
        if not (binding and self.policy.learns and state.updates >= state.trial_at):
            return False
        left = affordable(self.policy, updates=state.updates, spent=0.0, alarm=False) * TRIAL_PART - state.trial_cost
        return min(left, self.affordable(alarm=False)) >= 2 * COST_OF_LOSS

    # ---- how far

    def cap_under(self, lr_limit: float) -> float:
        """Returns the cap that a limit allows now."""
        state = self.state
        free, growth = state.updates < FREE_UPDATES, self.policy.growth
        if self.policy.learns:
            growth = learned_growth(growth, updates=state.updates, stalled=state.stalled)
        return next_cap(state.cap, state.margin * lr_limit, growth, free=free)

    def planned(self, lr_limit: float, lr_ref: float, shape: float = 1.0) -> float:
        """Returns the lr of the coming step under the present margin, in units of lr_ref.

        Args:
            lr_limit: The limit.
            lr_ref: The lr that is wanted; infinite where lr follows the cap.
            shape: The part of the cap that the schedule then lets through.
        """
        return min(lr_ref, shape * self.cap_under(lr_limit))

    def in_force(self, measured: float, *, alarm: bool = False) -> float:
        """Returns the limit to act on: the measured one; with a learned margin its mean over measurements.

        Unless something looked wrong: then the newest alone counts.
        """
        if not self.policy.learns or alarm:
            return measured
        before = self.state.figures.get("lr_limit")
        return mean_limit(before, measured, free=self.state.updates < FREE_UPDATES)

    def lr_to_try(self, found: Measurement, lr_ref: float, shape: float = 1.0, *, alarm: bool = False) -> float | None:
        """Returns the lengthened lr to try on the batch next, None where there is nothing (more) to learn.

        In a young run, half of the last one as long as that failed.
        """
        planned = self.planned(self.in_force(found.lr_limit, alarm=alarm), lr_ref, shape)
        if not (self.policy.learns and planned > 0):
            return None
        first = planned / self.policy.trial_slack
        if found.trial_lr is None:
            return first
        young = self.state.updates < FREE_UPDATES and found.trial_lr > first / 2**HALVINGS
        if not (young and found.trial_failed and self.affordable(alarm=True) - found.cost >= COST_OF_LOSS):
            return None
        return found.trial_lr / 2

    def press(self, lr_ref: float) -> tuple[float, str] | None:
        """Returns how hard the cap binds, with the words for it (`pressure`); None without a cap."""
        longer = 1 / self.policy.trial_slack if self.policy.learns and not self.state.stalled else None
        return None if self.state.cap is None else pressure(lr_ref, self.state.cap, longer=longer)

    def follow(self, flips: list[float | None]) -> None:
        """Carries the limit over to the coming step: gamma stays until it is measured again, c is known at each.

        Where parameters differ, the limit rises by the smallest rise of their c: lambda_max of D^1/2 H D^1/2 falls at
        least as much as every D does.

        Args:
            flips: Each parameter's c at the coming step, None where it does not move.
        """
        state = self.state
        before = zip(state.flips, flips, strict=False)
        rises = [now / then for then, now in before if then is not None and now is not None]
        if not rises or len(flips) != len(state.flips):
            return
        old, state.figures["lr_limit"] = state.figures["lr_limit"], state.measured_limit * min(rises)
        state.following = abs(state.figures["lr_limit"] - old) > SETTLED * old

    # ---- what follows

    def settle(
        self, found: Measurement, *, lr_ref: float, jump: str | None, shape: float = 1.0
    ) -> tuple[bool, str | None]:
        """Takes a measurement in: moves margin, cap and the time of the next one.

        Args:
            found: The measurement, `lr_limit` being the limit in force. One that failed moves nothing but that time.
            lr_ref: The lr that is wanted.
            jump: What looked wrong, if anything did.
            shape: See `planned`.

        Returns:
            Whether the trial step failed, and what moved the margin, if it moved.
        """
        state, failed, moved = self.state, False, None
        if found.failure is not None:
            state.retry = next_retry(state.retry)
            state.due_at = state.updates + state.retry
        else:
            state.expected_cost = max(self.least_cost, found.cost)
            failed, moved = self._learn(found, lr_ref, jump, shape)
            state.cap = self.cap_under(found.lr_limit)
            state.keep(found)
            state.gap = next_gap(state.gap, alarm=jump is not None, trial_failed=failed)
            state.due_at, state.retry = state.updates + state.gap, 0
        state.trial_at = state.updates + state.trial_gap
        return failed, moved

    def settle_trial(self, tried: Measurement, lr_ref: float, shape: float = 1.0) -> str | None:
        """Takes a trial step in: moves the margin; returns what moved it."""
        state = self.state
        failed, moved = self._learn(tried, lr_ref, None, shape)
        state.trial_gap = next_trial_gap(state.trial_gap, failed=failed, max_overhead=self.policy.max_overhead)
        state.trial_at = state.updates + state.trial_gap
        state.cap = self.cap_under(tried.lr_limit)
        return moved

    def _flip(self) -> float:
        """The largest c of the parameters that move; that of no momentum where none is known."""
        return max((c for c in self.state.flips if c is not None), default=2.0)

    def _learn(self, found: Measurement, lr_ref: float, jump: str | None, shape: float) -> tuple[bool, str | None]:
        failed = found.trial_failed
        if failed is None or found.trial_lr is None:
            return False, None
        planned, reached = self.planned(found.lr_limit, lr_ref, shape), found.trial_lr * self.policy.trial_slack
        searched = reached < BINDING * planned  # halved once at least
        failed = self.state.stalled = failed or searched
        old = self.state.margin
        self.state.margin = learned_margin(
            old,
            planned=planned,
            desired=lr_ref,
            lr_limit=found.lr_limit,
            trial_failed=failed,
            alarm=jump is not None,
            margin_max=self.policy.margin_max,
            least=self.policy.least_margin(self._flip(), adaptive=self.adaptive),
            found=reached if searched else None,
        )
        if self.state.margin == old:
            return failed, None
        times = f"{1 / self.policy.trial_slack:.3g} times"
        why = jump or (
            f"no trial step longer than lr {found.trial_lr:.3g} lowers the batch's loss"
            if searched and not found.trial_failed
            else f"a trial step {times} as long (lr {found.trial_lr:.3g}) would move the batch's loss from "
            f"{found.loss:.4g} to {found.trial_loss:.4g}"
        )
        return failed, f"margin {old:.3g} -> {self.state.margin:.3g}: {why}"
