"""Between a measurement and the applied lr: the policy's functions at work on what a run remembers."""

from __future__ import annotations

import math
from dataclasses import replace

from safe_lr.accounts import State
from safe_lr.cadence import (
    FOLLOW_EACH,
    FOLLOW_EVERY,
    SETTLED,
    TRIAL_GAP,
    TRIAL_PART,
    affordable,
    next_gap,
    next_retry,
    next_trial_gap,
)
from safe_lr.decisions import Action
from safe_lr.measurement import Measurement
from safe_lr.policies import (
    FAILED,
    FREE_UPDATES,
    HALVINGS,
    MARGIN_MIN,
    MARGIN_SEARCHED,
    MATURE,
    MULTIPLE_FAILED,
    MULTIPLE_START,
    ROOM,
    STEADY_FROM,
    TOLD,
    VOTES,
    Policy,
    Trial,
    annealed,
    judged,
    learned_growth,
    learned_multiple,
    median_limit,
    most_under_decay,
    next_cap,
    next_crest,
    next_rung,
    pace,
    rungs,
)
from safe_lr.rules import Rules, constants, largest_constant, risen, smallest_rise, smallest_share
from safe_lr.settings import COST_OF_LOSS
from safe_lr.tuning import pressure


class Controller:
    """Decides when to measure and how margin and cap move. Sees numbers only; all it remembers is in `state`.

    Args:
        policy: The settings.
        least_cost: Gradient evaluations below which no measurement is worth starting.
        momentum: Whether the limit counts momentum.
        unaveraged: See `Ensemble.unaveraged`.
        follows_gradients: Whether P is made of gradients at all.
        searched: Whether the limit is found by trial steps instead of measured.
        tolerance: The optimizer's own factor on the noise limit.
        head_start, annealing: See `Preconditioner`.

    Attributes:
        state: What a resumed run must remember.

    Example:
        >>> controller = Controller(Policy(margin=0.5), least_cost=8.0)
        >>> controller.due(), controller.state.cap
        (True, None)
        >>> controller.settle(Measurement(lr_limit=0.2), lr_ref=1.0, jump=None)
        (None, None)
        >>> controller.due(), controller.state.cap                   # the next measurement is due in three updates
        (False, 0.1)
    """

    def __init__(
        self,
        policy: Policy,
        least_cost: float,
        *,
        momentum: bool = True,
        unaveraged: float = 1.0,
        follows_gradients: bool = False,
        searched: bool = False,
        tolerance: float = 1.0,
        head_start: float = 1.0,
        annealing: float = 1.0,
    ) -> None:
        if searched and policy.learns:
            policy = replace(policy, margin_max=min(policy.margin_max, MARGIN_SEARCHED))
        self.policy, self.least_cost = policy, least_cost
        self.momentum, self.unaveraged = momentum, unaveraged
        self.follows_gradients, self.searched, self.tolerance = follows_gradients, searched, tolerance
        self.annealing = annealing
        margin = policy.margin_at(MULTIPLE_START, 1.0, young=True)
        multiple = head_start * MULTIPLE_START
        self.state = State(multiple, margin, told=multiple, expected_cost=least_cost)

    def restore(self, state: State) -> None:
        """Goes on from a saved state, under the present policy."""
        self.state = state
        self.anneal()

    def held_back(self, lr_ref: float) -> bool:
        """Whether a cap under a learned margin is what holds lr back."""
        return self.policy.learns and self.state.cap is not None and lr_ref > self.state.cap

    # ---- when

    def due(self, *, alarm: bool = False, early: bool = False) -> bool:
        """Whether the coming update is to measure, in time and in cost. An alarm needs no more than the least cost.

        Args:
            alarm: Whether something looks wrong.
            early: Whether the last measurement was of another time; one that failed has its own time to be tried again.
        """
        state = self.state
        if not (alarm or (early and not state.retry) or state.updates >= state.due_at):
            return False
        return self.affordable(alarm=alarm) >= (self.least_cost if alarm else state.expected_cost)

    def affordable(self, *, alarm: bool) -> float:
        """Returns the gradient evaluations that a measurement may cost now."""
        state = self.state
        return self._left(state.cost - state.look_cost, alarm=alarm)

    def _left(self, spent: float, *, alarm: bool) -> float:
        policy, updates = self.policy, self.state.updates
        return affordable(policy.credit, policy.max_overhead, updates=updates, spent=spent, alarm=alarm)

    @property
    def wandered(self) -> bool:
        """Whether gradient norms, which P follows, have changed so much that a new measurement is due."""
        return self.comparable and self.state.trend.wandered(self.state.usual)

    @property
    def comparable(self) -> bool:
        """Whether gradient norms, where P follows them, can be compared with those at the last measurement."""
        late = self.state.updates >= self.state.measured_at + TRIAL_GAP
        return self.follows_gradients and late and not self.young

    @property
    def can_try(self) -> bool:
        """Whether trial steps would tell anything, and there is budget left for them."""
        return self.policy.learns and self.affordable(alarm=True) >= 3 * COST_OF_LOSS

    def trial_due(self, lr_ref: float) -> bool:
        """Whether the coming update is to try its step without a measurement."""
        state = self.state
        if not (self.held_back(lr_ref) and state.updates >= state.trial_at):
            return False
        left = self._left(0.0, alarm=False) * TRIAL_PART - state.trial_cost
        return min(left, self.affordable(alarm=False)) >= 2 * COST_OF_LOSS

    # ---- how far

    @property
    def young(self) -> bool:
        """Whether the limit still rises so fast that the cap follows each measurement freely."""
        return self.state.updates < FREE_UPDATES

    def cap_under(self, lr_limit: float) -> float:
        """Returns the cap that a limit allows now."""
        state, growth = self.state, self.policy.growth
        if self.policy.learns:
            growth = learned_growth(growth, held=state.held, trial=state.trial)
        return min(next_cap(state.cap, state.margin * lr_limit, growth, free=self.young), self.highest)

    def planned(self, lr_limit: float, lr_ref: float) -> float:
        """Returns the lr of the coming step under the present margin, in units of lr_ref.

        Args:
            lr_limit: The limit.
            lr_ref: The lr that is wanted. Infinite where lr follows the cap: it is the cap that trial steps judge then,
                whatever part of it a schedule lets through.
        """
        return min(lr_ref, self.cap_under(lr_limit))

    def in_force(self, measured: float) -> float:
        """Returns the limit to act on: the measured one; with a learned margin the median of the newest ones.

        A young run's limits have no vote, and the newest counts alone as long as there is none.
        """
        flip = self._flip()
        if not self.policy.learns or self.young or not self.state.votes:
            return measured
        return median_limit([*self.state.votes, measured / flip]) * flip

    def weighed(self, found: Measurement, lr_ref: float, *, alarm: bool = False) -> Measurement:
        """Returns a good measurement with the limit in force in it.

        Curvature needs a witness: a limit far below the others counts at once, and alone, only where a step under
        theirs would raise the batch's loss: the planned one, or, at an alarm, one at the cap. It does so until the next
        measurement, or until trial steps before it find room (`settle_trial`).
        """
        limit = self.in_force(found.lr_limit)
        self.state.alone = False
        if alarm or self._verdict(found, self.planned(limit, lr_ref)) == "bad":
            self.state.alone = found.lr_limit < limit
            limit = min(limit, found.lr_limit)
        if self.state.updates >= MATURE:
            self.state.votes = [*self.state.votes, found.lr_limit / self._flip()][-VOTES:]
        self.state.decay = found.decay
        self._limit_to(limit)
        return replace(found, lr_limit=self.state.figures["lr_limit"])

    def _limit_to(self, limit: float) -> None:
        """Puts a limit in force, none beyond what decoupled decay alone leaves, and the margin that goes with it."""
        decay = self.state.decay
        self.state.figures["lr_limit"] = min(limit, 2 / decay) if decay > 0 else limit
        self.anneal()

    def lr_to_try(self, found: Measurement, limit: float, lr_ref: float, *, measured: bool = True) -> float | None:
        """Returns the lr to try on the batch next, None where there is nothing (more) to learn.

        A young run searches, by halving, for what the limit should be; an older one tries whether there is room.

        Args:
            found: What was found so far.
            limit: The limit in force.
            lr_ref: See `planned`.
            measured: Whether that limit was measured just now.
        """
        planned = self.planned(limit, lr_ref)
        if not (self.policy.learns and 0 < planned < math.inf):
            return None
        if found.trial_lr is not None and self.affordable(alarm=True) - found.cost < COST_OF_LOSS:
            return None
        young = self.young and measured
        lengths = rungs(
            self.policy.trial_slack,
            binding=planned < lr_ref and not self.young,
            halvings=HALVINGS * young,
        )
        last = None if found.trial_lr is None else found.trial_lr / planned
        length = next_rung(lengths, last, failed=found.trial_failed is True)
        return None if length is None else planned * length

    def harmless(self, tried: Measurement) -> bool:
        """Whether trial steps found nothing wrong with a step at the cap."""
        cap = self.state.cap or 0.0
        return self._verdict(tried, self.planned(self.state.figures["lr_limit"], cap)) in ("fine", "roomy")

    def press(self, lr_ref: float) -> tuple[float, str] | None:
        """Returns how hard the cap binds, with the words for it (`pressure`); None without a cap."""
        lengths = {"roomy": ROOM / self.policy.trial_slack, "fine": 1 / self.policy.trial_slack}
        longer = lengths.get(self.state.trial or "") if self.policy.learns else None
        return None if self.state.cap is None else pressure(lr_ref, self.state.cap, longer=longer)

    @property
    def highest(self) -> float:
        """What the cap may not rise above: the annealed crest, infinite where there is none to hold it down."""
        crest = self.state.crest
        if crest is None or not self._learns_from_noise or self.state.held <= STEADY_FROM:
            return math.inf
        return crest * self.annealed

    @property
    def annealed(self) -> float:
        """What is left of the noise limit; all of it where the margin is not learned."""
        return annealed(self.state.held) ** self.annealing if self._learns_from_noise else 1.0

    @property
    def _learns_from_noise(self) -> bool:
        return self.policy.learns and not self.searched

    @property
    def annealed_share(self) -> float:
        """The noise limit as a part of lr_limit at the coming step, of which the margin is a multiple."""
        return self.annealed * self.state.share

    @property
    def annealed_part(self) -> float:
        """What annealing leaves of the margin itself: all of it where `margin_max` is lower still."""
        return self.state.margin / self._margin(self.state.multiple, self.state.share)

    @property
    def least_after_harm(self) -> float:
        """What an alarm or a rewind may cut the multiple to."""
        return min(MULTIPLE_FAILED, MARGIN_MIN / self.annealed_share)

    def begin(self, lr_ref: float) -> None:
        """Before each update is decided on: takes in whether the cap holds lr back, and sets a learned margin anew.

        Args:
            lr_ref: The lr that is wanted. Where lr follows the cap it is infinite, but 0 while a warm-up lets only a
                part of the cap through.
        """
        state = self.state
        if state.cap is None:
            state.holding = state.updates == 0  # whose cap comes with its measurement
        else:
            state.holding = lr_ref > state.cap
            if self._learns_from_noise and not self.young:
                state.crest = next_crest(state.crest, state.cap, held=state.held)
        self.anneal()

    def anneal(self) -> None:
        """Sets the margin anew: where it is learned it falls while the cap holds lr back."""
        self.state.margin = self.margin_at(self.state.multiple)

    def follows(self, *, turned: bool) -> bool:
        """Whether c of the coming step is to be looked at; `turned` where someone has moved a decay."""
        state = self.state
        often = state.updates < FOLLOW_EACH or state.updates % FOLLOW_EVERY == 0
        return state.cap is not None and (turned or (state.following and often))

    def follow(self, rules: Rules) -> None:
        """Carries limit and margin over to the coming step: gamma stays until it is measured again, c is known at each.

        Where parameters differ, the limit rises by the smallest rise of their c.
        """
        state, rise = self.state, smallest_rise(self.state.flips, constants(rules))
        if rise is None:
            return
        was = state.share, state.figures["lr_limit"]
        self._share(rules)
        if self.momentum:
            self._limit_to(risen(state.measured_limit, rise, state.decay))
        is_now = state.share, state.figures["lr_limit"]
        moved = any(abs(now - then) > SETTLED * then for then, now in zip(was, is_now, strict=True))
        state.following = moved or self.young  # for what ends with youth

    def starts(self, rules: Rules) -> None:
        """Takes in each parameter's update rule at the coming step, which is to be measured."""
        self.state.flips = constants(rules)
        self._share(rules)

    def _share(self, rules: Rules) -> None:
        """Sets the noise limit's part of lr_limit, and with it the margin."""
        share = smallest_share(rules, momentum=self.momentum, unaveraged=self.unaveraged)
        if self.searched:
            self.state.share = MARGIN_SEARCHED / MULTIPLE_START
        elif share is not None:
            self.state.share = self.tolerance * share
        self.anneal()

    def margin_at(self, multiple: float) -> float:
        """Returns the margin that a multiple of the noise limit would be at the coming step."""
        return self._margin(multiple, self.annealed_share)

    def _margin(self, multiple: float, share: float) -> float:
        young = self.young and self.tolerance <= 1
        return min(self.policy.margin_at(multiple, share, young=young), self._most)

    @property
    def _most(self) -> float:
        """What no learned margin exceeds; a fixed one is 1 at most anyway."""
        return most_under_decay(self.state.decay, self.state.figures.get("lr_limit", math.nan))

    def _flip(self) -> float:
        """The largest c of the parameters that move, where the limit counts it."""
        return largest_constant(self.state.flips if self.momentum else [])

    # ---- what follows

    def settle(self, found: Measurement, *, lr_ref: float, jump: str | None) -> tuple[Trial | None, str | None]:
        """Takes a measurement in: moves margin, cap and the time of the next one.

        Args:
            found: The measurement, `lr_limit` being the limit in force. One that failed moves nothing but that time.
            lr_ref: The lr that is wanted.
            jump: What looked wrong, if anything did.

        Returns:
            What the trial steps found, and what moved the margin, if it moved.
        """
        state, trial, moved = self.state, None, None
        state.hear(found)
        if found.failure is not None:
            state.retry = next_retry(state.retry)
            state.due_at = state.updates + state.retry
        else:
            state.expected_cost = max(self.least_cost, found.cost)
            trial, moved = self._learn(found, lr_ref, jump)
            state.cap = self.cap_under(found.lr_limit)
            early = not self.young and state.updates < state.measured_at + state.gap
            state.keep(found)
            state.gap = next_gap(state.gap, alarm=jump is not None, trial_failed=trial == "bad", early=early)
            state.due_at, state.retry = state.updates + state.gap, 0
        state.trial_at = state.updates + state.trial_gap
        return trial, moved

    def settle_trial(self, tried: Measurement, lr_ref: float) -> tuple[Action, str] | None:
        """Takes trial steps in: moves the margin, or a limit that counts alone; returns what was done, and why."""
        state, alone = self.state, self.state.alone
        state.hear(tried)
        planned = self.planned(tried.lr_limit, lr_ref)
        trial, moved = self._learn(tried, lr_ref, None, still=alone)
        told: tuple[Action, str] | None = None if moved is None else ("margin", moved)
        if alone and trial == "roomy":
            told = "raise", self._relieved(tried, planned)
        state.trial_gap = next_trial_gap(state.trial_gap)
        state.trial_at = state.updates + state.trial_gap
        state.cap = self.cap_under(state.figures["lr_limit"])
        return told

    def _relieved(self, tried: Measurement, planned: float) -> str:
        """Raises a limit that counts alone by as much as a trial step with room bears out, to the others' median.

        No further: trial steps tell what is harmful now, not that a step a hundred times longer would not be.
        """
        state, low = self.state, self.state.figures["lr_limit"]
        others = median_limit(state.votes) * self._flip() / state.measured_limit
        seen = (tried.trial_lr or planned) * self.policy.trial_slack / planned
        rise = min(others, seen)
        state.alone, state.measured_limit = seen < others, rise * state.measured_limit
        self._limit_to(rise * low)
        return (
            f"limit {low:.3g} -> {rise * low:.3g}, of {others * low:.3g} before: the lower one was of a single batch, "
            f"and even a trial step (lr {tried.trial_lr:.3g}) would move this one's loss from {tried.loss:.4g} to "
            f"{tried.trial_loss:.4g}"
        )

    def _verdict(self, found: Measurement, planned: float) -> Trial | None:
        if found.trial_failed is None or found.trial_lr is None or not planned > 0:
            return None
        return judged(found.trial_lr / planned, self.policy.trial_slack, failed=found.trial_failed)

    def _learn(
        self, found: Measurement, lr_ref: float, jump: str | None, *, still: bool = False
    ) -> tuple[Trial | None, str | None]:
        """Moves the multiple by what trial steps found; `still`: not upwards, since it is the limit that is to rise.

        A margin that already is at its ceiling raises it no further, nor one that allows all that is wanted or more
        than the crest does, towards which the cap is on its way. Small moves are told once they add up.
        """
        state, old = self.state, self.margin_at(self.state.told)
        planned = self.planned(found.lr_limit, lr_ref)
        trial = self._verdict(found, planned)
        if trial is None or found.trial_lr is None or not self.policy.learns:
            return None, None
        if trial == "roomy" and state.updates < state.calm_until:
            trial = "fine"  # so it looked before the step that did harm, too
        if not self.young:
            state.course.tried(found.trial_lr / planned, failed=found.trial_failed is True)
        again, unit = state.trial in FAILED, self.annealed_share * found.lr_limit
        state.trial = trial
        still = still or state.multiple * self.annealed_share >= min(self.policy.margin_max, self._most)
        enough = min(self.highest, lr_ref)  # of which more would only be wound up
        still = still or state.margin * found.lr_limit >= enough
        searched = found.trial_lr / unit if self.young and not found.trial_failed else None
        state.multiple = learned_multiple(
            state.multiple,
            "fine" if still and trial == "roomy" else trial,
            used=planned / unit,
            again=again,
            least=None if jump is None else self.least_after_harm,
            found=searched,
            step=pace(state.held, state.tried_at),
        )
        state.tried_at = state.held
        self.anneal()
        if abs(math.log(state.margin / old)) < math.log(TOLD):
            return trial, None
        state.told = state.multiple
        why = f"a trial step (lr {found.trial_lr:.3g}) would move the batch's loss from {found.loss:.4g} to "
        why += f"{found.trial_loss:.4g}"
        if trial == "roomy":
            why = f"even {why}"
        elif not found.trial_failed:
            why = f"no trial step longer than lr {found.trial_lr:.3g} lowers the batch's loss"
        why = f"{jump}, and {why}" if jump is not None else why
        return trial, f"margin {old:.3g} -> {state.margin:.3g}: {why}"
