"""Pictures: of a run, as a plot or as a chart of the report, and of the theory.

matplotlib (extra `plot`) is imported when a picture is drawn, not before.
"""

from safe_lr.plots.charts import HEIGHT, POINTS, Axis, Chart, layout, linear_axis, log_axis, number, spread
from safe_lr.plots.run import LR_LABELS, Points, curve, lr_curve, measured, thin
from safe_lr.plots.spectrum import spectral_density
from safe_lr.plots.theory import stability_region, transition_spectrum

__all__ = [
    "HEIGHT",
    "LR_LABELS",
    "POINTS",
    "Axis",
    "Chart",
    "Points",
    "curve",
    "layout",
    "linear_axis",
    "log_axis",
    "lr_curve",
    "measured",
    "number",
    "spectral_density",
    "spread",
    "stability_region",
    "thin",
    "transition_spectrum",
]
