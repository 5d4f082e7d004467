"""What the update rules of all parameters come to: one constant c for the limit, one share of it for noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from safe_lr.policies import noise_share
from safe_lr.stability import UpdateRule

Rules = Sequence[UpdateRule | None]
"""Each parameter's update rule at the coming step, None where it does not move."""

Constants = list[float | None]
"""Each parameter's c, None where it does not move."""


def constants(rules: Rules) -> Constants:
    """Returns each parameter's c: its limit is c / gamma.

    Example:
        >>> constants([UpdateRule(), None])                                                     # gradient descent
        [2.0, None]
    """
    return [None if rule is None else rule.flip for rule in rules]


def smallest_rise(then: Constants, now: Constants) -> float | None:
    """Returns the factor by which a joint limit rises at least; None where the parameters are others, or none moves.

    lambda_max of D^1/2 H D^1/2 falls at least as much as every entry of D does.

    Example:
        >>> smallest_rise([2.0, 4.0, None], [3.0, 4.0, 8.0]), smallest_rise([2.0], [2.0, 2.0])
        (1.0, None)
    """
    if len(then) != len(now):
        return None
    rises = [c / before for before, c in zip(then, now, strict=True) if before is not None and c is not None]
    return min(rises, default=None)


def risen(limit: float, rise: float, decay: float) -> float:
    """Returns a limit where each c is `rise` times what it was.

        limit = 2 / ((2 / c) gamma + decay)

    Only the part that curves falls with c. Where parameters' decays differ it is no larger than it may be.

    Args:
        limit: The limit so far.
        rise: Of c.
        decay: The largest decoupled weight decay, in 1 / lr.

    Example:
        >>> risen(0.1, 3.0, 0.0), risen(0.1, 19.0, 20.0), round(risen(0.05, 3.0, 20.0), 4)
        (0.30000000000000004, 0.1, 0.075)
    """
    if rise == 1 or decay <= 0:
        return limit * rise
    return 1 / (max(0.0, 1 / limit - decay / 2) / rise + decay / 2)


def largest_constant(known: Constants) -> float:
    """Returns the largest finite c of those that move; 2 where there is none.

    Example:
        >>> largest_constant([3.8, None, math.inf]), largest_constant([None])
        (3.8, 2.0)
    """
    return max((c for c in known if c is not None and c < math.inf), default=2.0)


def smallest_share(rules: Rules, *, momentum: bool, unaveraged: float) -> float | None:
    """Returns the noise limit's part of lr_limit (`noise_share`), the smallest over the parameters; None where none
    moves.

    Args:
        rules: The rules.
        momentum: Whether the limit counts momentum.
        unaveraged: See `Ensemble.unaveraged`.

    Example:
        >>> plain = [UpdateRule(), None]
        >>> [smallest_share(plain, momentum=True, unaveraged=times) for times in (1.0, 3.0)]
        [1.0, 3.0]
    """
    shares = [
        noise_share(
            rule.flip if momentum else 2.0,
            rule.gain,
            averaged=rule.from_gradient == 0,
            unaveraged=unaveraged,
        )
        for rule in rules
        if rule is not None and rule.flip < math.inf and rule.gain > 0
    ]
    return min(shares, default=None)
