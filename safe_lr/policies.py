"""From a measurement to a learning rate: pure functions of numbers.

The rule is `lr = min(desired lr, cap)` with `cap = margin * lr_limit`. The functions here say how the cap follows the
limit and how the margin learns; when to measure is `cadence`'s. They hold no state and see no tensor.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MULTIPLE_START = 2.0
"""Where the learned multiple of the noise limit (see `noise_share`) starts. Along tuned runs of fifteen pairs of task
and optimizer the lr is mostly 1-3 times 2 / gamma (Muon: 15-20); as a fraction of lr_limit it lies between .1 and 4.5
(benchmarks/lr_robustness.py)."""

MULTIPLE_LEAST = MULTIPLE_START
"""Its floor where a lengthened trial step fails: noise makes that happen in every fifth trial of a healthy run, and
gamma rises as lr falls, so that at half of this the demo's lr went down to a fifth of the tuned one."""

MULTIPLE_LOW = 0.25
"""Its floor where the trial before failed as well: that is seldom noise. On the stream of benchmarks/spikes.py there
are 3.9 spikes a run with it and 7.4 without (two lrs, 16 seeds), some 30 under bare Adam. Seven rows of the matrix, two
seeds, at the tuned lr and 100 times it: six are as before to 1 %, one loses 1.7 %; one of three demos loses 7 %. A
floor of .25 throughout leaves .3 spikes (two lrs, five seeds), but costs where lr is right."""

MULTIPLE_FAILED = 0.5
"""Its floor where the very step that is planned fails."""

MULTIPLE_DRIFT = 0.1
"""Its floor where losses (`rewind`) or gradient norms have drifted up. On the stream of benchmarks/spikes.py (twenty
seeds, lr .01 / .03, `rewind`) no spike is left with it, at final losses of 6e-8 / 2e-7, where bare Adam ends at 2e-3 /
8e-3. With .25 two were left in the eight hardest runs at .01: there a single batch of rare examples still does harm.
Without `rewind` both floors leave as many, a floor of 1 some more. Ordinary runs are hardly ever cut."""

CALM_UPDATES = 200
"""After a cut at a drift trial steps with room do not raise the multiple for this long. On a batch of odd examples,
whose loss is far above the usual one, even a long step finds room: with TRIAL_GAP in its place two spikes were left in
those eight runs, none with it."""

RISES = 2
"""Cuts by rising gradient norms until the next measurement. What two of them do not stop is no drift: on the way off a
plateau norms rise hundredfold, and with a cut at each rise lr fell to a hundredth of what the limit allowed."""

MULTIPLE_MOST = 40.0
"""Its ceiling, which tuned runs stay far below."""

UNAVERAGED = 3.0
"""The noise limit is this many times higher where P is made of gradients and the fresh gradient moves the parameters
itself (NAdam; RMSprop and Adagrad have factors of their own on that, `Preconditioner.unaveraged`): a gamma measured on
a training batch is 2-4 times that of a large one there."""

MARGIN_YOUNG = 1.0
"""The learned margin's ceiling while the run is young, but for unaveraged steps and Muon's. Before momentum has built
up, a multiple of 2 is a margin of 2: a ResNet's first steps then swing out beyond the limit, 10 % lost at the end."""

MARGIN_SEARCHED = 0.5
"""The margin stays below this where the limit is itself the result of trial steps (Lion): nothing lies beyond."""

MARGIN_MIN = 0.05
"""What an alarm or a rewind may cut the learned margin to, or to MULTIPLE_FAILED where that is less: .05 of Adam's
limit alone is a multiple of .95, above what any failed trial may cut to."""

VOTES = 3
"""Measured limits whose median a learned margin is a margin of. Over batches they vary twofold, and a thousandfold
where attention saturates: one outlier held a ViT at a hundredth of its lr to the end of the run."""

MATURE = 5
"""Updates before which a limit has no vote: it is a hundredth of what it will be."""

ROOM = 4.0
"""The margin rises where a trial step this many times longer still than the one that must not fail is fine too (8 times
the coming step by default). In steady runs the longest trial step that lowers the loss is 2-8 times the lr *whatever
the lr*, 25 times the tuned one included: in that range trials say nothing, and a margin that rises there drifts."""

HALVINGS = 6
"""Halvings of the trial step in a young run: the limit rises a hundredfold within ten updates there, and a margin that
was right for the first ones would let lr overshoot."""

MARGIN_MAX_LEAST = 0.05
"""The smallest `margin_max`."""

AGING = 0.5
"""While the margin is learned the cap may rise like this power of the run's length, once that is slower than `growth`.
Trial steps on one batch are forgiving where BatchNorm lets weights grow with lr: at 2 % an update the demo drifts up
fivefold late in the run."""

CATCH_UP = 5
"""Where there is room the cap may rise by `growth` this many times in one update: lr is far too low there."""

STEP = 1.5
"""Factor by which the multiple rises or falls after a trial."""

TOLD = 1.05
"""A margin that trial steps have moved by this factor since it was last told of is a decision."""

STEADY_FROM = 100
"""Updates at which the cap held lr back, from which on a run counts as steady: above MULTIPLE_START the multiple
moves by no more per trial than their number has grown since the last one (`pace`), the noise limit is annealed, and the
cap has its crest. In steady runs trial steps find room at any lr (ROOM), and in full steps lr goes on rising: after
1,000 updates a ResNet's was 8 times the tuned one, a GPT's 4 times."""

ANNEALING, ANNEALED_TO = 0.25, 0.5
"""From then on the noise limit is annealed by this power of the run's length, to this part of it at most. A constant lr
that is right for so many updates leaves noise that a smaller one averages out, and how long the run will be is not
known. A power of .35 does as much good; .5 loses 9 to 14 % on single runs of 1,000 updates (Muon has .75,
`Preconditioner.annealing`), and from update 50 on some rows lose 2 to 4 %. No further than to a half, since nothing was
measured beyond 1,000 updates, and lr that falls lets gamma rise: an lr of half the cap is never annealed."""

FREE_UPDATES = 13
"""Updates in which the cap follows each measurement freely, those at 0, 3 and 12 (GAP_FACTOR): until then the limit of
the coming step itself rises tenfold and more, and no earlier cap is worth holding on to. A LoRA fine-tune whose limit
is forty times higher at 12 than at 3 took another 40 updates to get there."""


@dataclass(frozen=True)
class Policy:
    """The policy's settings. Checked when made.

    Attributes:
        margin: A number in (0, 1], kept strictly, or "auto": learned, at most `margin_max`.
        margin_max: Largest learned margin; 1 never leaves the linearly stable region.
        trial_slack: A trial step `1 / trial_slack` times as long as the coming one must not fail, in a young run the
            coming one itself; in (0, 1].
        growth: Largest factor by which the cap rises in one update; at least 1.
        max_overhead: Gradient evaluations spent on measuring per update, in the long run.
        credit: Gradient evaluations that may be spent on top of that.
        follow_limit: Whether lr is the cap itself, whatever lr the optimizer was given.

    Raises:
        TypeError: Not a number.
        ValueError: A number out of its range.
    """

    margin: float | str = "auto"
    margin_max: float = 8.0
    trial_slack: float = 0.5
    growth: float = 1.02
    max_overhead: float = 0.05
    credit: float = 120.0
    follow_limit: bool = False

    def __post_init__(self) -> None:
        if self.margin != "auto" and not (
            isinstance(self.margin, (int, float)) and not isinstance(self.margin, bool) and 0 < self.margin <= 1
        ):
            raise ValueError(
                f'margin must be a number in (0, 1], the fraction of the stability limit to use, or "auto"; '
                f"got {self.margin!r}"
            )
        if not isinstance(self.follow_limit, bool):
            raise TypeError(f"follow_limit must be True or False, got {self.follow_limit!r}")
        for name in ("margin_max", "trial_slack", "growth", "max_overhead", "credit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        for name, ok, allowed in (
            ("margin_max", self.margin_max >= MARGIN_MAX_LEAST, f"at least {MARGIN_MAX_LEAST}"),
            ("trial_slack", 0 < self.trial_slack <= 1, "in (0, 1]"),
            ("growth", self.growth >= 1, "at least 1 (1.02 lets the cap rise by 2 % an update)"),
            ("max_overhead", self.max_overhead >= 0, "at least 0 (gradient evaluations an update)"),
            ("credit", self.credit >= 0, "at least 0 (gradient evaluations)"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    @property
    def learns(self) -> bool:
        """Whether the margin is learned."""
        return self.margin == "auto"

    def margin_at(self, multiple: float, share: float, *, young: bool = False) -> float:
        """Returns the margin in force: a learned multiple of the noise limit as a part of lr_limit, or the fixed one.

        A learned one is MARGIN_YOUNG at most in a young run whose noise limit lies within lr_limit.

        Example:
            >>> Policy().margin_at(2.0, 0.25), Policy(margin_max=0.3).margin_at(2.0, 0.25), Policy(0.8).margin_at(2, 1)
            (0.5, 0.3, 0.8)
            >>> Policy().margin_at(2.0, 1.0), Policy().margin_at(2.0, 1.0, young=True)
            (2.0, 1.0)
        """
        if self.margin != "auto":
            return float(self.margin)
        return min(multiple * share, self.margin_max, MARGIN_YOUNG if young and share <= 1 else math.inf)


def noise_share(flip: float, gain: float, *, averaged: bool, unaveraged: float = UNAVERAGED) -> float:
    """Returns the noise limit as a part of lr_limit = c / gamma.

        noise limit = 2 / (gamma sqrt(gain)),    `unaveraged` times that where steps are made of single gradients

    What momentum adds to the limit holds for gradients that are the same from step to step. In a small batch's noise it
    adds nothing: there an average of weight 1 (Adam's) is stable up to 2 / gamma, and a sum of gradients (heavy ball's,
    gain = 1 / (1 - mu)) up to 2 / (gamma gain). Real runs lie between the two; for sums this takes the middle.

    Args:
        flip: The update rule's constant c; 2 under the bounds that leave momentum out.
        gain: Sum of the weights of past gradients in one step.
        averaged: Whether P is free of gradients, or the step is made of averaged gradients alone.
        unaveraged: See `Ensemble.unaveraged`.

    Example:
        >>> noise_share(38.0, 1.0, averaged=True) * 38, round(noise_share(3.8, 10.0, averaged=True), 3)  # Adam, SGD
        (2.0, 0.166)
        >>> noise_share(2.0, 1.0, averaged=False)                                                        # RMSprop
        3.0

    References:
        "2 (1 - b) / lr" for small batches: arXiv 2604.14108 (2026). Polyak 1964.
    """
    return (1.0 if averaged else unaveraged) * 2.0 / (flip * math.sqrt(gain))


def most_under_decay(decay: float, limit: float) -> float:
    """Returns the largest learned margin where weight decay is decoupled: lr * decay stays below 1, or lr the limit.

    Noise and curvature leave room beyond the limit, and trial steps find it; a parameter that decay alone moves to the
    other side of zero has none, and is large before a trial step tells.

    Args:
        decay: Decoupled weight decay, in 1 / lr.
        limit: The limit, below 2 / decay.

    Example:
        >>> most_under_decay(0.1, 20.0), most_under_decay(0.1, 2.0), most_under_decay(0.0, 2.0)
        (1.0, 5.0, inf)
    """
    return max(1.0, 1 / (decay * limit)) if decay > 0 and limit > 0 else math.inf


def annealed(held: int) -> float:
    """Returns what is left of the noise limit after so many updates at which the cap held lr back.

        max(ANNEALED_TO, (STEADY_FROM / held)^ANNEALING),    1 up to STEADY_FROM

    At the edge of stability gamma follows lr, so a measured limit bears out whatever lr is used; only the run's length
    tells that noise is to be averaged out. Updates whose lr is a schedule's own do not count: it is the schedule that
    averages there, and a long warm-up must not find the cap annealed.

    Example:
        >>> annealed(0), annealed(100), round(annealed(500), 3), annealed(1_600), annealed(1_000_000)
        (1.0, 1.0, 0.669, 0.5, 0.5)

    References:
        Bjorck et al. 2024, arXiv 2409.19913: the longer the run, the lower the best lr.
    """
    return max(ANNEALED_TO, min(1.0, float((STEADY_FROM / max(1, held)) ** ANNEALING)))


def next_crest(crest: float | None, cap: float, *, held: int) -> float | None:
    """Returns the crest: what the cap, before annealing, may not rise above again in a steady run.

    It is the highest cap until the cap has held lr back at STEADY_FROM updates, but for those of a young run. A limit
    that rises later is mostly one that has followed lr, and what trial steps find bears it out (ROOM). Over 1,000
    updates, 100 times above the tuned lr, fifteen rows (three seeds) were 3.3 % behind in the mean and 18 % at worst
    without it, 1.1 and 7.5 % with it (docs/benchmarks.md).

    Args:
        crest: The crest so far.
        cap: The cap of the last update.
        held: At how many updates the cap has held lr back (`State.held`).

    Example:
        >>> [next_crest(0.2, 0.3, held=held) for held in (0, 100, 101)], next_crest(0.3, 0.2, held=100)
        ([0.3, 0.3, 0.2], 0.3)
    """
    return max(cap, crest or 0.0) if held <= STEADY_FROM else crest


def pace(held: int, last: int) -> float:
    """Returns the factor by which the multiple moves after trial steps above MULTIPLE_START: STEP, in a steady run
    no more than the run has grown longer since.

    So it rises or falls no faster than that length does, however many trial steps there are, as steps of a
    stochastic approximation shrink (Robbins and Monro 1951).

    Args:
        held: At how many updates the cap has held lr back: the run's length.
        last: What that was at the trial steps before.

    Example:
        >>> pace(50, 40), pace(1_000, 800), pace(1_000, 10)
        (1.5, 1.25, 1.5)
    """
    return STEP if held <= STEADY_FROM else min(STEP, held / max(1, last))


def next_cap(cap: float | None, target: float, growth: float, *, free: bool) -> float:
    """Returns the cap of the coming update: down to the target at once, up by at most `growth`.

    Only the cap's rise is limited, never the schedule's: a schedule below the cap keeps its own lr to the bit.

    Args:
        cap: The cap so far, None before the first measurement.
        target: margin * lr_limit of the last measurement.
        growth: Largest factor of a rise.
        free: Whether the run is young enough for the cap to follow freely.

    Example:
        >>> next_cap(0.1, 0.05, 1.02, free=False), next_cap(0.1, 1.0, 1.02, free=False)
        (0.05, 0.10200000000000001)
        >>> next_cap(None, 1.0, 1.02, free=False)
        1.0
    """
    return target if cap is None or free else min(target, cap * growth)


def learned_growth(growth: float, *, held: int, trial: Trial | None) -> float:
    """Returns the largest rise of the cap in the coming update while the margin is learned.

    None where the last trial step failed; CATCH_UP times `growth` where it had room; else the smaller of `growth` and
    what makes the cap rise like the run's length to the power AGING.

    Example:
        >>> learned_growth(1.02, held=10, trial="fine"), learned_growth(1.02, held=500, trial="fine")
        (1.02, 1.001)
        >>> learned_growth(1.02, held=500, trial="tight"), round(learned_growth(1.02, held=500, trial="roomy"), 3)
        (1.0, 1.104)
    """
    if trial in FAILED:
        return 1.0
    return _power(growth, CATCH_UP) if trial == "roomy" else 1 + min(growth - 1, AGING / max(1, held))


def _power(growth: float, times: int) -> float:
    """`growth ** times`, infinite where Python raises OverflowError."""
    return math.inf if times * math.log(growth) > 700 else float(growth**times)


Trial = Literal["roomy", "fine", "tight", "bad"]
"""What trial steps found: even the longest is fine; the lengthened one is; only the planned one is; not even that."""

FAILED: tuple[Trial, Trial] = ("tight", "bad")
"""Those that lower the multiple; in a young run "tight" does not: the planned step itself was found to be fine."""


def rungs(trial_slack: float, *, binding: bool, halvings: int) -> list[float]:
    """Returns the lengths of the trial steps to try, in units of the planned one, until one is fine.

    Example:
        >>> rungs(0.5, binding=True, halvings=0), rungs(0.5, binding=False, halvings=2)
        ([8.0, 2.0, 1.0], [2.0, 1.0, 0.5, 0.25])
    """
    near = 1 / trial_slack
    lengths = [ROOM * near] * binding + [near] + [1.0] * (near > 1)
    return lengths + [0.5**k for k in range(1, halvings + 1)]


def next_rung(lengths: list[float], last: float | None, *, failed: bool) -> float | None:
    """Returns the next length to try, None where the last one was fine or was the last.

    Example:
        >>> next_rung([8.0, 2.0, 1.0], None, failed=False), next_rung([8.0, 2.0, 1.0], 8.0, failed=True)
        (8.0, 2.0)
        >>> next_rung([8.0, 2.0, 1.0], 2.0, failed=False), next_rung([8.0, 2.0, 1.0], 1.0, failed=True)
        (None, None)
    """
    if last is None:
        return lengths[0]
    return next((length for length in lengths if failed and length < 0.99 * last), None)


def judged(length: float, trial_slack: float, *, failed: bool) -> Trial:
    """Returns what the last of a row of trial steps says; `length` as in `rungs`.

    Example:
        >>> [judged(k, 0.5, failed=False) for k in (8.0, 2.0, 1.0, 0.5)], judged(1.0, 0.5, failed=True)
        (['roomy', 'fine', 'tight', 'bad'], 'bad')
    """
    near, length = 1 / trial_slack, length * 1.01  # lrs are rounded
    if failed or length < 1:
        return "bad"
    if length < near:
        return "tight"
    return "roomy" if length >= ROOM * near else "fine"


def learned_multiple(
    multiple: float,
    trial: Trial,
    *,
    used: float,
    again: bool = False,
    least: float | None = None,
    found: float | None = None,
    step: float = STEP,
) -> float:
    """Returns the multiple of the noise limit after trial steps.

    It rises by `step` where there is room, from below MULTIPLE_START by STEP to there. Where only the lengthened step
    fails it falls by `step` below what was planned, where the planned one does by STEP; in a young run to what its
    search found, which is the planned step itself where only the lengthened one fails.

    Args:
        multiple: The multiple so far.
        trial: What the trial steps found.
        used: The planned lr in units of the noise limit.
        again: Whether the trial before failed too.
        least: What a failed trial may cut it to, if not to MULTIPLE_LEAST ("tight"; MULTIPLE_LOW if again) or
            MULTIPLE_FAILED ("bad").
        found: In a young run, the multiple that a search found to be fine.
        step: See `pace`.

    Example:
        >>> learned_multiple(2.0, "roomy", used=2.0), learned_multiple(2.0, "fine", used=2.0)
        (3.0, 2.0)
        >>> learned_multiple(6.0, "tight", used=6.0), learned_multiple(2.4, "tight", used=2.4)
        (4.0, 2.0)
        >>> learned_multiple(1.5, "tight", used=1.5, again=True), learned_multiple(2.0, "bad", used=2.0, found=0.8)
        (1.0, 0.8)
        >>> [learned_multiple(m, "roomy", used=m, step=1.25) for m in (1.0, 1.6, 2.0)]
        [1.5, 2.0, 2.5]
    """
    if trial == "roomy":
        if multiple < MULTIPLE_START:
            return min(MULTIPLE_START, multiple * STEP)
        return max(multiple, min(MULTIPLE_MOST, multiple * step))
    if trial == "fine":
        return multiple
    if least is None:
        least = MULTIPLE_FAILED if trial == "bad" else MULTIPLE_LOW if again else MULTIPLE_LEAST
    fall = step if trial == "tight" and multiple > MULTIPLE_START else STEP
    cut = min(multiple, used if used > 0 else multiple) / fall if found is None else found
    return min(multiple, max(least, cut))


def median_limit(votes: Sequence[float]) -> float:
    """Returns the limit that a learned margin is a margin of: the median of the newest VOTES measured ones.

    Of two it is their geometric mean.

    Example:
        >>> median_limit([1.0, 1.0, 1e-3]), median_limit([4.0, 1.0]), median_limit([9.0, 1.0, 2.0, 3.0])
        (1.0, 2.0, 2.0)
    """
    return math.exp(statistics.median(math.log(vote) for vote in votes[-VOTES:]))
