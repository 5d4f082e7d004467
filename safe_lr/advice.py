"""Advice: what a run's numbers say about its lr, its betas and its warm-up, what measuring cost, and what is doubtful.

`Course` keeps the numbers that are needed, as the run goes on or as its record is read; `advise` turns a `Summary` into
sentences. Neither grows with the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from safe_lr.decisions import Decision, Figures, Summary

Topic = Literal["cap", "rewind", "lr", "warm-up", "betas", "cost", "doubt"]

YOUNG = 13
"""Updates at the beginning of a run whose caps say nothing of it: the limit itself rises there (FREE_UPDATES)."""

BIN = 1.05
"""Desired over applied lr is counted in bins of this factor: its median is right to half of that."""

MOST = 1e300
"""The largest ratio of desired to applied lr that is told apart."""

MOSTLY = 0.5
"""From this share of capped steps on it is the cap that sets lr, not the schedule."""

EARLY = 0.25
"""A warm-up is no longer than this share of the run; what binds up to there and never again is one."""

FAR = 4.0
"""From this ratio of the lowest cap to the largest desired lr on, lr may be too small. Nothing is said below it: tuned
runs lie within a factor of four of their cap, where single measurements vary twofold."""

ENOUGH = 5
"""Fewer trials, or measurements, are too few to conclude from."""

LONG = 100
"""Steps from which on so few measurements are worth a warning."""

TARGETS = 0.95, 0.99
"""Where the source paper's guideline (Sec. 3.6, 4.2.2) leads the betas to."""


@dataclass(frozen=True)
class Advice:
    """One sentence and the numbers behind it.

    Attributes:
        topic: What it is about; `doubt` qualifies the others.
        text: The sentence.
        figures: Its numbers by name, those of `Summary` where they stand there.
    """

    topic: Topic
    text: str
    figures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


@dataclass
class Course:
    """A run's `Figures` as it goes on, in running numbers of a fixed size.

    Attributes:
        so_far: The figures by name (a plain dict, since they move with every update) but for `pressure`, a median ...
        pressures: ... of the capped updates by desired / applied lr: `{k: n}`, n of them at BIN ** k.

    Example:
        >>> course = Course()
        >>> for step in range(20):
        ...     course.step(step, desired=1.0, applied=0.25, cap=0.25, lr_limit=0.5)
        >>> [course.so_far[name] for name in ("pressure_max", "last_capped_step", "cap_low")]
        [4.0, 19, 0.25]
    """

    so_far: dict[str, Any] = field(default_factory=lambda: asdict(Figures()))
    pressures: dict[int, int] = field(default_factory=dict)

    def step(
        self,
        step: int,
        *,
        desired: float | None,
        applied: float,
        cap: float | None,
        lr_limit: float | None,
        times: int = 1,
    ) -> None:
        """Takes an update in.

        Args:
            step: Its number, 0 for the first.
            desired: The lr that was asked for; None where lr follows the cap.
            applied: The lr that was applied.
            cap: The cap in force, None where there was none.
            lr_limit: The limit in force, None where there was none.
            times: How many updates it stands for.
        """
        if cap is None:
            self.so_far["unprotected_steps"] += times
        elif step >= YOUNG:
            self._lower("cap_low", cap)
        if lr_limit is not None and applied > lr_limit:
            self.so_far["beyond_steps"] += times
        self._raise("lr_applied_high", applied)
        if desired is not None:
            self._lower("lr_desired_low", desired)
            self._raise("lr_desired_high", desired)
        if desired is not None and 0 < applied < desired:
            pressure = min(desired / applied, MOST)  # a denormal lr has an infinite one
            self.so_far["last_capped_step"] = step + times - 1
            self._raise("pressure_max", pressure)
            place = round(math.log(pressure, BIN))
            self.pressures[place] = self.pressures.get(place, 0) + times

    def tried(self, length: float, *, failed: bool) -> None:
        """Takes the last trial step of several in; `length` in units of the planned one. Not of young runs: they search
        from far beyond."""
        self.so_far["trials"] += 1
        self.so_far["trials_failed"] += failed
        if not failed:
            self._lower("trial_room", length)

    def measured(self, *, differences: bool, inferred: bool, unrepeatable: bool, summed: float | None) -> None:
        """Takes in what a measurement that did not fail gives reason to doubt.

        Args:
            differences, inferred, unrepeatable: See `Figures`.
            summed: The ratio of the training gradient to the closure's, where backward passes were probably added up.
        """
        self.so_far["differences"] += differences
        self.so_far["inferred"] |= inferred
        self.so_far["unrepeatable"] |= unrepeatable
        if summed is not None:
            self.so_far["summed"] += 1
            self._raise("gradient_ratio", summed)

    def decide(self, decision: Decision) -> None:
        """Takes a decision in: whether its eigenvalues converged, the betas, and updates that were not made."""
        self.so_far["unconverged"] += decision.num_matvecs > 0 and decision.converged is False
        self.so_far["drops"] += decision.action == "drop"
        self.so_far["rewinds"] += decision.action == "rewind"
        for name, beta in (("beta1", decision.beta1), ("beta2", decision.beta2)):
            if beta is not None:
                self.so_far[name] = beta
                if self.so_far[f"{name}_first"] is None:
                    self.so_far[f"{name}_first"] = beta

    def figures(self) -> dict[str, Any]:
        """Returns the figures so far, as `Summary` takes them."""
        return {**self.so_far, "pressure": self._median()}

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> Course:
        """Restores `asdict(course)`; what is missing there is new."""
        return cls(
            asdict(Figures(**saved.get("so_far", {}))), {int(k): n for k, n in saved.get("pressures", {}).items()}
        )

    def _median(self) -> float | None:
        """The median of desired / applied over the capped updates."""
        half, seen = sum(self.pressures.values()) / 2, 0
        for place in sorted(self.pressures):
            seen += self.pressures[place]
            if seen >= half:
                return min(float(BIN**place), self.so_far["pressure_max"] or math.inf)
        return None

    def _lower(self, name: str, value: float) -> None:
        low = self.so_far[name]
        if low is None or value < low:
            self.so_far[name] = value

    def _raise(self, name: str, value: float) -> None:
        high = self.so_far[name]
        if high is None or value > high:
            self.so_far[name] = value


def advise(summary: Summary) -> list[Advice]:
    """Returns what a user should know about a run, the most important first.

    How often and how hard the cap bound; what lr, warm-up and betas might be instead; what measuring cost; and each
    reason to doubt the figures. Nothing is said where the numbers do not carry it.

    Args:
        summary: The run so far; its own `advice` is not looked at.

    Example:
        >>> run = dict(measurements=9, failures=0, num_matvecs=30, cost=80.0, overhead=0.08, worst_utilisation=0.5,
        ...            margin=0.5, cap=0.05, lr_limit=0.1, seconds=1.5)
        >>> for advice in advise(Summary(steps=1000, capped_steps=930, first_capped_step=70, last_capped_step=999,
        ...                              pressure=20.0, pressure_max=50.0, lr_desired_low=1.0, lr_desired_high=1.0,
        ...                              lr_applied_high=0.06, cap_low=0.02, **run)):
        ...     print(advice)
        The cap bound in 930 of 1,000 steps (93 %): the desired lr was 20 times what was applied in the median, 50 times
        at most.
        lr could be lowered from 1 to 0.06, the largest that was applied, without losing anything.
        An lr of 0.02 would have been below the cap throughout, the first 13 updates apart.
        Measuring cost 80 gradient evaluations, 8 % of what the 1,000 steps took, and 1.5 s.
    """
    if not summary.steps:
        return []
    parts = _cap, _rewind, _lr, _warm_up, _betas, _cost, _doubts
    return [advice for part in parts for advice in part(summary)]


def _cap(s: Summary) -> Iterator[Advice]:
    if s.cap is None:
        yield _say("cap", "No limit was measured in {steps:,} steps: every lr was applied as desired, unprotected.", s)
    elif _follows(s):
        yield _say("cap", "lr followed the limit for {steps:,} steps, up to {lr_applied_high:.3g}.", s)
    elif not s.capped_steps:
        yield _say("cap", "The cap never bound in {steps:,} steps: every lr was applied as desired.", s)
    else:
        text = f"The cap bound in {{capped_steps:,}} of {{steps:,}} steps ({_percent(s.capped_steps / s.steps)})"
        if s.pressure is not None and s.pressure_max is not None:
            text += (
                ": the desired lr was {pressure:.3g} times what was applied in the median, {pressure_max:.3g} times "
                "at most"
            )
        yield _say("cap", f"{text}.", s)


def _rewind(s: Summary) -> Iterator[Advice]:
    """What was not made, and by that which data or which lr to look at."""
    if s.drops:
        dropped = f"{_count(s.drops, 'update')} {'was' if s.drops == 1 else 'were'} dropped"
        yield _say(
            "rewind", f"{dropped}: gradient or loss of the batch was not finite, or far out. Look at the data.", s
        )
    if s.rewinds:
        text = f"The run went back {_count(s.rewinds, 'time')}: the loss had jumped, or something was no longer finite."
        yield _say("rewind", text, s)


def _lr(s: Summary) -> Iterator[Advice]:
    mostly = s.capped_steps >= MOSTLY * s.steps
    low, high, applied = s.lr_desired_low, s.lr_desired_high, s.lr_applied_high
    if mostly and low is not None and high is not None and applied is not None and applied < high:
        if low == high:  # the cap did not see the desired lr: min(largest applied, cap) is what was applied
            yield _say(
                "lr",
                "lr could be lowered from {lr_desired_high:.3g} to {lr_applied_high:.3g}, the largest that was "
                "applied, without losing anything.",
                s,
            )
        else:
            yield _say(
                "lr",
                "The cap hid most of the schedule: a peak of {lr_applied_high:.3g}, the largest lr that was applied, "
                "instead of {lr_desired_high:.3g} would let more of its shape through.",
                s,
            )
    if s.cap_low is not None:
        yield _say(
            "lr",
            f"An lr of {{cap_low:.3g}} would have been below the cap throughout, the first {YOUNG} updates apart.",
            s,
        )
    yield from _room(s, mostly=mostly)


def _room(s: Summary, *, mostly: bool) -> Iterator[Advice]:
    """Whether lr, or the cap that sets it, may be too small."""
    fine = s.trials >= ENOUGH and not s.trials_failed and s.trial_room is not None and s.trial_room >= 1
    trials = "all {trials:,} trial steps, at least {trial_room:.3g} times as long as planned, lowered the batch's loss"
    if mostly:
        if fine and s.trial_room is not None and s.trial_room >= FAR:
            yield _say("lr", f"The cap may be too low: {trials}.", s)
    elif s.cap_low is not None and s.lr_desired_high and s.cap_low >= FAR * s.lr_desired_high and not s.trials_failed:
        also = f", and {trials}" if fine else ""
        text = f"lr may be too small: the cap was never below {{ratio:.3g}} times {{lr_desired_high:.3g}}{also}."
        yield _say("lr", text, s, ratio=s.cap_low / s.lr_desired_high)


def _warm_up(s: Summary) -> Iterator[Advice]:
    length = 0 if s.last_capped_step is None else s.last_capped_step + 1
    if s.capped_steps and length <= EARLY * s.steps and s.capped_steps >= MOSTLY * length:
        text = (
            "The cap bound only in the first {length:,} of {steps:,} updates: a warm-up of that length would do the "
            "same."
        )
        yield _say("warm-up", text, s, length=length)


def _betas(s: Summary) -> Iterator[Advice]:
    names = [name for name in ("beta1", "beta2") if getattr(s, name) is not None]
    moved = [name for name in names if getattr(s, name) != getattr(s, f"{name}_first")]
    if moved:
        moves = " and ".join(f"{name} from {{{name}_first:.5g}} to {{{name}:.5g}}" for name in moved)
        yield _say("betas", f"Betas moved, {moves}: a new run could start there.", s)
    elif len(names) == 2 and s.capped_steps >= MOSTLY * s.steps:
        first, second = s.beta1 or 0.0, s.beta2 or 0.0
        if first < TARGETS[0] and second > TARGETS[1]:
            text = "Betas stayed at ({beta1:.5g}, {beta2:.5g}): tune_betas=True lets them move towards "
            yield _say("betas", text + f"{TARGETS} while the cap binds; in nine benchmarks that gained nothing.", s)


def _cost(s: Summary) -> Iterator[Advice]:
    text = (
        "Measuring cost {cost:.3g} gradient evaluations, "
        f"{_percent(s.overhead)} of what the {{steps:,}} steps took, and {{seconds:.3g}} s."
    )
    yield _say("cost", text, s)


def _doubts(s: Summary) -> Iterator[Advice]:
    """Each reason to doubt the figures."""
    good = s.measurements - s.failures
    few = s.steps >= LONG and 0 < good < ENOUGH
    for doubtful, text in (
        (s.failures, "{failures:,} of {measurements:,} measurements failed; until the next one the last cap stood in."),
        (s.unprotected_steps and s.cap is not None, f"{_count(s.unprotected_steps, 'update')} had no cap yet."),
        (few, f"All limits of the run stand on {_count(good, 'measurement')}."),
        (s.unconverged, f"{{unconverged:,}} of {good:,} measurements ran out of products before they converged."),
        (
            s.differences,
            f"{_count(s.differences, 'measurement')} took central finite differences, wrong where the loss has kinks.",
        ),
        (s.inferred, "The preconditioner was inferred from the optimizer's own updates: the limits are a guess."),
        (
            s.summed,
            "The training gradient was up to {gradient_ratio:.3g} times the closure's: where backward() calls add up, "
            "the closure must return the sum of their losses, or the limits are too high.",
        ),
        (
            s.unrepeatable,
            "The closure gave two losses for one random state: what was measured is not quite what was trained.",
        ),
        (
            s.beyond_steps,
            f"lr was beyond the linear limit in {_count(s.beyond_steps, 'step')} "
            f"({_percent(s.beyond_steps / s.steps)}): there trial steps alone vouch for it.",
        ),
    ):
        if doubtful:
            yield _say("doubt", text, s)


def _follows(s: Summary) -> bool:
    return s.lr_desired_high is None and s.lr_applied_high is not None


def _say(topic: Topic, text: str, summary: Summary, **more: float) -> Advice:
    """Fills a sentence in, and keeps the numbers that it names."""
    used = _Used(vars(summary) | more)
    return Advice(topic, text.format_map(used), used.used)


class _Used(dict[str, Any]):
    """A mapping that remembers what was looked up in it."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.used: dict[str, float] = {}

    def __getitem__(self, name: str) -> Any:
        self.used[name] = super().__getitem__(name)
        return self.used[name]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _percent(share: float) -> str:
    """Returns a share in words that never round to none or all.

    Example:
        >>> _percent(0.93), _percent(0.001), _percent(0.999), _percent(1.0)
        ('93 %', 'under 1 %', 'over 99 %', '100 %')
    """
    if 0 < share < 0.01:
        return "under 1 %"
    return "over 99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"
