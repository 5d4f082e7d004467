"""`CoherenceGuard`: the engine that measures, decides and caps around `optimizer.step()`."""

from __future__ import annotations

import functools
import os
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from safe_lr.accounts import State
from safe_lr.closures import Closure
from safe_lr.controller import Controller
from safe_lr.decider import Decider
from safe_lr.decisions import Decision, Summary
from safe_lr.ensemble import Ensemble
from safe_lr.exits import close_at_exit
from safe_lr.hooks import around_updates
from safe_lr.instrument import Instrument
from safe_lr.loggers import Logger, resolve
from safe_lr.loggers.broadcast import Broadcast
from safe_lr.measurement import Measurement, measure
from safe_lr.neighbours import Neighbours
from safe_lr.objective import Closures, as_list
from safe_lr.policies import Policy
from safe_lr.preconditioners import Preconditioner
from safe_lr.rates import Rates
from safe_lr.rewind import rewinds_allowed
from safe_lr.rewinder import Rewinder
from safe_lr.settings import Settings
from safe_lr.tuner import Tuner
from safe_lr.tuning import Range, Tuning

JOINT = (
    "two safe_lr schedulers act on one loss, each as if the other's parameters stood still. Their joint limit can be "
    "half of each: give both optimizers to one CoherenceGuard([a, b])."
)

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
        process_group: Any = None,
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
            unaveraged=self.ensemble.unaveraged,
            follows_gradients=self.ensemble.follows_gradients,
            searched="trial" in self.ensemble.kinds,
            tolerance=self.ensemble.tolerance,
            head_start=self.ensemble.head_start,
            annealing=self.ensemble.annealing,
        )
        self.policy = self._controller.policy
        self._tuner = Tuner(self.ensemble, Tuning(tune_betas, beta1_range, beta2_range, tune_eps, eps_range))
        self.rates = Rates(self.ensemble, follow=follow_limit)
        self._instrument = Instrument(self.ensemble, self.settings, lambda_every, warm_start=warm_start, seed=seed)
        self._seed = seed
        self.restore = restore
        self._preconditioner = preconditioner
        most = rewinds_allowed(rewind)
        self.rewinder: Rewinder | None = None
        if most:
            self.rewinder = Rewinder(self.ensemble, most, rewind_device, tuner=self._tuner, process_group=process_group)
        self._observed: list[Closure] | None = None
        self._loss: Tensor | float | None = None
        self._closed = self._counting = False
        self._log = Broadcast(resolve(loggers, log_path), functools.partial(_begun, weakref.ref(self)))
        self._decider = Decider(
            self.ensemble,
            self._controller,
            self._instrument,
            self.rates,
            self._tuner,
            self.rewinder,
            self._log,
            raises=on_failure == "raise",
        )
        _neighbours.succeed(self)
        self.rates.read()  # an earlier guard has given the desired lrs back
        handles = around_updates(self.ensemble.members, self)
        # Once the guard is gone, or the process ends, the optimizer has its own lr and betas and no hook of ours, and
        # the loggers have been closed.
        self._at_exit = weakref.finalize(
            self, _leave, handles, self.rates, self._tuner, self._log, self._controller, os.getpid()
        )

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
        """Whether the coming update will measure; an alarm can make one that is not due do so too.

        Parameters that begin to move count once they have a gradient.
        """
        self.rates.read()
        return self._decider.due

    @property
    def history(self) -> deque[Decision]:
        """The newest decisions, at most 10,000."""
        return self._decider.history

    @property
    def last_measurement(self) -> Measurement | None:
        """The newest measurement, failed ones included; None before the first."""
        return self._decider.last_measurement

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
        last = self.last_measurement
        try:
            self.rates.read()
            if not self._counting:
                self.ensemble.count_from_now()
                self._counting = True
            watch = functools.partial(_neighbours.watched, self)
            self._decider.act(self._observed, self._probe, self._loss, watch)
        except BaseException:
            self.pause()  # there will be no update, and nothing that runs after it
            raise
        finally:
            self._observed = self._loss = None  # it binds late and holds a batch
        if self.last_measurement is not last and _neighbours.newly_sharing(self):
            self._decider.warn_once("joint", JOINT)

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
        """After one optimizer of several, or where no update follows: nobody else sees the capped lr."""
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
            self._log.step(self._decider.row())
        group = self.rates.reference
        desired = None if self.rates.follow else self.rates.desired[group]
        state.stepped(desired, self.rates.applied[group], capped=self.rates.capped)
        if self.restore:
            self.rates.give_back()

    # ---- what loggers are told

    def _config(self) -> dict[str, Any]:
        return {
            **asdict(self.settings),
            **asdict(self.policy),
            **asdict(self._tuner.tuning),
            "optimizer": self.ensemble.name,
            "seed": self._seed,
        }


def _begun(reference: weakref.ref[CoherenceGuard]) -> dict[str, Any]:
    """The settings, at the first record: from now on there is something to lose at exit."""
    guard = reference()
    if guard is None:  # it was dropped before anything happened
        return {}
    close_at_exit(guard)
    return guard._config()


def _leave(
    handles: Sequence[RemovableHandle], rates: Rates, tuner: Tuner, log: Broadcast, controller: Controller, process: int
) -> None:
    for handle in handles:
        handle.remove()
    rates.give_back()
    tuner.give_back()
    if log.started and os.getpid() == process:
        log.close(controller.state.summary().to_dict())
