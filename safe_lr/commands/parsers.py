"""What the commands' parsers have in common."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NEGATIVE = 1
"""Exit status of a command that worked and whose answer is no."""

Run = Callable[[argparse.Namespace], int | None]


def add_command(
    commands: Any, name: str, run: Run, *, brief: str, about: str, examples: tuple[str, ...]
) -> argparse.ArgumentParser:
    """Adds a command with its help and examples, and returns its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=brief,
        description=about,
        epilog="\n".join(f"example: safe-lr {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="print the answer as JSON, and nothing else")


def positive(text: str) -> int:
    """Reads a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file in an error that names none: that of a disk which is full while it is written."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error


def as_json(value: Any) -> str:
    """Returns JSON; numbers that are not finite become null, which JSON has."""
    return json.dumps(_finite(value), allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
