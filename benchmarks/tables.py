"""The tables of the docs, written from the committed JSON.

    python -m benchmarks.tables [--check]

What stands between `<!-- table: NAME -->` and `<!-- end -->`, in README.md or docs/*.md, is replaced.
`--check` changes nothing and ends with 1 where a table is not what its JSON says.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import betas, poison
from benchmarks.lr_robustness import ABOVE, VARIANTS, between, percent
from benchmarks.results import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def gaps(result: dict[str, Any]) -> str:
    """The default at every lr; where the highest three differ, their range."""
    rows = []
    for row in result["rows"]:
        safe, bare = row["safe_lr"]["default"], row["unprotected"]
        top = sorted({safe[str(k)]["mean"] for k in ABOVE[2:]})
        high = percent(top[0]) if percent(top[0]) == percent(top[-1]) else f"{percent(top[0])} to {percent(top[-1])}"
        rows.append(
            [
                row["row"],
                f"{row['tuned_lr']:g}",
                f"{row['tuned_loss']:.4g}",
                between(safe["0"]),
                between(safe["2"]),
                high,
                percent(bare["2"]),
                percent(bare["4"]),
            ]
        )
    titles = ["row", "tuned lr", "loss", "1x", "10x", "100x to 10,000x", "bare 10x", "bare 100x"]
    return markdown(titles, rows)


def beside(result: dict[str, Any]) -> str:
    """What people use instead."""
    rows = []
    for row in result["rows"]:
        others = row["baselines"]
        rows.append(
            [
                row["row"],
                percent(row["safe_lr"]["default"]["4"]["mean"]),
                percent(row["follow_limit"]["mean"]),
                percent(row["cosine at 10x"]["mean"]),
                *(
                    percent(others[n]["mean"])
                    for n in ("warm-up + cosine", "prodigy", "schedule-free", "torch-lr-finder")
                ),
            ]
        )
    titles = ["row", "safe_lr at 100x", "no lr (`follow_limit`)", "cosine at 10x its lr", "warm-up + cosine", "Prodigy",
              "schedule-free AdamW", "torch-lr-finder"]  # fmt: skip
    return markdown(titles, rows)


def settings(result: dict[str, Any]) -> str:
    """Every setting, on the same seeds."""
    return _settings(result, {name: f"`{name}`" if name in VARIANTS else name for name in result["variants"]})


BRIEFLY = {
    "default": "default",
    "margin_max=1": "`margin_max=1`",
    "coherence": '`bound="coherence", margin=1`',
    "lemma1": '`bound="lemma1", margin=1`',
    "nothing": "nothing",
}


def briefly(result: dict[str, Any]) -> str:
    """The default beside some other settings, on the same seeds."""
    return _settings(result, BRIEFLY)


def _settings(result: dict[str, Any], names: dict[str, str]) -> str:
    rows = [
        [shown, *(percent(result["variants"][name][k][s]) for k in ("0", "4") for s in ("median", "worst"))]
        for name, shown in names.items()
    ]
    return markdown(["", "at the tuned lr: median", "worst", "at 100 times it: median", "worst"], rows)


def curve(result: dict[str, Any]) -> str:
    """The gap that each budget leaves."""
    rows = [
        [f"{point['credit']:g}", f"{point['overhead']:.1%}", percent(point["median"]), percent(point["worst"])]
        for point in result["gap_against_overhead"]
    ]
    return markdown(["`credit`", "gradient evaluations on measuring, a step", "median gap at 100x", "worst"], rows)


def longer(result: dict[str, Any]) -> str:
    """Longer runs, and a long warm-up."""
    rows = [
        [row["row"], f"{row['tuned_lr']:g}", *(between(row[name]) for name in ("1x", "100x", "warm-up")),
         f"{row['warm-up']['capped']:.0%}"]
        for row in result["rows"]
    ]  # fmt: skip
    return markdown(["row", "tuned lr", "1x", "100x", "long warm-up, 1x", "capped there"], rows)


def demo(result: dict[str, Any]) -> str:
    """Medians and ranges of the demo over seeds."""

    def figures(run: str, key: str, form: str) -> tuple[str, str]:
        values = sorted(row[f"{run}_{key}"] for row in result["seeds"])
        middle = values[len(values) // 2]
        return format(middle, form), f"{format(values[0], form)} to {format(values[-1], form)}"

    rows = []
    for run in ("tuned", "unprotected", "protected"):
        loss, losses = figures(run, "val_loss", ".3f")
        accuracy, accuracies = figures(run, "val_accuracy", ".1%")
        lr = "0.01" if run == "tuned" else "1"
        rows.append([run, lr, f"{loss} ({losses})", f"{accuracy} ({accuracies})", figures(run, "peak_loss", ".3g")[0]])
    return markdown(["run", "lr", "validation loss", "accuracy", "peak loss"], rows)


def spikes(result: dict[str, Any]) -> str:
    """Spikes of bare and protected runs on the stream that shifts, seed by seed."""
    names = {"bare": "bare Adam", "safe_lr": "safe_lr", "rewind": "safe_lr, `rewind=True`"}
    rows = []
    for mean in result["means"]:
        runs = [run for run in result["runs"] if (run["lr"], run["method"]) == (mean["lr"], mean["method"])]
        seeds = ", ".join(str(run["spikes"]) for run in runs)
        final = statistics.median(run["final"] for run in runs)
        highest = [run["worst"] for run in runs]
        rows.append([
            f"{mean['lr']:g}", names[mean["method"]], f"{mean['spikes']:.1f} ({seeds})",
            f"{statistics.median(highest):.1f} ({max(highest):.3g})", f"{final:.1e}", f"{mean['drops']:.1f}",
            f"{mean['rewinds']:.1f}",
        ])  # fmt: skip
    titles = [
        "lr",
        "run",
        "spikes, mean (each seed)",
        "highest: median (worst)",
        "final loss, median",
        "dropped",
        "rewinds",
    ]
    return markdown(titles, rows)


NETWORKS = {"mlp": "MLP", "conv_bn": "conv + BatchNorm", "gpt_small": "GPT .8 M", "gpt_large": "GPT 5 M"}
STARTS = ("early", "cold", "warm", "early_preconditioned", "cold_preconditioned", "warm_preconditioned")
PEERS = {
    "pyhessian": "PyHessian",
    "hessian_eigenthings": "hessian-eigenthings, k=1",
    "hessian_eigenthings_k10": "hessian-eigenthings, k=10",
    "curvlinops": "curvlinops + eigsh",
}


def products(result: dict[str, Any]) -> str:
    """What the parts of an exact measurement cost, network by network."""
    rows = [
        [NETWORKS[name], f"{task['parameters']:,}", f"{1e3 * task['unit_seconds']:.0f} ms"]
        + [f"{task['parts'][part]:.2f}" for part in ("graph", "product", "forward")]
        for name, task in result["tasks"].items()
    ]
    return markdown(["", "parameters", "a gradient", "graph", "product", "forward pass"], rows)


def tools(result: dict[str, Any]) -> str:
    """Error / products / gradients of each tool on each network; of several seeds the worst error and the spread."""

    def cell(found: dict[str, Any] | None) -> str:
        if found is None:
            return "-"
        error, cost, spread = f"{found['error']:.2%}", f"{found['gradients']:.1f}", found["gradients_by_seed"]
        if len(spread) > 1:
            error += f" ({found['error_range'][1]:.1%})"
            cost += f" ({min(spread):.1f}-{max(spread):.1f})"
        return f"{error} / {found['num_matvecs']:g} / {cost}"

    tasks = result["tasks"].values()
    rows = [
        [f"safe_lr {start.replace('_', ', ')}", *(cell(task["safe_lr"].get(start)) for task in tasks)]
        for start in STARTS
    ]
    rows += [[label, *(cell(task.get(name)) for task in tasks)] for name, label in PEERS.items()]
    return markdown(["", *NETWORKS.values()], rows)


def peaks(result: dict[str, Any]) -> str:
    """Peak memory of each tool over that of a gradient, which stands in MiB."""
    found = [task["memory_mib"] for task in result["tasks"].values()]
    labels = {"safe_lr": "safe_lr", "safe_lr_preconditioned": "safe_lr, preconditioned"} | PEERS
    rows = [["a gradient", *(f"{mib['gradient']:.0f} MiB" for mib in found)]]
    for name, label in labels.items():
        rows.append([label, *(f"{mib[name] / mib['gradient']:.1f}" if mib.get(name) else "-" for mib in found)])
    return markdown(["", *NETWORKS.values()], rows)


def sizes(result: dict[str, Any]) -> str:
    """Seconds and gradients against the number of parameters."""
    rows = [
        [f"{row['parameters']:,}", f"{row['seconds']:.3f}", f"{row['gradients']:.0f}"]
        for row in result["scaling"]["rows"]
    ]
    return markdown(["parameters", "seconds", "gradients"], rows)


def overheads(result: dict[str, Any]) -> str:
    """Wall time and counted cost of measuring, at each length of run."""
    rows = [
        [
            f"{row['row']}, {10 ** (row['above'] / 2):g}x the tuned lr",
            f"{row['ms_per_step']:.1f}",
            *(f"+{at['wall']:.0%} ({at['counted']:.0%})" if (at := row["at"].get(n)) else "" for n in result["wall"]),
        ]
        for row in result["rows"]
    ]
    first, *rest = (f"{int(n):,}" for n in result["wall"])
    return markdown(["row", "ms a step", f"{first} steps: wall (counted)", *rest], rows)


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "gaps": ("lr_robustness.json", gaps),
    "beside": ("lr_robustness.json", beside),
    "settings": ("lr_robustness.json", settings),
    "briefly": ("lr_robustness.json", briefly),
    "budgets": ("lr_robustness.json", curve),
    "longer": ("longer_runs.json", longer),
    "demo": ("demo.json", demo),
    "betas": ("betas.json", betas.markdown),
    "products": ("curvature.json", products),
    "tools": ("curvature.json", tools),
    "peaks": ("curvature.json", peaks),
    "sizes": ("curvature.json", sizes),
    "overheads": ("overhead.json", overheads),
    "poison": ("poison.json", poison.markdown),
    "spikes": ("spikes.json", spikes),
    "spikes_poisoned": ("spikes_poisoned.json", spikes),
}
"""Name: JSON, and what makes a table of it."""


def written(page: str, results: Path = RESULTS) -> str:
    """Returns a page with its marked tables made anew."""

    def made(match: re.Match[str]) -> str:
        name, make = TABLES[match["name"]]
        return f"{match[1]}{make(json.loads((results / name).read_text()))}\n{match[3]}"

    return MARKED.sub(made, page)


def main() -> int:
    parser = argparse.ArgumentParser(description="The tables of the docs, from the committed JSON.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; 1 where a table is not what its JSON says"
    )
    args = parser.parse_args()
    stale = [page for page in PAGES if written(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'stale' if args.check else 'written'}")
        if not args.check:
            page.write_text(written(page.read_text()))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
