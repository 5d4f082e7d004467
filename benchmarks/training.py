"""One training run of `benchmarks/lr_robustness.py`: a task, an optimizer, a way of choosing lr, a seed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.tasks import OPTIMIZERS, TASKS, Task

WARMUP = 0.05  # of the steps, in the baseline with warm-up and cosine
LAST = 0.1  # of the steps, whose mean loss is the score
VALIDATIONS = 4


@dataclass(frozen=True)
class Cell:
    """What tells one run from another.

    Attributes:
        task: A key of TASKS.
        optimizer: A key of OPTIMIZERS, or `prodigy` or `schedulefree`.
        method: A key of METHODS.
        lr: The lr that is asked for.
        seed: Of weights and batches.
        steps: Optimizer steps.
        options: Arguments of the scheduler, as sorted pairs.
    """

    task: str
    optimizer: str
    method: str
    lr: float
    seed: int
    steps: int
    options: tuple[tuple[str, Any], ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return {**asdict(self), "options": dict(self.options)}


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """Returns the factor on lr at a step: linear over the first WARMUP of the steps, then a cosine to zero.

    Example:
        >>> factor = warmup_cosine(100)
        >>> factor(0), factor(4), round(factor(100), 3)
        (0.2, 1.0, 0.0)
    """
    first = max(1, round(WARMUP * steps))

    def factor(step: int) -> float:
        if step < first:
            return (step + 1) / first
        return 0.5 * (1 + math.cos(math.pi * (step - first + 1) / (steps - first + 1)))

    return factor


def constant(optimizers: list[Optimizer], cell: Cell) -> Plan:
    """The lr as it is."""
    return Plan()


def cosine(optimizers: list[Optimizer], cell: Cell) -> Plan:
    """Warm-up, then cosine."""
    schedules = [LambdaLR(optimizer, warmup_cosine(cell.steps)) for optimizer in optimizers]
    return Plan(step=lambda: [schedule.step() for schedule in schedules])


def protected(optimizers: list[Optimizer], cell: Cell) -> Plan:
    """safe_lr around the constant lr."""
    from safe_lr import CoherenceGuard

    guard = CoherenceGuard(optimizers, loggers=None, **dict(cell.options))
    return Plan(guard=guard)


def protected_cosine(optimizers: list[Optimizer], cell: Cell) -> Plan:
    """safe_lr around warm-up and cosine."""
    plan = cosine(optimizers, cell)
    plan.guard = protected(optimizers, cell).guard
    return plan


@dataclass
class Plan:
    """What chooses lr in a run: called after each step; a guard, if there is one, is shown each closure."""

    step: Callable[[], Any] = lambda: None
    guard: Any = None


METHODS: dict[str, Callable[[list[Optimizer], Cell], Plan]] = {
    "constant": constant,
    "cosine": cosine,
    "safe": protected,
    "safe_cosine": protected_cosine,
}


def depends_on_safe_lr(cell: Cell) -> bool:
    """Whether the cell's result may change with the library."""
    return cell.method.startswith("safe")


def make_optimizers(name: str, model: nn.Module, lr: float) -> list[Optimizer]:
    """Returns the optimizers of one run."""
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "prodigy":
        from prodigyopt import Prodigy

        return [Prodigy(params, lr=lr)]
    if name == "schedulefree":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(params, lr=lr)
        optimizer.train()
        return [optimizer]
    return OPTIMIZERS[name](model, lr)


def suggested_lr(task: Task, optimizer: str, seed: int) -> float | None:
    """Returns what torch-lr-finder suggests (steepest descent of the smoothed loss on 100 batches), None if nothing."""
    import contextlib
    import io

    import matplotlib
    from torch_lr_finder import LRFinder

    matplotlib.use("Agg")
    from matplotlib import pyplot

    model = task.make_model(seed)
    optimizers = make_optimizers(optimizer, model, 1e-6)
    batches = task.batches(seed + 500, task.batch_size)
    loader = torch.utils.data.DataLoader([next(batches) for _ in range(100)], batch_size=None)  # the only kind it takes
    finder = LRFinder(model, optimizers[0], task.loss, device="cpu")
    figure, axes = pyplot.subplots()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            finder.range_test(loader, end_lr=10, num_iter=100)
            found = finder.plot(ax=axes, suggest_lr=True)
    finally:
        pyplot.close(figure)
    return float(found[1]) if isinstance(found, tuple) and found[1] is not None else None


def run(cell: Cell) -> dict[str, Any]:
    """Trains once, on one thread.

    Returns:
        `score`: mean loss on fresh batches over the last tenth of the steps, None where it diverged; `initial`: the
        first loss; `val`; `peak`; `diverged`: not finite, or above the first loss; `losses`: thinned for drawing; for
        safe_lr also what it measured and spent.
    """
    torch.set_num_threads(1)
    task, lr = TASKS[cell.task], cell.lr
    started = time.perf_counter()
    if cell.method == "finder":
        found = suggested_lr(task, cell.optimizer, cell.seed)
        if found is None:
            return {"cell": cell.to_dict(), "score": None, "diverged": True, "note": "torch-lr-finder suggests nothing"}
        lr = found
    model = task.make_model(cell.seed)
    optimizers = make_optimizers(cell.optimizer, model, lr)
    plan = METHODS["constant" if cell.method == "finder" else cell.method](optimizers, cell)
    result = train(task, model, optimizers, plan, cell)
    result |= {"cell": cell.to_dict(), "lr": lr, "seconds": time.perf_counter() - started}
    if plan.guard is not None:
        result |= account(plan.guard, cell)
        plan.guard.close()
    return result


def train(task: Task, model: nn.Module, optimizers: list[Optimizer], plan: Plan, cell: Cell) -> dict[str, Any]:
    """Takes the steps; stops at the first loss that is not finite."""
    batches = task.batches(cell.seed, task.batch_size)
    losses: list[float] = []
    lrs: list[float] = []
    validations: list[float] = []
    last = max(1, round(LAST * cell.steps))
    checks = {cell.steps - 1 - round(k * last / VALIDATIONS) for k in range(VALIDATIONS)}
    for step in range(cell.steps):
        x, y = next(batches)
        loss = task.loss(model(x), y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        if plan.guard is not None:
            plan.guard.observe(lambda x=x, y=y: task.loss(model(x), y))
        for optimizer in optimizers:
            optimizer.step()
        lrs.append(plan.guard.coming_lrs()[0] if plan.guard is not None else optimizers[0].param_groups[0]["lr"])
        plan.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step in checks:
            validations.append(validate(task, model, optimizers))
    complete = len(losses) == cell.steps and math.isfinite(losses[-1])
    score = statistics.fmean(losses[-last:]) if complete else math.inf
    diverged = not score <= losses[0]
    thin = max(1, cell.steps // 100)
    return {
        "score": score if math.isfinite(score) else None,
        "initial": losses[0],
        "diverged": diverged,
        "val": statistics.fmean(validations) if validations and math.isfinite(sum(validations)) else None,
        "peak": max(losses) if complete else None,
        "losses": [round(v, 4) for v in losses[::thin] if math.isfinite(v)],
        "lrs": [float(f"{v:.4g}") for v in lrs[::thin]],
    }


def validate(task: Task, model: nn.Module, optimizers: list[Optimizer]) -> float:
    """Returns the loss on held-out data, in eval mode (schedule-free optimizers too have one)."""
    x, y = task.held_out()
    modal = [optimizer for optimizer in optimizers if hasattr(optimizer, "eval")]
    model.eval()
    for optimizer in modal:
        optimizer.eval()
    try:
        with torch.no_grad():
            return float(task.loss(model(x), y))
    finally:
        model.train()
        for optimizer in modal:
            optimizer.train()


def account(guard: Any, cell: Cell) -> dict[str, Any]:
    """Returns what safe_lr did in the run."""
    summary = guard.summary()
    margins = [decision.margin for decision in guard.history]
    return {
        "overhead_counted": summary.cost / cell.steps,
        "measurements": summary.measurements,
        "capped": summary.capped_steps / cell.steps,
        "margin": margins[-1] if margins else None,
    }
