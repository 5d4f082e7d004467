"""Does any lr work? Runs from the tuned lr to 10,000 times above it, protected and not, beside what people use instead.

    python -m benchmarks.lr_robustness --json docs/results/lr_robustness.json [--quick | --full] [--tasks ...]

Every run has the same number of steps and sees each example at most once. The score is the mean loss on fresh batches
over the last tenth of the steps. `Tuned` is the best constant lr of a half-decade grid, picked on seed 0 and scored on
the other seeds, with the very batches that safe_lr is scored on: gaps are paired. Results are kept one file a run under
`runs/lr_robustness`, so an interrupted matrix goes on where it was; those of the baselines are committed.

The matrix takes some forty minutes on two cores; `--quick` (3 tasks, 2 optimizers, 1 seed) three, `--full` an hour and
a half.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from benchmarks.cells import Cache, key
from benchmarks.results import save
from benchmarks.tasks import TASKS, USUAL
from benchmarks.training import Cell, depends_on_safe_lr
from safe_lr.policies import Policy

ROOT = Path(__file__).parents[1]
BASELINES = ROOT / "docs" / "results" / "lr_robustness_baselines.json"
STEPS = 300
SEEDS = (10, 11, 12, 13, 14, 15)
"""Those that are scored and published. The policy was chosen on 1 to 6 (and a constant tried on 7 to 9)."""
ABOVE = (0, 2, 4, 6, 8)  # half decades above the tuned lr: 1x, 10x, ... 10,000x
SOME = (0, 4)
QUICK = (("cnn", "adam"), ("gpt", "adam"), ("gpt", "rmsprop"), ("teacher", "rmsprop"))

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "margin_max=1": {"margin_max": 1.0},
    "margin=0.5": {"margin": 0.5},
    "margin=1": {"margin": 1.0},
    "coherence": {"bound": "coherence", "margin": 1.0},
    "lemma1": {"bound": "lemma1", "margin": 1.0},
}
"""What the default is compared with, as arguments of the scheduler."""

CREDITS = (15.0, 30.0, 60.0, 120.0, 240.0)
"""Budgets for the curve of gap against overhead, at 100 times the tuned lr."""

COMPARED = 3
"""Seeds on which the default is compared with other settings and budgets; `--full` takes all."""


def lr_at(k: int) -> float:
    """Returns lr at half decade k.

    Example:
        >>> lr_at(-2), lr_at(-5), lr_at(1)
        (0.1, 0.00316, 3.16)
    """
    return float(f"{10 ** (k / 2):.3g}")


@dataclass(frozen=True)
class Row:
    """A task and the optimizer that trains it."""

    task: str
    optimizer: str

    def __str__(self) -> str:
        return f"{self.task}/{self.optimizer}"

    def cell(self, method: str, lr: float, seed: int, steps: int, **options: Any) -> Cell:
        """Returns one run of this row."""
        return Cell(self.task, self.optimizer, method, lr, seed, steps, tuple(sorted(options.items())))


def rows_of(tasks: Sequence[str] | None = None) -> list[Row]:
    """Returns every row, or those of some tasks.

    Example:
        >>> [str(row) for row in rows_of(["teacher"])]
        ['teacher/rmsprop', 'teacher/adagrad']
    """
    rows = [Row(task.name, optimizer) for task in TASKS.values() for optimizer in task.optimizers]
    return [row for row in rows if not tasks or row.task in tasks]


Grid = dict[int, float]


def best(grid: Grid) -> int:
    """Returns the half decade with the lowest score; the smaller one of equals.

    Example:
        >>> best({-4: 0.5, -3: 0.4, -2: math.inf})
        -3
    """
    return min(sorted(grid), key=grid.__getitem__)


def missing_beside(grid: Grid, start: int) -> list[int]:
    """Returns which half decades are still to be run before the best one lies between two worse ones.

    Example:
        >>> missing_beside({}, -4), missing_beside({-5: 0.5, -4: 0.4, -3: 0.3}, -4)
        ([-5, -4, -3], [-2])
        >>> missing_beside({-5: 2, -4: 1, -3: 2}, -4)
        []
    """
    middle = best(grid) if grid else start
    return [k for k in (middle - 1, middle, middle + 1) if k not in grid]


class Matrix:
    """The runs of the benchmark, baselines first.

    Args:
        cache: Where results are kept.
        rows: Which tasks and optimizers.
        seeds: Those that are scored; seed 0 is the one that lr is picked on.
        steps: Of each run.
        workers: Processes.
        compared: On how many of the seeds other settings and budgets are run; None for all.
    """

    def __init__(
        self,
        cache: Cache,
        rows: Sequence[Row],
        seeds: Sequence[int] = SEEDS,
        steps: int = STEPS,
        workers: int = 2,
        compared: int | None = COMPARED,
    ) -> None:
        self.cache, self.rows, self.seeds, self.steps, self.workers = cache, rows, seeds, steps, workers
        self.compared = seeds[:compared]
        self.used: list[Cell] = []
        self.tuned: dict[Row, int] = {}
        self.tuned_cosine: dict[Row, int] = {}
        self.tuned_free: dict[str, int] = {}

    @property
    def tasks(self) -> list[str]:
        """The tasks of the rows, each once."""
        return list(dict.fromkeys(row.task for row in self.rows))

    def run(self, cells: Sequence[Cell], label: str) -> list[dict[str, Any]]:
        """Returns the cells' results."""
        self.used += cells
        return self.cache.run(cells, workers=self.workers, label=label)

    def search(self, start: dict[Any, int], cell: Callable[[Any, int], Cell], label: str) -> dict[Any, int]:
        """Returns, for each key of `start`, the best half decade, searched from there outwards."""
        grids: dict[Any, Grid] = {what: {} for what in start}
        while wanted := [(w, k) for w, grid in grids.items() for k in missing_beside(grid, start[w])]:
            results = self.run([cell(w, k) for w, k in wanted], label)
            for (w, k), result in zip(wanted, results, strict=True):
                grids[w][k] = math.inf if result["diverged"] else result["score"]
        return {w: best(grid) for w, grid in grids.items()}

    def tune(self) -> None:
        """Finds each row's best constant lr, on seed 0."""
        usual = {row: USUAL[row.optimizer] for row in self.rows}
        self.tuned = self.search(
            usual, lambda row, k: row.cell("constant", lr_at(k), 0, self.steps), "constant lr, grid"
        )

    def baselines(self) -> None:
        """Runs whatever does without safe_lr."""
        s = self.steps
        self.tune()
        self.tuned_cosine = self.search(
            self.tuned, lambda row, k: row.cell("cosine", lr_at(k), 0, s), "warm-up + cosine, grid"
        )
        self.tuned_free = self.search(
            dict.fromkeys(self.tasks, -4), lambda task, k: self.schedule_free(task, k, 0), "schedule-free, grid"
        )
        cells = [cell for seed in self.seeds for row in self.rows for cell in self.scored(row, seed)]
        cells += [self.prodigy(task, seed) for seed in self.seeds for task in self.tasks]
        cells += [self.schedule_free(task, self.tuned_free[task], seed) for seed in self.seeds for task in self.tasks]
        cells += [self.unprotected(row, above, self.seeds[0]) for row in self.rows for above in ABOVE[1:]]
        cells += [self.unprotected(row, SOME[-1], seed) for seed in self.compared for row in self.rows]
        self.run(cells, "baselines, scored")

    def scored(self, row: Row, seed: int) -> list[Cell]:
        """The row's own baselines on one seed."""
        cells = [self.constant(row, seed), self.cosine(row, seed)]
        return cells if row.optimizer == "muon" else [*cells, self.finder(row, seed)]  # it takes one optimizer

    def constant(self, row: Row, seed: int) -> Cell:
        return row.cell("constant", lr_at(self.tuned[row]), seed, self.steps)

    def cosine(self, row: Row, seed: int) -> Cell:
        return row.cell("cosine", lr_at(self.tuned_cosine[row]), seed, self.steps)

    def finder(self, row: Row, seed: int) -> Cell:
        return row.cell("finder", 0.0, seed, self.steps)

    def unprotected(self, row: Row, above: int, seed: int) -> Cell:
        return row.cell("constant", lr_at(self.tuned[row] + above), seed, self.steps)

    def prodigy(self, task: str, seed: int) -> Cell:
        return Row(task, "prodigy").cell("constant", 1.0, seed, self.steps)

    def schedule_free(self, task: str, k: int, seed: int) -> Cell:
        return Row(task, "schedulefree").cell("constant", lr_at(k), seed, self.steps)

    def protected(self, row: Row, above: int, seed: int, **options: Any) -> Cell:
        """safe_lr at an lr above the tuned one."""
        return row.cell("safe", lr_at(self.tuned[row] + above), seed, self.steps, **options)

    def budgeted(self, row: Row, credit: float, seed: int) -> Cell:
        """safe_lr 100 times above the tuned lr, with another budget."""
        return self.protected(row, SOME[-1], seed, **({} if credit == Policy().credit else {"credit": credit}))

    def following(self, row: Row, seed: int) -> Cell:
        """safe_lr with no lr at all."""
        return row.cell("safe", 1.0, seed, self.steps, follow_limit=True)

    def protected_cosine(self, row: Row, above: int, seed: int) -> Cell:
        """safe_lr around warm-up and cosine."""
        return row.cell("safe_cosine", lr_at(self.tuned_cosine[row] + above), seed, self.steps)

    def ours(self) -> None:
        """Runs whatever depends on safe_lr."""
        cells = [self.protected(row, above, seed) for seed in self.seeds for row in self.rows for above in ABOVE]
        cells += [self.following(row, seed) for seed in self.seeds for row in self.rows]
        cells += [self.protected_cosine(row, 2, seed) for seed in self.seeds for row in self.rows]
        for options in list(VARIANTS.values())[1:]:
            for seed in self.compared:
                cells += [self.protected(row, above, seed, **options) for row in self.rows for above in SOME]
        cells += [self.budgeted(row, credit, seed) for credit in CREDITS for seed in self.compared for row in self.rows]
        self.run(cells, "safe_lr")

    # ---- what it says

    def of(self, cell: Cell) -> dict[str, Any] | None:
        """Returns a kept result."""
        return self.cache.get(cell)

    def gap(self, cell: Cell, row: Row, seed: int, metric: str = "score") -> float | None:
        """Returns how far a run ends behind the best constant lr on the same seed; 1 is 100 %, None not run.

        A run that diverged counts as one that learned nothing: its first loss.
        """
        result, tuned = self.of(cell), self.of(self.constant(row, seed))
        if result is None or tuned is None:
            return None
        mine = result.get(metric)
        if metric == "score" and (result["diverged"] or mine is None):
            mine = result.get("initial", tuned["initial"])
        return None if mine is None or tuned[metric] is None else mine / tuned[metric] - 1

    def gaps(self, cell_of: Callable[[Row, int], Cell], row: Row, metric: str = "score") -> list[float]:
        """Returns the paired gaps over the seeds that were run."""
        found = [self.gap(cell_of(row, seed), row, seed, metric) for seed in self.seeds]
        return [gap for gap in found if gap is not None]

    def middle(self, cell_of: Callable[[Row, int], Cell]) -> dict[str, float | None]:
        """Returns median and worst over the rows of their mean gaps on the seeds that settings are compared on."""
        gaps = [[self.gap(cell_of(row, seed), row, seed) for seed in self.compared] for row in self.rows]
        means = [statistics.fmean(of) for row in gaps if len(of := [gap for gap in row if gap is not None]) == len(row)]
        return {"median": _or_none(statistics.median, means), "worst": _or_none(max, means), "rows": len(means)}

    def sensitivity(self, row: Row, *, protected: bool) -> float | None:
        """Returns the LR sensitivity: mean over lr of min(loss, initial loss) - best loss, on the first scored seed.

        References:
            Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training instabilities".
        """
        seed = self.seeds[0]
        tuned = self.of(self.constant(row, seed))
        make = self.protected if protected else self.unprotected
        cells = [make(row, above, seed) for above in ABOVE[1:]]
        results = [self.of(cell) for cell in cells]
        if tuned is None or any(result is None for result in results):
            return None
        losses = [min(r["score"], r["initial"]) if r["score"] is not None else r["initial"] for r in results if r]
        return statistics.fmean(max(0.0, loss - tuned["score"]) for loss in losses)

    def result(self) -> dict[str, Any]:
        """Returns everything that the JSON holds."""
        rows = [self.of_row(row) for row in self.rows]
        tuned = [gap for row in rows for gap in [row["safe_lr"]["default"]["0"]["mean"]] if gap is not None]
        above = [
            row["safe_lr"]["default"][str(k)]["mean"] for row in rows for k in ABOVE[1:]
            if row["safe_lr"]["default"][str(k)]["mean"] is not None
        ]  # fmt: skip
        uncertain = [row["safe_lr"]["default"]["0"] for row in rows]
        ratios = [
            row["lr_sensitivity"]["protected"] / row["lr_sensitivity"]["unprotected"]
            for row in rows
            if row["lr_sensitivity"]["unprotected"] and row["lr_sensitivity"]["protected"] is not None
        ]
        protected = [self.of(cell) for cell in self.used if cell.method.startswith("safe")]
        overheads = [
            result["overhead_counted"]
            for row in self.rows for seed in self.seeds for k in ABOVE
            if (result := self.of(self.protected(row, k, seed))) is not None and result["score"] is not None
        ]  # fmt: skip
        follow = [row["follow_limit"]["mean"] for row in rows if row["follow_limit"]["mean"] is not None]
        return {
            "steps": self.steps,
            "seeds": list(self.seeds),
            "seeds_compared": list(self.compared),
            "worst_gap_at_tuned": _or_none(max, tuned),
            "rows_within_1_percent_at_tuned": sum(at["low"] is not None and at["low"] <= 0.01 for at in uncertain),
            "worst_gap_above": _or_none(max, above),
            "median_gap_above": _or_none(statistics.median, above),
            "median_gap_following": _or_none(statistics.median, follow),
            "lr_sensitivity_ratio": _or_none(statistics.median, ratios),
            "divergences": sum(1 for result in protected if result is not None and result["diverged"]),
            "divergences_default": sum(
                1 for row in self.rows for seed in self.seeds for k in ABOVE
                if (result := self.of(self.protected(row, k, seed))) is not None and result["diverged"]
            ),
            "overhead": _or_none(statistics.median, overheads),
            "overhead_is": f"gradient evaluations spent on measuring per step, on {self.steps} steps",
            "gap_against_overhead": self.curve(),
            "variants": self.variants(),
            "rows": rows,
        }  # fmt: skip

    def of_row(self, row: Row) -> dict[str, Any]:
        """Returns one row's figures; gaps are relative to its best constant lr on the same seeds."""

        def summed(cell_of: Callable[[Row, int], Cell]) -> dict[str, Any]:
            return spread(self.gaps(cell_of, row)) | {"val": spread(self.gaps(cell_of, row, "val"))["mean"]}

        tuned = [result for seed in self.seeds if (result := self.of(self.constant(row, seed))) is not None]
        return {
            "row": str(row),
            "tuned_lr": lr_at(self.tuned[row]),
            "tuned_loss": _or_none(statistics.fmean, [r["score"] for r in tuned if r["score"] is not None]),
            "baselines": {
                "warm-up + cosine": summed(self.cosine),
                "prodigy": summed(lambda row, seed: self.prodigy(row.task, seed)),
                "schedule-free": summed(
                    lambda row, seed: self.schedule_free(row.task, self.tuned_free[row.task], seed)
                ),
                "torch-lr-finder": summed(self.finder),
            },
            "unprotected": {
                str(k): self.gap(self.unprotected(row, k, self.seeds[0]), row, self.seeds[0]) for k in ABOVE[1:]
            },
            "safe_lr": {
                name: {
                    str(k): summed(lambda row, seed, k=k, o=options: self.protected(row, k, seed, **o)) for k in ABOVE
                }
                for name, options in VARIANTS.items()
            },
            "follow_limit": summed(self.following),
            "cosine at 10x": summed(lambda row, seed: self.protected_cosine(row, 2, seed)),
            "lr_sensitivity": {
                "protected": self.sensitivity(row, protected=True),
                "unprotected": self.sensitivity(row, protected=False),
            },
        }  # fmt: skip

    def curve(self) -> list[dict[str, Any]]:
        """Returns what each budget costs and leaves of the gap, over the rows."""
        points = []
        for credit in CREDITS:
            cells = [self.budgeted(row, credit, seed) for row in self.rows for seed in self.compared]
            spent = [result["overhead_counted"] for cell in cells if (result := self.of(cell)) is not None]
            gaps = self.middle(lambda row, seed, credit=credit: self.budgeted(row, credit, seed))
            points.append({"credit": credit, "overhead": _or_none(statistics.median, spent), **gaps})
        return points

    def variants(self) -> dict[str, Any]:
        """Returns for each variant the median and worst gap over the rows, at the tuned lr and 100 times above it."""
        table: dict[str, Any] = {
            name: {
                str(k): self.middle(lambda row, seed, k=k, o=options: self.protected(row, k, seed, **o)) for k in SOME
            }
            for name, options in VARIANTS.items()
        }
        table["nothing"] = {
            str(k): self.middle(lambda row, seed, k=k: self.unprotected(row, k, seed)) for k in SOME
        }  # fmt: skip
        return table


def _or_none(statistic: Callable[[Any], float], values: Sequence[float]) -> float | None:
    return statistic(values) if values else None


def spread(gaps: Sequence[float]) -> dict[str, Any]:
    """Returns mean and its 95 % interval (Student's t), which one value alone does not have.

    Example:
        >>> spread([0.01, 0.03])["mean"], spread([0.5])["low"]
        (0.02, None)
    """
    if not gaps:
        return {"mean": None, "low": None, "high": None, "all": []}
    mean, low, high = statistics.fmean(gaps), None, None
    if len(gaps) > 1:
        half = float(student.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "all": list(gaps)}


def percent(value: float | None) -> str:
    """Returns a gap as text.

    Example:
        >>> percent(0.0123), percent(12.0), percent(None)
        ('+1.2%', '+1200%', '-')
    """
    if value is None:
        return "-"
    return f"{value:+.1%}" if abs(value) < 1 else f"{value:+.0%}"


def between(found: dict[str, Any]) -> str:
    """Returns a gap with its interval.

    Example:
        >>> between(spread([0.01, 0.03])), between(spread([0.5])), between(spread([]))
        ('+2.0% (-10.7% to +14.7%)', '+50.0%', '-')
    """
    if found["low"] is None:
        return percent(found["mean"])
    return f"{percent(found['mean'])} ({percent(found['low'])} to {percent(found['high'])})"


def table(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    titles = (
        "row",
        "tuned lr",
        "loss",
        "1x",
        "10x",
        "100x",
        "1000x",
        "10000x",
        "bare 10x",
        "follow",
        "cosine",
        "prodigy",
    )
    widths = (18, 10, 10, 28, 28, *[10] * 7)
    shown = [titles]
    for row in result["rows"]:
        safe, others = row["safe_lr"]["default"], row["baselines"]
        cells = [between(safe[str(k)]) for k in ABOVE[:2]] + [percent(safe[str(k)]["mean"]) for k in ABOVE[2:]]
        cells += [percent(row["unprotected"]["2"]), percent(row["follow_limit"]["mean"])]
        cells += [percent(others["warm-up + cosine"]["mean"]), percent(others["prodigy"]["mean"])]
        loss = "-" if row["tuned_loss"] is None else f"{row['tuned_loss']:.4f}"
        shown.append((row["row"], f"{row['tuned_lr']:.3g}", loss, *cells))
    lines = ["".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in shown]
    lines.append("")
    for name, at in result["variants"].items():
        shown = "   ".join(
            f"{label}: median {percent(at[k]['median'])}, worst {percent(at[k]['worst'])}"
            for k, label in (("0", "tuned lr"), ("4", "100x"))
        )
        lines.append(f"{name:>18}   {shown}")
    lines.append("")
    for point in result["gap_against_overhead"]:
        gap = f"median {percent(point['median'])}, worst {percent(point['worst'])}"
        lines.append(f"{'credit':>12} {point['credit']:>5.0f}   overhead {percent(point['overhead'])}   100x: {gap}")
    keys = ("worst_gap_at_tuned", "median_gap_above", "worst_gap_above", "median_gap_following")
    lines += ["", *(f"{key}: {percent(result[key])}" for key in keys)]
    ratio, overhead = result["lr_sensitivity_ratio"], result["overhead"]
    lines.append(f"lr_sensitivity_ratio: {'-' if ratio is None else f'{ratio:.3g}'}")
    lines.append(f"divergences: {result['divergences_default']} at defaults, {result['divergences']} of all our runs")
    lines.append(f"overhead (gradient evaluations a step): {percent(overhead)}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws loss against lr, protected and not, a panel a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    columns = min(5, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(2.6 * columns, 2.3 * lines), squeeze=False, sharex=True)
    xs = [10 ** (k / 2) for k in ABOVE]
    for panel, row in zip(axes.flat, rows, strict=False):
        safe = [row["safe_lr"]["default"][str(k)]["mean"] for k in ABOVE]
        bare = [0.0, *(row["unprotected"][str(k)] for k in ABOVE[1:])]
        for values, style in (
            (bare, {"color": "tab:red", "marker": "x"}),
            (safe, {"color": "tab:blue", "marker": "o"}),
        ):
            shown = [(x, 100 * v) for x, v in zip(xs, values, strict=True) if v is not None]
            if shown:
                panel.plot(*zip(*shown, strict=True), **style, markersize=4, linewidth=1.2)
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set(xscale="log", yscale="symlog", title=row["row"])
        panel.title.set_fontsize(9)
        panel.tick_params(labelsize=7)
    for panel in list(axes.flat)[len(rows) :]:
        panel.set_visible(False)
    figure.supxlabel("lr in units of the tuned lr", fontsize=9)
    figure.supylabel("behind the tuned run, % of its loss", fontsize=9)
    figure.legend(["without safe_lr (x)", "with safe_lr (o)"], loc="upper right", fontsize=8, ncols=2)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def commit_baselines(matrix: Matrix, path: Path) -> None:
    """Writes the baselines' results into the one file that is committed, without their curves; other seeds' stay."""
    kept = dict(matrix.cache.committed)
    for cell in dict.fromkeys(matrix.used):
        result = matrix.of(cell)
        if result is not None and not depends_on_safe_lr(cell):
            kept[key(cell)] = {
                name: value for name, value in result.items() if name not in ("losses", "lrs", "seconds")
            }
    path.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(kept.items())) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss against lr, protected and not, beside what people use instead.")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--figure", type=Path, help="where to draw it (PNG)")
    parser.add_argument("--quick", action="store_true", help="3 tasks, 2 optimizers, 1 seed")
    parser.add_argument("--full", action="store_true", help="every variant and budget on every seed")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="scored seeds (default 10 to 15; lr is picked on seed 0)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "lr_robustness")
    parser.add_argument("--save-baselines", action="store_true", help=f"write {BASELINES.name}, for a commit")
    parser.add_argument("--baselines-only", action="store_true", help="nothing of safe_lr's")
    args = parser.parse_args()
    rows = rows_of(args.tasks)
    if args.quick:
        rows = [row for row in (Row(*names) for names in QUICK) if row in rows]
    seeds = tuple(args.seeds) if args.seeds else SEEDS[:1] if args.quick else SEEDS
    if 0 in seeds:
        parser.error("seed 0 is the one that lr is picked on: score on others")
    compared = None if args.full else COMPARED
    matrix = Matrix(Cache(args.cache, BASELINES), rows, seeds, args.steps, args.workers, compared)
    matrix.baselines()
    if not args.baselines_only:
        matrix.ours()
    if args.save_baselines:
        commit_baselines(matrix, BASELINES)
    result = matrix.result()
    print(table(result))
    save(result, args.json)
    if args.figure:
        draw(result, args.figure)


if __name__ == "__main__":
    main()
