"""Finds the demo's tuned lr: the best constant lr of a half-decade grid, by mean held-out loss over three seeds.

    python examples/tune_demo.py --json examples/data/tuned_lr.json

Plain Adam, no safe_lr. Without `--source` it scans the full set (where it is installed; about 15 minutes on one core)
and the committed subset (2 minutes), and writes both to one file, which `examples/demo.py` reads.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fashion_cnn import Task, make_model, make_task
from fashion_mnist import full_folder
from tqdm import tqdm

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SEEDS = (0, 1, 2)
LAST = 50  # steps whose mean is reported as the final training loss


def train(task: Task, lr: float, seed: int, steps: int) -> dict[str, float]:
    """Trains at a constant lr and returns the figures of the run, NaN where the loss was not finite."""
    model = make_model(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses: list[float] = []
    for _, (x, y) in zip(range(steps), task.batches(seed), strict=False):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    val_loss, val_accuracy = task.validate(model)
    return {
        "lr": lr,
        "seed": seed,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "train_loss": statistics.fmean(losses[-LAST:]),
        "peak_loss": max(losses),
    }


def tune(task: Task, steps: int, grid: tuple[float, ...] = GRID, seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    """Scans the grid and returns every run, the means over seeds and the best lr."""
    bar = tqdm([(lr, seed) for lr in grid for seed in seeds], desc=task.name, unit="run")
    runs = [train(task, lr, seed, steps) for lr, seed in bar]
    means = [_mean([run for run in runs if run["lr"] == lr]) for lr in grid]
    best = min(means, key=lambda row: row["val_loss"] if math.isfinite(row["val_loss"]) else math.inf)
    return {
        "data": task.where,
        "steps": steps,
        "batch_size": task.batch_size,
        "epochs": round(steps * task.batch_size / len(task.train[0]), 2),
        "optimizer": "Adam, torch's defaults but lr",
        "seeds": list(seeds),
        "tuned": best,
        "means": means,
        "runs": [{name: _json_ready(value) for name, value in run.items()} for run in runs],
    }


def _mean(runs: list[dict[str, float]]) -> dict[str, float]:
    names = ("lr", "val_loss", "val_accuracy", "train_loss", "peak_loss")
    row = {name: _json_ready(statistics.fmean(run[name] for run in runs)) for name in names}
    return row | {
        "lr": runs[0]["lr"],
        "val_loss_min_max": [_json_ready(f(run["val_loss"] for run in runs)) for f in (min, max)],
    }


def _json_ready(value: float) -> float:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the demo's tuned lr.")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--source", choices=("full", "subset"), help="scan only this data set")
    parser.add_argument("--quick", action="store_true", help="three lrs, one seed, 20 steps: a smoke test, no result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sources = [args.source] if args.source else (["full"] if full_folder() else []) + ["subset"]
    result: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "quick": args.quick}
    for source in sources:
        task = make_task(source)
        print(task.where)
        result[source] = tune(task, 20, (1e-3, 1e-2, 1e-1), (0,)) if args.quick else tune(task, task.steps)
        for row in result[source]["means"]:
            figures = "  ".join(
                f"{name} {row[name]:.4g}" for name in ("val_loss", "val_accuracy", "train_loss", "peak_loss")
            )
            print(f"lr {row['lr']:<7g} {figures}")
        print(f"tuned lr ({source}): {result[source]['tuned']['lr']:g}")
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
