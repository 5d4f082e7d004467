"""Cuts that no measurement asks for: after a step that did harm, and while losses or gradient norms drift up."""

from __future__ import annotations

import math
from typing import Any

from safe_lr.cadence import TRIAL_GAP
from safe_lr.controller import Controller
from safe_lr.policies import (
    CALM_UPDATES,
    MULTIPLE_DRIFT,
    RISES,
    STEP,
    learned_multiple,
)


def go_back(control: Controller, saved: dict[str, Any], wanted: float) -> None:
    """Goes on from an earlier state, with a multiple and a cap below those of the step that did harm.

    For a routine gap (at least TRIAL_GAP updates) trial steps with room do not raise the multiple again.

    Args:
        control: What goes on.
        saved: That state's `state_dict()`.
        wanted: The lr that is wanted now; infinite where lr follows the cap.
    """
    state = control.state
    used = min(wanted, math.inf if state.cap is None else state.cap)
    unit = control.annealed_share * state.figures.get("lr_limit", math.nan)
    known = math.isfinite(used) and unit > 0
    multiple = learned_multiple(
        state.multiple, "bad", used=used / unit if known else state.multiple, least=control.least_after_harm
    )
    earlier = state.gone_back(saved)
    earlier.multiple = min(earlier.multiple, multiple) if control.policy.learns else earlier.multiple
    earlier.told, earlier.calm_until = earlier.multiple, max(earlier.calm_until, state.calm_until)
    control.restore(earlier)
    if earlier.cap is not None and used > 0:  # at an lr of 0 an earlier step did the harm; from 0 no cap rises
        earlier.cap = min(earlier.cap, used / STEP)
    _keep_calm(control, max(TRIAL_GAP, earlier.gap))


def heed_norms(control: Controller, lr_ref: float) -> str | None:
    """Cuts margin and cap where gradient norms have risen while the cap holds lr back, and the loss was not seen to
    fall; returns what was done, and why, None if nothing.

    From there they count anew: a further rise cuts again, RISES times at most until the next measurement.

    Args:
        control: What is cut.
        lr_ref: The lr that is wanted.
    """
    state = control.state
    if not (control.comparable and state.trend.risen(state.lowest) and control.held_back(lr_ref)):
        return None
    if state.cuts >= RISES or state.falling:
        return None
    state.cuts += 1
    lowest, state.lowest = state.lowest or 0.0, state.trend.mean
    told = cut(control)
    seen = f"usual gradient norms have risen from {math.exp(lowest):.3g} to {math.exp(state.trend.mean):.3g}"
    return None if told is None else f"{told}: {seen}"


def cut(control: Controller) -> str | None:
    """Cuts a learned margin and the cap since loss or gradient norms drift up; returns what that did to them, None if
    nothing.

    From what was used, as after a rewind, but to no less than MULTIPLE_DRIFT allows; and trial steps with room do not
    raise the multiple for CALM_UPDATES, also where nothing was left to cut: as the loss drifts up they are wrong.

    Example:
        >>> from safe_lr.measurement import Measurement
        >>> from safe_lr.policies import Policy
        >>> control = Controller(Policy(), least_cost=8.0)
        >>> control.settle(Measurement(lr_limit=0.2), lr_ref=1.0, jump=None)
        (None, None)
        >>> cut(control)
        'margin 1 -> 0.667, cap 0.2 -> 0.133'
    """
    state = control.state
    if not state.cap:
        return None
    limit = state.figures["lr_limit"]
    unit = control.annealed_share * limit
    multiple = learned_multiple(state.multiple, "bad", used=state.cap / unit, least=MULTIPLE_DRIFT)
    margin = control.margin_at(multiple)
    held = min(state.cap, state.margin * limit, control.highest)  # at the coming update, were nothing cut
    cap = min(held, max(state.cap / STEP, MULTIPLE_DRIFT * unit), margin * limit)
    moves = {"margin": (state.margin, margin), "cap": (held, cap)}
    told = [f"{name} {old:.3g} -> {new:.3g}" for name, (old, new) in moves.items() if new < old]
    _keep_calm(control, CALM_UPDATES)
    if not told:
        return None
    state.multiple, state.told, state.margin, state.cap = multiple, multiple, margin, cap
    return ", ".join(told)


def _keep_calm(control: Controller, updates: int) -> None:
    """For so many updates trial steps with room do not raise the multiple."""
    control.state.calm_until = max(control.state.calm_until, control.state.updates + updates)
