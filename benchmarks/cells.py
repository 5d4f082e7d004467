"""Runs cells of a benchmark in two processes and keeps each result, so that nothing is computed twice.

A cell's key is its configuration and a digest of the code that its result depends on: comments, docstrings and layout
do not count, any other change does. Results lie one file a cell under `runs/`; those of the baselines, which do not
depend on safe_lr, are also committed in one file, from which a fresh clone takes them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.training import Cell, depends_on_safe_lr, run

ROOT = Path(__file__).parents[1]
TRAINING = ("benchmarks/training.py", "benchmarks/tasks.py", "benchmarks/networks.py")
UNSEEN = (
    "report.py",
    "plots",
    "loggers",
    "__main__.py",
    "advice.py",
    "spectrum.py",
    "sharpness.py",
)  # of safe_lr: decide no lr


def canonical(source: str) -> str:
    """Returns code without comments, docstrings and layout.

    Example:
        >>> canonical('def f():\\n    "Says."\\n    return 1  # one') == canonical('def f(): return 1')
        True
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
            continue
        if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
            del body[0]
    return ast.dump(tree)


@functools.cache
def digest(library: bool) -> str:
    """Returns a digest of the training code and torch's version, of the library too where that matters."""
    files = [ROOT / name for name in TRAINING]
    if library:
        folder = ROOT / "safe_lr"
        files += [f for f in sorted(folder.rglob("*.py")) if f.relative_to(folder).parts[0] not in UNSEEN]
    text = "\n".join([torch.__version__.split("+")[0], *(canonical(f.read_text()) for f in files)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def key(cell: Cell) -> str:
    """Returns the name of a cell's result."""
    what = json.dumps(cell.to_dict(), sort_keys=True)
    digested = hashlib.sha256((what + digest(depends_on_safe_lr(cell))).encode()).hexdigest()[:12]
    return f"{cell.task}-{cell.optimizer}-{cell.method}-{cell.lr:.3g}-s{cell.seed}-{digested}"


class Cache:
    """Results by key: one JSON file a cell in `folder`, and read-only ones in `committed`.

    Args:
        folder: Where results are written.
        committed: A JSON file {key: result} that is looked into as well.
    """

    def __init__(self, folder: Path, committed: Path | None = None) -> None:
        self.folder, self.hits, self.computed = folder, 0, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.committed: dict[str, Any] = (
            json.loads(committed.read_text()) if committed is not None and committed.is_file() else {}
        )

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """Returns a kept result, None where there is none; a file cut short counts as none."""
        name = key(cell)
        try:
            return dict(json.loads((self.folder / f"{name}.json").read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            return self.committed.get(name)

    def put(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keeps a result; a reader never sees half of it."""
        path = self.folder / f"{key(cell)}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result))
        part.replace(path)

    def run(
        self, cells: Iterable[Cell], *, workers: int = 2, label: str = "", make: Callable[..., Any] = run
    ) -> list[dict[str, Any]]:
        """Returns each cell's result, computing what is missing; interrupted, it goes on where it was.

        Args:
            cells: In any order; the same one may come twice.
            workers: Processes, of one thread each; 0 computes in this one.
            label: For the progress bar.
            make: Cell -> result.
        """
        cells = list(cells)
        missing = [cell for cell in dict.fromkeys(cells) if self.get(cell) is None]
        self.hits += len(set(cells)) - len(missing)
        self.computed += len(missing)
        with tqdm(total=len(missing), desc=label, unit="run", ncols=100, disable=not missing) as bar:
            if workers == 0:
                for cell in missing:
                    self.put(cell, make(cell))
                    bar.update()
            elif missing:
                self._in_processes(missing, workers, make, bar)
        return [found for cell in cells if (found := self.get(cell)) is not None]

    def _in_processes(self, missing: list[Cell], workers: int, make: Callable[..., Any], bar: Any) -> None:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            jobs = {pool.submit(make, cell): cell for cell in missing}
            try:
                for job in as_completed(jobs):
                    self.put(jobs[job], job.result())
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
