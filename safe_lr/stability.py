"""When does an optimizer turn unstable? Update rules, their transition matrices and the lr at which they flip.

Everything here is a pure function of numbers: no model, no tensor, no optimizer.

Near a stationary point the loss is a quadratic. Along a direction with preconditioned curvature `h` (an eigenvalue of
P^-1/2 H P^-1/2), the gradient is `h x` and an optimizer with one average of past gradients obeys

    average' = decay * average + (1 - decay) * h x
    x'       = x - lr * (from_average * average' + from_gradient * h x + weight_decay * x)

which is the augmented state `s' = A s` of the source paper's Sec. 3.9, Eq. 23. It is stable while every eigenvalue of A
lies inside the unit circle, and as lr grows the first one to leave does so at z = -1 (the flip: x changes sign each
step).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class UpdateRule:
    """How an optimizer turns gradients into a direction: the numbers that decide its stability.

    The average is normalised (its weights sum to 1), so that the rule of a *young* optimizer differs from that of an
    old one only in `decay`, see `warm_decay`: at the first update the average is the gradient itself (decay 0, c = 2).
    Taking the old optimizer's limit from step 0 on instead amplifies a quadratic up to 19-fold with momentum .9 and
    39-fold with .95; with the rule of the coming step, following the limit at margin 1 stays below 2.5-fold.

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

        Infinite where the direction holds nothing of the gradient.
        """
        a, gain = self.decay, self.from_average * (1 - self.decay) + self.from_gradient * (1 + self.decay)
        return float(2 * (1 + a) / gain) if gain > 0 else math.inf


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
    rule: UpdateRule, lr: npt.ArrayLike, eigenvalue: npt.ArrayLike, weight_decay: npt.ArrayLike = 0.0
) -> Array:
    """Returns A of `(x, lr * average)' = A (x, lr * average)` (the source paper's Eq. 23).

    Args:
        rule: The update rule.
        lr: Learning rate, any shape (broadcast against the others).
        eigenvalue: Eigenvalue of the preconditioned Hessian; `lr * eigenvalue` has no unit.
        weight_decay: Decoupled weight decay.

    Returns:
        Array of shape (..., 2, 2).

    Example:
        >>> transition_matrix(UpdateRule(), lr=0.5, eigenvalue=3.0)[0, 0]      # 1 - lr * eigenvalue
        np.float64(-0.5)
    """
    lr, eigenvalue, weight_decay = np.broadcast_arrays(*(np.asarray(x, float) for x in (lr, eigenvalue, weight_decay)))
    h = lr * eigenvalue
    a, f, g = rule.decay, rule.from_average, rule.from_gradient
    matrix = np.empty((*h.shape, 2, 2))
    matrix[..., 0, 0] = 1 - lr * weight_decay - h * (f * (1 - a) + g)
    matrix[..., 0, 1] = -f * a
    matrix[..., 1, 0] = (1 - a) * h
    matrix[..., 1, 1] = a
    return matrix


def spectral_radius(
    rule: UpdateRule, lr: npt.ArrayLike, eigenvalue: npt.ArrayLike, weight_decay: npt.ArrayLike = 0.0
) -> Array:
    """Returns the largest |z| among the eigenvalues of the transition matrix; stable below 1 (Eq. 12).

    Example:
        >>> adam = UpdateRule(decay=0.9, from_average=1, from_gradient=0)
        >>> bool(spectral_radius(adam, lr=37.9, eigenvalue=1) < 1 < spectral_radius(adam, lr=38.1, eigenvalue=1))
        True
    """
    radius: Array = np.abs(np.linalg.eigvals(transition_matrix(rule, lr, eigenvalue, weight_decay))).max(axis=-1)
    return radius


def lr_limit(rule: UpdateRule, gamma: npt.ArrayLike, weight_decay: npt.ArrayLike = 0.0) -> Array:
    """Returns the lr below which no direction with preconditioned curvature up to `gamma` is amplified for ever.

        lr_limit = 2 / ((2 / c) gamma + weight_decay),    c = rule.flip

    For AdamW this is 2 (1 + b1) / ((1 - b1) gamma + (1 + b1) wd). Infinite where nothing curves and nothing decays.

    Args:
        rule: The update rule.
        gamma: Largest eigenvalue of P^-1/2 H P^-1/2, any shape.
        weight_decay: Decoupled weight decay, in 1/lr.

    Example:
        >>> float(lr_limit(UpdateRule(), gamma=4.0))
        0.5
        >>> lr_limit(UpdateRule(), gamma=[4.0, 8.0], weight_decay=2.0)
        array([0.33333333, 0.2       ])
    """
    with np.errstate(divide="ignore"):
        limit: Array = 2 / (2 / rule.flip * np.asarray(gamma, float) + np.asarray(weight_decay, float))
    return limit
