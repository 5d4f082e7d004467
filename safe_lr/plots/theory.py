"""The theory's pictures: which lrs are stable, and how the eigenvalues of the transition matrix move."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from safe_lr.plots.canvas import new_axes
from safe_lr.plots.charts import number
from safe_lr.stability import Array, Rule, lr_limit, transition_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def stability_region(
    rule: Rule,
    curvature: npt.ArrayLike,
    p: npt.ArrayLike,
    *,
    scaled: int = 0,
    scales: npt.ArrayLike | None = None,
    weight_decay: float = 0.0,
    measured: Iterable[tuple[float, float]] = (),
    ax: Axes | None = None,
) -> Axes:
    """Draws which lrs are stable while one entry of the preconditioner is scaled (the source paper's Figure 3).

    For gradient descent on a diagonal Hessian the region is Eq. 22, `lr < min_i 2 p_i / lambda_i`. Beside the limit of
    the rule stand those of the two coarser bounds, where they differ from it: `2 / (gamma + weight_decay)` (Eq. 17, no
    momentum) and `2 / (lambda_max / p_min + weight_decay)` (Lemma 1, Eq. 21).

    Args:
        rule: The update rule, or anything that knows its transition matrix.
        curvature: The eigenvalues lambda_i of a Hessian that commutes with P, shape (n,); or any Hessian, (n, n).
            Directions that curve down grow at every lr, and are left out.
        p: The entries p_i of the preconditioner at scale 1, shape (n,).
        scaled: Which of them is scaled.
        scales: The factors, rising. By default four decades around 1.
        weight_decay: Decoupled weight decay.
        measured: (scale, lr) pairs to lay over: the boundary of a real optimizer.
        ax: Where to draw. None makes a figure of its own, outside pyplot.

    Returns:
        The axes, both logarithmic.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Shapes do not fit, an entry of p is not positive, or nothing curves.

    Example:
        >>> from safe_lr.stability import UpdateRule
        >>> ax = stability_region(UpdateRule(), curvature=[1.0, 4.0], p=[1.0, 1.0], scales=[0.1, 1.0])
        >>> ax.lines[0].get_ydata().round(6).tolist()    # min(2 s p_1 / lambda_1, 2 p_2 / lambda_2)
        [0.2, 0.5]
    """
    at: Array = np.logspace(-2, 2, 401) if scales is None else np.asarray(scales, float)
    spectrum, sharpness, entries = _preconditioned(np.asarray(curvature, float), np.asarray(p, float), scaled, at)
    limit = lr_limit(rule, spectrum, weight_decay).min(axis=-1)
    if not np.isfinite(limit).all():
        raise ValueError("nothing curves, so that every lr is stable; curvature needs a positive eigenvalue")
    coherence = 2 / (spectrum.max(axis=-1) + weight_decay)
    lemma1 = 2 / (sharpness / entries.min(axis=-1) + weight_decay)
    ax = new_axes(6.5, 4.5) if ax is None else ax
    ax.plot(at, limit, color="#1d4ed8", linewidth=2, label="limit of the update rule")
    for name, line, dashes in (("no momentum (Eq. 17)", coherence, (0, (5, 3))), ("Lemma 1", lemma1, (0, (1, 1.5)))):
        if not np.allclose(line, limit):
            ax.plot(at, line, color="#6b7280", linewidth=1.4, linestyle=dashes, label=name, zorder=1.5)
    points = np.array(list(measured), float).reshape(-1, 2)
    lines = np.concatenate([*(line.get_ydata() for line in ax.lines), points[:, 1]]).astype(float)
    bottom, top = lines.min() / 3, lines.max() * 3
    ax.fill_between(at, bottom, limit, color="#1d4ed8", alpha=0.12, linewidth=0, label="stable")
    if len(points):
        style: dict[str, Any] = {
            "color": "#c2410c",
            "markerfacecolor": "white",
            "markeredgewidth": 1.5,
            "markersize": 6,
        }
        ax.plot(*points.T, "o", label="real optimizer, measured", zorder=3, **style)
    ax.set(xscale="log", yscale="log", xlim=(at[0], at[-1]), ylim=(bottom, top))
    ax.set(title="Stable learning rates", xlabel=f"scale of $p_{{{scaled + 1}}}$", ylabel="lr")
    ax.grid(visible=True, which="major", alpha=0.3)
    ax.legend(frameon=False, fontsize="small")
    return ax


def transition_spectrum(
    rule: Rule,
    eigenvalue: float = 1.0,
    *,
    weight_decay: float = 0.0,
    lrs: npt.ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the eigenvalues of the transition matrix against the unit circle as lr grows (Sec. 3.9, Eq. 23).

    Where the first one crosses the circle is the limit: at -1 the parameter changes sign each step (the flip), at a
    complex pair it turns round.

    Args:
        rule: The update rule, or anything that knows its transition matrix.
        eigenvalue: Of the preconditioned Hessian; it changes nothing but the unit of lr, unless there is decay.
        weight_decay: Decoupled weight decay.
        lrs: Learning rates, rising. By default from 0 to 1.25 times the limit, more densely near 0.
        ax: Where to draw. None makes a figure of its own, outside pyplot.

    Returns:
        The axes, real part across, imaginary part up.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The rule has no limit, and no `lrs` are given.

    Example:
        >>> from safe_lr.stability import UpdateRule
        >>> ax = transition_spectrum(UpdateRule(0.9, 10.0, 0.0))    # heavy ball
        >>> ax.get_title()
        'leaves at lr = 3.8'
    """
    limit = float(lr_limit(rule, eigenvalue, weight_decay))
    exists = 0 < limit < math.inf
    if lrs is None and not exists:
        raise ValueError(f"the limit of this rule is {limit:g}, so that lrs have no scale; pass lrs=[...]")
    at = 1.25 * limit * np.linspace(0, 1, 1000) ** 2 if lrs is None else np.asarray(lrs, float)
    z = np.linalg.eigvals(transition_matrix(rule, at, eigenvalue, weight_decay))
    ax = new_axes(5.0, 5.0) if ax is None else ax
    turn = np.linspace(0, 2 * np.pi, 400)
    ax.plot(np.cos(turn), np.sin(turn), color="#6b7280", linewidth=1, label="unit circle")
    for name, shown, colour in (
        ("lr below the limit", z[at <= limit], "#1d4ed8"),
        ("lr above it", z[at > limit], "#c2410c"),
    ):
        ax.plot(shown.real.ravel(), shown.imag.ravel(), ".", markersize=3, color=colour, label=name)
    start = np.linalg.eigvals(transition_matrix(rule, 0.0, eigenvalue, weight_decay))
    ax.plot(start.real, start.imag, "s", color="#0f766e", markersize=5, label="lr = 0")
    if exists:
        leaving = np.linalg.eigvals(transition_matrix(rule, limit, eigenvalue, weight_decay))
        leaving = leaving[np.abs(leaving) > 1 - 1e-6]
        ring: dict[str, Any] = {
            "markerfacecolor": "none",
            "markeredgecolor": "#c2410c",
            "markeredgewidth": 1.8,
            "markersize": 10,
        }
        ax.plot(leaving.real, leaving.imag, "o", label="at the limit", **ring)
    title = f"leaves at lr = {number(limit)}" if exists else f"{'no' if limit else 'every'} lr is unstable"
    ax.set(title=title, xlabel="real part of z", ylabel="imaginary part of z")
    ax.set(aspect="equal", xlim=(-1.7, 1.3), ylim=(-1.5, 1.5))
    ax.grid(visible=True, which="major", alpha=0.3)
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    return ax


def _preconditioned(curvature: Array, p: Array, scaled: int, scales: Array) -> tuple[Array, float, Array]:
    """Eigenvalues of P^-1/2 H P^-1/2 that are not negative, at each scale; lambda_max(H); P's entries at each scale."""
    if p.ndim != 1 or curvature.shape not in ((len(p),), (len(p), len(p))):
        raise ValueError(f"curvature is (n,) or (n, n) for p of shape (n,); got {curvature.shape} and {p.shape}")
    if not (p > 0).all():
        raise ValueError(f"the entries of p are positive; got {p.tolist()}")
    entries: Array = np.repeat(p[None], len(scales), axis=0)
    entries[:, scaled] *= scales
    if curvature.ndim == 1:
        spectrum: Array = curvature / entries
        sharpness = curvature.max()
    else:
        root = entries**-0.5
        spectrum = np.asarray(np.linalg.eigvalsh(root[:, :, None] * curvature * root[:, None, :]), float)
        sharpness = np.linalg.eigvalsh(curvature).max()
    return spectrum.clip(min=0), float(sharpness), entries
