"""The figures of a row that are metrics, and the name that they go by elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "safe_lr/"
METRICS = (
    *("lr", "lr_desired", "lr_limit", "cap", "margin", "utilisation", "gamma", "lambda_max", "p_min", "p_eff"),
    *("beta1", "beta2", "capped", "cost"),
)


def known(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row's metrics, those of further groups included, without the ones that are not known yet.

    Example:
        >>> known({"step": 3, "lr": 0.1, "lr/g1": 0.2, "gamma": None, "note": 1.0})
        {'lr': 0.1, 'lr/g1': 0.2}
    """
    return {name: value for name, value in row.items() if value is not None and name.partition("/")[0] in METRICS}
