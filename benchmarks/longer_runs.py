"""What 300 steps hide: the rows of `lr_robustness` over 1,000 steps, and a long warm-up to an lr that is right.

    python -m benchmarks.longer_runs --json docs/results/longer_runs.json [--tasks ...] [--seeds ...]

Three comparisons, each paired: safe_lr at the tuned lr and 100 times above it beside the tuned constant lr (picked anew
on seed 0 of these steps), and, at the tuned lr, a linear warm-up over the first three tenths of the steps with and
without safe_lr around it. Some 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from benchmarks.cells import Cache
from benchmarks.lr_robustness import BASELINES, ROOT, Matrix, Row, lr_at, percent, rows_of, spread
from benchmarks.results import save
from benchmarks.tasks import TASKS
from benchmarks.training import Cell, Plan, make_optimizers, protected, train

STEPS = 1_000
SEEDS = (10, 11, 12)
"""Those that are scored. What was chosen on runs of this length was chosen on 1 to 3."""
WARMUP = 0.3
"""Share of the steps over which lr rises in the third comparison."""


def warm(job: tuple[Cell, bool]) -> dict[str, Any]:
    """Trains once with the long warm-up, with or without safe_lr."""
    torch.set_num_threads(1)
    cell, guarded = job
    task, first = TASKS[cell.task], max(1, round(WARMUP * cell.steps))
    model = task.make_model(cell.seed)
    optimizers = make_optimizers(cell.optimizer, model, cell.lr)
    schedules = [LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / first)) for optimizer in optimizers]
    guard = protected(optimizers, cell).guard if guarded else None
    plan = Plan(step=lambda: [schedule.step() for schedule in schedules], guard=guard)
    result = train(task, model, optimizers, plan, cell)
    return {"score": result["score"], "capped": guard.summary().capped_steps / cell.steps if guard is not None else 0.0}


def warmed(matrix: Matrix) -> dict[Row, dict[str, Any]]:
    """Returns for each row how far a long warm-up ends behind where safe_lr is around it, and how often that capped."""
    jobs = [
        (row.cell("constant", lr_at(matrix.tuned[row]), seed, matrix.steps), guarded)
        for row in matrix.rows for seed in matrix.seeds for guarded in (False, True)
    ]  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(matrix.workers) as pool:
        results = list(tqdm(pool.imap(warm, jobs), total=len(jobs), desc="long warm-up"))
    found = {(cell.task, cell.optimizer, cell.seed, safe): r for (cell, safe), r in zip(jobs, results, strict=True)}
    rows: dict[Row, dict[str, Any]] = {}
    for row in matrix.rows:
        pairs = [[found[row.task, row.optimizer, seed, safe] for safe in (False, True)] for seed in matrix.seeds]
        gaps = [ours["score"] / plain["score"] - 1 for plain, ours in pairs]
        rows[row] = spread(gaps) | {"capped": statistics.fmean(ours["capped"] for _, ours in pairs)}
    return rows


def middle(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Returns median, mean and worst of the rows' mean gaps."""
    gaps = [row[name]["mean"] for row in rows]
    return {"median": statistics.median(gaps), "mean": statistics.fmean(gaps), "worst": max(gaps)}


def main() -> None:
    parser = argparse.ArgumentParser(description="safe_lr over 1,000 steps, and around a long warm-up.")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="scored seeds; lr is picked on seed 0")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "lr_robustness")
    args = parser.parse_args()
    if 0 in args.seeds:
        parser.error("seed 0 is the one that lr is picked on: score on others")
    rows = rows_of(args.tasks)
    matrix = Matrix(Cache(args.cache, BASELINES), rows, args.seeds, args.steps, args.workers)
    matrix.tune()
    matrix.run([matrix.constant(row, seed) for seed in args.seeds for row in rows], "tuned")
    matrix.run([matrix.protected(row, k, seed) for seed in args.seeds for row in rows for k in (0, 4)], "safe_lr")
    warmups = warmed(matrix)
    told = []
    for row in rows:
        at = {k: spread(matrix.gaps(lambda row, seed, k=k: matrix.protected(row, k, seed), row)) for k in (0, 4)}
        told.append(
            {"row": str(row), "tuned_lr": lr_at(matrix.tuned[row]), "1x": at[0], "100x": at[4], "warm-up": warmups[row]}
        )
        shown = "   ".join(f"{name} {percent(told[-1][name]['mean'])}" for name in ("1x", "100x", "warm-up"))
        print(f"{row!s:>16}   {shown}   capped {warmups[row]['capped']:.0%} of the warm-up's run")
    result = {name: middle(told, name) for name in ("1x", "100x", "warm-up")}
    for name, of in result.items():
        print(f"{name:>8}: " + ", ".join(f"{what} {percent(value)}" for what, value in of.items()))
    save({"steps": args.steps, "seeds": list(args.seeds), **result, "rows": told}, args.json)


if __name__ == "__main__":
    main()
