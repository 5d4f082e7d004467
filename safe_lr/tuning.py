"""When betas and eps move, and how far: pure functions of numbers.

The source paper's guideline is b2 .999 -> .99 and b1 .9 -> .95 (Sec. 3.6, 4.2.2): lower gamma, flatter minima. It does
not hold everywhere, so what is moved must show that it helps. A `Dial` goes from the user's own values (0) to the end
of their ranges (1): forward while the cap holds lr back, back again where gamma did not fall or there is slack.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

Range = tuple[float, float]

STEP = 1 / 8
"""Largest move of a dial. From (.9, .999) towards (.95, .99) the first update then changes by less than 1 % even where
gradients are nothing but noise (tests/test_betas.py); with a sixth it would be 1.1 %."""

STEP_FRESH = STEP / 4
"""The same where b1 is also the weight of the fresh gradient (NAdam): on noise alone the first update follows that
weight, and changes by 4 % after a whole STEP."""

PRESSES = 1.5
"""From this ratio of desired lr to cap on, the cap holds lr back enough to move something (a guess, like the next two:
no benchmark has chosen between them) ..."""

HARD = 4.0
"""... and from this one on, to move it by a whole STEP."""

SLACK = 0.5
"""Below this ratio there is slack, and the user's own values are good enough."""

SETTLING = 10
"""Updates before the first move, and at least between two: before that gamma moves a hundredfold by itself."""

MEMORY = 0.5
"""Weight of a new measurement in the (geometric) mean gamma that moves are judged by: it varies by half from batch to
batch."""

PATIENCE = 10
"""Most doublings of the wait after moves that did not help."""

SINGLE = 1e-6
"""Rounding of betas that are tensors in single precision: a .9 lies inside of (.9, .95)."""

ROUNDING = 1e-9
"""Positions below this are the user's own value."""


@dataclass(frozen=True)
class Tuning:
    """What may be moved, and inside which ranges. Checked when made.

    Attributes:
        tune_betas: Whether the decays of the moments are.
        beta1_range: The first moment's; it moves up. A group's own value outside is left alone.
        beta2_range: The second moment's (RMSprop's alpha); it moves down.
        tune_eps: Whether eps is.
        eps_range: Its range; it moves up, and never above most of the second moment's roots, which mostly is the
            narrower bound: the default has room for every optimizer's own eps.

    Raises:
        TypeError: Not a flag, or not a pair of numbers.
        ValueError: A range that is empty, upside down, or holds what no beta or eps can be.

    Example:
        >>> Tuning(beta2_range=(0.999, 0.99))
        Traceback (most recent call last):
        ValueError: beta2_range must be two numbers, 0 <= lowest < highest < 1, such as (0.99, 0.999); got (0.999, 0.99)
    """

    tune_betas: bool = False
    beta1_range: Range = (0.9, 0.95)
    beta2_range: Range = (0.99, 0.999)
    tune_eps: bool = False
    eps_range: Range = (0.0, 1e-3)

    def __post_init__(self) -> None:
        for name in ("tune_betas", "tune_eps"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, top, allowed, example in (
            ("beta1_range", 1.0, "0 <= lowest < highest < 1", "(0.9, 0.95)"),
            ("beta2_range", 1.0, "0 <= lowest < highest < 1", "(0.99, 0.999)"),
            ("eps_range", math.inf, "0 <= lowest < highest", "(0.0, 1e-3)"),
        ):
            given = getattr(self, name)
            says = f"{name} must be two numbers, {allowed}, such as {example}; got {given!r}"
            if not (isinstance(given, (tuple, list)) and len(given) == 2 and all(map(_is_number, given))):
                raise TypeError(says)
            if not 0 <= given[0] < given[1] < top:
                raise ValueError(says)
            object.__setattr__(self, name, (float(given[0]), float(given[1])))

    def ends(self, beta1: float | None, beta2: float | None) -> tuple[float | None, float | None]:
        """Returns where a group's own betas move to; None for one that stays: it has none, or none inside its range.

        Example:
            >>> Tuning().ends(0.9, 0.999), Tuning().ends(0.9, 0.95), Tuning().ends(None, 0.99)
            ((0.95, 0.99), (0.95, None), (None, None))
        """
        (low1, high1), (low2, high2) = self.beta1_range, self.beta2_range
        return (
            high1 if beta1 is not None and low1 - SINGLE <= beta1 < high1 - SINGLE else None,
            low2 if beta2 is not None and low2 + SINGLE < beta2 <= high2 + SINGLE else None,
        )


def clipped(position: float) -> float:
    """Returns a position inside [0, 1]; one that is the user's own value but for rounding is 0.

    Example:
        >>> clipped(1.2), clipped(0.3 - 0.2 - 0.1)
        (1.0, 0.0)
    """
    return 0.0 if position < ROUNDING else min(1.0, position)


def decay_at(position: float, own: float, end: float | None) -> float:
    """Returns the decay at a dial's position: its memory 1 / (1 - b) goes from one end to the other in equal factors.

    Args:
        position: In [0, 1].
        own: The user's own decay, at 0.
        end: The decay at 1; None where it stays.

    Example:
        >>> decay_at(0.0, 0.9, 0.95), round(decay_at(0.5, 0.999, 0.99), 5), decay_at(1.0, 0.999, 0.99)
        (0.9, 0.99684, 0.99)
    """
    if end is None or position <= 0:
        return own
    return end if position >= 1 else 1 - (1 - own) ** (1 - position) * (1 - end) ** position


def eps_at(position: float, own: float, end: float) -> float:
    """Returns eps at a dial's position, evenly between both ends, for P = sqrt(v) + eps is linear in it.

    Example:
        >>> eps_at(0.0, 1e-8, 1e-4), eps_at(0.5, 0.0, 1e-4), eps_at(0.5, 1e-4, 1e-8)
        (1e-08, 5e-05, 0.0001)
    """
    return own + position * max(0.0, end - own)


def memory(decay: float, updates: int) -> float:
    """Returns how many updates a bias-corrected average remembers: 1 / (1 - b), or its age while it is young.

    Example:
        >>> round(memory(0.9, 1_000_000), 6), round(memory(0.999, 10), 2)
        (10.0, 9.96)
    """
    return (1 - decay**updates) / (1 - decay)


def pressure(desired: float, cap: float, *, longer: float | None) -> tuple[float, str]:
    """Returns how hard the cap binds, the desired lr in units of it, and the words for it.

    Where lr follows the cap no lr is desired. What it could be then is what a trial step showed to be fine, in units of
    the planned one; without such a step nothing says that lr is too small.

    Args:
        desired: The desired lr; infinite where lr follows the cap.
        cap: The cap, above 0.
        longer: The longest trial step that was fine, in units of the planned one; None where none longer was.

    Example:
        >>> pressure(1.0, 0.25, longer=None)
        (4.0, 'the desired lr is 4 times the cap')
        >>> pressure(math.inf, 0.25, longer=4.0)
        (4.0, 'a step 4 times as long would be fine')
    """
    if math.isfinite(desired):
        return desired / cap, f"the desired lr is {desired / cap:.3g} times the cap"
    if longer is None:
        return 1.0, "nothing says that lr is too small"
    return longer, f"a step {longer:.3g} times as long would be fine"


@dataclass(frozen=True)
class Dial:
    """Where a setting stands between the user's own value and the end of its range, and how its last move fared.

    Attributes:
        position: 0 is the user's own value, 1 the end of the range.
        moved: The last move, until it was judged; else 0.
        before: Mean gamma before that move.
        gamma: Mean gamma since then; None as long as none was measured.
        free_at: The update from which on the move can be judged and the next one made.
        failures: Moves in a row that did not help.
    """

    position: float = 0.0
    moved: float = 0.0
    before: float | None = None
    gamma: float | None = None
    free_at: int = SETTLING
    failures: int = 0

    def saw(self, gamma: float) -> Dial:
        """Returns the dial with one more measured gamma.

        Example:
            >>> Dial().saw(4.0).saw(1.0).gamma
            2.0
        """
        mean = gamma if self.gamma is None else self.gamma ** (1 - MEMORY) * gamma**MEMORY
        return replace(self, gamma=mean)

    def turned(
        self, press: float, why: str, *, updates: int, wait: float, held: bool = False, step: float = STEP
    ) -> tuple[Dial, str | None]:
        """Returns the dial after a measurement, and why it moved or stayed; None where nothing is to be said.

        A move forward that did not lower gamma is taken back, and the wait for the next one doubles.

        Args:
            press: See `pressure`.
            why: That in words.
            updates: Updates made so far.
            wait: Updates that a move needs to show what it does.
            held: Whether it may not move forward now.
            step: The largest move.

        Example:
            >>> dial, reason = Dial().saw(10.0).turned(4.0, "the cap binds", updates=50, wait=100)
            >>> round(dial.position, 3), dial.free_at, reason
            (0.125, 150, 'the cap binds')
            >>> dial.saw(12.0).turned(4.0, "the cap binds", updates=150, wait=100)[1]
            'gamma 10 -> 12 since the last move, which did not help and is taken back'
        """
        if updates < self.free_at or self.gamma is None:
            return self, None
        since = None if self.before is None else f"gamma {self.before:.3g} -> {self.gamma:.3g} since the last move"
        tried, helped = self.moved > 0, self.before is None or self.gamma < self.before
        failures = 0 if tried and helped else self.failures
        if tried and not helped:
            by, failures = -self.moved, min(PATIENCE, failures + 1)
            reason = f"{since}, which did not help and is taken back"
        elif press <= SLACK and self.position > 0:
            by, reason = -step, why if since is None else f"{since}; {why}"
        elif press >= PRESSES and self.position < 1 and not held:
            by = step * min(1.0, math.log(press) / math.log(HARD))
            reason = why if since is None else f"{since}; {why}"
        else:
            return replace(self, moved=0.0, before=None, failures=failures), since
        position = clipped(self.position + by)
        free_at = updates + math.ceil(max(SETTLING, wait) * 2**failures)
        return Dial(position, position - self.position, self.gamma, None, free_at, failures), reason


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
