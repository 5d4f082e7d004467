"""What safe_lr costs in time: the same training twice, step by step in turns, with and without it.

    python -m benchmarks.overhead --json docs/results/overhead.json

Two copies of a model train in one process on the same batches, one step each in turns, and each step is timed. The
ratio of the two sums is the overhead in wall time, read at several lengths of run; beside it stands what was counted,
in gradient evaluations per step, and what single measurements and trial steps took in units of a plain step. Two tasks
run 10,000 steps, the others 1,000; a cap that binds costs trial steps on top, so each runs at the tuned lr and 100
times above it. The copy without safe_lr has the tuned lr throughout: at 100 times that a network soon is a wreck, and a
conv net's forward pass 10 % faster for it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.lr_robustness import Row, lr_at
from benchmarks.results import save
from benchmarks.tasks import TASKS
from benchmarks.training import make_optimizers
from safe_lr import CoherenceGuard

LONG = (("cnn", "adam"), ("lora", "adamw"))
SHORT = (("gpt", "adam"), ("vit", "adamw"), ("lstm", "nadam"), ("resnet", "sgd"), ("teacher", "rmsprop"))
LENGTHS = (300, 1_000, 3_000, 10_000)
BATCHES = 200
"""Different batches, which then come again: this is about time."""

TUNED = {
    "cnn/adam": -4, "gpt/adam": -5, "vit/adamw": -5, "lstm/nadam": -3, "resnet/sgd": -3, "lora/adamw": -4,
    "teacher/rmsprop": -5,
}  # fmt: skip
"""Half decades of the tuned lr, from lr_robustness."""


class Trainee:
    """A model that trains step by step.

    Attributes:
        seconds: Time spent on each step.
        cost: Gradient evaluations spent so far, after each step.
        measurements: Measurements made so far, likewise.
    """

    def __init__(self, row: Row, lr: float, *, protected: bool) -> None:
        self.task = TASKS[row.task]
        self.model = self.task.make_model(1)
        self.optimizers = make_optimizers(row.optimizer, self.model, lr)
        self.guard = CoherenceGuard(self.optimizers, loggers=None) if protected else None
        self.seconds: list[float] = []
        self.cost: list[float] = []
        self.measurements: list[int] = []

    def step(self, x: Any, y: Any) -> None:
        """Trains on one batch."""
        started = time.perf_counter()
        loss = self.task.loss(self.model(x), y)
        loss.backward()
        if self.guard is not None:
            self.guard.observe(lambda: self.task.loss(self.model(x), y))
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - started)
        if self.guard is not None:
            state = self.guard._controller.state  # a summary takes as long as the rest of the books
            self.cost.append(state.cost)
            self.measurements.append(state.measurements)


def paired(row: Row, above: int, steps: int) -> dict[str, Any]:
    """Trains with and without safe_lr in turns; returns the overheads at the lengths up to `steps`."""
    tuned = TUNED[str(row)]
    lr = lr_at(tuned + above)
    plain, safe = Trainee(row, lr_at(tuned), protected=False), Trainee(row, lr, protected=True)
    stream = TASKS[row.task].batches(1, TASKS[row.task].batch_size)
    batches = list(itertools.islice(stream, min(BATCHES, steps)))
    Trainee(row, lr, protected=True).step(*batches[0])  # what a process loads and compiles once, torch's part too
    shown = tqdm(itertools.islice(itertools.cycle(batches), steps), total=steps, desc=f"{row} {10 ** (above / 2):g}x")
    for index, (x, y) in enumerate(shown):
        for trainee in (plain, safe) if index % 2 else (safe, plain):
            trainee.step(x, y)
    quiet = [s - p for s, p in zip(safe.seconds, plain.seconds, strict=True)]
    per_step = statistics.median(plain.seconds)
    counted = [after - before for before, after in itertools.pairwise([0.0, *safe.cost])]
    measured = [after > before for before, after in itertools.pairwise([0, *safe.measurements])]
    spent: dict[str, Any] = {}
    for name, of in (("measurement", True), ("trial", False)):
        picked = [k for k, cost in enumerate(counted) if cost > 0 and measured[k] is of]
        if picked:
            spent[name] = {
                "times": len(picked),
                "counted": statistics.fmean(counted[k] for k in picked),
                "steps": statistics.fmean(quiet[k] for k in picked) / per_step,
            }
    return {
        "row": str(row),
        "above": above,
        "lr": lr,
        "ms_per_step": 1e3 * per_step,
        "spent": spent,
        "ms_between_measurements": 1e3 * statistics.median(quiet),
        "at": {
            str(length): {
                "wall": sum(safe.seconds[:length]) / sum(plain.seconds[:length]) - 1,
                "counted": safe.cost[length - 1] / length,
            }
            for length in LENGTHS
            if length <= steps
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What safe_lr costs in time, step by step beside plain training.")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--long", type=int, default=LENGTHS[-1], help="steps of the two long tasks")
    parser.add_argument("--short", type=int, default=1_000, help="steps of the others")
    args = parser.parse_args()
    torch.set_num_threads(1)
    jobs = [(Row(*names), above, args.short) for names in SHORT for above in (0, 4)]
    jobs += [(Row(*names), above, args.long) for names in LONG for above in (0, 4)]
    rows = []
    for row, above, steps in jobs:
        rows.append(paired(row, above, steps))
        at = "   ".join(f"{n}: {v['wall']:+.1%} ({v['counted']:.1%} counted)" for n, v in rows[-1]["at"].items())
        print(f"{rows[-1]['row']:>18} {10 ** (above / 2):>5g}x  {rows[-1]['ms_per_step']:6.1f} ms   {at}", flush=True)
    walls = {n: [r["at"][n]["wall"] for r in rows if n in r["at"]] for n in map(str, LENGTHS)}
    result = {n: {"median": statistics.median(v), "worst": max(v)} for n, v in walls.items() if v}
    for n, of in result.items():
        print(f"{n} steps: median {of['median']:+.1%}, worst {of['worst']:+.1%}")
    save({"wall": result, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
