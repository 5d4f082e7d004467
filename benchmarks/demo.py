"""The demo over several seeds: how far is a run at 100 times the tuned lr from the tuned one?

    python -m benchmarks.demo --json docs/results/demo.json [--seeds 10 11 12 13 14] [--quick]

Each seed is one `examples/demo.py`: tuned, unprotected and protected, advancing in turns in one process. Prints a line
a seed, then medians and ranges. The lr was tuned on other seeds (0, 1, 2).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.results import save

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def one(seed: int, source: str, quick: bool) -> dict[str, Any]:
    """Runs the demo on one seed and returns its `summary.json`."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(DEMO), "--out", out, "--seed", str(seed), "--source", source]
        done = subprocess.run(command + ["--quick"] * quick, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the demo failed on seed {seed}:\n{done.stderr[-3000:]}")
        summary: dict[str, Any] = json.loads((Path(out) / "summary.json").read_text())
        return summary


def spread(values: list[float]) -> dict[str, float]:
    """Returns median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def collect(seeds: list[int], source: str, quick: bool) -> dict[str, Any]:
    """Returns the rows, one a seed, and their medians and ranges."""
    rows = []
    for seed in tqdm(seeds, unit="seed", ncols=100):
        summary = one(seed, source, quick)
        protected, tuned, bare = (summary[name] for name in ("protected", "tuned", "unprotected"))
        rows.append(
            {
                "seed": seed,
                **{f"{run}_{key}": summary[run][key] for run in ("tuned", "unprotected", "protected")
                   for key in ("val_loss", "val_accuracy", "train_loss", "peak_loss")},
                "gap": protected["val_loss"] / tuned["val_loss"] - 1,
                "gap_unprotected": bare["val_loss"] / tuned["val_loss"] - 1 if bare["val_loss"] else None,
                **{key: protected[key] for key in ("measurements", "num_matvecs", "overhead", "overhead_counted")},
            }
        )  # fmt: skip
    keys = ("gap", "overhead", "overhead_counted", "measurements", "num_matvecs")
    keys += tuple(f"{run}_{key}" for run in ("tuned", "protected") for key in ("val_loss", "val_accuracy"))
    return {"task": summary["task"], "seeds": rows, **{key: spread([row[key] for row in rows]) for key in keys}}


def table(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    lines = [f"{'seed':>6}{'tuned':>9}{'unprotected':>13}{'protected':>11}{'gap':>8}{'overhead':>10}{'counted':>9}"]
    for row in result["seeds"]:
        bare = row["unprotected_val_loss"]
        lines.append(
            f"{row['seed']:>6}{row['tuned_val_loss']:>9.4f}{f'{bare:.4g}' if bare else 'nan':>13}"
            f"{row['protected_val_loss']:>11.4f}{row['gap']:>+8.1%}{row['overhead']:>+10.1%}"
            f"{row['overhead_counted']:>9.1%}"
        )
    gap, overhead = result["gap"], result["overhead"]
    lines.append(
        f"gap: median {gap['median']:+.1%} ({gap['min']:+.1%} to {gap['max']:+.1%}); overhead: median "
        f"{overhead['median']:+.1%} ({overhead['min']:+.1%} to {overhead['max']:+.1%})"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo over several seeds.")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--source", choices=("auto", "full", "subset"), default="auto")
    parser.add_argument("--quick", action="store_true", help="one seed, 30 steps: a smoke test")
    args = parser.parse_args()
    result = collect(args.seeds[:1] if args.quick else args.seeds, args.source, args.quick)
    print(table(result))
    save(result, args.json)


if __name__ == "__main__":
    main()
