"""A `Decision`: what was done to the learning rate at one step, and why.

Decisions are the product's memory. They are plain numbers and one sentence, so that they can be written to JSON, shown
in a table, compared between runs and ranks, and read by someone who was not there.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Action = Literal["keep", "cap", "raise", "margin", "betas", "eps", "drop", "rewind", "hold"]

ACTIONS: tuple[Action, ...] = get_args(Action)


@dataclass(frozen=True)
class Decision:
    """One decision about one parameter group, with its reason and the figures behind it.

    One scale multiplies every group's desired lr, so a decision speaks for all groups through the one with the largest
    desired lr, `group`. Figures that were not measured are None, never NaN.

    Attributes:
        step: Optimizer updates made before this one (0 for the first).
        group: Index of the parameter group with the largest desired lr.
        action: `keep` (lr stays as it is), `cap` (lr is lowered to the cap), `raise` (the cap lets lr rise), `margin`
            (the learned margin changed), `betas` or `eps` (they moved, or stay after what the last move did), `drop`
            (the update was not made, for its batch is to blame), `rewind` (the run went back to a snapshot), or `hold`
            (no usable measurement: the last cap stays; or betas or eps that are left alone).
        reason: One plain sentence with its numbers.
        lr_desired: The lr that the schedule asks for.
        lr_before: The lr applied before the decision.
        lr_after: The lr applied after it.
        margin: Fraction of `lr_limit` that may be used; above 1 only where it was learned, see `beyond_linear_limit`.
        utilisation: `lr_after / lr_limit`; 1 is the linear edge of stability. None without a limit.
        beta1: First-moment decay (momentum) of the group, None where the optimizer has none.
        beta2: Second-moment decay of the group, None where the optimizer has none.
        cap: Largest lr that is allowed now, in units of the group's lr. None before the first measurement.
        lr_limit: Largest stable lr under the chosen bound: what `margin` is a margin of. With a learned margin the
            median of the last three (the newest alone in a young run, or where a trial step bears out a lower one),
            else as measured.
        limits: The limit under each bound as measured: `lemma1`, `coherence`, `momentum`.
        lambda_max: Largest algebraic eigenvalue of the Hessian; None at measurements that did not solve for it.
        gamma: Coherence, the largest eigenvalue of P^-1/2 H P^-1/2.
        p_min: Smallest entry of P among the coordinates that carry curvature.
        p_min_all: Smallest entry of P.
        p_eff: `lambda_max / gamma`.
        residual: Residual norm of the eigenpair behind `lr_limit`.
        converged: Whether that residual met the tolerance.
        num_matvecs: Hessian-vector products spent on the measurement.
        cost: Gradient evaluations spent on it.
        seconds: Wall time spent on it.
        loss: Loss on the measured batch.
        trial_lr: The lengthened lr that was tried on the measured batch, None if none was.
        trial_loss: Loss on that batch after the trial step.
        beyond_linear_limit: True where the margin in force is above 1.
        failure: Why the measurement failed, None if it did not.

    Example:
        >>> Decision(step=7, group=0, action="cap", reason="lr 1 is above the cap 0.2", lr_desired=1.0, lr_before=1.0,
        ...          lr_after=0.2, lr_limit=0.4, margin=0.5, utilisation=0.5).capped
        True
    """

    step: int
    group: int
    action: Action
    reason: str
    lr_desired: float
    lr_before: float
    lr_after: float
    margin: float
    utilisation: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    cap: float | None = None
    lr_limit: float | None = None
    limits: dict[str, float] | None = None
    lambda_max: float | None = None
    gamma: float | None = None
    p_min: float | None = None
    p_min_all: float | None = None
    p_eff: float | None = None
    residual: float | None = None
    converged: bool | None = None
    num_matvecs: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    loss: float | None = None
    trial_lr: float | None = None
    trial_loss: float | None = None
    beyond_linear_limit: bool = False
    failure: str | None = None

    @property
    def capped(self) -> bool:
        """Whether the applied lr is below the desired one."""
        return self.lr_after < self.lr_desired

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready values: a number that is not finite becomes None.

        Example:
            >>> Decision(0, 0, "hold", "loss is nan", 1.0, 1.0, 1.0, 0.5, loss=float("nan")).to_dict()["loss"] is None
            True
        """
        return {name: _json_ready(value) for name, value in dataclasses.asdict(self).items()}


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was applied, desired and allowed in a run, as far as advice needs it.

    Attributes:
        last_capped_step: The last update at an lr below the desired one, None if there was none.
        pressure, pressure_max: Desired in units of the applied lr over the capped updates: median and largest.
        lr_desired_low, lr_desired_high: Smallest and largest desired lr; None where lr follows the cap.
        lr_applied_high: Largest applied lr.
        cap_low: Smallest cap after the first 13 updates.
        unprotected_steps: Updates made without a cap.
        beyond_steps: Updates made at an lr beyond `lr_limit`.
        trials, trials_failed: How often a coming step was tried, and how often it failed at every length.
        trial_room: The least that a trial step that did not fail was longer than the planned one.
        unconverged, differences: Measurements whose eigenvalues did not converge, and those by central differences.
        summed, gradient_ratio: Measurements at which backward passes had probably been added up, and the largest ratio
            of the training gradient to the closure's.
        inferred: Whether P was inferred from an unknown optimizer's own update.
        unrepeatable: Whether the closure gave two losses for one random state.
        drops, rewinds: Updates that were not made because their batch was to blame, and times gone back.
        beta1_first, beta2_first, beta1, beta2: Betas of the reference group, the first and the last.
    """

    last_capped_step: int | None = None
    pressure: float | None = None
    pressure_max: float | None = None
    lr_desired_low: float | None = None
    lr_desired_high: float | None = None
    lr_applied_high: float | None = None
    cap_low: float | None = None
    unprotected_steps: int = 0
    beyond_steps: int = 0
    trials: int = 0
    trials_failed: int = 0
    trial_room: float | None = None
    unconverged: int = 0
    differences: int = 0
    summed: int = 0
    gradient_ratio: float | None = None
    inferred: bool = False
    unrepeatable: bool = False
    drops: int = 0
    rewinds: int = 0
    beta1_first: float | None = None
    beta2_first: float | None = None
    beta1: float | None = None
    beta2: float | None = None


@dataclass(frozen=True)
class Summary(Figures):
    """A run so far, in numbers and, printed, in sentences.

    Attributes:
        steps: Optimizer updates made.
        measurements: Measurements made, failed ones included.
        failures: Measurements that failed.
        num_matvecs: Hessian-vector products spent.
        cost: Gradient evaluations spent.
        overhead: `cost / steps`: measuring against training, in gradient evaluations.
        capped_steps: Updates made at an lr below the desired one.
        first_capped_step: The first of them, None if there was none.
        worst_utilisation: Largest applied lr in units of its limit, None before the first measurement.
        margin: The margin in force.
        cap: The cap in force, None before the first measurement.
        lr_limit: The limit in force.
        seconds: Wall time spent measuring.
        advice: What follows, in sentences (`safe_lr.advice`).
        Others: See `Figures`.
    """

    steps: int
    measurements: int
    failures: int
    num_matvecs: int
    cost: float
    overhead: float
    capped_steps: int
    first_capped_step: int | None
    worst_utilisation: float | None
    margin: float
    cap: float | None
    lr_limit: float | None
    seconds: float
    advice: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        capped = "never capped"
        if self.capped_steps:
            capped = f"capped in {self.capped_steps} of them, first at {self.first_capped_step}"
        limit = "no limit measured yet"
        if self.lr_limit is not None and self.cap is not None:
            limit = f"the last limit {self.lr_limit:.3g}, margin {self.margin:.3g}, cap {self.cap:.3g}"
        first = (
            f"{self.steps} steps, {capped}; {limit}; {self.measurements} measurements ({self.failures} failed), "
            f"{self.num_matvecs} products, overhead {self.overhead:.1%} in gradient evaluations"
        )
        return "\n* ".join([first, *self.advice])

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready values."""
        return {name: _json_ready(value) for name, value in dataclasses.asdict(self).items()}
