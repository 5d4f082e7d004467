"""Makes the figures of docs/theory.md: `python docs/make_theory_plots.py`, about a minute.

The rings in figures/stability_region.png are measured, not computed: torch's own optimizer with a frozen preconditioner
runs on a quadratic, and bisection finds the lr at which it begins to grow. No formula of safe_lr enters. The numbers go
to figures/stability_region.json, beside the limits that safe_lr gives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer, RMSprop

from safe_lr.plots import stability_region, transition_spectrum
from safe_lr.preconditioners import preconditioner_of
from safe_lr.stability import Array, Rule, UpdateRule, lr_limit

OUT = Path(__file__).parent / "figures"
SCALES = np.logspace(-1.75, 1.75, 7)
DIAGONAL = [1.0, 4.0]
FULL = [[2.0, 1.8], [1.8, 3.0]]  # commutes with no diagonal but the multiples of 1
P = [1.0, 1.0]

KEEP = 1 - 1e-12  # decay of the second moment: no gradient moves it
PAST = 1e9  # updates so far: the first moment has forgotten its start
LINEAR = ("exp_avg", "momentum_buffer")  # what scales with the gradient

Make = Callable[[list[Tensor], float], Optimizer]

PANELS: list[tuple[str, Make, Any, float]] = [
    ("RMSprop, diagonal H (Eq. 22)", lambda x, lr: RMSprop(x, lr, alpha=KEEP, eps=0), DIAGONAL, 0.0),
    ("Adam, diagonal H", lambda x, lr: Adam(x, lr, betas=(0.9, KEEP), eps=0), DIAGONAL, 0.0),
    ("Adam, H and P do not commute", lambda x, lr: Adam(x, lr, betas=(0.9, KEEP), eps=0), FULL, 0.0),
    (
        "AdamW, weight decay 0.2",
        lambda x, lr: AdamW(x, lr, betas=(0.9, KEEP), eps=0, weight_decay=0.2),
        FULL,
        0.2,
    ),
]


class Late:
    """x' = x - h x_before: the gradient of the step before."""

    def matrix(self, h: Array, decay: Array) -> Array:
        one = np.ones_like(h)
        return np.stack([np.stack([1 - decay, -h], -1), np.stack([one, 0 * one], -1)], -2)


SPECTRA: list[tuple[str, Rule]] = [
    ("SGD", UpdateRule()),
    ("Adam, .9", UpdateRule(0.9, 1.0, 0.0)),
    ("Nesterov, .9", UpdateRule(0.9, 9.0, 1.0)),
    ("A gradient one step late", Late()),
]


def measured_boundary(make: Make, hessian: Tensor, p: Tensor, decades: tuple[float, float] = (-3, 3)) -> float:
    """Returns the lr at which an optimizer whose P is frozen at `p` begins to grow on 0.5 x^T H x, to 1e-4.

    Args:
        make: Makes the optimizer from its parameters and lr; its second moment's decay is `KEEP`.
        hessian: Positive definite, float64.
        p: The preconditioner's entries; ones for SGD.
        decades: Powers of ten that the boundary lies between; nothing else is known beforehand.
    """
    low, high = decades
    while high - low > 1e-4 / math.log(10):
        middle = (low + high) / 2
        low, high = (low, middle) if _growth(make, hessian, p, 10**middle) > 0 else (middle, high)
    return 10 ** ((low + high) / 2)


def _growth(make: Make, hessian: Tensor, p: Tensor, lr: float, steps: int = 400) -> float:
    """Log growth over the second half of a run; with P frozen it is linear, and rescaled after each step."""
    x = torch.nn.Parameter(torch.ones_like(p))
    optimizer = make([x], lr)
    x.grad = torch.zeros_like(x)
    optimizer.step()  # only to make the state
    x.data.fill_(1.0)
    state, total = optimizer.state[x], 0.0
    for step in range(steps):
        if isinstance(optimizer, Adam):
            state["step"].fill_(PAST)
            state["exp_avg_sq"].copy_(p**2 * (1 - KEEP ** (PAST + 1)) / KEEP)
        elif "square_avg" in state:
            state["square_avg"].copy_(p**2 / KEEP)
        x.grad = hessian @ x.detach()
        optimizer.step()
        linear = [x.data, *(state[name] for name in LINEAR if isinstance(state.get(name), Tensor))]
        size = float(torch.stack([v.norm() for v in linear]).max()) * 1e3  # so small that P does not see the gradient
        for v in linear:
            v.div_(size)
        total += math.log(size) if step > steps // 2 else 0.0
    return total


def draw_regions(path: Path) -> dict[str, list[dict[str, float]]]:
    """Draws the stability regions with the measured boundaries; returns the numbers."""
    figure = Figure(figsize=(11.0, 8.4), dpi=110, layout="constrained")
    table: dict[str, list[dict[str, float]]] = {}
    for ax, (title, make, curvature, weight_decay) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        hessian = torch.tensor(curvature, dtype=torch.float64)
        hessian = torch.diag(hessian) if hessian.ndim == 1 else hessian
        rule = _settled_rule(make)
        rows = []
        for scale in SCALES:
            p = torch.tensor(P, dtype=torch.float64) * torch.tensor([scale, 1.0])
            gamma = float(torch.linalg.eigvalsh(hessian / (p[:, None] * p).sqrt())[-1])
            limit, actual = float(lr_limit(rule, gamma, weight_decay)), measured_boundary(make, hessian, p)
            rows.append({"scale": scale, "limit": limit, "measured": actual, "error": actual / limit - 1})
        points = [(row["scale"], row["measured"]) for row in rows]
        stability_region(rule, curvature, P, weight_decay=weight_decay, measured=points, ax=ax).set_title(title)
        table[title] = rows
    figure.savefig(path)
    return table


def draw_spectra(path: Path) -> None:
    """Draws the transition spectra of four rules."""
    figure = Figure(figsize=(10.0, 10.4), dpi=110, layout="constrained")
    for ax, (title, rule) in zip(figure.subplots(2, 2).flat, SPECTRA, strict=True):
        transition_spectrum(rule, ax=ax)
        ax.set_title(f"{title}: {ax.get_title()}")
    figure.savefig(path)


def _settled_rule(make: Make) -> UpdateRule:
    """What safe_lr takes the optimizer for, once its averages have settled."""
    optimizer = make([torch.nn.Parameter(torch.zeros(1))], 1.0)
    return preconditioner_of(optimizer).rule(optimizer.param_groups[0], {"step": torch.tensor(PAST)})


def main() -> None:
    """Writes all figures and the numbers."""
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    draw_spectra(OUT / "transition_spectrum.png")
    table = draw_regions(OUT / "stability_region.png")
    worst = max(abs(row["error"]) for rows in table.values() for row in rows)
    text = json.dumps({"worst_relative_error": worst, "panels": table}, indent=1)
    (OUT / "stability_region.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
