"""The picture of a curvature's eigenvalues."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from safe_lr.plots.canvas import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Density(Protocol):
    """What is drawn: `safe_lr.SpectralDensity` is one."""

    @property
    def grid(self) -> npt.NDArray[np.float64]: ...
    @property
    def density(self) -> npt.NDArray[np.float64]: ...
    @property
    def nodes(self) -> npt.NDArray[np.float64]: ...
    @property
    def sigma(self) -> float: ...
    @property
    def size(self) -> int: ...


def spectral_density(found: Density, ax: Axes | None = None) -> Axes:
    """Draws the density of eigenvalues, on a logarithmic axis: outliers are a 1/n of the whole and show on no other.

    The dotted line is the height of a single eigenvalue's peak, `1 / (n sigma sqrt(2 pi))`; the axis ends a decade
    below it, where there is nothing but the tails of Gaussians. Ticks along the bottom are the Ritz values, one row a
    probe: those that stand in line in all of them are outliers, the others sample the bulk.

    Args:
        found: What `safe_lr.spectral_density` returned.
        ax: Where to draw. None makes a figure of its own, outside pyplot.

    Returns:
        The axes; `ax.figure.savefig("density.png")` writes the picture.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch, safe_lr
        >>> x = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        >>> ax = spectral_density(safe_lr.spectral_density(lambda: x @ x, [x], sigma=0.1, grid=[1.0, 2.0, 3.0]))
        >>> round(float(ax.lines[0].get_ydata().max()), 3)      # all at 2: 1 / (0.1 sqrt(2 pi))
        3.989
    """
    ax = new_axes() if ax is None else ax
    alone = 1 / (found.size * found.sigma * math.sqrt(2 * math.pi))
    bottom, top = alone / 10, max(float(found.density.max()), alone) * 3
    ax.plot(found.grid, found.density, color="#1d4ed8", linewidth=1.6, label="density")
    ax.fill_between(found.grid, bottom, found.density.clip(min=bottom), color="#1d4ed8", alpha=0.12, linewidth=0)
    ax.axhline(alone, color="#6b7280", linewidth=1.2, linestyle=(0, (1, 1.5)), label="a single eigenvalue")
    rows = np.repeat(np.linspace(0.015, 0.09, len(found.nodes))[:, None], found.nodes.shape[1], axis=1)
    style: dict[str, Any] = {"color": "#c2410c", "markersize": 4, "alpha": 0.6, "transform": ax.get_xaxis_transform()}
    ax.plot(found.nodes.ravel(), rows.ravel(), "|", label="Ritz values, one row a probe", **style)
    ax.set(title="Spectral density", xlabel="eigenvalue", ylabel="share of eigenvalues per unit")
    ax.set(yscale="log", xlim=(found.grid[0], found.grid[-1]), ylim=(bottom, top))
    ax.grid(visible=True, which="major", alpha=0.3)
    ax.legend(frameon=False, fontsize="small")
    return ax
