"""What benchmarks share at their ends: the options they take, the tables they print, the JSON they leave."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def command_line(what: str, quick: str) -> argparse.ArgumentParser:
    """Returns a parser of `--json` and `--quick`.

    Args:
        what: What the benchmark says.
        quick: What is left of it under `--quick`.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--quick", action="store_true", help=f"{quick}: a smoke test")
    return parser


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown.

    Example:
        >>> print(markdown(["a", "b"], [["1", "2"]]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [titles, ["---"] * len(titles), *rows])


def save(result: Any, path: Path | None) -> None:
    """Writes the result as JSON and makes the folders on the way; does nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
