"""A run's accounts: what it must remember, what it has cost, and how its decisions are told."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from safe_lr.advice import Course, advise
from safe_lr.decisions import Action, Decision, Summary
from safe_lr.measurement import NOT_DETERMINISTIC, Measurement
from safe_lr.norms import NormTrend
from safe_lr.operators import DIFFERENCES
from safe_lr.policies import MULTIPLE_START, Trial

SUMMED = 1.9
"""From this ratio of training gradient to the closure's own on, several backward passes have probably been added up."""

SHORTENED = 0.995
"""What is told with two digits is told to be annealed from here on."""

FIGURES = ("lr_limit", "gamma", "lambda_max", "p_min", "p_eff")
"""A measurement's figures that stay in force until the next one."""

COUNTED = (
    "updates", "held", "measurements", "failures", "num_matvecs", "cost", "look_cost", "trial_cost", "seconds",
    "capped_steps", "first_capped_step", "worst_utilisation", "hvp", "checked", "course",
)  # fmt: skip
"""What a run has done and spent stays so, also where it goes back to an earlier state."""

LIMITED = (
    "cap", "crest", "measured_limit", "decay", "flips", "share", "votes", "alone", "moving", "following", "figures",
    "expected_cost", "gap", "measured_at", "usual", "lowest", "cuts",
)  # fmt: skip
"""What a measurement leaves behind."""


@dataclass
class State:
    """Everything that a resumed run must remember, as plain numbers."""

    multiple: float  # the learned multiple of the noise limit
    margin: float  # in force
    expected_cost: float  # of the next routine measurement
    updates: int = 0
    held: int = 0  # updates at which the cap held lr back, the first one apart: the run's length as far as lr is ours
    holding: bool = False  # whether it does so at the coming one
    cap: float | None = None
    crest: float | None = None  # what the cap, before annealing, may not rise above again in a steady run
    measured_limit: float = math.nan  # `figures["lr_limit"]` follows it and c from one measurement to the next
    decay: float = 0.0  # the largest decoupled weight decay at that measurement, in 1 / lr
    flips: list[float | None] = field(default_factory=list)  # each parameter's c at that measurement, None: no gradient
    share: float = 1.0  # the noise limit as a part of lr_limit, at the coming step
    votes: list[float] = field(default_factory=list)  # the newest limits, each divided by its c
    alone: bool = False  # whether the limit in force is a single low one, on a witness, instead of their median
    moving: list[bool] = field(default_factory=list)  # which parameters had a gradient at that measurement
    following: bool = False  # whether c still moves
    decays: list[tuple[float | None, float | None]] = field(default_factory=list)  # of each group at the last update
    due_at: int = 0
    gap: int = 0  # updates between routine measurements; 0 before the first
    hvp: str | None = None  # how the last good measurement made its products
    checked: bool = False  # whether the closure was seen to be deterministic, or not to be
    trial: Trial | None = None  # what the last trial steps found
    tried_at: int = 0  # `held` at them
    told: float = MULTIPLE_START  # the multiple when a decision last told of it
    calm_until: int = 0  # after a rewind or a cut at a rise: updates until trial steps may raise the multiple again
    retry: int = 0  # updates until a failed measurement is tried again; 0 after a good one
    trial_at: int = 0
    trial_gap: int = 2
    trend: NormTrend = field(default_factory=NormTrend)
    measured_at: int = 0  # updates at the last good measurement
    usual: float | None = None  # the trend's mean then, None where it was not known
    lowest: float | None = None  # the lowest it has been since then, or since a rise from there has cut the margin
    cuts: int = 0  # by such rises, since then
    heard: list[float] = field(default_factory=list)  # the last two losses that measurements and trial steps met
    measurements: int = 0
    verified_at: int = 0  # the last one whose differences exact products have checked
    failures: int = 0
    num_matvecs: int = 0
    cost: float = 0.0
    look_cost: float = 0.0  # the part of it spent on comparing with a snapshot
    trial_cost: float = 0.0  # the part of it spent on trial steps between measurements
    seconds: float = 0.0
    capped_steps: int = 0
    first_capped_step: int | None = None
    worst_utilisation: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    course: Course = field(default_factory=Course)  # what advice is made of

    def felt(self, norm: float) -> None:
        """Takes in the norm of the coming update's gradient."""
        self.trend = self.trend.after(norm)
        means = [mean for mean in (self.lowest, self.trend.known) if mean is not None]
        self.lowest = min(means, default=None)

    def hear(self, found: Measurement) -> None:
        """Takes in the loss of a batch that was measured, or that trial steps were made on; less is better."""
        if found.loss is not None:
            self.heard = [*self.heard, -found.loss if found.maximize else found.loss][-2:]

    @property
    def falling(self) -> bool:
        """Whether the last loss that was met is below the one before."""
        return len(self.heard) == 2 and self.heard[1] < self.heard[0]

    def looked(self, cost: float) -> None:
        """Adds what a look back at a snapshot cost; the budget of measurements does not pay for it."""
        self.cost += cost
        self.look_cost += cost

    def count(self, found: Measurement) -> None:
        """Adds what a measurement or trial cost."""
        self.failures += found.failure is not None
        self.num_matvecs += found.num_matvecs
        self.cost += found.cost
        self.seconds += found.seconds
        if found.failure is None:
            self.course.measured(
                differences=found.num_matvecs > 0 and found.hvp == "finite-difference",
                inferred=found.inferred,
                unrepeatable=found.note == NOT_DETERMINISTIC,
                summed=found.gradient_ratio if (found.gradient_ratio or 0.0) > SUMMED else None,
            )

    def stepped(self, desired: float | None, applied: float, *, capped: bool) -> None:
        """Counts an update with the reference group's lrs; the desired one is None where lr follows the cap."""
        if capped:
            self.capped_steps += 1
            if self.first_capped_step is None:
                self.first_capped_step = self.updates
        limit = self.figures.get("lr_limit")
        self.course.step(self.updates, desired=desired, applied=applied, cap=self.cap, lr_limit=limit)
        self.updates += 1
        self.held, self.holding = self.held + self.holding, False  # one without gradients is none

    def keep(self, found: Measurement) -> None:
        """Keeps a measurement's figures until the next one."""
        self.measured_limit, self.following = found.lr_limit, True
        self.measured_at = self.updates
        self.usual = self.lowest = self.trend.known
        self.cuts = 0
        self.figures.update({name: value for name in FIGURES if (value := getattr(found, name)) is not None})

    def explain(
        self,
        found: Measurement,
        before: float,
        after: float,
        *,
        capped: bool,
        annealed: float = 1.0,
        highest: float = math.inf,
    ) -> tuple[Action, str]:
        """Returns what a measurement did to the lr of the reference group, and the sentence that says why.

        Args:
            found: The measurement.
            before, after: That lr.
            capped: Whether it is below the desired one.
            annealed: What the updates at the cap have left of the margin.
            highest: What they have left of the crest, which the cap may not rise above; infinite where there is none.
        """
        if found.failure is not None:
            held = "there is no cap yet: the desired lr is applied"
            if self.cap is not None:
                held = f"the last cap {self.cap:.3g} is held"
            return "hold", f"{found.failure}; {held}"
        limit = "limit" if found.curvature != "trial" else "largest lr that lowers the batch's loss (no limit exists)"
        allowed = f"{self.margin:.3g} x {limit} {found.lr_limit:.3g}"
        target = min(self.margin * found.lr_limit, highest)
        crest = self.crest if self.crest is not None and target == highest else None
        left = annealed if crest is None else highest / crest
        shortened = f"annealed to {left:.2g} after {self.held} updates at the cap"
        if crest is not None:
            allowed = f"its crest {crest:.3g}{f', {shortened}' * (left < SHORTENED)}; {allowed} would be more"
        elif left < SHORTENED:
            allowed += f" (the margin {shortened})"
        if found.hvp in DIFFERENCES:
            allowed += f" (products by {'one-sided ' * (found.hvp == 'one-sided')}finite differences)"
        if found.note is not None:
            allowed += f" ({found.note})"
        if found.inferred:
            allowed += " (P inferred from the optimizer's own update)"
        if (found.gradient_ratio or 0.0) > SUMMED:
            allowed += (
                f" (the training gradient is {found.gradient_ratio:.3g} times the closure's: where backward() calls "
                "add up, the closure must return the sum of their losses)"
            )
        if after < before:
            there = math.isclose(self.cap or 0.0, target, rel_tol=1e-3)
            allowed = f"= {allowed}" if there else f", on its way to {allowed}"
            return "cap", f"lr {before:.3g} is above the cap {self.cap:.3g}{' ' * there}{allowed}"
        if after > before:
            return "raise", f"lr may rise from {before:.3g} to the cap {self.cap:.3g}, on its way to {allowed}"
        if capped:
            return "keep", f"lr stays at the cap {self.cap:.3g}, on its way to {allowed}"
        return "keep", f"lr {after:.3g} is within the cap {self.cap:.3g} <= {allowed}"

    def decision(
        self,
        action: Action,
        reason: str,
        found: Measurement,
        group: int,
        lrs: tuple[float, float, float],
        betas: tuple[float | None, float | None],
    ) -> Decision:
        """Returns the decision that says so, with all figures behind it.

        Args:
            action, reason: What was done, and why.
            found: The measurement or trial; `lr_limit` NaN where it found none.
            group: Index of the reference group.
            lrs: Its desired lr, and its applied lr before and after.
            betas: Its decays of the first and second moment.
        """
        limited = found.failure is None and math.isfinite(found.lr_limit)
        solved = found.gamma is not None
        same = ("lambda_max", "gamma", "p_min", "p_min_all", "p_eff", "num_matvecs", "cost", "seconds", "loss")
        return Decision(
            step=self.updates,
            group=group,
            action=action,
            reason=reason,
            lr_desired=lrs[0],
            lr_before=lrs[1],
            lr_after=lrs[2],
            margin=self.margin,
            utilisation=lrs[2] / found.lr_limit if limited else None,
            beta1=betas[0],
            beta2=betas[1],
            cap=self.cap,
            lr_limit=found.lr_limit if limited else None,
            limits=dict(found.limits),
            residual=found.residual if solved else None,
            converged=found.converged if solved else None,
            trial_lr=found.trial_lr,
            trial_loss=found.trial_loss,
            beyond_linear_limit=self.margin > 1,
            failure=found.failure,
            **{name: getattr(found, name) for name in same},
        )

    def row(
        self,
        applied: list[float],
        desired: list[float],
        group: int,
        betas: tuple[float | None, float | None],
        *,
        capped: bool,
    ) -> dict[str, Any]:
        """Returns one update's scalars, as `Logger.step` takes them."""
        limit = self.figures.get("lr_limit")
        row: dict[str, Any] = {
            "step": self.updates,
            "lr": applied[0],
            "lr_desired": desired[0],
            "cap": self.cap,
            "margin": self.margin,
            "utilisation": applied[group] / limit if limit else None,
            "beta1": betas[0],
            "beta2": betas[1],
            "capped": int(capped),
            "cost": self.cost,
            **{name: self.figures.get(name) for name in FIGURES},
        }
        for index in range(1, len(applied)):
            row[f"lr/g{index}"], row[f"lr_desired/g{index}"] = applied[index], desired[index]
        return row

    def summary(self) -> Summary:
        """Returns the run so far, with advice."""
        told = Summary(
            steps=self.updates,
            measurements=self.measurements,
            failures=self.failures,
            num_matvecs=self.num_matvecs,
            cost=self.cost,
            overhead=self.cost / max(1, self.updates),
            capped_steps=self.capped_steps,
            first_capped_step=self.first_capped_step,
            worst_utilisation=self.worst_utilisation,
            margin=self.margin,
            cap=self.cap,
            lr_limit=self.figures.get("lr_limit"),
            seconds=self.seconds,
            **self.course.figures(),
        )
        return replace(told, advice=tuple(map(str, advise(told))))

    def gone_back(self, saved: dict[str, Any]) -> State:
        """Returns an earlier state, from its `state_dict()`, with what has been counted and spent since.

        A measurement is due at once. Where none had been made at that time, the limit known now stays in force.
        """
        kept = COUNTED + (LIMITED if saved["cap"] is None else ())
        since = {name: getattr(self, name) for name in kept}
        return replace(State.from_state_dict(saved), **since, due_at=self.updates, trial_at=self.updates, retry=0)

    def state_dict(self) -> dict[str, Any]:
        """Returns numbers in dicts, nothing else."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> State:
        """Restores `state_dict()`."""
        return cls(
            **{
                **state_dict,
                "trend": NormTrend(**state_dict["trend"]),
                "figures": dict(state_dict["figures"]),
                "flips": list(state_dict["flips"]),
                "votes": list(state_dict["votes"]),
                "moving": list(state_dict["moving"]),
                # not in states of the first versions:
                "course": Course.from_state_dict(state_dict.get("course", {})),
                "told": state_dict.get("told", state_dict["multiple"]),
                "held": state_dict.get("held", state_dict["updates"]),
                "tried_at": state_dict.get("tried_at", state_dict["updates"]),
                "decays": [(first, second) for first, second in state_dict.get("decays", [])],
            }
        )
