"""`CoherenceScheduler`: a drop-in for a learning-rate scheduler that keeps lr below the stability limit."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from safe_lr.decisions import Decision, Summary
from safe_lr.ensemble import unwrapped
from safe_lr.guard import CoherenceGuard
from safe_lr.loggers import Logger
from safe_lr.measurement import Measurement
from safe_lr.objective import Closures
from safe_lr.preconditioners import Preconditioner
from safe_lr.tuning import Range

Schedule = Callable[[Optimizer], LRScheduler] | LRScheduler | None


class CoherenceScheduler(LRScheduler):
    """A torch scheduler whose lr stays below the edge of stability.

        lr = min(desired lr, cap),    cap = margin * lr_limit

    The desired lr is that of any torch schedule inside; the limit is measured from time to time, just before an update,
    on the batch that was observed. While nothing is capped every lr is torch's, to the bit, and no cap ever leaks into
    a schedule that computes its next lr from the present one. `param_groups` show the applied lr. In a `SequentialLR`
    or a `ChainedScheduler` the cap exists inside `optimizer.step()` only, since the other members compute from what
    they find in `param_groups`; `get_last_lr()` tells the applied lr there too.

        scheduler = CoherenceScheduler(optimizer, schedule=lambda opt: CosineAnnealingLR(opt, T_max=steps))
        for x, y in loader:
            loss = criterion(model(x), y)
            loss.backward()
            scheduler.observe(lambda: criterion(model(x), y))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    Args:
        optimizer: Any of `torch.optim` but Rprop and LBFGS, several of other packages (docs/theory.md has the table),
            or one that was registered; in a wrapper that keeps nothing of its own (accelerate's) too.
        schedule: Makes the desired schedule, or is one made on this optimizer; None keeps the optimizer's own lr.
        bound: `momentum` (c / gamma, exact with momentum), `coherence` (2 / gamma) or `lemma1` (2 p_min / lambda_max,
            the source paper's worst case, usually a hundred times too small for Adam).
        margin: The fraction of the limit that may be used: a number in (0, 1] kept strictly, or "auto", learned by
            trial steps on the measured batch (a margin above 1 is recorded as `beyond_linear_limit`). Once the cap has
            held lr back for 100 updates it is annealed, to a half after 1,600 (Muon's to an eighth, Adagrad's not), and
            the cap rises no further than it was.
        margin_max: Largest learned margin (with margin="auto"); 1 never leaves the linearly stable region.
        trial_slack: With a learned margin the coming step lengthened by `1 / trial_slack` (twice as long by default)
            must not raise the batch's loss, or the margin falls (in the first 13 updates: the coming step itself); if
            one 4 times as long still is fine too, it rises.
        growth: Largest factor by which the cap (never the schedule) rises in one update. In the first 13 updates the
            cap follows the limit freely, since bias correction makes it rise tenfold.
        curvature: `hessian`; `empirical-fisher` (closures return per-example losses, shape (B,)), `gauss-newton` or
            `fisher` (they return the pair (outputs, loss_of_outputs)).
        hvp: How Hessian products are made: `exact` (double backward on one retained graph), `lean` (the graph built
            anew for each), `finite-difference` (central), `one-sided` (differences at one gradient a product instead of
            two), or `auto`: one-sided where the loss is smooth (kinks of ReLU and its like are taken out first; no
            autocast) and large enough for them to pay, else exact, lean where memory runs out, central differences
            where nothing else works. Differences are checked, and exact after all where they fail.
        probe: A fixed closure, or several, to measure on instead of the observed batches: warm starts then pay.
        tol: Relative residual at which the eigen-solver stops. Limits use `value + residual`.
        warm_start: Start from the last eigenvector, which then is part of `state_dict`.
        max_matvecs: Largest number of Hessian-vector products for one measurement.
        max_basis: Largest number of parameter-sized Krylov vectors kept at a time (at least 2), for models so large
            that one a product, five to ten in all, does not fit. None keeps all.
        max_overhead: Gradient evaluations spent on measuring per update, in the long run ...
        credit: ... beside this many, spent early and on alarms. Counts, not clocks: runs repeat bit for bit. A quarter
            is kept for alarms; below about 11 (18 under `lemma1`) the first updates go unmeasured.
        lambda_every: Every how many measurements lambda_max itself is solved for (gamma always is).
        follow_limit: No lr to choose: lr is the cap itself, and a schedule only shapes it (its lr in units of its
            largest one is the part of the cap to use). The optimizer's own lr then sets the groups' ratios, and is what
            is used while nothing could be measured.
        tune_betas: Whether betas (RMSprop's alpha) move inside their ranges, by steps that the first update hardly
            shows: from your own values towards a shorter memory of squared gradients and a longer one of gradients
            while the cap holds lr back, back again where gamma did not fall or there is slack. A group whose betas
            someone else writes is left alone. `close()` gives your own back.
        beta1_range, beta2_range: The ranges; a beta outside of its range stays as it is.
        tune_eps: Whether eps moves up in the same way, which lifts P's smallest entries; never above the roots of the
            second moment of nine tenths of the coordinates.
        eps_range: Its range.
        rewind: Go back in memory where a step made the loss jump or turned anything non-finite: at most this many times
            without healthy progress in between (True: 5), then `RewindsExhausted` says what was tried. An update whose
            batch is to blame (a gradient that is not finite, or more than thirty times the usual) is dropped instead.
            Tell `observe` the loss: a batch that only the loss shows to be far out is then dropped too. A snapshot is
            kept of parameters, optimizer state, the buffers (BatchNorm's) of the modules that the closure names, the
            random streams (a second rewind in a row leaves those, so that a batch drawn from them is not met again),
            the schedule inside, and margin and cap; the data loader's position is not part of it, and a schedule
            advances by each `step()` of yours, also where the update was not made. Costs that memory
            (`rewind_memory()`; about three times the parameters with Adam), a copy of it every ten updates, and two
            forward passes, with one more copy of the parameters meanwhile, when something looks wrong. Where the cap
            holds lr back, one forward pass before each copy tells the batch's loss under the snapshot so far (two where
            `observe` is not told the loss, and the first time; three where what it is told does not settle it): where
            the present loss is 1.5 times that, margin and cap are cut. All of that is in `summary().cost`, beside
            `max_overhead`, not within it. An overflow that a GradScaler skips is none of it. Under torch.distributed
            all ranks decide together, by one small all-reduce an update.
        rewind_device: Where the snapshot lies ("cpu"); None for where the parameters do.
        process_group: Whose ranks decide together about going back; None for torch.distributed's default group.
        preconditioner: None for what is registered, "from-update" to infer P from the update of an optimizer that is
            not, or a `Preconditioner`.
        on_failure: `hold` the last cap and record why, or `raise`.
        loggers: "auto" (W&B if a run is active), a `Logger`, "wandb", "jsonl", "console", "tensorboard" or "trackio",
            several of these, or None.
        log_path: Where to write the record of decisions (JSON lines), if anywhere.
        seed: Seed of the eigen-solver's start vectors.

    Raises:
        TypeError: Not an optimizer, one that is not known (the message says how to register it), or a schedule of
            another optimizer.
        ValueError: A choice that does not exist, a number out of range, nothing that requires grad.
        MemoryError: There is no room for the snapshot of `rewind`; the message has the figures.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> curvature = torch.tensor([2.0, 0.5])                               # H = diag(4, 1): lr_limit = 2 / 4
        >>> optimizer = torch.optim.SGD([x], lr=100.0)
        >>> scheduler = CoherenceScheduler(optimizer, margin=0.5)
        >>> for _ in range(50):
        ...     loss = (x**2 * curvature).sum()
        ...     loss.backward()
        ...     scheduler.observe(lambda: (x**2 * curvature).sum())
        ...     _ = optimizer.step()
        ...     scheduler.step()
        ...     optimizer.zero_grad()
        >>> [round(lr, 3) for lr in scheduler.get_last_lr()], scheduler.get_desired_lr(), bool(loss < 1e-6)
        ([0.25], [100.0], True)

    References:
        The source paper, "Extending stability analysis to adaptive optimization algorithms using loss surface
        geometry", Eq. 16-17, 20-21, 23.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule = None,
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
        follow_limit: bool = False,
        tune_betas: bool = False,
        beta1_range: Range = (0.9, 0.95),
        beta2_range: Range = (0.99, 0.999),
        tune_eps: bool = False,
        eps_range: Range = (0.0, 1e-3),
        rewind: bool | int = False,
        rewind_device: torch.device | str | None = None,
        process_group: Any = None,
        preconditioner: str | Preconditioner | None = None,
        on_failure: str = "hold",
        loggers: str | Logger | Sequence[str | Logger] | None = "auto",
        log_path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(optimizer, (list, tuple)) and any(isinstance(member, Optimizer) for member in optimizer):
            raise TypeError(
                "a scheduler has one optimizer; for several on one loss keep their schedules and cap them together: "
                "CoherenceGuard([a, b])"
            )
        # torch's own __init__ is not called: it would step, and keep an epoch count beside the inner schedule's.
        self._guard = CoherenceGuard(
            optimizer,
            bound=bound,
            margin=margin,
            margin_max=margin_max,
            trial_slack=trial_slack,
            growth=growth,
            curvature=curvature,
            hvp=hvp,
            probe=probe,
            tol=tol,
            warm_start=warm_start,
            max_matvecs=max_matvecs,
            max_basis=max_basis,
            max_overhead=max_overhead,
            credit=credit,
            lambda_every=lambda_every,
            follow_limit=follow_limit,
            tune_betas=tune_betas,
            beta1_range=beta1_range,
            beta2_range=beta2_range,
            tune_eps=tune_eps,
            eps_range=eps_range,
            rewind=rewind,
            rewind_device=rewind_device,
            process_group=process_group,
            preconditioner=preconditioner,
            on_failure=on_failure,
            loggers=loggers,
            log_path=log_path,
            seed=seed,
            restore=False,
        )
        try:
            self._schedule, self._scheduled = _made(schedule, optimizer), schedule is not None
        except BaseException:
            self._guard.close()  # no hook stays behind
            raise
        self._given = optimizer
        self._guard.rates.read()
        if self._guard.rewinder is not None and self._scheduled:
            self._guard.rewinder.schedule = self._schedule

    # ---- measuring

    def observe(self, closure: Closures, loss: Tensor | float | None = None) -> None:
        """Stores a closure for the coming update: returns the current batch's loss, with its graph, no `backward()`.

        A list, one closure for each micro-batch of an accumulated gradient, is measured as its mean, at the memory of
        one. Evaluated only when a measurement is due; dropped when the update is over. `loss`, the loss that was
        differentiated, lets `rewind` see a jump of it at no cost.
        """
        self._guard.observe(closure, loss)

    def measure(self, closure: Closures | None = None) -> Measurement:
        """Measures now, with all three limits, and changes nothing; see `safe_lr.measure`."""
        return self._guard.measure(closure)

    @property
    def due(self) -> bool:
        """Whether the coming update will measure; an alarm can make one that is not due do so too."""
        return self._guard.due

    @property
    def history(self) -> deque[Decision]:
        """The decisions so far, the newest last; the last 10,000 are kept."""
        return self._guard.history

    @property
    def last_decision(self) -> Decision | None:
        """The newest decision, None before the first."""
        return self._guard.last_decision

    @property
    def last_measurement(self) -> Measurement | None:
        """The newest measurement, None before the first."""
        return self._guard.last_measurement

    def summary(self) -> Summary:
        """Returns the run so far in numbers; `print` it for what to make of them."""
        return self._guard.summary()

    def rewind_memory(self) -> int:
        """Returns the bytes that the snapshot for `rewind` takes: parameters + optimizer state + buffers; 0 without."""
        return self._guard.rewind_memory()

    def close(self) -> None:
        """Detaches from the optimizer, gives its own lr, betas and eps back, closes the loggers. Safe to call twice."""
        self._guard.close()

    # ---- being a torch scheduler

    def step(self, metrics: Any = None) -> None:
        """Advances the schedule inside by one; call it after `optimizer.step()`, or once an epoch, as its schedule
        wants.

        Args:
            metrics: What a ReduceLROnPlateau inside watches; nothing else takes it.

        Raises:
            TypeError: `metrics` with another schedule, or none with a ReduceLROnPlateau.
        """
        plateau = isinstance(self._schedule, ReduceLROnPlateau)
        if metrics is not None and not plateau and _called_by_torchs_combination():
            with self._desired():  # torch < 2.8: SequentialLR starts its next member by step(0)
                self._schedule.step(metrics)
            return
        if plateau != (metrics is not None):
            inner = f"a {type(self._schedule).__name__} inside" if self._scheduled else "no ReduceLROnPlateau inside"
            raise TypeError(
                "the schedule inside is a ReduceLROnPlateau: call step(metrics), with the validation loss"
                if plateau
                else f"step() takes no argument with {inner}, got {metrics!r}: metrics are for a ReduceLROnPlateau, "
                "and an epoch is not needed"
            )
        with self._desired():
            self._schedule.step(metrics) if plateau else self._schedule.step()

    def get_last_lr(self) -> list[float | Tensor]:
        """Returns the applied lr of each group (a copy where it is a tensor)."""
        if self._guard.restore:
            return [*self._guard.coming_lrs()]
        return [lr.clone() if isinstance(lr := group["lr"], Tensor) else lr for group in self.optimizer.param_groups]

    def get_desired_lr(self) -> list[float]:
        """Returns the lr of each group that the schedule asks for; under `follow_limit` the applied one."""
        rates = self._guard.rates
        return rates.applied if rates.follow else rates.present()

    def get_lr(self) -> list[float | Tensor]:
        """Returns the schedule's own next lr; torch's schedulers call it, users want `get_last_lr`."""
        return self._schedule.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Returns the schedule's state and ours: numbers, lists and tensors, loadable with `weights_only=True`."""
        return {"schedule": self._schedule.state_dict(), "guard": self._guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores `state_dict()`; the optimizer's own state dict is loaded separately, before or after.

        Raises:
            ValueError: The state is not a `CoherenceScheduler`'s, or has another number of parameter groups.
        """
        missing = {"schedule", "guard"} - set(state_dict if isinstance(state_dict, dict) else ())
        if missing:
            raise ValueError(
                f"this is not a CoherenceScheduler's state: {', '.join(sorted(missing))} missing. To go on from a "
                "plain schedule's checkpoint, load it into that schedule and pass it as schedule=."
            )
        self._guard.load_state_dict(state_dict["guard"])
        self._schedule.load_state_dict(state_dict["schedule"])

    # SequentialLR and ChainedScheduler reach into these.

    @property
    def optimizer(self) -> Optimizer:  # type: ignore[override]
        """The optimizer whose lr this is, as it was given: a wrapper (accelerate's) is not taken off."""
        # Both read it when they are made, and nothing else tells a member that it has become one.
        if _called_by_torchs_combination():
            self._guard.restore = True
            if self._guard.rewinder is not None:
                self._guard.rewinder.schedule = None  # lr is its siblings' too, and those are not known
            self._guard.rates.give_back()
        return self._given

    @property
    def _last_lr(self) -> list[float | Tensor]:  # type: ignore[override]
        return self.get_last_lr()

    @property
    def last_epoch(self) -> int:
        """The inner schedule's count."""
        return self._schedule.last_epoch

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        self._schedule.last_epoch = value

    def _initial_step(self) -> None:
        with self._desired():
            self._schedule._initial_step()

    def _update_lr(self, epoch: int | None = None) -> None:
        with self._desired():
            self._schedule._update_lr(epoch)

    def _desired(self) -> _Desired:
        return _Desired(self._guard)

    def __setattr__(self, name: str, value: Any) -> None:
        # ... and what is written to it, as to a torch scheduler, is the schedule's too.
        schedule = self.__dict__.get("_schedule")
        if schedule is not None and name not in self.__dict__ and name in vars(schedule) and name != "last_epoch":
            setattr(schedule, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # Anything else that torch or a trainer reads off a scheduler (base_lrs, T_max, ...) is the schedule's.
        schedule = self.__dict__.get("_schedule")
        if schedule is None:
            raise AttributeError(name)
        return getattr(schedule, name)


class _Desired:
    """Lets the schedule see its own lrs; on the way out takes over what it wrote and applies the cap."""

    def __init__(self, guard: CoherenceGuard) -> None:
        self.guard = guard

    def __enter__(self) -> None:
        self.guard.rates.give_back()

    def __exit__(self, *error: object) -> None:
        self.guard.rates.read()
        if not self.guard.restore:
            self.guard.apply()


def _called_by_torchs_combination() -> bool:
    return isinstance(sys._getframe(2).f_locals.get("self"), (SequentialLR, ChainedScheduler))


def _made(schedule: Schedule, optimizer: Optimizer) -> LRScheduler:
    if schedule is None:
        return ConstantLR(optimizer, factor=1.0, total_iters=0)
    made: Any = schedule(optimizer) if callable(schedule) and not isinstance(schedule, LRScheduler) else schedule
    if not isinstance(made, LRScheduler):
        raise TypeError(
            "schedule must be a torch scheduler or make one, schedule=lambda opt: CosineAnnealingLR(opt, T_max=1000); "
            f"got {'a function that returned ' * (callable(schedule) and made is not schedule)}{type(made).__name__}"
        )
    owner: Any = getattr(made, "optimizer", None)
    if unwrapped(owner) is not unwrapped(optimizer):
        raise TypeError(
            "the schedule belongs to another optimizer; make it on this one: schedule=lambda opt: StepLR(opt, 30)"
        )
    return made
