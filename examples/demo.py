"""The demo: a small CNN on Fashion-MNIST with Adam, at an lr 100 times too high.

    python examples/demo.py [--out runs/demo] [--source full|subset] [--seed 10] [--quick]

Three runs with the same initial weights and the same batches: *unprotected* at the high lr, *protected* by safe_lr at
the same high lr, and *tuned* at the best constant lr of a scan (`examples/tune_demo.py`, results in
`examples/data/tuned_lr.json`). They advance in turns, a block of steps each and in alternating order, so that whatever
else the machine does falls on all three alike and their times can be compared.

Weights & Biases is on, in offline mode: no account, no network. WANDB_MODE=online sends the run to your account.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fashion_cnn import Batch, Task, make_model, make_task
from torch import nn
from tqdm import tqdm

from safe_lr import CoherenceScheduler
from safe_lr.plots import lr_curve
from safe_lr.report import write_report

TUNED_LR = Path(__file__).parent / "data" / "tuned_lr.json"
TOO_HIGH = 100  # the high lr, in tuned lrs
SEED = 10  # not one of those that the lr was tuned on
BLOCK = 10  # steps that a run takes before it is the next one's turn
LAST = 50  # steps whose mean is reported as the final training loss
VALIDATIONS = 10  # one validation says little: under a constant lr and BatchNorm it moves by 5 % within five steps


@dataclass
class Run:
    """One of the three runs: its model, optimizer and batches, and what it has been through."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Iterator[Batch]
    scheduler: CoherenceScheduler | None = None
    lr: float = 0.0
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0

    def step(self) -> None:
        """Takes one optimizer step, on the clock."""
        model, optimizer, scheduler = self.model, self.optimizer, self.scheduler
        x, y = next(self.batches)
        started = time.perf_counter()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if scheduler is not None:
            scheduler.observe(lambda: F.cross_entropy(model(x), y))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - started

    def figures(self) -> dict[str, Any]:
        """Returns the run's results; loss and accuracy on held-out images are means over the last validations."""
        losses, accuracies = zip(*self.validations, strict=True)
        return {
            "lr": self.lr,
            "val_loss": statistics.fmean(losses),
            "val_accuracy": statistics.fmean(accuracies),
            "val_losses": list(losses),
            "train_loss": statistics.fmean(self.losses[-LAST:]),
            "peak_loss": max(self.losses),
            "final_lr": self.scheduler.get_last_lr()[0] if self.scheduler else self.lr,
            "seconds": self.seconds,
            "ms_per_step": 1000 * self.seconds / len(self.losses),
        }


def make_runs(task: Task, tuned_lr: float, out: Path, seed: int) -> list[Run]:
    """Returns the three runs, ready to start; protected and unprotected next to each other."""
    runs = []
    for name in ("tuned", "unprotected", "protected"):
        lr = tuned_lr * (1 if name == "tuned" else TOO_HIGH)
        model = make_model(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        scheduler = CoherenceScheduler(optimizer, log_path=out / "decisions.jsonl") if name == "protected" else None
        runs.append(Run(name, model, optimizer, task.batches(seed), scheduler, lr))
    return runs


def train(runs: list[Run], task: Task, steps: int, wandb_run: Any) -> None:
    """Lets the runs advance in turns, to `steps` steps each, and validates each after its last blocks."""
    on_screen = sys.stderr.isatty()
    bar = tqdm(total=steps * len(runs), unit="step", mininterval=0.2 if on_screen else 10, ncols=110)
    blocks = math.ceil(steps / BLOCK)
    for block in range(blocks):
        count = min(BLOCK, steps - block * BLOCK)
        for run in runs if block % 2 == 0 else reversed(runs):
            for _ in range(count):
                run.step()
                if wandb_run is not None and run.scheduler is not None:
                    wandb_run.log({"loss": run.losses[-1]})  # safe_lr's own figures ride on this row
            if block >= blocks - VALIDATIONS:
                run.validations.append(task.validate(run.model))
            bar.update(count)
        bar.set_postfix_str(", ".join(f"{run.name} {run.losses[-1]:.3g}" for run in runs), refresh=False)
    bar.close()


def start_wandb(out: Path) -> Any:
    """Opens a W&B run, offline unless WANDB_MODE says otherwise. Returns None, and says why, where that fails."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no crash reports: nothing leaves this machine
    try:
        import wandb
    except ImportError as error:
        print(f"Going on without W&B: {error}")
        return None
    settings = wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=20, finish_timeout=20)
    try:
        return wandb.init(project="safe-lr-demo", dir=out, settings=settings)
    except (wandb.Error, OSError) as error:
        print(f"Going on without W&B: {error}")
        return None


def summarise(runs: list[Run], task: Task, tuning: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns what `summary.json` holds."""
    result: dict[str, Any] = {run.name: run.figures() for run in runs}
    scheduler = next(run.scheduler for run in runs if run.scheduler is not None)
    told = scheduler.summary()
    result["protected"] |= {
        "measurements": told.measurements,
        "num_matvecs": told.num_matvecs,
        "cost": told.cost,
        "overhead": result["protected"]["seconds"] / result["unprotected"]["seconds"] - 1,
        "overhead_counted": told.overhead,
        "capped_steps": told.capped_steps,
        "first_capped_step": told.first_capped_step,
        "failures": told.failures,
        "margin": told.margin,
    }
    result["task"] = {
        "data": task.name,
        "steps": len(runs[0].losses),
        "batch_size": task.batch_size,
        "epochs": len(runs[0].losses) * task.batch_size / len(task.train[0]),
        "optimizer": "Adam",
        "seed": seed,
        "too_high": TOO_HIGH,
        "tuned_by": "examples/tune_demo.py",
        "tuned_seeds": tuning["seeds"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return result


def table(summary: dict[str, Any]) -> str:
    """Returns the results as a table and three sentences."""
    columns = ("lr", "val loss", "accuracy", "train loss", "peak loss", "ms/step")
    lines = ["run        " + "".join(f"{column:>12}" for column in columns)]
    for name in ("tuned", "unprotected", "protected"):
        row = summary[name]
        figures = [f"{row[key]:.4g}" for key in ("lr", "val_loss", "val_accuracy", "train_loss", "peak_loss")]
        figures[2] = f"{row['val_accuracy']:.1%}"
        lines.append(f"{name:<11}" + "".join(f"{figure:>12}" for figure in [*figures, f"{row['ms_per_step']:.1f}"]))
    row, steps = summary["protected"], summary["task"]["steps"]
    return "\n".join(lines) + (
        f"\n\nsafe_lr held the lr below {row['lr']:g} in {row['capped_steps']} of {steps} steps; at the end it was "
        f"{row['final_lr']:.3g}.\n"
        f"It measured {row['measurements']} times ({row['num_matvecs']} Hessian-vector products): "
        f"{row['overhead']:+.1%} wall time against the\n"
        f"unprotected run, {row['overhead_counted']:.1%} by count of gradient evaluations.\n"
        "Validation loss and accuracy are on held-out images, means over validations after each of the last "
        f"{len(row['val_losses'])}\nblocks of {BLOCK} steps."
    )


def write_results(out: Path, summary: dict[str, Any]) -> None:
    """Writes summary, report and picture next to the decisions, and says how to open them."""
    (out / "summary.json").write_text(json.dumps(_json_ready(summary), indent=1) + "\n")
    write_report(out / "decisions.jsonl", out / "report.html")
    lr_curve(out / "decisions.jsonl").figure.savefig(out / "lr.png")


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_ready(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description="Train at an lr 100 times too high, with and without safe_lr.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results")
    parser.add_argument("--source", choices=("auto", "full", "subset"), default="auto", help="which Fashion-MNIST")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of weights and batches")
    parser.add_argument("--quick", action="store_true", help="30 steps: a smoke test, no result")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the network is small: more threads gain little and make the times depend on other load
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "decisions.jsonl").unlink(missing_ok=True)  # the logger appends; this is a new run
    task = make_task(args.source)
    tuning = json.loads(TUNED_LR.read_text())[task.name]
    steps = 30 if args.quick else task.steps
    tuned_lr: float = tuning["tuned"]["lr"]
    print(f"Data: {task.where}.")
    print(
        f"Adam, {steps} steps of {task.batch_size} images. Tuned lr {tuned_lr:g}, the best of a scan over "
        f"{len(tuning['means'])} lrs and {len(tuning['seeds'])} seeds; too high: {TOO_HIGH * tuned_lr:g}."
    )
    wandb_run = start_wandb(out)
    runs = make_runs(task, tuned_lr, out, args.seed)
    train(runs, task, steps, wandb_run)
    summary = summarise(runs, task, tuning, args.seed)
    for run in runs:
        if run.scheduler is not None:
            run.scheduler.close()
    if wandb_run is not None:
        wandb_run.finish()
    write_results(out, summary)

    print(f"\n{table(summary)}\n")
    written = {
        "report.html": "the run in one page; open it in a browser",
        "lr.png": "desired, allowed and applied lr; open it in an image viewer",
        "decisions.jsonl": "every measurement and decision, one JSON object a line",
        "summary.json": "the figures above",
    }
    for name, what in written.items():
        print(f"{out / name!s:<28} {what}")
    if wandb_run is not None:
        print(f"{out / 'wandb'!s:<28} the W&B run; `wandb sync {Path(wandb_run.dir).parent}` sends it to your account")


if __name__ == "__main__":
    main()
