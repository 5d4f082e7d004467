"""What a budget of runs buys: sweeps over lr, over a clipped lr range, and over safe_lr's margin.

    python -m benchmarks.sweep --json docs/results/sweep.json [--seeds 0 1 2 3 4] [--runs 8] [--quick]

One task (the network and the digits of `examples/sweep.py`, 300 updates), two optimizers, random search, four sweeps of
the same number of runs:

plain       lr log-uniform over seven decades, 1e-5 to 100: someone who does not know the scale; nothing protects
clipped     the same after `clip_to_stable`, which costs 200 to 300 gradient evaluations, as much as one more run
protected   the plain range again, under the default CoherenceScheduler: lr = min(lr, cap)
margin      no lr: `follow_limit=True` and a fixed margin, log-uniform from .05 to 1

A seed sets the data's order, the initialisation and the draws; plain, clipped and protected share their draws. The four
sweeps advance in turns. Told is the best validation loss so far after 2, 4, ... runs, as a mean over seeds; and, since
with so few draws luck is much of that, what the best of as many draws is *expected* to be, from all runs of all seeds
(Dodge et al. 2019, arXiv 1909.03004), a run that learned nothing counting as log 10.

    python -m benchmarks.sweep --transfer --json docs/results/sweep_transfer.json

Whether what was found on a narrow network serves one that is eight times wider (torch's own initialisation, 100
updates, three seeds): a grid over lr and one over the margin on both widths. "Moved" says by which factor the best
value of the wide one differs from the narrow one's, and "lost" what the wide one's validation loss pays for taking the
narrow one's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.results import save
from safe_lr import CoherenceScheduler
from safe_lr.sweeps import arguments, clip_to_stable, sweep_config
from safe_lr.sweeps.search import make_engine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import sweep as digits

STEPS = 300
UNTRAINED = math.log(10)  # the loss of a network that knows nothing
LRS = (1e-5, 100.0)
ARMS = ("plain", "clipped", "protected", "margin")
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
}
CRITERION = nn.CrossEntropyLoss()

WIDTHS = {"narrow": 16, "wide": 128}
TRANSFER_STEPS = 100
GRIDS: dict[str, list[float]] = {
    "lr": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
    "margin": [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4],
}


def closures(model: nn.Module, seed: int) -> Iterator[Callable[[], torch.Tensor]]:
    """Yields the losses of one batch after another, without end."""
    x, y, _, _ = digits.data()
    for bx, by in digits.batches(x, y, seed):
        yield lambda bx=bx, by=by: CRITERION(model(bx), by)


def network(width: int) -> nn.Module:
    """The network of `examples/sweep.py`, at another width."""
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def train(
    make: Callable[[nn.Module], Optimizer],
    params: dict[str, Any],
    protect: bool,
    seed: int,
    steps: int,
    make_model: Callable[[], nn.Module] = digits.make_model,
) -> float:
    """Returns the validation loss after a run; NaN or infinite where it diverged."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = make(model)
    for group in optimizer.param_groups:
        group["lr"] = params.get("lr", group["lr"])
    scheduler = CoherenceScheduler(optimizer, loggers=None, **arguments(params)) if protect else None
    for _, closure in zip(range(steps), closures(model, seed)):  # noqa: B905 (the second has no end)
        loss = closure()
        loss.backward()
        if scheduler is not None:
            scheduler.observe(closure)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    if scheduler is not None:
        scheduler.close()
    _, _, val_x, val_y = digits.data()
    with torch.no_grad():
        return float(CRITERION(model(val_x), val_y))


def one_seed(name: str, seed: int, runs: int, steps: int) -> dict[str, Any]:
    """Runs the four sweeps of one seed, in turns."""
    make = OPTIMIZERS[name]
    plain = sweep_config(lr=LRS, method="random")
    clipped = clip_to_stable(
        plain, digits.make_model, lambda model: closures(model, seed), optimizer_factory=make, seed=seed
    )
    configs = {"plain": plain, "clipped": clipped, "protected": plain, "margin": sweep_config(method="random")}
    engines = {arm: make_engine(config, "built-in", seed) for arm, config in configs.items()}
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    seconds = dict.fromkeys(ARMS, 0.0)
    for _ in range(runs):
        for arm in ARMS:
            params = engines[arm].ask() or {}
            started = time.perf_counter()
            loss = train(make, params, arm in ("protected", "margin"), seed, steps)
            seconds[arm] += time.perf_counter() - started
            found[arm].append({**params, "val_loss": loss if loss < float("inf") else None})
    return {
        "seed": seed,
        "ceiling": clipped["parameters"]["lr"]["max"],
        "cut": clipped.get("description", ""),
        "trials": found,
        "seconds": seconds,
    }


def best_after(trials: list[dict[str, Any]], runs: int) -> float:
    """Returns the best validation loss of the first `runs` trials; infinite where none of them ended in a number."""
    return min((trial["val_loss"] for trial in trials[:runs] if trial["val_loss"] is not None), default=float("inf"))


def expected_best(losses: list[float | None], runs: int) -> float:
    """Returns the expected best of `runs` draws, with replacement, from all trials; losses above UNTRAINED count as it.

    With losses sorted, the i-th of n is the best with probability ((n-i+1)/n)^runs - ((n-i)/n)^runs.

    Example:
        >>> expected_best([1.0, 0.0], 1), expected_best([1.0, 0.0], 2)
        (0.5, 0.25)
    """
    values = sorted(UNTRAINED if loss is None else min(loss, UNTRAINED) for loss in losses)
    n = len(values)
    weights = [((n - i) / n) ** runs - ((n - i - 1) / n) ** runs for i in range(n)]
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def collect(seeds: list[int], runs: int, steps: int) -> dict[str, Any]:
    """Returns every trial, and the means over seeds."""
    budgets = sorted({budget for budget in (2, 4, 8, 16, runs) if budget <= runs})
    result: dict[str, Any] = {"task": "digits MLP", "steps": steps, "runs": runs, "lrs": LRS, "optimizers": {}}
    for name in OPTIMIZERS:
        rows = []
        for seed in seeds:
            rows.append(one_seed(name, seed, runs, steps))
            print(
                f"{name} seed {seed}: " + ", ".join(f"{a} {best_after(rows[-1]['trials'][a], runs):.4f}" for a in ARMS)
            )
        tables = {}
        for arm in ARMS:
            bests = {budget: [best_after(row["trials"][arm], budget) for row in rows] for budget in budgets}
            losses = [trial["val_loss"] for row in rows for trial in row["trials"][arm]]
            tables[arm] = {
                "best_after": {str(budget): statistics.mean(values) for budget, values in bests.items()},
                "best": bests[runs],
                "expected_after": {str(budget): expected_best(losses, budget) for budget in budgets},
                "median_trial": statistics.median([float("inf") if loss is None else loss for loss in losses]),
                "useless": sum(loss is None or loss > UNTRAINED for loss in losses) / len(losses),
                "seconds_per_run": sum(row["seconds"][arm] for row in rows) / len(losses),
            }
        result["optimizers"][name] = {"arms": tables, "seeds": rows}
    return result


def table(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    lines = []
    for name, found in result["optimizers"].items():
        budgets = list(next(iter(found["arms"].values()))["best_after"])
        head = "".join(f"{'after ' + budget:>10}" for budget in budgets)
        head += "".join(f"{'expected ' + budget:>12}" for budget in budgets)
        lines.append(f"{name:<12}{head}{'median run':>12}{'useless':>9}{'s a run':>9}")
        for arm, row in found["arms"].items():
            best = "".join(f"{row['best_after'][budget]:>10.4f}" for budget in budgets)
            best += "".join(f"{row['expected_after'][budget]:>12.4f}" for budget in budgets)
            lines.append(
                f"  {arm:<10}{best}{row['median_trial']:>12.3g}{row['useless']:>9.0%}{row['seconds_per_run']:>9.2f}"
            )
    return "\n".join(lines)


def transfer(seeds: list[int], steps: int) -> dict[str, Any]:
    """Returns the losses of both grids on both widths, one for each seed, and what became of the best values."""
    result: dict[str, Any] = {"task": "digits MLP", "steps": steps, "widths": WIDTHS, "grids": GRIDS, "optimizers": {}}
    for name, make in OPTIMIZERS.items():
        for over, grid in GRIDS.items():
            losses: dict[str, list[list[float]]] = {}
            for size, width in WIDTHS.items():
                losses[size] = []
                for value in grid:
                    params = {"lr": value} if over == "lr" else {"safe_lr.margin": value, "safe_lr.follow_limit": True}
                    ends = [train(make, params, over == "margin", s, steps, lambda w=width: network(w)) for s in seeds]
                    losses[size].append([end if end < UNTRAINED else UNTRAINED for end in ends])  # NaN too
                print(f"{name} {over} {size}: {[round(statistics.mean(row), 4) for row in losses[size]]}", flush=True)
            result["optimizers"].setdefault(name, {})[over] = {"losses": losses} | moved(grid, losses)
    return result


def moved(grid: list[float], losses: dict[str, list[list[float]]]) -> dict[str, float]:
    """Returns what the narrow network's best value, by the mean over seeds, does on the wide one.

    Example:
        >>> moved([0.1, 0.2], {"narrow": [[1.0], [3.0]], "wide": [[2.0], [0.5]]})
        {'narrow': 0.1, 'wide': 0.2, 'moved': 2.0, 'transferred': 2.0, 'best': 0.5, 'lost': 1.5}
    """
    means = {size: [statistics.mean(row) for row in rows] for size, rows in losses.items()}
    narrow, wide = (means[size].index(min(means[size])) for size in WIDTHS)
    transferred, best = means["wide"][narrow], means["wide"][wide]
    return {
        "narrow": grid[narrow],
        "wide": grid[wide],
        "moved": grid[wide] / grid[narrow],
        "transferred": transferred,
        "best": best,
        "lost": transferred - best,
    }


def transfer_table(result: dict[str, Any]) -> str:
    """Returns the result of `transfer` as text."""
    columns = ("narrow", "wide", "moved", "transferred", "best", "lost")
    lines = [f"{'optimizer':<10}{'over':<8}" + "".join(f"{column:>13}" for column in columns)]
    for name, found in result["optimizers"].items():
        for over, row in found.items():
            lines.append(f"{name:<10}{over:<8}" + "".join(f"{row[column]:>13.4g}" for column in columns))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4, with --transfer 0 to 2")
    parser.add_argument("--runs", type=int, default=8, help="runs in each sweep")
    parser.add_argument("--transfer", action="store_true", help="from a narrow network to a wide one")
    parser.add_argument("--quick", action="store_true", help="one seed, two runs of 20 updates: a smoke test")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.seeds = args.seeds or list(range(3 if args.transfer else 5))
    if args.quick:
        args.seeds, args.runs = args.seeds[:1], 2
    started = time.perf_counter()
    if args.transfer:
        result = transfer(args.seeds, 20 if args.quick else TRANSFER_STEPS)
        print(transfer_table(result))
    else:
        result = collect(args.seeds, args.runs, 20 if args.quick else STEPS)
        print(table(result))
    save(result | {"seconds": round(time.perf_counter() - started, 1)}, args.json)


if __name__ == "__main__":
    main()
