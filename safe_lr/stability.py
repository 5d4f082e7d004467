"""When does an optimizer turn unstable? Update rules, their transition matrices and the lr at which they flip.

Everything here is a pure function of numbers: no model, no tensor, no optimizer.

Near a stationary point the loss is a quadratic. Along a direction with preconditioned curvature `h` (an eigenvalue of
P^-1/2 H P^-1/2), the gradient is `h x` and an optimizer with one average of past gradients obeys

    average' = decay * average + (1 - decay) * h x
    x'       = x - lr * (from_average * average' + from_gradient * h x + weight_decay * x)

which is the augmented state `s' = A s` of the source paper's Sec. 3.9, Eq. 23. It is stable while every eigenvalue of A
lies inside the unit circle, and as lr grows the first one to leave does so at z = -1 (the flip: x changes sign each
step).

`lr_limit` finds the exit numerically, for this and for any other rule that can say what its A is; `UpdateRule.flip` is
the closed form that the scheduler uses at each update, tested equal to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

POINTS = 64
"""Points of the scan for the exit, per decade of lr: what is unstable over less than 3.7 % of lr can be missed."""

DECADES = (-7, 12)
"""Where the scan begins and ends, in units of the lr that changes A by 1; limits seen so far lie between 1 and 1e6."""

ROUNDING = 1e-9
"""What |z| must exceed 1 by to count as outside. A double eigenvalue on the circle, such as that of undamped momentum,
is computed to the root of the machine's precision only; the solver extrapolates back to 1."""


class Rule(Protocol):
    """Whatever knows its transition matrix: `UpdateRule`, or a rule with more averages, a delay, a period of two steps.

    Example:
        A gradient that comes one step late, x' = x - h x_before; the state is (x, x_before).

        >>> class Late:
        ...     def matrix(self, h, decay):
        ...         zero, one = np.zeros_like(h), np.ones_like(h)
        ...         return np.stack([np.stack([1 - decay, -h], -1), np.stack([one, zero], -1)], -2)
        >>> print(f"{lr_limit(Late(), gamma=4.0):.6f}")    # 1 / gamma: half of gradient descent's
        0.250000
    """

    def matrix(self, h: Array, decay: Array) -> Array:
        """Returns A, of shape (..., n, n).

        Args:
            h: lr * eigenvalue, shape (...,).
            decay: lr * weight_decay, the same shape.
        """
        ...  # pragma: no cover


@dataclass(frozen=True)
class UpdateRule:
    """How an optimizer turns gradients into a direction: the numbers that decide its stability.

    The average is normalised (its weights sum to 1), so that the rule of a *young* optimizer differs from that of an
    old one only in `decay`, see `warm_decay`: at the first update the average is the gradient itself (decay 0, c = 2).
    Taking the old optimizer's limit from step 0 on instead amplifies a quadratic 1e17-fold where the average is
    bias-corrected with decay .9, and 22,500-fold at half of it; with the rule of the coming step, following the limit
    at margin 1 stays below 2.5-fold.

    Attributes:
        decay: Weight of the old average in the new one, in [0, 1). 0 where the optimizer has no momentum.
        from_average: Weight of the new average in the direction (heavy ball: the sum of the weights, 1 / (1 - mu)).
        from_gradient: Weight of the fresh gradient in the direction (1 without momentum and in Nesterov's form).

    Example:
        >>> UpdateRule().flip                                                         # gradient descent: lr < 2 / gamma
        2.0
        >>> round(UpdateRule(decay=0.9, from_average=1, from_gradient=0).flip, 9)     # Adam: 2 (1 + b1) / (1 - b1)
        38.0
        >>> round(UpdateRule(decay=0.9, from_average=10, from_gradient=0).flip, 9)    # heavy ball: 2 (1 + mu)
        3.8

    References:
        The source paper, Sec. 3.9, Eq. 23. Kingma & Ba 2015 (bias correction). Polyak 1964; Nesterov 1983.
    """

    decay: float = 0.0
    from_average: float = 0.0
    from_gradient: float = 1.0

    @property
    def flip(self) -> float:
        """The constant c in `lr_limit = c / gamma`: the value of lr * eigenvalue at which A has the eigenvalue -1.

        From det(A + I) = 0 with `trace A = 1 + a - h (f (1 - a) + g)` and `det A = a (1 - h g)`:

            c = 2 (1 + a) / (f (1 - a) + g (1 + a))        a = decay, f = from_average, g = from_gradient

        Infinite where the direction holds nothing of the gradient. The first exit is the flip as long as no weight is
        negative (the product of A's eigenvalues stays inside too, by Jury's criterion); for other rules use `lr_limit`.
        """
        a, gain = self.decay, self.from_average * (1 - self.decay) + self.from_gradient * (1 + self.decay)
        return float(2 * (1 + a) / gain) if gain > 0 else math.inf

    @property
    def gain(self) -> float:
        """The sum of the weights of all gradients in one direction: 1 for averages, 1 / (1 - mu) for heavy ball.

        Example:
            >>> UpdateRule().gain, UpdateRule(decay=0.9, from_average=10, from_gradient=0).gain
            (1.0, 10)
        """
        return self.from_average + self.from_gradient

    def matrix(self, h: Array, decay: Array) -> Array:
        """Returns A of `(x, lr * average)' = A (x, lr * average)`, of shape (..., 2, 2).

        Args:
            h: lr * eigenvalue.
            decay: lr * weight_decay, of the same shape.
        """
        a, f, g = self.decay, self.from_average, self.from_gradient
        matrix = np.empty((*h.shape, 2, 2))
        matrix[..., 0, 0] = 1 - decay - h * (f * (1 - a) + g)
        matrix[..., 0, 1] = -f * a
        matrix[..., 1, 0] = (1 - a) * h
        matrix[..., 1, 1] = a
        return matrix


def warm_decay(b: float, updates: float, caution: float = 0.9) -> float:
    """Returns the decay of a young exponential average at its update number `updates` (1 for the first).

    After t gradients an exponential average that started from nothing, or is bias-corrected, is

        average_t = decay_t * average_{t-1} + (1 - decay_t) * gradient_t,    decay_t = b (1 - b^{t-1}) / (1 - b^t)

    The limit of that rule, followed step by step while it rises, amplifies at most 2.1-fold for b = .9 but 7-fold for
    b = .999. Taken at the age 1 + .9 (t - 1) it stays below 2.5-fold for every b, and ends at the same limit.

    Args:
        b: The exponential decay, in [0, 1).
        updates: t, at least 1; `math.inf` for an average that has forgotten its start.
        caution: Fraction of the age that counts; 1 gives the decay exactly.

    Example:
        >>> warm_decay(0.9, 1), round(warm_decay(0.9, 2, caution=1), 6), warm_decay(0.9, math.inf)
        (0.0, 0.473684, 0.9)
    """
    if b == 0:
        return 0.0
    age = 1 + caution * (updates - 1)
    return float(b * (1 - b ** (age - 1)) / (1 - b**age))


def transition_matrix(
    rule: Rule, lr: npt.ArrayLike, eigenvalue: npt.ArrayLike, weight_decay: npt.ArrayLike = 0.0
) -> Array:
    """Returns A of the augmented state, `s' = A s` (the source paper's Eq. 23).

    Args:
        rule: The update rule; an `UpdateRule`'s state is `(x, lr * average)`.
        lr: Learning rate, any shape (broadcast against the others).
        eigenvalue: Eigenvalue of the preconditioned Hessian; `lr * eigenvalue` has no unit.
        weight_decay: Decoupled weight decay.

    Returns:
        Array of shape (..., n, n), n = 2 for an `UpdateRule`.

    Example:
        >>> transition_matrix(UpdateRule(), lr=0.5, eigenvalue=3.0)[0, 0]      # 1 - lr * eigenvalue
        np.float64(-0.5)
    """
    lr, eigenvalue, weight_decay = np.broadcast_arrays(*(np.asarray(x, float) for x in (lr, eigenvalue, weight_decay)))
    return rule.matrix(np.asarray(lr * eigenvalue), np.asarray(lr * weight_decay))


def spectral_radius(
    rule: Rule, lr: npt.ArrayLike, eigenvalue: npt.ArrayLike, weight_decay: npt.ArrayLike = 0.0
) -> Array:
    """Returns the largest |z| among the eigenvalues of the transition matrix; stable below 1 (Eq. 12).

    Args: As `transition_matrix`; the shape of the result is theirs, broadcast.

    Example:
        >>> adam = UpdateRule(decay=0.9, from_average=1, from_gradient=0)
        >>> bool(spectral_radius(adam, lr=37.9, eigenvalue=1) < 1 < spectral_radius(adam, lr=38.1, eigenvalue=1))
        True
    """
    radius: Array = np.abs(np.linalg.eigvals(transition_matrix(rule, lr, eigenvalue, weight_decay))).max(axis=-1)
    return radius


def lr_limit(rule: Rule, gamma: npt.ArrayLike, weight_decay: npt.ArrayLike = 0.0) -> Array:
    """Returns the smallest lr at which an eigenvalue of A leaves the unit circle, wherever on the circle it does.

    Every lr below it is stable. Without weight decay that holds for all curvatures between 0 and `gamma` together,
    because A depends on their product with lr alone. For an `UpdateRule` it holds with weight decay too, and

        lr_limit = 2 / ((2 / c) gamma + weight_decay),    c = rule.flip

    For AdamW this is 2 (1 + b1) / ((1 - b1) gamma + (1 + b1) wd). For other rules with decay, take the smallest over
    the eigenvalues. What is stable again at some larger lr does not count.

    The exit is found by a scan of lr and bisection, to about 1e-9 in lr (1e-13 where |z| passes 1 with a slope).

    Args:
        rule: The update rule.
        gamma: Largest eigenvalue of P^-1/2 H P^-1/2, any shape (broadcast against the decay).
        weight_decay: Decoupled weight decay, in 1/lr.

    Returns:
        Array of the common shape. Infinite where nothing curves and nothing decays, or where no lr is unstable; 0 where
        every lr is (gamma is infinite, or negative without decay: it climbs); NaN for NaN.

    Example:
        >>> float(lr_limit(UpdateRule(), gamma=4.0))
        0.5
        >>> lr_limit(UpdateRule(), gamma=[4.0, 8.0], weight_decay=2.0)
        array([0.33333333, 0.2       ])

    References:
        The source paper, Sec. 3.9. Jury 1964, "Theory and application of the z-transform method".
    """
    gamma, weight_decay = np.broadcast_arrays(np.asarray(gamma, float), np.asarray(weight_decay, float))
    pairs = np.stack([gamma.ravel(), weight_decay.ravel()], axis=-1)
    size = np.abs(pairs).max(axis=-1)  # NaN if either is
    limit = np.where(np.isinf(size), 0.0, np.where(size == 0, np.inf, np.nan))
    known = np.isfinite(size) & (size > 0)
    # lr moves a point along a ray in the plane of (h, decay); rays that are alike are followed once.
    rays, which = np.unique(pairs[known] / size[known, None], axis=0, return_inverse=True)
    parts = [_first_exit(rule, rays[i : i + 4096]) for i in range(0, len(rays), 4096)]  # some 20 MB at a time
    with np.errstate(over="ignore", under="ignore"):
        limit[known] = np.concatenate([np.empty(0), *parts])[which.ravel()] / size[known]
    return limit.reshape(gamma.shape)


def _first_exit(rule: Rule, rays: Array) -> Array:
    """How far along each ray (h, decay) A stays stable: scan, then bisection."""
    unit = 1 / (np.abs(rays) @ _sensitivity(rule))  # there A has changed by about 1
    rays = rays * unit[:, None]
    first, last = DECADES
    grid = 10.0 ** (first + np.arange((last - first) * POINTS) / POINTS)
    exit_index = np.full(len(rays), len(grid))
    for start in range(0, len(grid), POINTS):
        still = np.flatnonzero(exit_index == len(grid))
        outside = _outside(rule, grid[start : start + POINTS], rays[still, None])
        exit_index[still] = np.where(outside.any(axis=-1), start + outside.argmax(axis=-1), len(grid))
        if (exit_index < len(grid)).all():
            break
    found = np.flatnonzero((exit_index > 0) & (exit_index < len(grid)))
    distance = np.where(exit_index == 0, 0.0, np.inf)
    distance[found] = _bisected(rule, rays[found], grid[exit_index[found] - 1], grid[exit_index[found]])
    return distance * unit


def _bisected(rule: Rule, rays: Array, low: Array, high: Array) -> Array:
    """The exit between a stable and an unstable point of each ray."""
    for _ in range(50):
        middle = (low + high) / 2
        outside = _outside(rule, middle, rays)
        low, high = np.where(outside, low, middle), np.where(outside, middle, high)
    # There |z| is 1 + ROUNDING; with the slope, back to 1.
    excess, beyond = (_excess(rule, at, rays) for at in (high, high * (1 + 1e-6)))
    rise = beyond - excess
    back = np.divide(excess, rise, out=np.zeros_like(rise), where=rise > 0) * 1e-6
    return high * (1 - np.clip(back, 0, 1e-3))


def _sensitivity(rule: Rule) -> Array:
    """How fast A changes with h and with decay, at 0."""
    step = 1e-3
    at_0, along_h, along_decay = rule.matrix(np.array([0.0, step, 0.0]), np.array([0.0, 0.0, step]))
    change = np.array([np.linalg.norm(along_h - at_0), np.linalg.norm(along_decay - at_0)]) / step
    return np.where(change > 0, change, 1.0)


def _outside(rule: Rule, distance: Array, rays: Array) -> npt.NDArray[np.bool_]:
    """Whether some |z| is above 1 by more than rounding; near 0, where all starts at 1, by more than a trace."""
    outside: npt.NDArray[np.bool_] = _excess(rule, distance, rays) > np.minimum(ROUNDING, 1e-3 * distance)
    return outside


def _excess(rule: Rule, distance: Array, rays: Array) -> Array:
    """The spectral radius, less 1, so far along each ray."""
    return spectral_radius(rule, distance, rays[..., 0], rays[..., 1]) - 1
