"""A `Decider`: at each update looks at the gradients, measures where that is due, decides, and writes the lrs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from safe_lr import processes
from safe_lr.accounts import State
from safe_lr.closures import Closure
from safe_lr.controller import Controller
from safe_lr.cuts import heed_norms
from safe_lr.decisions import Action, Decision
from safe_lr.ensemble import Ensemble
from safe_lr.hooks import warn_user
from safe_lr.instrument import UNSCALED, Instrument
from safe_lr.loggers import is_stop_request
from safe_lr.loggers.broadcast import Broadcast
from safe_lr.measurement import Measurement
from safe_lr.movers import MeasurementFailed
from safe_lr.preconditioners import decays
from safe_lr.rates import Rates
from safe_lr.rewind import RewindsExhausted, Trouble
from safe_lr.rewinder import Rewinder
from safe_lr.settings import COST_OF_GRAPH
from safe_lr.stability import UpdateRule
from safe_lr.tuner import Tuner

NO_CLOSURE = (
    "safe_lr was given no closure for this update: call observe(lambda: criterion(model(x), y)) on the scheduler or "
    "guard between backward() and optimizer.step(). Training goes on; no new limit can be measured."
)

SEVERAL_RANKS = (
    "safe_lr does not coordinate the processes of torch.distributed: each measures its own batch, so their learning "
    "rates, and then their parameters, part ways. Give every rank the same fixed batch (x, y): "
    "probe=lambda: criterion(ddp.module(x), y)."
)

HISTORY = 10_000
"""Decisions kept in memory."""


class Decider:
    """Puts instrument, controller, tuner and rewinder to work on the coming update, and keeps the record.

    Args:
        ensemble: The optimizers.
        controller: Says when to measure and how margin and cap move; its state is the run's.
        instrument: Measures and tries.
        rates: Writes the lrs.
        tuner: Moves betas and eps.
        rewinder: Drops updates and goes back, if anything does.
        log: Who is told of decisions.
        raises: Whether a failed measurement is raised instead of recorded.

    Attributes:
        history: The newest decisions.
        last_measurement: The newest, without its vectors.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        controller: Controller,
        instrument: Instrument,
        rates: Rates,
        tuner: Tuner,
        rewinder: Rewinder | None,
        log: Broadcast,
        *,
        raises: bool,
    ) -> None:
        self.ensemble, self.controller, self.instrument, self.rates = ensemble, controller, instrument, rates
        self.tuner, self.rewinder, self.log, self.raises = tuner, rewinder, log, raises
        self.history: deque[Decision] = deque(maxlen=HISTORY)
        self.last_measurement: Measurement | None = None
        self._warned: set[str] = set()

    @property
    def state(self) -> State:
        """What the run remembers."""
        return self.controller.state

    def act(
        self,
        observed: list[Closure] | None,
        probe: list[Closure] | None,
        loss: Tensor | float | None,
        watch: Callable[[list[Closure]], list[Closure]],
    ) -> None:
        """Does what the coming update needs: refuses it, or measures or tries where that is due, and writes the lrs.

        Args:
            observed: Closures of the update's own batches, None where the user gave none.
            probe: Closures to measure on instead, None for those.
            loss: The loss that was differentiated, where it is known.
            watch: Called with the closures that are to be measured, returns those to call.
        """
        state, control = self.state, self.controller
        size = self.ensemble.gradient_norm()
        if size is None:
            return  # no gradients: nothing moves
        control.begin(self.rates.asked_of_cap)
        if self.rewinder is not None and self._refused(self.rewinder, size, loss, observed):
            return
        early = self._outdated()
        before, state.decays = state.decays, self.ensemble.decays()
        if control.follows(turned=state.decays != before):
            control.follow(self._rules())
        usual, alarm = state.trend, state.trend.alarming(size)
        state.felt(size)
        if alarm and not control.due(early=early):
            alarm = probe is not None or observed is None or not self._harmless(observed)
        jump = f"the gradient norm is {size:.3g}, usual is {math.exp(usual.mean):.3g}" if alarm else None
        if control.due(alarm=alarm, early=early) and self._measure(
            probe or observed, jump, watch, fixed=probe is not None, early=early
        ):
            return
        self._heed_norms()
        if state.cap is not None:
            if observed is not None and probe is None and control.trial_due(self.rates.wanted):
                self._try(observed)
                return
            state.cap = control.cap_under(state.figures["lr_limit"])
        self.rates.apply(state.cap)

    @property
    def due(self) -> bool:
        """Whether the coming update will measure, as far as can be told before its gradients are there."""
        return self.controller.due(early=self._outdated())

    def _outdated(self) -> bool:
        """Whether the last measurement missed what now moves, how fast, or P's size."""
        state, moving = self.state, self.ensemble.moving()
        woken = any(now and not then for now, then in zip(moving, state.moving, strict=False))
        # Ranks whose gradient norms differ would measure at different updates, and wait for each other.
        wandered = self.controller.wandered and processes.count() == 1
        return woken or wandered or self.rates.drifted()

    def _measure(
        self,
        closures: list[Closure] | None,
        jump: str | None,
        watch: Callable[[list[Closure]], list[Closure]],
        *,
        fixed: bool,
        early: bool,
    ) -> bool:
        """Measures, decides and tunes; returns whether it could."""
        if closures is None:
            self.warn_once("observe", NO_CLOSURE)
            return False
        if not fixed and processes.count() > 1:
            self.warn_once("ranks", SEVERAL_RANKS)
        budget = self.controller.affordable(alarm=jump is not None)
        if not self.instrument.can_measure(closures, self.state, budget):
            return False
        usual = jump is None and not early
        if usual:
            self.tuner.before_measuring(self.controller.press(self.rates.wanted), self.state.updates)
        found = self._measured(watch(closures), budget, fixed=fixed)
        self._decide(found, jump)
        self._tune(found, usual=usual)
        return True

    def _refused(
        self, rewinder: Rewinder, norm: float, loss: Tensor | float | None, observed: list[Closure] | None
    ) -> bool:
        """Whether the coming update is not to be made: it is dropped, or the run has gone back."""
        before = self.rates.applied[self.rates.reference]
        try:
            trouble = rewinder.inspect(norm, loss, observed, self.controller, self.rates)
        except RewindsExhausted as given_up:
            self._not_made(given_up.tries[-1], before)
            raise
        if trouble is None:
            if rewinder.drifted is not None:
                self._record_cut(rewinder.drifted, before)
            return False
        self._not_made(trouble, before)
        return True

    def _not_made(self, trouble: Trouble, before: float) -> None:
        self.rates.apply(self.state.cap)
        found = Measurement(bound=self.instrument.settings.bound, cost=trouble.cost)
        self._record(trouble.action, trouble.reason, found, before, self.rates.applied[self.rates.reference])

    def _heed_norms(self) -> None:
        """Cuts margin and cap, with no measurement, where gradient norms have risen while the cap holds lr back."""
        if processes.count() > 1:
            return  # ranks whose gradient norms differ would cut at different updates
        told = heed_norms(self.controller, self.rates.wanted)
        if told is not None:
            before = self.rates.applied[self.rates.reference]
            self.rates.apply(self.state.cap)
            self._record_cut(told, before)

    def _record_cut(self, told: str, before: float) -> None:
        """Records a cut that no measurement asked for."""
        limit = self.state.figures.get("lr_limit", math.nan)
        found = Measurement(bound=self.instrument.settings.bound, lr_limit=limit)
        self._record("margin", told, found, before, self.rates.applied[self.rates.reference])

    def _rules(self) -> list[UpdateRule | None]:
        """Each parameter's update rule at the coming step; none where the optimizer's state cannot be read."""
        try:
            return self.ensemble.rules()
        except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError):
            return []  # the next measurement will say what is wrong with it

    def _harmless(self, closures: list[Closure]) -> bool:
        """Whether the cap is right for gradients that look wrong all the same: tried, where the margin is learned."""
        state = self.state
        if state.cap is None or not self.controller.can_try:
            return False
        found = self._tried(closures, min(state.cap, self.controller.cap_under(state.figures["lr_limit"])))
        state.count(found)
        return self.controller.harmless(found)

    def _tried(self, closures: list[Closure], lr_ref: float) -> Measurement:
        """Tries the coming step at some lrs; whatever goes wrong becomes the `failure`."""
        limit = self.state.figures["lr_limit"]
        try:
            found = self.instrument.try_steps(
                closures,
                self.rates.present_shares(),
                lambda found: self.controller.lr_to_try(found, limit, lr_ref, measured=False),
            )
        except Exception as error:  # noqa: BLE001 (raised again or recorded)
            found = self._excused(error)
        self._heard(found)
        return replace(found, lr_limit=limit)

    def _try(self, closures: list[Closure]) -> None:
        """Between measurements, while the cap binds: lets trial steps alone move the learned margin."""
        state = self.state
        found = self._tried(closures, self.rates.wanted)
        state.count(found)
        state.trial_cost += found.cost
        lr = self.rates.applied[self.rates.reference]
        told = self.controller.settle_trial(found, self.rates.wanted)
        self.rates.apply(self.state.cap)
        if told is None and found.failure is not None:
            told = "hold", f"{found.failure}; the cap {state.cap:.3g} stays"
        if told is not None:
            found = replace(found, lr_limit=self.state.figures["lr_limit"])
            self._record(*told, found, lr, self.rates.applied[self.rates.reference])

    def _measured(self, closures: list[Closure], budget: float, *, fixed: bool) -> Measurement:
        """Measures the coming step; whatever goes wrong becomes the measurement's `failure`."""
        state, control, lr_ref = self.state, self.controller, self.rates.wanted
        shares, flips = self.rates.present_shares(), state.flips
        control.starts(self._rules())
        try:
            found = self.instrument.measure(
                closures,
                shares,
                state,
                budget=budget,
                fixed=fixed,
                search_from=self.rates.lr_ref / control.policy.trial_slack,
                try_lr=lambda found: control.lr_to_try(found, control.in_force(found.lr_limit), lr_ref),
            )
            if found.note == UNSCALED:
                self.warn_once("scaled", f"safe_lr could not measure: {found.failure}.")
            if found.failure is not None and self.raises:
                raise MeasurementFailed(found.failure, found.num_matvecs)
        except Exception as error:  # noqa: BLE001 (raised again or recorded)
            found = self._excused(error)
        if found.failure is None:
            if state.crest is not None:
                state.crest *= self.rates.rescaled(shares)
            self.rates.shares = shares
            state.hvp = found.hvp
        else:
            state.flips = flips  # those of the limit that stays in force
        state.measurements += 1
        state.count(found)
        self._heard(found)
        self.last_measurement = replace(found, vectors={})
        return found

    def _heard(self, found: Measurement) -> None:
        if self.rewinder is not None:
            self.rewinder.heard(found.loss)

    def _excused(self, error: Exception) -> Measurement:
        """Turns an error into a failed measurement, unless the user wants it raised or it asks training to stop."""
        if self.raises or is_stop_request(error):
            raise error
        first_line = next(iter(str(error).splitlines()), "")
        failure = f"{type(error).__name__}: {first_line}"
        under = "at the desired lr, UNPROTECTED" if self.state.cap is None else f"under the cap {self.state.cap:.3g}"
        self.warn_once("failure", f"safe_lr could not measure ({failure}); training goes on {under}.")
        return Measurement(bound=self.instrument.settings.bound, failure=failure, cost=COST_OF_GRAPH)

    def _decide(self, found: Measurement, jump: str | None) -> None:
        """Turns a measurement into a margin, a cap and applied lrs; `jump` says what looked wrong, if anything did."""
        state, group = self.state, self.rates.reference
        before = self.rates.applied[group]
        if found.failure is None:
            self.instrument.keep(found)
            found = self.controller.weighed(found, self.rates.wanted, alarm=jump is not None)
            state.moving = self.ensemble.moving()
        _, moved = self.controller.settle(found, lr_ref=self.rates.wanted, jump=jump)
        self.rates.apply(self.state.cap)
        after = self.rates.applied[group]
        if found.failure is None:
            state.worst_utilisation = max(after / found.lr_limit, state.worst_utilisation or 0.0)
        if moved is not None:
            self._record("margin", moved, replace(found, num_matvecs=0, cost=0.0, seconds=0.0), after, after)
        self._record(*self._explained(found, before, after), found, before, after)

    def _explained(self, found: Measurement, before: float, after: float) -> tuple[Action, str]:
        left = {"annealed": self.controller.annealed_part, "highest": self.controller.highest}
        return self.state.explain(found, before, after, capped=self.rates.capped, **left)

    def _tune(self, found: Measurement, *, usual: bool) -> None:
        """After a measurement, `usual` unless something looked wrong or the last one was of another time: moves betas.

        P goes on as it was; what b1 does to c, the limit follows.
        """
        state, group = self.state, self.rates.reference
        before = self.rates.applied[group]
        gamma = found.gamma if usual and found.failure is None else None
        told = self.tuner.settle(gamma, self.controller.press(self.rates.wanted), state.updates)
        if state.cap is not None and self.controller.momentum and any(said[0] == "betas" for said in told):
            self.controller.follow(self._rules())
            state.following = True  # c of a young average goes on moving
            state.cap = min(state.cap, state.margin * state.figures["lr_limit"])
            self.rates.apply(self.state.cap)
        limit = state.figures.get("lr_limit", math.nan)
        found = replace(found, lr_limit=limit, failure=None, num_matvecs=0, cost=0.0, seconds=0.0)
        for action, reason in told:
            self._record(action, reason, found, before, self.rates.applied[group])

    def _record(self, action: Action, reason: str, found: Measurement, before: float, after: float) -> None:
        group = self.rates.reference
        desired, betas = self.rates.asked[group], decays(self.ensemble.param_groups[group])
        decision = self.state.decision(action, reason, found, group, (desired, before, after), betas)
        self.history.append(decision)
        self.state.course.decide(decision)
        if self.log:
            self.log.decide(decision)

    # ---- what is told

    def row(self) -> dict[str, Any]:
        """Returns the coming update's scalars, as `Logger.step` takes them."""
        group = self.rates.reference
        betas = decays(self.ensemble.param_groups[group])
        return self.state.row(self.rates.applied, self.rates.asked, group, betas, capped=self.rates.capped)

    def warn_once(self, key: str, message: str) -> None:
        """Warns, but for the same key only once."""
        if key not in self._warned:
            self._warned.add(key)
            warn_user(message)
