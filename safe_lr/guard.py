"""`CoherenceGuard`: the engine that measures, decides and caps around `optimizer.step()`."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from safe_lr.accounts import State
from safe_lr.closures import Closure
from safe_lr.controller import Controller
from safe_lr.decisions import Action, Decision, Summary
from safe_lr.ensemble import Ensemble
from safe_lr.hooks import around_updates, warn_user
from safe_lr.instrument import UNSCALED, Instrument
from safe_lr.loggers import Logger, is_stop_request, resolve
from safe_lr.loggers.broadcast import Broadcast
from safe_lr.measurement import COST_OF_GRAPH, Measurement, Settings, measure
from safe_lr.movers import MeasurementFailed
from safe_lr.neighbours import Neighbours
from safe_lr.objective import Closures, as_list
from safe_lr.policies import Policy
from safe_lr.preconditioners import Preconditioner, decays
from safe_lr.rates import Rates
from safe_lr.rewind import rewinds_allowed
from safe_lr.rewinder import Rewinder
from safe_lr.stability import UpdateRule
from safe_lr.tuner import Tuner
from safe_lr.tuning import Range, Tuning

NO_CLOSURE = (
    "safe_lr was given no closure for this update: call observe(lambda: criterion(model(x), y)) on the scheduler or "
    "guard between backward() and optimizer.step(). Training goes on; no new limit can be measured."
)

HISTORY = 10_000
"""Decisions kept in memory."""

_neighbours = Neighbours()


class CoherenceGuard:
    """Keeps an optimizer's lr below the stability limit, inside `optimizer.step()` only.

        lr = min(desired lr, cap),    cap = margin * lr_limit

    The desired lr is whatever stands in `param_groups` when `optimizer.step()` is called: a scheduler's, a trainer's,
    or yours. The cap is applied just before the update and taken back after it, so nobody else ever sees a capped lr.
    See `CoherenceScheduler` for the arguments and for a version whose `param_groups` show the applied lr.

    Args:
        optimizer: A torch optimizer with a known preconditioner, or a list of them where several act on one loss (Muon
            for the matrices, AdamW for the rest): their limit is a joint one, and one scale caps them all. The cap then
            holds from the first one's step to the last one's.
        restore: Whether the desired lr is put back after each update.

    With `rewind`, the lr that a schedule of yours has written stays as it is when the run goes back: nothing is known
    of that schedule. A `CoherenceScheduler` takes the schedule inside it back too.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> curvature = torch.tensor([2.0, 0.5])                               # H = diag(4, 1): lr_limit = 2 / 4
        >>> optimizer = torch.optim.SGD([x], lr=100.0)
        >>> guard = CoherenceGuard(optimizer, margin=0.5)
        >>> for _ in range(50):
        ...     loss = (x**2 * curvature).sum()
        ...     loss.backward()
        ...     guard.observe(lambda: (x**2 * curvature).sum())
        ...     _ = optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.param_groups[0]["lr"], bool(loss < 1e-6), round(guard.last_decision.lr_after, 2)
        (100.0, True, 0.25)
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        bound: str = "momentum",
        margin: float | str = "auto",
        margin_max: float = 8.0,
        trial_slack: float = 0.5,
        growth: float = 1.02,
        curvature: str = "hessian",
        hvp: str = "auto",
        probe: Closures | None = None,
        tol: float = 0.1,
        warm_start: bool = True,
        max_matvecs: int = 30,
        max_basis: int | None = None,
        max_overhead: float = 0.05,
        credit: float = 120.0,
        lambda_every: int = 4,
        preconditioner: str | Preconditioner | None = None,
        on_failure: str = "hold",
        loggers: str | Logger | Sequence[str | Logger] | None = "auto",
        log_path: str | Path | None = None,
        seed: int = 0,
        follow_limit: bool = False,
        tune_betas: bool = False,
        beta1_range: Range = (0.9, 0.95),
        beta2_range: Range = (0.99, 0.999),
        tune_eps: bool = False,
        eps_range: Range = (0.0, 1e-3),
        rewind: bool | int = False,
        rewind_device: torch.device | str | None = None,
        restore: bool = True,
    ) -> None:
        self.ensemble = Ensemble(optimizer, preconditioner)
        if on_failure not in ("hold", "raise"):
            raise ValueError(f"on_failure must be one of 'hold', 'raise', got {on_failure!r}")
        for name, number in (("lambda_every", lambda_every), ("seed", seed)):
            if not isinstance(number, int) or not -(2**63) <= number < 2**63:
                raise TypeError(f"{name} must be an integer of 64 bits, got {number!r}")
        if lambda_every < 1:
            raise ValueError(f"lambda_every must be at least 1 (measurements), got {lambda_every!r}")
        self._probe = None if probe is None else as_list(probe, "probe")
        if not any(p.requires_grad for group in self.ensemble.param_groups for p in group["params"]):
            raise ValueError("no parameter of the optimizer requires grad: nothing can be measured or capped")
        self.optimizer = self.ensemble.members[0]
        self.settings = Settings(bound, curvature, hvp, tol, max_matvecs, max_basis, cautious=True)
        self._controller = Controller(
            Policy(margin, margin_max, trial_slack, growth, max_overhead, credit, follow_limit),
            self.settings.least_cost,
            momentum=bound == "momentum",
            adaptive=self.ensemble.adaptive,
            searched="trial" in self.ensemble.kinds,
        )
        self.policy = self._controller.policy
        self._tuner = Tuner(self.ensemble, Tuning(tune_betas, beta1_range, beta2_range, tune_eps, eps_range))
        self.rates = Rates(self.ensemble, follow=follow_limit)
        self.history: deque[Decision] = deque(maxlen=HISTORY)
        self.last_measurement: Measurement | None = None
        self._instrument = Instrument(self.ensemble, self.settings, lambda_every, warm_start=warm_start, seed=seed)
        self._on_failure, self._seed = on_failure, seed
        self.restore = restore
        self._preconditioner = preconditioner
        most = rewinds_allowed(rewind)
        self.rewinder = Rewinder(self.ensemble, most, rewind_device, tuner=self._tuner) if most else None
        self._observed: list[Closure] | None = None
        self._loss: Tensor | float | None = None
        self._warned: set[str] = set()
        self._closed = self._counting = False
        self._log = Broadcast(resolve(loggers, log_path), self._config)
        _neighbours.succeed(self)
        self.rates.read()  # an earlier guard has given the desired lrs back
        handles = around_updates(self.ensemble.members, self)
        # Once the guard is gone, or the process ends, the optimizer has its own lr and betas and no hook of ours.
        self._at_exit = weakref.finalize(self, _leave, handles, self.rates, self._tuner)

    # ---- what the user calls

    def observe(self, closure: Closures, loss: Tensor | float | None = None) -> None:
        """Stores a closure for the coming update: returns the loss of the current batch, with its graph, no
        `backward()`.

        Under gradient accumulation it may be a list, a closure for each micro-batch: their mean is measured, at the
        memory of one. It is evaluated only when a measurement is due, and dropped when the update is over.

        Args:
            closure: One closure or several.
            loss: The loss that was differentiated, if it is at hand (the mean over micro-batches): `rewind` then sees
                a jump of it at no cost. Detached; ignored without `rewind`.

        Raises:
            TypeError: A closure is not callable, or the list is empty.
        """
        self._observed = as_list(closure, "observe()")
        if self.rewinder is not None:
            self._loss = loss.detach() if isinstance(loss, Tensor) else loss

    @property
    def due(self) -> bool:
        """Whether the coming update will measure; an alarm can make one that is not due do so too."""
        return self._controller.due()

    @property
    def last_decision(self) -> Decision | None:
        """The newest decision, None before the first."""
        return self.history[-1] if self.history else None

    def measure(self, closure: Closures | None = None) -> Measurement:
        """Measures now, with all three limits, and changes nothing; not counted against `max_overhead`.

        Args:
            closure: Returns the loss; the probe, else the observed closure, where None.
        """
        s = self.settings
        closure = closure or self._probe or self._observed
        applied = self.rates.applied
        self.rates.give_back()  # the shares of lr_ref are the desired lrs'
        try:
            return measure(
                self.ensemble.members,
                closure,
                bound=s.bound,
                curvature=s.curvature,
                hvp=s.hvp,
                preconditioner=self._preconditioner,
                seed=self._seed,
            )
        finally:
            if applied != self.rates.applied:
                self.rates.apply(self._state.cap)

    def summary(self) -> Summary:
        """Returns the run so far in numbers; `print` it for what to make of them."""
        return self._state.summary()

    def rewind_memory(self) -> int:
        """Returns the bytes that the snapshot for `rewind` takes: parameters + optimizer state + buffers; 0 without."""
        return 0 if self.rewinder is None else self.rewinder.nbytes

    def state_dict(self) -> dict[str, Any]:
        """Returns numbers, lists and tensors only, so that it loads with `weights_only=True`.

        With `warm_start` it holds one parameter-sized vector for each eigenvalue in use. With `rewind` it holds the
        counts, not the snapshot.
        """
        rewound = {} if self.rewinder is None else {"rewind": self.rewinder.state_dict()}
        return {
            **rewound,
            "state": self._state.state_dict(),
            "counts": list(self.ensemble.counts) if self._counting else [],
            "rates": self.rates.state_dict(),
            "vectors": dict(self._instrument.vectors),
            "tuner": self._tuner.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict()`; load the optimizer's too, in either order.

        Raises:
            ValueError: The state is not a guard's, or has another number of parameter groups.
        """
        missing = {"state", "counts", "rates", "vectors"} - set(state_dict)
        if missing:
            raise ValueError(
                f"this is not a CoherenceGuard's state: {', '.join(sorted(missing))} missing"
                + (". It is a CoherenceScheduler's: pass its ['guard']" if "guard" in state_dict else "")
            )
        self.rates.load_state_dict(state_dict["rates"])
        if state_dict["counts"]:
            self.ensemble.counts, self._counting = list(state_dict["counts"]), True
        self._controller.restore(State.from_state_dict(state_dict["state"]))
        self._instrument.vectors = dict(state_dict["vectors"])
        if "tuner" in state_dict:  # not so in states of the first versions
            self._tuner.load_state_dict(state_dict["tuner"])
        if self.rewinder is not None and "rewind" in state_dict:
            self.rewinder.load_state_dict(state_dict["rewind"])

    def close(self) -> None:
        """Detaches from the optimizer, gives its own lr, betas and eps back, closes the loggers. Safe to call twice."""
        self._closed = True
        _neighbours.leave(self)
        self._at_exit()
        if self._log:
            self._log.close(self.summary().to_dict())

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a safe_lr scheduler cannot be copied or pickled, it is hooked to its optimizer: save state_dict(), make a "
            "new one on the other optimizer, and load_state_dict()"
        )

    # ---- around optimizer.step()

    @property
    def _state(self) -> State:
        return self._controller.state

    def before(self) -> None:
        """Before the update: measures where that is due or something looks wrong, moves the cap, writes the lrs."""
        try:
            self._act()
        finally:
            self._observed = self._loss = None  # it binds late and holds a batch

    def _act(self) -> None:
        state = self._state
        self.rates.read()
        if not self._counting:
            self.ensemble.count_from_now()
            self._counting = True
        if self.rates.drifted() and not state.retry:
            state.due_at = min(state.due_at, state.updates)
        size, moving = self.ensemble.gradient_norm(), self.ensemble.moving()
        if size is None:
            return  # no gradients: nothing moves
        if self.rewinder is not None and self._refused(size):
            return
        woken = any(now and not then for now, then in zip(moving, state.moving, strict=False))
        if woken and not state.retry:
            state.due_at = min(state.due_at, state.updates)  # the limit did not count these
        if state.cap is not None and state.following:
            self._controller.follow(self._rules())
        usual, alarm = state.trend, state.trend.alarming(size)
        state.trend = usual.after(size)
        if alarm and not self._controller.due():
            alarm = not self._harmless()
        if self._controller.due(alarm=alarm):
            closure = self._probe or self._observed
            budget = self._controller.affordable(alarm=alarm)
            if closure is not None and self._instrument.can_measure(closure, state, budget):
                jump = f"the gradient norm is {size:.3g}, usual is {math.exp(usual.mean):.3g}" if alarm else None
                if not alarm:
                    self._tuner.before_measuring(self._controller.press(self.rates.wanted), state.updates)
                found = self._measured(closure, alarm)
                self._decide(found, jump)
                self._tune(found, alarm)
                return
            if closure is None:
                self._warn_once("observe", NO_CLOSURE)
        if state.cap is not None:
            if self._observed is not None and self._probe is None and self._controller.trial_due(self.rates.wanted):
                self._try(self._observed)
                return
            state.cap = self._controller.cap_under(state.figures["lr_limit"])
        self.apply()

    def _refused(self, norm: float) -> bool:
        """Whether the coming update is not to be made: it is dropped, or the run has gone back."""
        assert self.rewinder is not None
        before = self.rates.applied[self.rates.reference]
        trouble = self.rewinder.inspect(norm, self._loss, self._observed, self._controller, self.rates)
        if trouble is None:
            return False
        self.apply()
        found = Measurement(bound=self.settings.bound, cost=trouble.cost)
        self._record("rewind", trouble.reason, found, before, self.rates.applied[self.rates.reference])
        return True

    def _rules(self) -> list[UpdateRule | None]:
        """Each parameter's update rule at the coming step; none where the optimizer's state cannot be read."""
        try:
            return self.ensemble.rules()
        except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError):
            return []  # the next measurement will say what is wrong with it

    def _harmless(self) -> bool:
        """Whether the cap is right for gradients that look wrong all the same: tried, where the margin is learned."""
        state, closures = self._state, self._observed
        if state.cap is None or closures is None or self._probe is not None or not self._controller.can_try:
            return False
        found = self._tried(closures, state.cap, 1.0)
        state.count(found)
        return self._controller.harmless(found)

    def apply(self) -> None:
        """Writes the applied lrs under the cap in force."""
        if not self._closed:
            self.rates.apply(self._state.cap)

    def coming_lrs(self) -> list[float]:
        """Returns the lr of each group under the cap in force, whatever `param_groups` show."""
        self.rates.read()
        return self.rates.capped_at(None if self._closed else self._state.cap)

    def resume(self) -> None:
        """Before another optimizer of several takes its part in the update: applies the cap again."""
        self.rates.read()
        self.apply()

    def stepped(self, optimizer: Optimizer) -> None:
        """One optimizer has made its update."""
        if self.rewinder is None or not self.rewinder.dropping:
            self.ensemble.count(optimizer)

    def pause(self) -> None:
        """After one optimizer of several: nobody else sees its capped lr."""
        if self.restore:
            self.rates.give_back()

    def after(self, updated: bool) -> None:
        """After the update: counts it. One that a GradScaler dropped does not count, and has used no closure."""
        if not updated:
            self._observed = self._loss = None
            return
        if self.rewinder is not None and self.rewinder.finish():
            if self.restore:
                self.rates.give_back()
            return
        state = self._state
        if len(self.ensemble.members) > 1:
            self.resume()  # what was paused in between counts, and is shown
        if self._log:
            self._log.step(self._row())
        group = self.rates.reference
        desired = None if self.rates.follow else self.rates.desired[group]
        state.stepped(desired, self.rates.applied[group], capped=self.rates.capped)
        if self.restore:
            self.rates.give_back()

    # ---- measuring and deciding

    def _tried(self, closures: list[Closure], lr_ref: float, shape: float) -> Measurement:
        """Tries the coming step at some lrs; whatever goes wrong becomes the `failure`."""
        limit = self._state.figures["lr_limit"]
        try:
            found = self._instrument.try_steps(
                closures,
                self.rates.present_shares(),
                lambda found: self._controller.lr_to_try(found, limit, lr_ref, shape, measured=False),
            )
        except Exception as error:  # noqa: BLE001 (raised again or recorded)
            found = self._excused(error)
        self._heard(found)
        return replace(found, lr_limit=limit)

    def _try(self, closures: list[Closure]) -> None:
        """Between measurements, while the cap binds: lets trial steps alone move the learned margin."""
        state = self._state
        found = self._tried(closures, self.rates.wanted, self.rates.shape)
        state.count(found)
        state.trial_cost += found.cost
        _, moved = self._controller.settle_trial(found, self.rates.wanted, self.rates.shape)
        self.apply()
        if moved is not None or found.failure is not None:
            action: Action = "margin" if moved is not None else "hold"
            lr = self.rates.applied[self.rates.reference]
            self._record(action, moved or f"{found.failure}; the cap {state.cap:.3g} stays", found, lr, lr)

    def _measured(self, closures: list[Closure], alarm: bool) -> Measurement:
        """Measures the coming step; whatever goes wrong becomes the measurement's `failure`."""
        state, control, lr_ref, shape = self._state, self._controller, self.rates.wanted, self.rates.shape
        shares, flips = self.rates.present_shares(), state.flips
        control.starts(self._rules())
        try:
            found = self._instrument.measure(
                _neighbours.watched(self, closures),
                shares,
                state,
                budget=control.affordable(alarm=alarm),
                fixed=self._probe is not None,
                search_from=self.rates.lr_ref / self.policy.trial_slack,
                try_lr=lambda found: control.lr_to_try(found, control.in_force(found.lr_limit), lr_ref, shape),
            )
            if found.note == UNSCALED:
                self._warn_once("scaled", f"safe_lr could not measure: {found.failure}.")
            if found.failure is not None and self._on_failure == "raise":
                raise MeasurementFailed(found.failure, found.num_matvecs)
        except Exception as error:  # noqa: BLE001 (raised again or recorded)
            found = self._excused(error)
        if found.failure is None:
            self.rates.shares = shares
            state.hvp = found.hvp
        else:
            state.flips = flips  # those of the limit that stays in force
        state.measurements += 1
        state.count(found)
        self._heard(found)
        self.last_measurement = replace(found, vectors={})
        if not _neighbours.alone(self) and _neighbours.newly_sharing(self):
            self._warn_once(
                "joint",
                "two safe_lr schedulers act on one loss, each as if the other's parameters stood still. Their joint "
                "limit can be half of each: give both optimizers to one CoherenceGuard([a, b]).",
            )
        return found

    def _heard(self, found: Measurement) -> None:
        if self.rewinder is not None:
            self.rewinder.heard(found.loss)

    def _excused(self, error: Exception) -> Measurement:
        """Turns an error into a failed measurement, unless the user wants it raised or it asks training to stop."""
        if self._on_failure == "raise" or is_stop_request(error):
            raise error
        first_line = next(iter(str(error).splitlines()), "")
        failure = f"{type(error).__name__}: {first_line}"
        under = "at the desired lr, UNPROTECTED" if self._state.cap is None else f"under the cap {self._state.cap:.3g}"
        self._warn_once("failure", f"safe_lr could not measure ({failure}); training goes on {under}.")
        return Measurement(bound=self.settings.bound, failure=failure, cost=COST_OF_GRAPH)

    def _decide(self, found: Measurement, jump: str | None) -> None:
        """Turns a measurement into a margin, a cap and applied lrs; `jump` says what looked wrong, if anything did."""
        state, group = self._state, self.rates.reference
        before = self.rates.applied[group]
        if found.failure is None:
            self._instrument.keep(found)
            found = self._controller.weighed(found, self.rates.wanted, self.rates.shape, alarm=jump is not None)
            state.moving = self.ensemble.moving()
        _, moved = self._controller.settle(found, lr_ref=self.rates.wanted, jump=jump, shape=self.rates.shape)
        self.apply()
        after = self.rates.applied[group]
        if found.failure is None:
            state.worst_utilisation = max(after / found.lr_limit, state.worst_utilisation or 0.0)
        if moved is not None:
            self._record("margin", moved, replace(found, num_matvecs=0, cost=0.0, seconds=0.0), after, after)
        self._record(*state.explain(found, before, after, capped=self.rates.capped), found, before, after)

    def _tune(self, found: Measurement, alarm: bool) -> None:
        """After a measurement: moves betas. P goes on as it was; what b1 does to c, the limit follows."""
        state, group = self._state, self.rates.reference
        before = self.rates.applied[group]
        gamma = None if alarm or found.failure is not None else found.gamma
        told = self._tuner.settle(gamma, self._controller.press(self.rates.wanted), state.updates)
        if state.cap is not None and self.settings.bound == "momentum" and any(said[0] == "betas" for said in told):
            self._controller.follow(self._rules())
            state.following = True  # c of a young average goes on moving
            state.cap = min(state.cap, state.margin * state.figures["lr_limit"])
            self.apply()
        limit = state.figures.get("lr_limit", math.nan)
        found = replace(found, lr_limit=limit, failure=None, num_matvecs=0, cost=0.0, seconds=0.0)
        for action, reason in told:
            self._record(action, reason, found, before, self.rates.applied[group])

    def _record(self, action: Action, reason: str, found: Measurement, before: float, after: float) -> None:
        group = self.rates.reference
        desired, betas = self.rates.asked[group], decays(self.ensemble.param_groups[group])
        decision = self._state.decision(action, reason, found, group, (desired, before, after), betas)
        self.history.append(decision)
        self._state.course.decide(decision)
        if self._log:
            self._log.decide(decision)

    # ---- what loggers are told

    def _config(self) -> dict[str, Any]:
        return {
            **asdict(self.settings),
            **asdict(self.policy),
            **asdict(self._tuner.tuning),
            "optimizer": self.ensemble.name,
            "seed": self._seed,
        }

    def _row(self) -> dict[str, Any]:
        group = self.rates.reference
        betas = decays(self.ensemble.param_groups[group])
        return self._state.row(self.rates.applied, self.rates.asked, group, betas, capped=self.rates.capped)

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warn_user(message)


def _leave(handles: Sequence[RemovableHandle], rates: Rates, tuner: Tuner) -> None:
    for handle in handles:
        handle.remove()
    rates.give_back()
    tuner.give_back()
