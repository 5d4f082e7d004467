"""An empty picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def new_axes(width: float = 8.0, height: float = 4.5) -> Axes:
    """Returns axes on a figure of their own, outside pyplot: no display is needed, nothing stays open.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> new_axes().figure.get_size_inches().tolist()
        [8.0, 4.5]
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures are drawn with matplotlib: pip install 'safe_lr[plot]'") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained").subplots()
