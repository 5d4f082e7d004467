"""What one poisoned step costs: a batch of NaN, or one whose loss is 10,000 times itself, in an otherwise healthy run.

    python -m benchmarks.poison --json docs/results/poison.json [--quick] [--seeds 1 2 3 ...] [--workers 2]

On rows of `benchmarks/lr_robustness.py` at their tuned lr, under `CoherenceGuard`, with `rewind=True` and without. A
run of 300 steps meets the poison at step 100. It is compared with the same run without poison: same weights, same
batches (paired). A third run never meets that batch at all (`left out`): how far it lies from the clean one is what a
batch more or less is worth, and a poisoned run can do no better than be equal to it, to the bit, from there on.

`nan`: one input is NaN where inputs are numbers, which BatchNorm's statistics take in too; else the loss is. `scaled`:
the loss is 1e4 times itself. The score is the mean loss on the fresh batches of the last tenth of the steps. The guard
is not told the loss, which would make it see more. A batch less lets every later measurement and trial step fall on
another one, and so moves single runs by some percent either way: hence thirty seeds. Without `rewind` the costs are ten
times that, and the first CONTRAST of them are enough. Results are kept one file a run under `runs/poison`.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.betas import tuned_lrs
from benchmarks.cells import ROOT, Cache, canonical
from benchmarks.lr_robustness import STEPS, Row, between, lr_at, spread
from benchmarks.results import command_line, save
from benchmarks.results import markdown as table
from benchmarks.tasks import TASKS
from benchmarks.training import LAST, Cell, make_optimizers, validate

METHOD = "safe_poison"  # what begins with "safe" depends on the library
ROWS = (("cnn", "adam"), ("resnet", "sgd"), ("vit", "adamw"), ("gpt", "rmsprop"), ("lstm", "nadam"))
POISONS = ("nan", "scaled")
PROTECTIONS = {"rewind": {"rewind": True}, "safe_lr": {}}
SEEDS = tuple(range(1, 31))
CONTRAST = 10  # seeds, the first, without rewind
PART = 1 / 3  # of the steps, before the poison
SCALE = 1e4


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains once, on one thread, with `cell.options["poison"]` at one step: None, "left out", or one of POISONS.

    Returns:
        `score`, None where the loss did not stay finite; `val`; updates dropped, and times gone back.
    """
    from safe_lr import CoherenceGuard

    torch.set_num_threads(1)
    started, task, options = time.perf_counter(), TASKS[cell.task], dict(cell.options)
    poison = options.pop("poison")
    model = task.make_model(cell.seed)
    optimizers = make_optimizers(cell.optimizer, model, cell.lr)
    guard = CoherenceGuard(optimizers, loggers=None, **options)
    losses: list[float] = []
    for step, (x, y) in zip(range(cell.steps), task.batches(cell.seed, task.batch_size), strict=False):
        met = poison if step == round(PART * cell.steps) else None
        if met == "left out":
            losses.append(math.nan)
            continue
        x, scale = poisoned(x, met)

        def loss_of(x: Tensor = x, y: Tensor = y, scale: float = scale) -> Tensor:
            return scale * task.loss(model(x), y)

        loss = loss_of()
        losses.append(loss.item())
        loss.backward()
        guard.observe(loss_of)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    score = statistics.fmean(losses[-max(1, round(LAST * cell.steps)) :])
    val, told = validate(task, model, optimizers), guard.summary()
    guard.close()
    return {
        "cell": cell.to_dict(),
        "score": score if math.isfinite(score) else None,
        "val": val if math.isfinite(val) else None,
        "drops": told.drops,
        "rewinds": told.rewinds,
        "seconds": time.perf_counter() - started,
    }


def poisoned(x: Tensor, poison: str | None) -> tuple[Tensor, float]:
    """Returns a batch's inputs and what its loss is to be multiplied by.

    Example:
        >>> poisoned(torch.ones(2, 1), "nan")[0].tolist(), poisoned(torch.ones(1).long(), "nan")[1]
        ([[nan], [1.0]], nan)
        >>> poisoned(torch.ones(1), "scaled")[1], poisoned(torch.ones(1), None)
        (10000.0, (tensor([1.]), 1.0))
    """
    if poison == "nan" and x.is_floating_point():
        return x.index_fill(0, torch.tensor([0]), math.nan), 1.0
    return x, {"nan": math.nan, "scaled": SCALE}.get(poison or "", 1.0)


def code() -> str:
    """Returns a digest of how a run is made here."""
    parts = canonical("\n".join(inspect.getsource(made) for made in (run_cell, poisoned)))
    return hashlib.sha256(f"{PART} {SCALE}{parts}".encode()).hexdigest()[:12]


class Benchmark:
    """The runs, and what is made of them.

    Args:
        folder: Where results are kept, a file a run.
        tuned: The half decade of each row's best constant lr.
        seeds, steps: Of each run.
    """

    def __init__(
        self, folder: Path, tuned: dict[Row, int], *, seeds: Sequence[int] = SEEDS, steps: int = STEPS
    ) -> None:
        self.cache, self.tuned, self.seeds, self.steps = Cache(folder / code()), tuned, seeds, steps

    def cell(self, row: Row, seed: int, protection: str, poison: str | None) -> Cell:
        options = {**PROTECTIONS[protection], "poison": poison}
        return row.cell(METHOD, lr_at(self.tuned[row]), seed, self.steps, **options)

    def cells(self) -> Iterator[Cell]:
        """Yields all, those that are compared side by side."""
        for row in self.tuned:
            for protection in PROTECTIONS:
                for seed in self.seeds_of(protection):
                    yield from (self.cell(row, seed, protection, met) for met in (None, "left out", *POISONS))

    def seeds_of(self, protection: str) -> Sequence[int]:
        """Returns the seeds that a protection is run with."""
        return self.seeds if protection == "rewind" else self.seeds[:CONTRAST]

    def run(self, workers: int) -> None:
        """Computes what is missing."""
        self.cache.run(list(self.cells()), workers=workers, label="poison", make=run_cell)

    def result(self) -> dict[str, Any]:
        """Returns everything that the JSON holds; a cost is how far a loss lies above that of the clean run."""
        rows = [self.at(row, protection, met) for row in self.tuned for protection in PROTECTIONS for met in POISONS]
        own = [row for row in rows if row["protection"] == "rewind"]
        costs = [row["cost"]["mean"] for row in own]
        return {
            "poison_worst_cost": None if None in costs else max(costs),
            "poison_equal": statistics.fmean(row["equal"] for row in own),
            "steps": self.steps,
            "seeds": list(self.seeds),
            "seeds_without_rewind": list(self.seeds_of("safe_lr")),
            "rows": rows,
        }

    def at(self, row: Row, protection: str, poison: str) -> dict[str, Any]:
        """Returns a row under one poison: what that costs, what leaving the batch out does, how often both are one."""
        clean, out, met = (
            [self.cache.get(self.cell(row, seed, protection, which)) or {} for seed in self.seeds_of(protection)]
            for which in (None, "left out", poison)
        )
        return {
            "row": str(row),
            "protection": protection,
            "poison": poison,
            "cost": spread(_gaps(met, clean, "score")),
            "cost_val": spread(_gaps(met, clean, "val")),
            "left_out": spread(_gaps(out, clean, "score")),
            "equal": statistics.fmean(a.get("val") == b.get("val") is not None for a, b in zip(met, out, strict=True)),
            "broken": sum(run.get("score") is None for run in met),
            "drops": statistics.fmean(run.get("drops", 0) for run in met),
            "rewinds": statistics.fmean(run.get("rewinds", 0) for run in met),
        }


def _gaps(runs: Sequence[dict[str, Any]], clean: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """Paired gaps; none at all where a run broke: a mean of those that did not would hide it."""
    pairs = [(a.get(metric), b.get(metric)) for a, b in zip(runs, clean, strict=True)]
    return [] if any(a is None or not b for a, b in pairs) else [a / b - 1 for a, b in pairs]


def markdown(result: dict[str, Any]) -> str:
    """Returns the table for docs/benchmarks.md."""
    titles = [
        "row",
        "poison",
        "run",
        "loss above the clean run's",
        "batch left out",
        "same run as that",
        "dropped",
        "rewinds",
    ]
    rows = []
    for row in result["rows"]:
        name = "safe_lr, `rewind=True`" if row["protection"] == "rewind" else "safe_lr"
        cost = f"broken in {row['broken']}" if row["broken"] else between(row["cost"])
        rows.append(
            [
                row["row"],
                row["poison"],
                name,
                cost,
                between(row["left_out"]),
                f"{row['equal']:.0%}",
                f"{row['drops']:.1f}",
                f"{row['rewinds']:.1f}",
            ]
        )
    return table(titles, rows)


def main() -> None:
    parser = command_line("What one poisoned step costs.", "one row, one seed, 45 steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "poison")
    args = parser.parse_args()
    rows = [Row(*names) for names in ROWS]
    if args.quick:
        rows, args.seeds, args.steps = [Row("lora", "adam")], args.seeds[:1], 45
    benchmark = Benchmark(args.cache, tuned_lrs(rows, STEPS, args.workers), seeds=args.seeds, steps=args.steps)
    benchmark.run(args.workers)
    result = benchmark.result()
    print(markdown(result))
    save(result, args.json)


if __name__ == "__main__":
    main()
