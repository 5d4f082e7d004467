"""Charts of the report: geometry in numbers and strings, markup in `templates/`."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from safe_lr.plots.run import Points, floor, thin

POINTS = 240  # most points of a curve in the report
HEIGHT = 240.0  # of a chart in the report, in pixels
LABEL_GAP = 15.0


@dataclass(frozen=True)
class Axis:
    """One direction of a chart, from `low` to `high`, linear or logarithmic.

    Example:
        >>> Axis(0.001, 10.0, True, (0.1,)).at(0.1)  # halfway between 1e-3 and 1e1
        0.5
    """

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Returns where `value` lies, 0 at `low` and 1 at `high`; what is outside lies on the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def log_axis(values: list[float], floor: float = 0.0) -> Axis:
    """Returns an axis between numbers of the 1-2-5 series.

    Args:
        values: What it has to hold; one at least is above 0.
        floor: The axis ends here at the latest, some way below which there may be values.

    Example:
        >>> log_axis([0.0, 0.012, 0.3])
        Axis(low=0.01, high=0.5, log=True, ticks=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5))
    """
    high = min(max(*values, 1e-300), 1e300)  # the marks around it are to be numbers, too
    low = min(high, max(min(value for value in values if value > 0), floor, high / 1e12))
    exponents = range(math.floor(math.log10(low)) - 1, math.floor(math.log10(high)) + 2)
    marks = [float(f"{mantissa}e{exponent}") for exponent in exponents for mantissa in (1, 2, 5)]
    first = max(i for i, mark in enumerate(marks) if mark <= low)
    last = min(i for i, mark in enumerate(marks) if mark >= high)
    if first == last:
        first, last = first - 1, last + 1
    inside = marks[first : last + 1]
    decades = [mark for mark in inside if f"{mark:e}".startswith("1.")]
    return Axis(marks[first], marks[last], True, tuple(inside if len(inside) <= 7 else decades))


def linear_axis(low: float, high: float, intervals: int = 5, *, whole: bool = False) -> Axis:
    """Returns an axis with ticks at multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: Smallest value.
        high: Largest value.
        intervals: Most intervals between ticks inside the range.
        whole: The values are steps: ticks are integers, and the axis ends where the values do, not at a tick.

    Example:
        >>> linear_axis(0.9, 0.99).ticks
        (0.9, 0.92, 0.94, 0.96, 0.98, 1.0)
        >>> linear_axis(0, 730, whole=True)
        Axis(low=0, high=730, log=False, ticks=(0.0, 200.0, 400.0, 600.0))
    """
    high = high if high > low else low + (1.0 if whole else abs(low) or 1.0)
    raw = (high - low) / intervals
    unit = 10.0 ** math.floor(math.log10(raw))
    tick = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
    if whole:
        tick = max(1.0, tick)
        ticks = range(math.ceil(low / tick), math.floor(high / tick) + 1)
    else:
        ticks = range(math.floor(low / tick + 1e-9), math.ceil(high / tick - 1e-9) + 1)
    values = tuple(round(i * tick, 12) for i in ticks)
    return Axis(low, high, False, values) if whole else Axis(values[0], values[-1], False, values)


@dataclass(frozen=True)
class Chart:
    """One chart of the report, before it is laid out.

    Attributes:
        title: Its heading.
        note: One or two sentences below the heading.
        curves: Points by label; a curve without points is left out.
        log: Whether the vertical axis is logarithmic.
        reference: A value to draw a line at.
        shaded: Label of the curve above which the plot is tinted.
        marks: Steps to mark at the lower edge.
        dots: Whether points are drawn as well as lines, where they are few.
    """

    title: str
    note: str
    curves: dict[str, Points]
    log: bool = True
    reference: float | None = None
    shaded: str | None = None
    marks: list[int] = field(default_factory=list)
    dots: bool = False


def layout(chart: Chart, first: int, last: int) -> dict[str, Any] | None:
    """Turns a chart into what the template draws.

    Horizontal positions are in thousandths of the plot's width, which follows the page's; vertical ones in pixels from
    the top of a plot `HEIGHT` high. Text and dots keep their size at every width because only the lines are stretched.

    Args:
        chart: What to draw.
        first: First step of the run: all its charts share one range of steps.
        last: Last step.

    Returns:
        Ticks, lines and labels; None if there is no point to draw.

    Example:
        >>> layout(Chart("lr", "", {"lr": [(0, 1.0), (10, 0.01)]}), 0, 20)["lines"][0]["points"]
        '0,0 500,240'
    """
    curves = {label: thin(points, POINTS) for label, points in chart.curves.items() if points}
    values = [value for points in curves.values() for _, value in points]
    if not values or (chart.log and max(values) <= 0):
        return None
    known = values if chart.reference is None else [*values, chart.reference]
    x = linear_axis(first, last, whole=True)
    y = log_axis(known, floor(chart.curves.values())) if chart.log else linear_axis(min(known), max(known))
    lines = [_line(label, points, x, y, dots=chart.dots) for label, points in curves.items()]
    for line, height in zip(lines, spread([line["end"] for line in lines], LABEL_GAP, HEIGHT), strict=True):
        line["label_y"] = _short(height)
    edge = next((line["points"] for line in lines if line["label"] == chart.shaded), "")
    marks = thin([(step, 0.0) for step in chart.marks], 40)
    return {
        "title": chart.title,
        "note": chart.note,
        "clipped": number(y.low) if min(values) < y.low else "",
        "description": " ".join(_in_words(label, points) for label, points in curves.items()),
        "x": x,
        "y": y,
        "x_ticks": [(_across(x, tick), f"{tick:,.0f}") for tick in x.ticks],
        "y_ticks": [(_down(y, tick), number(tick)) for tick in y.ticks],
        "lines": lines,
        "shade": f"{edge.split(',')[0]},0 {edge} {edge.split()[-1].split(',')[0]},0" if edge else "",
        "reference": None if chart.reference is None else _down(y, chart.reference),
        "marks": [_across(x, step) for step, _ in marks],
    }


def _line(label: str, points: Points, x: Axis, y: Axis, *, dots: bool) -> dict[str, Any]:
    places = [(_across(x, step), _down(y, value)) for step, value in points]
    return {
        "label": label,
        "points": " ".join(f"{across},{down}" for across, down in places),
        "dots": places if len(places) == 1 or (dots and len(places) <= 60) else [],
        "end": float(places[-1][1]),
    }


def _in_words(label: str, points: Points) -> str:
    """A curve for those who cannot see it."""
    values = [value for _, value in points]
    return (
        f"{label}: {number(values[0])} at step {points[0][0]:,.0f}, {number(values[-1])} at step {points[-1][0]:,.0f},"
        f" between {number(min(values))} and {number(max(values))}."
    )


def _across(x: Axis, step: float) -> str:
    return _short(1000 * x.at(step))


def _down(y: Axis, value: float) -> str:
    return _short(HEIGHT * (1 - y.at(value)))


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def spread(heights: list[float], gap: float, end: float) -> list[float]:
    """Moves labels apart so that none stands on another, in their order and inside [0, end] if there is room.

    Example:
        >>> spread([50.0, 52.0, 0.0], gap=15.0, end=240.0)
        [50.0, 65.0, 0.0]
        >>> spread([238.0, 240.0], gap=15.0, end=240.0)
        [225.0, 240.0]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for above, i in itertools.pairwise(order):
        moved[i] = max(moved[i], moved[above] + gap)
    limit = end
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved


def number(value: float | None) -> str:
    """Returns a figure in three digits; a dash stands for one that is not known.

    Example:
        >>> number(0.031416), number(0.0002), number(31416.0), number(None)
        ('0.0314', '2e-4', '3.14e4', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001 (a dash is what a table shows)
    text = f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"
    mantissa, e, exponent = text.partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if e else mantissa
