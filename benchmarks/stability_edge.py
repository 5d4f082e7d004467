"""Is the limit the lr at which the real optimizer turns unstable? Quadratics, first steps, trained networks.

    python -m benchmarks.stability_edge --json docs/results/stability_edge.json [--quick]

* Exact class: every optimizer with random hyper-parameters, one group or several with different ones, on random
  quadratics that do not commute with P. Predicted: `safe_lr.measure(...).lr_limit`. Actual: where the spectral radius
  of the real optimizer's step, whose transition matrix is made by stepping it from unit states, first reaches 1;
  bisected to 1e-9. Worst error wanted: below .1 %. Long runs 1 % below and above confirm it.
* From step 0, following each coming step's limit at margin 1 with P held: the peak amplification along each
  eigenvector. Wanted: at most 4.
* Local scale: lr over the limit of the moment where a run has settled. No target.
* Edge of stability: lr over the limit while a digits MLP trains, from where it first reaches 1. Wanted: medians within
  .9-1.1.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    SparseAdam,
)
from tqdm import tqdm

import safe_lr
from benchmarks.quadratics import EXACT, TINY, Options, Quadratic, SetUp, first_unstable_lr, freeze, random_hessian
from benchmarks.results import save
from safe_lr.ensemble import Ensemble
from safe_lr.movers import movers, shares

_BETAS = [(b1, b2) for b1 in (0.0, 0.5, 0.9, 0.95, 0.99) for b2 in (0.9, 0.99, 0.999, 0.9999)]
_DECAY = [0.0, 0.0, 0.01, 0.3]

HYPER_PARAMETERS: dict[type[Optimizer], dict[str, list[Any]]] = {
    SGD: {
        "momentum": [0.0, 0.5, 0.8, 0.9, 0.95, 0.99],
        "dampening": [0.0, 0.0, 0.5, 0.9],
        "nesterov": [False, True],
        "weight_decay": _DECAY,
    },
    ASGD: {"lambd": [0.0, 1e-4, 0.1], "alpha": [0.0, 0.5, 0.75], "t0": [10, 1e6], "weight_decay": _DECAY},
    Adagrad: {
        "lr_decay": [0.0, 1e-4, 0.01],
        "eps": [1e-10, 1e-2],
        "initial_accumulator_value": [0.0, 0.5],
        "weight_decay": _DECAY,
    },
    RMSprop: {
        "alpha": [0.9, 0.99, 0.999],
        "momentum": [0.0, 0.5, 0.9, 0.99],
        "centered": [False, True],
        "eps": [1e-8, 1e-2],
        "weight_decay": _DECAY,
    },
    Adadelta: {"rho": [0.5, 0.9, 0.99], "eps": [1e-6, 1e-2], "weight_decay": _DECAY},
    Adam: {
        "betas": _BETAS,
        "eps": [1e-8, 1e-2],
        "amsgrad": [False, True],
        "weight_decay": _DECAY,
        "decoupled_weight_decay": [False, True],
    },
    AdamW: {"betas": _BETAS, "eps": [1e-8, 1e-2], "amsgrad": [False, True], "weight_decay": [0.0, 0.01, 0.3, 3.0]},
    Adamax: {"betas": _BETAS, "eps": [1e-8, 1e-3], "weight_decay": _DECAY},
    NAdam: {
        "betas": _BETAS,
        "eps": [1e-8, 1e-2],
        "momentum_decay": [0.0, 4e-3, 0.1],
        "weight_decay": _DECAY,
        "decoupled_weight_decay": [False, True],
    },
    RAdam: {"betas": _BETAS, "eps": [1e-8, 1e-2], "weight_decay": _DECAY, "decoupled_weight_decay": [False, True]},
    SparseAdam: {"betas": _BETAS, "eps": [1e-8, 1e-2]},
}
"""What hyper-parameters are drawn from."""

SETS, MIXED, SETS_QUICK, MIXED_QUICK = 16, 8, 3, 1
"""Hyper-parameter sets of each optimizer, with one group and with several."""


def set_ups(make: type[Optimizer], single: int, mixed: int) -> list[SetUp]:
    """Draws hyper-parameters: `single` sets with one group, `mixed` with two or three; the same ones every time."""
    rng = random.Random(make.__name__)
    return [_draw(make, 1 if i < single else rng.choice((2, 3)), rng) for i in range(single + mixed)]


def _draw(make: type[Optimizer], groups: int, rng: random.Random) -> SetUp:
    common: Options = {} if rng.random() < 0.7 else {"maximize": True}
    if make is not SparseAdam:
        ways = [{}, {"foreach": True}, *[{"fused": True}] * (make in (SGD, Adam, AdamW, Adagrad))]
        common |= rng.choice(ways)
    drawn = [{name: rng.choice(values) for name, values in HYPER_PARAMETERS[make].items()} for _ in range(groups)]
    for i, options in enumerate(drawn):
        options["share"] = 1.0 if i == 0 else round(10 ** rng.uniform(-1, 0), 3)
        if options.get("nesterov"):
            options["dampening"] = 0.0
            options["nesterov"] = options["momentum"] > 0
    return SetUp(make, tuple(drawn), common, rng.choice((10**6, 5000)))


def sizes(setup: SetUp) -> list[int]:
    """Coordinates of each group: six to nine in all."""
    return [6] if len(setup.groups) == 1 else [3] * len(setup.groups)


def predicted_lr(setup: SetUp, seed: int) -> float:
    """The measured limit. ASGD's P depends on lr itself: the lr that is its own limit, by repeated measuring."""
    problem = Quadratic(setup, sizes(setup), seed)
    for p in problem.parts:
        p.data.fill_(TINY)
    lr = 1.0
    for _ in range(200):
        problem.set_lr(lr)
        found = safe_lr.measure(problem.optimizer, problem.loss, tol=1e-10)
        if found.failure or not found.converged:
            raise ArithmeticError(f"{setup}: {found.failure or 'not converged'}")
        if abs(found.lr_limit / lr - 1) < 1e-9:
            break
        lr = found.lr_limit
    return found.lr_limit


def edge_of(setup: SetUp, seed: int, long_run: int) -> dict[str, Any]:
    """Predicted and actual limit of one set-up on one quadratic, and whether a run of so many updates agrees."""
    predicted = predicted_lr(setup, seed)
    dimension = Quadratic(setup, sizes(setup), seed).dimension
    many = Quadratic(setup, sizes(setup), seed, dimension)
    low = predicted * random.Random(seed).uniform(0.01, 0.03)  # at random: the brackets owe the prediction nothing
    actual = first_unstable_lr(lambda lr: many.radius(lr) >= 1, low, 1e-9)
    row = {
        "setup": str(setup),
        "groups": len(setup.groups),
        "predicted": predicted,
        "actual": actual,
        "relative_error": abs(predicted / actual - 1),
    }
    if long_run:
        below, above = (Quadratic(setup, sizes(setup), seed).growth(actual * f, long_run) for f in (0.99, 1.01))
        row["long_run_agrees"] = below < 0 < above
    return row


def transient(setup: SetUp, seed: int, updates: int = 600) -> float:
    """Peak amplification from step 0, following each coming step's limit at margin 1, P held.

    Starts at every eigenvector of D^1/2 H D^1/2 (D = share / P), and is measured in coordinates D^-1/2 x, in which a
    single group's eigenvectors do not mix.
    """
    if setup.make in (SparseAdam, RAdam):  # eps / sqrt(1 - b2^t) shrinks all along; kept far below P
        setup = replace(setup, groups=tuple(options | {"eps": 1e-9} for options in setup.groups))
    total = sum(sizes(setup))
    problem = Quadratic(setup, sizes(setup), seed, total, settled=False)
    generator = torch.Generator().manual_seed(seed)
    flat = setup.make in (SGD, ASGD, RAdam)  # RAdam's P is 1 before rectification
    p = torch.ones(total, dtype=torch.float64)
    if not flat:
        p = 10 ** (2 * torch.rand(total, dtype=torch.float64, generator=generator) - 1)
    share = torch.cat([torch.full((n,), s) for n, s in zip(problem.sizes, problem.shares, strict=True)]).double()
    root = (share / p).sqrt()
    _, vectors = torch.linalg.eigh(root[:, None] * problem.hessian * root)
    x = start = TINY * root[:, None] * vectors
    norm = (start / root[:, None]).norm(dim=0)
    lr, peak = 1.0, 1.0
    ensemble = Ensemble(problem.optimizer)
    for update in range(updates):
        for _ in range(20 if setup.make is ASGD and update == 0 else 1):  # its P depends on lr
            problem.set_lr(lr)
            for part, entries in zip(problem.parts, p.split(problem.sizes), strict=True):
                freeze(problem.optimizer, part, entries[:, None].expand(part.shape), update)
            lr = coming_limit(problem, ensemble, update + 1)
        problem.set_lr(lr)
        x = problem.step(x)
        peak = max(peak, float(((x / root[:, None]).norm(dim=0) / norm).max()))
    return peak


def coming_limit(problem: Quadratic, ensemble: Ensemble, update: int) -> float:
    """The limit of the coming update, with the dense eigenproblem in the place of Lanczos."""
    moving = movers(ensemble, shares([g["lr"] for g in ensemble.param_groups], [])[1], update)
    weights, l2s, decays = [], [], []
    for m in moving:
        entries = m.root(torch.zeros_like(m.param))[1].expand(m.param.shape)[:, 0]
        l2, decoupled = m.decay()
        weights.append(2 / m.rule().flip * m.share / entries)
        l2s.append(torch.full_like(entries, l2))
        decays.append(torch.full_like(entries, decoupled * m.share))
    root, decay = torch.cat(weights).sqrt(), torch.cat(decays)
    product = root[:, None] * (problem.hessian + torch.diag(torch.cat(l2s))) * root + torch.diag(decay)
    return 2 / float(torch.linalg.eigvalsh(product)[-1])


LOCAL: list[tuple[type[Optimizer], Options, float]] = [
    (Adafactor, {}, 0.01),
    (Adafactor, {"beta2_decay": -0.5}, 0.03),
    (Adafactor, {"d": 2.0, "eps": (None, 0.1), "weight_decay": 0.1}, 0.03),
    (Muon, {"weight_decay": 0.0}, 0.01),
    (Muon, {"weight_decay": 0.0, "momentum": 0.8, "nesterov": False}, 0.01),
    (Muon, {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}, 0.03),
]


def local_scale(make: type[Optimizer], options: Options, lr: float, updates: int) -> dict[str, Any]:
    """lr over the limit of the moment, in the second half of a run at a constant lr on a quadratic in a matrix."""
    generator = torch.Generator().manual_seed(0)
    hessian = random_hessian(20, generator)
    x = nn.Parameter(torch.randn(5, 4, dtype=torch.float64, generator=generator))
    optimizer = make([x], lr=lr, **options)  # type: ignore[call-arg]
    seen = []
    for update in range(1, updates + 1):
        x.grad = (hessian @ x.detach().flatten()).view(x.shape)
        if update > updates // 2 and update % 5 == 0:
            found = safe_lr.measure(optimizer, lambda: 0.5 * x.flatten() @ hessian @ x.flatten(), tol=1e-4)
            used = min(lr, update**-0.5) if make is Adafactor else lr  # its lr counts up to 1 / sqrt(t)
            seen.append(used / found.lr_limit)
        optimizer.step()
    return {"optimizer": make.__name__, "options": str(options), "lr": lr, "utilisation": spread(seen)}


EDGES: dict[str, tuple[type[Optimizer], Options, int, int]] = {
    "GD": (SGD, {"lr": 0.2}, 3000, 1),
    # Momentum overshoots where it meets the edge at full lr: the run leaves for a flat place, or diverges at once.
    "heavy ball": (SGD, {"lr": 0.2, "momentum": 0.9}, 2000, 800),
    "Adam": (Adam, {"lr": 5e-3}, 1500, 1),
    "RMSprop": (RMSprop, {"lr": 1e-3}, 1500, 1),
}
"""Optimizer, hyper-parameters, number of updates, and in how many of them lr rises from 0 in a straight line."""


def edge_of_stability(make: type[Optimizer], options: Options, updates: int, warmup: int) -> dict[str, Any]:
    """lr over the limit while a digits MLP trains (full batch, one-hot MSE), from where it first reaches 1."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    targets = nn.functional.one_hot(torch.tensor(digits.target), 10).float()
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))

    def loss() -> torch.Tensor:
        return (model(inputs) - targets).square().sum(1).mean()

    optimizer = make(model.parameters(), **options)
    seen: list[tuple[int, float]] = []
    for update in range(1, updates + 1):
        lr = optimizer.param_groups[0]["lr"] = options["lr"] * min(1, update / warmup)
        if update % 20 == 0:
            seen.append((update, lr / safe_lr.measure(optimizer, loss, tol=1e-2).lr_limit))
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    reached = next((i for i, (_, u) in enumerate(seen) if u >= 1), None)
    row: dict[str, Any] = {
        **options,
        "updates": updates,
        "warmup": warmup,
        "final_loss": float(value.detach()),
        "reached_at": None if reached is None else seen[reached][0],
        "trace": [[update, round(u, 4)] for update, u in seen],
    }
    return row | ({} if reached is None else spread([u for _, u in seen[reached:]]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def collect(quick: bool) -> dict[str, Any]:
    """Runs everything and returns the result."""
    single, mixed = (SETS_QUICK, MIXED_QUICK) if quick else (SETS, MIXED)
    rows: list[dict[str, Any]] = []
    optimizers: dict[str, Any] = {}
    bar = tqdm(total=len(EXACT) * (single + mixed), unit="set", ncols=100)
    for make in EXACT:
        mine = []
        for i, setup in enumerate(set_ups(make, single, mixed)):
            bar.set_postfix_str(make.__name__)
            long_run = (800 if quick else 2500) * (i == 0 or (i == single and not quick))
            row = edge_of(setup, i, long_run)
            mine.append(row | {"optimizer": make.__name__, "transient": transient(setup, i, 200 if quick else 600)})
            bar.update()
        rows += mine
        optimizers[make.__name__] = {
            "sets": len(mine),
            "worst_relative_error": max(row["relative_error"] for row in mine),
            "worst_transient": max(row["transient"] for row in mine),
            "long_runs_agree": all(row.get("long_run_agrees", True) for row in mine),
        }
    bar.close()
    local = [local_scale(*case, updates=200 if quick else 1000) for case in tqdm(LOCAL, unit="run", ncols=100)]
    edges = {} if quick else {name: edge_of_stability(*case) for name, case in tqdm(EDGES.items(), ncols=100)}
    return {
        "worst_relative_error": max(o["worst_relative_error"] for o in optimizers.values()),
        "worst_transient": max(o["worst_transient"] for o in optimizers.values()),
        "cases": rows,
        "optimizers": optimizers,
        "edge_of_stability": edges,
        "local_scale": local,
    }


def table(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    lines = [f"{'optimizer':12}{'sets':>6}{'worst error':>13}{'peak':>8}  long runs"]
    for name, row in result["optimizers"].items():
        agree = "agree" if row["long_runs_agree"] else "DISAGREE"
        lines.append(
            f"{name:12}{row['sets']:>6}{row['worst_relative_error']:>13.2e}{row['worst_transient']:>8.2f}  {agree}"
        )
    worst = max(result["cases"], key=lambda row: row["relative_error"])
    lines.append(
        f"worst: predicted {worst['predicted']:.8g}, actual {worst['actual']:.8g} "
        f"({worst['relative_error']:.2e}): {worst['setup']}"
    )
    lines.append(f"highest peak: {max(result['cases'], key=lambda row: row['transient'])['setup']}")
    for row in result["local_scale"]:
        u = row["utilisation"]
        lines.append(
            f"local scale: {row['optimizer']} lr {row['lr']:g} {row['options']}: lr / limit {u['median']:.2f} "
            f"({u['min']:.2f} to {u['max']:.2f})"
        )
    for name, row in result["edge_of_stability"].items():
        said = (
            f"{row['median']:.3f} ({row['min']:.3f} to {row['max']:.3f}) from update {row['reached_at']} on"
            if row["reached_at"]
            else "never at the edge"
        )
        lines.append(f"edge of stability: {name} lr {row['lr']:g}: lr / limit {said}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against actual limits.")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--quick", action="store_true", help="fewer sets, no trained networks: under a minute")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = collect(args.quick)
    print(table(result))
    save(result, args.json)


if __name__ == "__main__":
    main()
