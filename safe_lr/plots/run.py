"""A run's figures against the step, thinned for the eye."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from safe_lr.decisions import Decision
from safe_lr.loggers.records import Records, Row, read_jsonl
from safe_lr.plots.canvas import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]

# How lr's four curves look, in the picture and in the report alike: name of the figure, label, colour, dashes.
_LR_STYLES = (
    ("lr_limit", "limit", "#c2410c", (0, (1, 1.5))),
    ("cap", "cap", "#0f766e", (0, (6, 2, 1, 2))),
    ("lr_desired", "desired", "#6b7280", (0, (5, 3))),
    ("lr", "applied", "#1d4ed8", "solid"),
)
LR_LABELS = {name: label for name, label, _, _ in _LR_STYLES}


def lr_curve(records_or_path: Records | str | os.PathLike[str], ax: Axes | None = None) -> Axes:
    """Draws the desired, the allowed and the applied learning rate of a run.

    Args:
        records_or_path: A record file of `JsonlLogger`'s, or what `read_jsonl` made of one.
        ax: Where to draw. None makes a figure of its own, outside pyplot: no display is needed, nothing stays open.

    Returns:
        The axes, labelled, with a logarithmic lr axis; `ax.figure.savefig("lr.png")` writes the picture.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: As `read_jsonl`.
    """
    records = records_or_path if isinstance(records_or_path, Records) else read_jsonl(records_or_path)
    ax = new_axes() if ax is None else ax
    curves = {name: [point for point in curve(records, name) if point[1] > 0] for name in LR_LABELS}
    for name, label, colour, dashes in _LR_STYLES:
        if curves[name]:
            steps, values = zip(*thin(curves[name], limit=2000), strict=True)
            width = 2.0 if name == "lr" else 1.3
            ax.plot(steps, values, label=label, color=colour, linestyle=dashes, linewidth=width)
    ax.set(title="Learning rate", xlabel="step", ylabel="lr", yscale="log")
    ax.grid(visible=True, which="major", alpha=0.3)
    if any(curves.values()):
        ax.set_ylim(bottom=max(ax.get_ylim()[0], floor(curves.values())))
        ax.legend(frameon=False)
    return ax


def curve(records: Records, name: str) -> Points:
    """Returns one figure's values against the step: from the rows, or from the decisions of a record without rows.

    Args:
        records: A run's record.
        name: A figure of the rows, such as `lr`, `lr_limit` or `gamma`. Where groups have lrs of their own, the largest
            is taken: it is the one that limit and cap are about.

    Returns:
        (step, value) pairs, in order; steps at which the figure was not known are left out.

    Example:
        >>> curve(Records(rows=[{"step": 0, "lr": 0.1}, {"step": 10, "lr": 0.2, "gamma": 3.0}]), "gamma")
        [(10, 3.0)]
    """
    if records.rows:
        return [(row["step"], _largest(row, name)) for row in records.rows if name in row]
    return measured(records.decisions, "lr_after" if name == "lr" else name)


def measured(decisions: list[Decision], name: str) -> Points:
    """Returns one figure's values at the decisions that have it, as (step, value) pairs.

    Example:
        >>> measured([Decision(3, 0, "cap", "", 1.0, 1.0, 0.5, margin=0.5, gamma=4.0)], "gamma")
        [(3, 4.0)]
    """
    found = {decision.step: getattr(decision, name) for decision in decisions if getattr(decision, name) is not None}
    return [(step, float(value)) for step, value in found.items() if math.isfinite(value)]


def thin(points: Points, limit: int = 300) -> Points:
    """Returns at most `limit` of the points, among them the first, the last and the extremes of every stretch.

    Keeping each stretch's smallest and largest value, rather than every n-th or a mean, leaves a spike of one step in
    the picture.

    Args:
        points: (x, y) pairs, by rising x.
        limit: Most points to keep, at least 4.

    Returns:
        The points that are kept, in order.

    Example:
        >>> thin([(x, 9.0 if x == 777 else 0.0) for x in range(1000)], limit=6)
        [(0, 0.0), (500, 0.0), (777, 9.0), (999, 0.0)]
    """
    if len(points) <= limit:
        return points
    stretch = math.ceil(len(points) / ((limit - 2) // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        indices = range(start, min(start + stretch, len(points)))
        kept |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def floor(curves: Iterable[Points]) -> float:
    """A decade below where each curve mostly is: a schedule that ends at 1e-12 would flatten all the rest."""
    lows = []
    for points in curves:
        values = sorted(value for _, value in points if value > 0)
        lows += [values[len(values) // 20]] if values else []
    return min(lows) / 10


def _largest(row: Row, name: str) -> float:
    return max(value for key, value in row.items() if key == name or key.startswith(f"{name}/g"))
