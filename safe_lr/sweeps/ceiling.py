"""Which part of an lr range cannot train: measured before the sweep, not found out by its runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from safe_lr.sweeps.candidates import Candidates, Makes, configs, own, stand_ins
from safe_lr.sweeps.checks import PREFIX, check
from safe_lr.sweeps.runs import Closures, Runs
from safe_lr.sweeps.spaces import Interval, space

STEPS = 50
"""Protected updates before the limit counts. An adaptive optimizer's limit is 70 to 10,000 times smaller at
initialisation than a few updates later; with b1 = .9 its constant c has reached 99.5 % of its value by then."""

MULTIPLE = 8.0
"""Nothing below this many times the limit is cut: the furthest that a learned margin ever goes (`margin_max`)."""

RAISE = 4.0
"""Factor by which the ceiling goes up while runs at it train."""


@dataclass(frozen=True)
class Ceiling:
    """The lr at and above which a range is cut.

    Attributes:
        lr: That lr: a bare run at it was seen to fail. None where nothing is to be cut.
        lr_limit: The largest limit met in the protected run, by curvatures that count; NaN if none was needed.
        trained_at: The largest lr at which a bare run was seen to train, None if none was tried or none trained.
        reason: The above in a sentence.
        cost: Gradient evaluations spent.
    """

    lr: float | None
    lr_limit: float
    trained_at: float | None
    reason: str
    cost: float


def stable_ceiling(
    model_factory: Callable[[], nn.Module],
    closure_factory: Callable[[nn.Module], Closures],
    *,
    highest: float,
    optimizer_factory: Makes | Sequence[Makes] | None = None,
    steps: int = STEPS,
    multiple: float = MULTIPLE,
    seed: int = 0,
) -> Ceiling:
    """Finds the lr from which on a run of this model, optimizer and data cannot train.

    1. A bare run of `steps` updates at `highest`. If it trains, nothing is to be cut.
    2. A protected run of as many updates, in which the limit is measured several times; its largest value counts, since
       that at initialisation is far too small for an adaptive optimizer. Curvature counts only while the loss is above
       a tenth of its first value: it can vanish with the loss, and the limit grows without bound. If `highest` is below
       `multiple` times that limit, nothing is to be cut.
    3. Bare runs at `multiple * lr_limit`, then at 4 times that, and so on, until one fails: that is the ceiling.

    A run trains if the mean loss of its last quarter is below its first loss. So what is cut lies beyond the linear
    limit by `multiple` *and* above an lr that was seen to fail, with `highest` seen to fail as well. What would fail
    only later is not cut.

    Of several optimizers the largest ceiling counts: what is cut, none of them can train.

    Args:
        model_factory: Makes a freshly initialised model; torch's seed is set before.
        closure_factory: Given the model, returns a closure of its loss, or an iterable of closures, one a step.
        highest: The upper end of the range.
        optimizer_factory: Given the model, returns its optimizer, whose lrs are scaled so that the largest is the lr in
            question; or a list of such functions. Limits of two optimizers differ by orders of magnitude, so give your
            own. None: SGD with momentum .9 and AdamW at torch's defaults stand in, and the reason says so.
        steps: Updates in each run.
        multiple: Nothing below this many times the limit is cut.
        seed: torch's seed for all runs; the caller's random streams are left alone.

    Raises:
        TypeError: `optimizer_factory` is no function, or makes an optimizer that has no limit.
        ValueError: `highest`, `steps` or `multiple` is out of range, no limit could be measured, or a stand-in does not
            fit the model.

    Example:
        >>> made = lambda: torch.nn.Linear(1, 1, bias=False)                     # loss 2 w^2: H = 4, lr_limit = 2 / 4
        >>> loss = lambda model: lambda: 2 * (model.weight**2).sum()
        >>> sgd = lambda model: torch.optim.SGD(model.parameters(), lr=1.0)
        >>> found = stable_ceiling(made, loss, optimizer_factory=sgd, highest=100.0)
        >>> round(found.lr_limit, 3), round(found.lr, 3)
        (0.5, 4.0)
    """
    tried = own(optimizer_factory) if optimizer_factory is not None else stand_ins()
    return _ceiling(tried, model_factory, closure_factory, highest=highest, steps=steps, multiple=multiple, seed=seed)


def _ceiling(
    tried: Candidates,
    model_factory: Callable[[], nn.Module],
    closure_factory: Callable[[nn.Module], Closures],
    *,
    highest: float,
    steps: int,
    multiple: float,
    seed: int,
) -> Ceiling:
    """What `stable_ceiling` finds, with these optimizers."""
    if not (math.isfinite(highest) and highest > 0 and multiple >= 1 and steps >= 4):
        raise ValueError(
            f"highest={highest!r} must be above 0, multiple={multiple!r} at least 1 and steps={steps!r} at least 4"
        )
    several = [
        Runs(makes, model_factory, closure_factory, steps, seed, spoken_of=bool(tried.why) or len(tried.makes) > 1)
        for makes in tried.makes
    ]
    why, cost = f". {tried.why}" if tried.why else "", 0.0
    found: list[Ceiling] = []
    with torch.random.fork_rng():
        for runs in several:  # all of them before any limit: where one trains, no more need be known
            cost += steps
            if runs.train(highest):
                reason = f"{runs.whose}a bare run at lr {highest:.3g} trains: nothing is cut{why}"
                return Ceiling(None, math.nan, highest, reason, cost)
        for runs in several:
            one = _climb(runs, highest, multiple)
            cost += one.cost
            if one.lr is None:
                return replace(one, reason=one.reason + why, cost=cost)
            found.append(one)
    return Ceiling(
        lr=max(one.lr for one in found if one.lr is not None),
        lr_limit=max(one.lr_limit for one in found),
        trained_at=max((one.trained_at for one in found if one.trained_at is not None), default=None),
        reason="; ".join(one.reason for one in found) + why,
        cost=cost,
    )


def _climb(runs: Runs, highest: float, multiple: float) -> Ceiling:
    """The ceiling of an optimizer whose bare run at `highest` has failed."""
    limit, spent = runs.largest_limit(highest)
    ceiling, trained, cost = multiple * limit, None, runs.steps + spent
    if ceiling > highest:
        reason = (
            f"{runs.whose}a bare run at lr {highest:.3g} fails within {runs.steps} updates, but all of it is below "
            f"{multiple:g} times the largest limit met in a protected one, {limit:.3g}: nothing is cut"
        )
        return Ceiling(None, limit, None, reason, cost)
    while ceiling < highest:
        cost += runs.steps
        if not runs.train(ceiling):
            break
        trained, ceiling = ceiling, RAISE * ceiling
    ceiling = min(ceiling, highest)
    reason = (
        f"{runs.whose}a bare run at lr {ceiling:.3g} fails within {runs.steps} updates; the largest limit met in a "
        f"protected one is {limit:.3g}"
    )
    return Ceiling(ceiling, limit, trained, reason, cost)


def clip_to_stable(
    config: Mapping[str, Any],
    model_factory: Callable[[], nn.Module],
    closure_factory: Callable[[nn.Module], Closures],
    *,
    optimizer_factory: Makes | Sequence[Makes] | None = None,
    parameter: str = "lr",
    steps: int = STEPS,
    multiple: float = MULTIPLE,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns a sweep config without the part of its lr range that cannot train.

    The rule is `stable_ceiling`'s. A range is cut at the ceiling, values from it on are dropped, and the config's
    `description` says so. It says why, too, where nothing is cut though bare runs at the upper end have failed; where
    one has trained there, the config stays as it is. Only the upper end is cut: an lr that is too small is slow, not
    unstable.

    Whose runs decide: those of `optimizer_factory`; else of torch's optimizers that the config's parameter `optimizer`
    names ("adam", "SGD"); else of SGD and AdamW, which stand in, as the `description` says. Of several, what one can
    train is not cut. SGD's momentum is what the config's `momentum` lists, or .9; all else is at torch's defaults.

    Args:
        config: A valid config, left as it is.
        model_factory, closure_factory, optimizer_factory, steps, multiple, seed: See `stable_ceiling`.
        parameter: Name of the lr.

    Returns:
        A copy. One that sweeps no lr but follows the limit (`safe_lr.follow_limit`) has nothing to be cut.

    Raises:
        TypeError: See `stable_ceiling`.
        ValueError: The config is invalid or has no such parameter, its distribution has no ends or holds integers only,
            its `optimizer` is none of torch's or does not fit the model, or nothing of the range can train.

    Example:
        >>> config = {"method": "random", "parameters": {"lr": {"values": [0.1, 1.0, 10.0]}}}
        >>> def made():                                                          # loss 2 w^2, for SGD with momentum .9:
        ...     model = torch.nn.Linear(1, 1, bias=False)                        # lr_limit = 2 (1 + .9) / 4 = .95
        ...     torch.nn.init.constant_(model.weight, 0.001)                     # AdamW's is in units of w: far lower
        ...     return model
        >>> clipped = clip_to_stable(config, made, lambda model: lambda: 2 * (model.weight**2).sum())
        >>> clipped["parameters"]["lr"]                                          # cut from about 8 * .95 on
        {'values': [0.1, 1.0]}
        >>> clipped["description"].split(". ")[1]
        'The config names no optimizer, so SGD with momentum 0.9 and AdamW at its defaults were assumed: name yours in
        its parameter optimizer, or pass optimizer_factory=.'
    """
    check(config)
    clipped = copy.deepcopy(dict(config))
    parameters = clipped["parameters"]
    if parameter not in parameters:
        if PREFIX + "follow_limit" in parameters:
            return clipped
        raise ValueError(f"the config sweeps {', '.join(parameters)}, not {parameter!r}: name its lr with parameter=")
    spec = parameters[parameter]
    lrs = space(parameter, spec)
    if isinstance(lrs, Interval) and lrs.integer:
        raise ValueError(f"parameters.{parameter}: min and max are integers, and so every draw is one: write floats")
    ends = (lrs.low, lrs.high) if isinstance(lrs, Interval) else (min(lrs.values), max(lrs.values))
    tried = own(optimizer_factory) if optimizer_factory is not None else configs(parameters)
    found = _ceiling(
        tried,
        model_factory,
        closure_factory,
        highest=float(ends[1]),
        steps=steps,
        multiple=multiple,
        seed=seed,
    )
    if found.lr is None:
        return clipped if found.trained_at is not None else _noted(clipped, f"{parameter}: {found.reason}.")
    if found.lr <= ends[0]:
        raise ValueError(
            f"parameters.{parameter}: nothing between {ends[0]:.3g} and {ends[1]:.3g} can train: {found.reason}. "
            "Lower the range."
        )
    if isinstance(lrs, Interval):
        spec["min"], spec["max"] = float(spec["min"]), found.lr
    else:
        kept = [index for index, lr in enumerate(lrs.values) if lr < found.lr]
        spec["values"] = [lrs.values[index] for index in kept]
        if lrs.weights is not None:
            total = sum(lrs.weights[index] for index in kept)
            spec["probabilities"] = [lrs.weights[index] / total for index in kept]
    return _noted(clipped, f"{parameter} cut from {ends[1]:.3g} to below {found.lr:.3g}: {found.reason}.")


def _noted(config: dict[str, Any], note: str) -> dict[str, Any]:
    """Writes a sentence behind what the config's `description` says already."""
    config["description"] = f"{config['description']} {note}" if config.get("description") else note
    return config
