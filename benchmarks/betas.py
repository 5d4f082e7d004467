"""What moving betas and eps is worth: off, `tune_betas`, `tune_eps`, both, and the source paper's fixed settings.

    python -m benchmarks.betas --json docs/results/betas.json [--quick | --full] [--markdown FILE] [--workers 2]

On rows of `benchmarks/lr_robustness.py` with Adam, AdamW, NAdam or RMSprop, under `CoherenceGuard`, at the tuned lr
and at 10 and 100 times it. Each setting is compared with `off` on the same initial weights and batches (paired), and
run right after it (interleaved): loss over the last tenth of the steps, validation loss, and at the end of the run
gamma, lambda_max and SAM's sharpness (Eq. 24), measured on 64 held-out examples. Table 1 of the source paper has the
pairs (.9, .999), which is `off`, (.9, .99) and (.95, .99).

Then the loss spikes of `benchmarks/spikes.py`, with `tune_betas` off and on. The default of `tune_betas` is on if and
only if no row is worse with it (no paired interval wholly above zero) and it is better in sum: `betas_default`. Results
are kept one file a run under `runs/betas`, so an interrupted benchmark goes on where it was; all rows are run on one
seed before the next. The nine default rows take 426 runs of some seven seconds, 25 minutes on two cores. `--full` adds
those where only eps can move (Adagrad), or only a companion's betas (Muon).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.cells import ROOT, Cache, canonical
from benchmarks.lr_robustness import BASELINES, STEPS, Matrix, Row, between, lr_at, percent, rows_of, spread
from benchmarks.results import command_line, save
from benchmarks.tasks import TASKS, Task
from benchmarks.training import Cell, Plan, account, make_optimizers, train

METHOD = "safe_betas"  # what begins with "safe" depends on the library
FAMILY = ("adam", "adamw", "nadam", "rmsprop")
ROWS = tuple((task.name, optimizer) for task in TASKS.values() for optimizer in task.optimizers if optimizer in FAMILY)
ABOVE = (0, 2, 4)  # half decades above the tuned lr: 1x, 10x, 100x
SEEDS = (1, 2, 3)
METRICS = ("score", "val", "gamma", "lambda_max", "sam")

VARIANTS: dict[str, dict[str, Any]] = {
    "off": {},
    "betas": {"tune_betas": True},
    "eps": {"tune_eps": True},
    "both": {"tune_betas": True, "tune_eps": True},
    "0.9, 0.99": {"betas": (0.9, 0.99)},
    "0.95, 0.99": {"betas": (0.95, 0.99)},
}
"""Arguments of `CoherenceGuard`; `betas` is the optimizer's own."""

EXAMPLES = 64
PRODUCTS = 30
TOL = 0.05
"""Of the closing measurement: the error is about the square of it, far below what gamma differs by from run to run, and
a hundredth would take longer than the training of the smaller batches."""

SPIKE_LRS = (0.01, 0.03)
SPIKE_STEPS = 2000


# ---- one run


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains once, on one thread; the result is that of `training.run`, with how sharp the end is."""
    torch.set_num_threads(1)
    if cell.task == "spikes":
        return run_spikes(cell)
    from safe_lr import CoherenceGuard

    started, task, options = time.perf_counter(), TASKS[cell.task], dict(cell.options)
    betas = options.pop("betas", None)
    model = task.make_model(cell.seed)
    optimizers = make_optimizers(cell.optimizer, model, cell.lr)
    for group in groups_with("betas", optimizers) if betas is not None else ():
        group["betas"] = tuple(betas)
    guard = CoherenceGuard(optimizers, loggers=None, **options)
    result = train(task, model, optimizers, Plan(guard=guard), cell) | account(guard, cell)
    result["moves"] = sum(
        decision.action in ("betas", "eps") and not decision.reason.startswith(f"{decision.action} stay")
        for decision in guard.history
    )
    if result["score"] is not None:
        result |= ending(task, model, optimizers)
    guard.close()
    return result | {"cell": cell.to_dict(), "seconds": time.perf_counter() - started}


def ending(task: Task, model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """Returns gamma, lambda_max and SAM's sharpness at the end, on held-out examples, and the betas and eps there.

    A figure that could not be measured is None. P is the optimizer's own, as a step on those examples would use it.
    """
    from safe_lr import measure, sam_sharpness

    x, y = task.held_out()
    per_input = len(y) // len(x)  # a text has a target for each character
    x, y = x[:EXAMPLES], y[: EXAMPLES * per_input]

    def closure() -> torch.Tensor:
        return task.loss(model(x), y)

    found = measure(optimizers, closure, tol=TOL, max_matvecs=PRODUCTS)
    try:
        sam: float | None = sam_sharpness(closure, [p for p in model.parameters() if p.requires_grad])
    except ValueError:  # the loss there is not finite
        sam = None
    figures = {"gamma": found.gamma, "lambda_max": found.lambda_max, "sam": sam}
    ends = {name: [group[name] for group in groups_with(name, optimizers)][:1] for name in ("betas", "eps")}
    return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()} | {
        name: held[0] for name, held in ends.items() if held
    }


def groups_with(name: str, optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """Returns the parameter groups that have an option of that name."""
    return [group for optimizer in optimizers for group in optimizer.param_groups if name in group]


def spikes_module() -> ModuleType | None:
    """Returns `benchmarks.spikes`, None where there is none."""
    try:
        return importlib.import_module("benchmarks.spikes")
    except ImportError:
        return None


def run_spikes(cell: Cell) -> dict[str, Any]:
    """Trains once on the stream that shifts, Adam under the guard, and counts the spikes of each phase."""
    from safe_lr import CoherenceGuard

    spikes: Any = spikes_module()
    stream, model = spikes.Stream(cell.seed), spikes.network(cell.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=cell.lr, betas=(0.9, 0.999))
    guard = CoherenceGuard(optimizer, loggers=None, **dict(cell.options))
    probes = [stream.batch(-1 - phase, 512, phase) for phase in (0, 1)]
    losses: list[list[float]] = [[], []]
    for step in range(cell.steps):
        phase = int(step >= cell.steps // 2)
        with torch.no_grad():
            losses[phase].append(float(nn.functional.mse_loss(model(probes[phase][0]), probes[phase][1])))
        tokens, targets = stream.batch(step, 16, phase)

        def closure(tokens: torch.Tensor = tokens, targets: torch.Tensor = targets) -> torch.Tensor:
            return nn.functional.mse_loss(model(tokens), targets)

        optimizer.zero_grad()
        closure().backward()
        guard.observe(closure)
        optimizer.step()
    betas = optimizer.param_groups[0]["betas"]
    guard.close()
    begun = sum(spikes.count_spikes(part)[0] for part in losses)
    last = statistics.fmean(losses[1][-spikes.WINDOW :])
    return {"cell": cell.to_dict(), "spikes": begun, "final": last if math.isfinite(last) else None, "betas": betas}


def code() -> str:
    """Returns a digest of what `cells.key` does not see: how a run is made here, and what it is measured with."""
    parts = [inspect.getsource(made) for made in (run_cell, ending, groups_with, run_spikes)]
    files = [ROOT / "safe_lr" / "sharpness.py", ROOT / "benchmarks" / "spikes.py"]
    parts += [file.read_text() for file in files if file.is_file()]
    settings = repr((EXAMPLES, PRODUCTS, TOL))
    return hashlib.sha256("\n".join([settings, *map(canonical, parts)]).encode()).hexdigest()[:12]


# ---- all of them


def variants_of(row: Row) -> dict[str, dict[str, Any]]:
    """Returns the settings that can change anything on a row: RMSprop's alpha is at its range's end, SGD has no eps."""
    optimizers = make_optimizers(row.optimizer, TASKS[row.task].make_model(0), 0.1)
    needs = {"tune_betas": "betas", "betas": "betas", "tune_eps": "eps"}
    has = {name for name in ("betas", "eps") if groups_with(name, optimizers)}
    return {name: options for name, options in VARIANTS.items() if all(needs[option] in has for option in options)}


class Benchmark:
    """The runs, and what is made of them.

    Args:
        folder: Where results are kept, a file a run.
        rows: Which tasks and optimizers.
        tuned: The half decade of each row's best constant lr.
        seeds, steps: Of each run.
        spike_steps: Of each run on the stream that shifts; 0 leaves it out.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Row],
        tuned: dict[Row, int],
        *,
        seeds: Sequence[int] = SEEDS,
        steps: int = STEPS,
        spike_steps: int = SPIKE_STEPS,
    ) -> None:
        self.cache, self.tuned, self.seeds, self.steps = Cache(folder / code()), tuned, seeds, steps
        self.variants = {row: options for row in rows if len(options := variants_of(row)) > 1}
        self.spike_steps = spike_steps if spikes_module() is not None else 0

    def cell(self, row: Row, above: int, seed: int, variant: str) -> Cell:
        return row.cell(METHOD, lr_at(self.tuned[row] + above), seed, self.steps, **VARIANTS[variant])

    def spike_cell(self, lr: float, seed: int, variant: str) -> Cell:
        return Row("spikes", "adam").cell(METHOD, lr, seed, self.spike_steps, **VARIANTS[variant])

    def cells(self) -> Iterator[Cell]:
        """Yields all, the settings that are compared side by side, and every row on one seed before the next seed."""
        for seed in self.seeds:
            for row, variants in self.variants.items():
                for above in ABOVE:
                    yield from (self.cell(row, above, seed, variant) for variant in variants)
            for lr in SPIKE_LRS if self.spike_steps else ():
                yield from (self.spike_cell(lr, seed, variant) for variant in ("off", "betas"))

    def run(self, workers: int) -> None:
        """Computes what is missing."""
        self.cache.run(list(self.cells()), workers=workers, label="betas and eps", make=run_cell)

    def gap(self, row: Row, above: int, seed: int, variant: str, metric: str) -> float | None:
        """Returns how far a figure lies above that of `off` on the same seed; 1 is 100 %, None not known.

        A run that diverged counts with its first loss.
        """
        mine, off = (self.cache.get(self.cell(row, above, seed, name)) for name in (variant, "off"))
        if mine is None or off is None:
            return None
        now, then = (
            r["initial"] if metric == "score" and (r["diverged"] or r["score"] is None) else r.get(metric)
            for r in (mine, off)
        )
        return None if now is None or not then else now / then - 1

    def gaps(self, row: Row, above: int, variant: str, metric: str) -> list[float]:
        """Returns the paired gaps over the seeds."""
        found = [self.gap(row, above, seed, variant, metric) for seed in self.seeds]
        return [gap for gap in found if gap is not None]

    def result(self) -> dict[str, Any]:
        """Returns everything that the JSON holds; a gain is how far a loss lies *below* that of `off`."""
        rows = [self.at(row, above) for row in self.variants for above in ABOVE]
        spikes = self.spikes()
        losses = {name: _all(rows, name, "score") for name in VARIANTS if name != "off"}
        return {
            "betas_worst_loss": _or_none(max, losses["betas"]),
            "betas_median_gain": _or_none(lambda gaps: -statistics.median(gaps), losses["betas"]),
            "eps_median_gain": _or_none(lambda gaps: -statistics.median(gaps), losses["eps"]),
            "spikes_off": spikes["off"]["mean"] if spikes else None,
            "spikes_on": spikes["betas"]["mean"] if spikes else None,
            "betas_default": verdict(rows),
            "steps": self.steps,
            "seeds": list(self.seeds),
            "overall": {
                name: {metric: self.overall(rows, name, metric) for metric in METRICS} for name in losses
            },
            "rows": rows,
            "spikes": spikes,
        }  # fmt: skip

    def overall(self, rows: Sequence[dict[str, Any]], name: str, metric: str) -> dict[str, Any]:
        """Returns the mean over rows and its interval; a row counts once, for at 10 and 100 times the lr its runs are
        nearly the same ones."""
        own = (_all([at for at in rows if at["row"] == str(row)], name, metric) for row in self.variants)
        return spread([statistics.fmean(gaps) for gaps in own if gaps])

    def at(self, row: Row, above: int) -> dict[str, Any]:
        """Returns one row at one lr: `off` in figures, the others as paired gaps with their 95 % intervals."""
        off = [found for seed in self.seeds if (found := self.cache.get(self.cell(row, above, seed, "off")))]
        settings = {}
        for name in self.variants[row]:
            ends = [found for seed in self.seeds if (found := self.cache.get(self.cell(row, above, seed, name)))]
            settings[name] = {metric: spread(self.gaps(row, above, name, metric)) for metric in METRICS} | {
                "diverged": sum(found["diverged"] for found in ends),
                "moves": _mean(found["moves"] for found in ends),
                "betas": [found.get("betas") for found in ends],
                "eps": [found.get("eps") for found in ends],
            }
        return {
            "row": str(row),
            "times": 10 ** (above / 2),
            "lr": lr_at(self.tuned[row] + above),
            "off": {metric: _mean(found.get(metric) for found in off) for metric in METRICS}
            | {"capped": _mean(found["capped"] for found in off), "diverged": sum(found["diverged"] for found in off)},
            "settings": {name: found for name, found in settings.items() if name != "off"},
        }

    def spikes(self) -> dict[str, Any] | None:
        """Returns spikes a run, off and on, and their paired difference; None where they were not run."""
        runs = [(lr, seed) for lr in SPIKE_LRS for seed in self.seeds] if self.spike_steps else []
        found = {
            name: [self.cache.get(self.spike_cell(lr, seed, name)) for lr, seed in runs] for name in ("off", "betas")
        }
        pairs = [(off, on) for off, on in zip(*found.values(), strict=True) if off is not None and on is not None]
        if not pairs:
            return None
        return {
            "off": spread([off["spikes"] for off, _ in pairs]),
            "betas": spread([on["spikes"] for _, on in pairs]),
            "difference": spread([on["spikes"] - off["spikes"] for off, on in pairs]),
            "final": spread([on["final"] / off["final"] - 1 for off, on in pairs if on["final"] and off["final"]]),
            "steps": self.spike_steps,
            "lrs": list(SPIKE_LRS),
        }


def verdict(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns whether `tune_betas` should be on by default, the rows where it is worse, and its mean gap.

    It is worse where the paired interval lies above zero, or one of its runs diverged and none of `off` did; it is on
    if there is no such row and the mean over all rows and lrs is below zero.

    Example:
        >>> gap = {"score": spread([-0.5, -0.25]), "diverged": 0}
        >>> row = {"row": "gpt/adam", "times": 10.0, "off": {"diverged": 0}, "settings": {"betas": gap}}
        >>> verdict([row])["on"], verdict([row, row | {"settings": {"betas": gap | {"score": spread([0.25, 0.25])}}}])
        (True, {'on': False, 'worse': ['gpt/adam at 10x'], 'mean': -0.0625})
    """
    moved = [row for row in rows if "betas" in row["settings"]]
    worse = [f"{row['row']} at {row['times']:g}x" for row in moved if _worse(row)]
    gaps = _all(rows, "betas", "score")
    mean = statistics.fmean(gaps) if gaps else None
    return {"on": not worse and mean is not None and mean < 0, "worse": worse, "mean": mean}


def _worse(row: dict[str, Any]) -> bool:
    found = row["settings"]["betas"]
    low = found["score"]["low"]
    return (low is not None and low > 0) or found["diverged"] > row["off"]["diverged"]


def _all(rows: Sequence[dict[str, Any]], name: str, metric: str) -> list[float]:
    """The mean gaps of one setting over rows and lrs."""
    means = [row["settings"][name][metric]["mean"] for row in rows if name in row["settings"]]
    return [mean for mean in means if mean is not None]


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _or_none(statistic: Callable[[Sequence[float]], float], values: Sequence[float]) -> float | None:
    return statistic(values) if values else None


# ---- what it says


def markdown(result: dict[str, Any]) -> str:
    """Returns the verdict and the tables, for docs/benchmarks.md."""
    names = list(result["overall"])
    seeds = ", ".join(map(str, result["seeds"]))
    lines = [
        says(result["betas_default"]) + " What is said of curvature is measured at the end of the runs.",
        "",
        f"Loss over the last tenth of {result['steps']} steps, in units of that with betas and eps left alone, on the "
        f"same weights and batches: mean over the seeds ({seeds}) and its 95 % interval (Student's t; paired). Below "
        "zero is better. Pairs are fixed betas.",
        "",
        _line("row", "lr", "capped", "off", *names),
        _line(*["---"] * (4 + len(names))),
    ]
    for row in result["rows"]:
        off = row["off"]
        cells = [between(row["settings"][name]["score"]) if name in row["settings"] else "-" for name in names]
        loss = "-" if off["score"] is None else f"{off['score']:.4g}"
        capped = "-" if off["capped"] is None else f"{off['capped']:.0%}"
        lines.append(_line(row["row"], f"{row['times']:g}x", capped, loss, *cells))
    lines += [
        "",
        "Mean over the rows, each the mean of its lrs, with its 95 % interval over rows; curvature is that of the end:",
        "",
        _line("", "loss", "validation loss", "gamma", "lambda_max", "SAM sharpness"),
        _line(*["---"] * (1 + len(METRICS))),
        *(_line(name, *(between(found[metric]) for metric in METRICS)) for name, found in result["overall"].items()),
        "",
        f"Worst loss of `tune_betas` {percent(result['betas_worst_loss'])}, median gain "
        f"{percent(result['betas_median_gain'])}; median gain of `tune_eps` {percent(result['eps_median_gain'])}.",
    ]
    if result["spikes"]:
        found = result["spikes"]
        off, on, more = (found[name] for name in ("off", "betas", "difference"))
        lines[-1] += (
            f" Spikes a run on a stream that shifts ({found['steps']} steps, lr {', '.join(map(str, found['lrs']))}): "
            f"{off['mean']:.2f} off, {on['mean']:.2f} with `tune_betas`"
        )
        if more["low"] is not None:
            lines[-1] += f", a difference of {more['mean']:+.2f} ({more['low']:+.2f} to {more['high']:+.2f})"
        lines[-1] += "."
    return "\n".join(lines)


def says(verdict: dict[str, Any]) -> str:
    """Returns the default and why, in a sentence.

    Example:
        >>> says({"on": False, "worse": ["gpt/adam at 10x"], "mean": -0.003})
        '`tune_betas` is off by default: with it the loss is higher in gpt/adam at 10x, beyond chance; mean -0.3%.'
        >>> says({"on": False, "worse": [], "mean": 0.004})
        '`tune_betas` is off by default: it is worse nowhere beyond chance, but not better in the mean, +0.4%.'
    """
    state, mean = "on" if verdict["on"] else "off", percent(verdict["mean"])
    why = f"it is worse nowhere beyond chance, {'and' if verdict['on'] else 'but not'} better in the mean, {mean}"
    if verdict["worse"]:
        why = f"with it the loss is higher in {', '.join(verdict['worse'])}, beyond chance; mean {mean}"
    return f"`tune_betas` is {state} by default: {why}."


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def tuned_lrs(rows: Sequence[Row], steps: int, workers: int) -> dict[Row, int]:
    """Returns the half decade of each row's best constant lr on seed 0; for 300 steps the results are committed."""
    matrix = Matrix(Cache(ROOT / "runs" / "lr_robustness", BASELINES), rows, steps=steps, workers=workers)
    matrix.tune()
    return matrix.tuned


def main() -> None:
    parser = command_line("What moving betas and eps is worth, beside fixed betas.", "one row, one seed, 60 steps")
    parser.add_argument("--markdown", type=Path, help="where to write verdict and tables")
    parser.add_argument("--full", action="store_true", help="every row that has betas or an eps")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "betas")
    args = parser.parse_args()
    rows = [Row(*names) for names in ROWS]
    spike_steps = SPIKE_STEPS
    if args.full:
        rows = rows_of()
    if args.quick:
        rows, args.seeds, args.steps, spike_steps = [Row("cnn", "adam")], args.seeds[:1], 60, 120
    tuned = tuned_lrs(rows, STEPS, args.workers)
    benchmark = Benchmark(args.cache, rows, tuned, seeds=args.seeds, steps=args.steps, spike_steps=spike_steps)
    benchmark.run(args.workers)
    result = benchmark.result()
    page = markdown(result)
    print(page)
    save(result, args.json)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(page + "\n")


if __name__ == "__main__":
    main()
