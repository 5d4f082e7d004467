"""The command `safe-lr`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safe_lr


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; `argv` is without the program's name, None takes the process's own.

    A command is a function that adds its parser to the subparsers and sets `run` there. It raises `OSError` or
    `ValueError` where the user has to mend something.

    Returns:
        The exit status: 0, or 2 after an error that the user can mend, which is told in one line.
    """
    parser = argparse.ArgumentParser(prog="safe-lr", description="Looks into what safe_lr did to a learning rate.")
    parser.add_argument("--version", action="version", version=f"safe_lr {safe_lr.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        print(f"safe-lr: error: {_in_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="write an HTML page about a run",
        description="Writes one self-contained HTML page about a run: curves, decisions and their reasons.",
        epilog="example: safe-lr report decisions.jsonl -o report.html",
    )
    parser.add_argument("record", type=Path, help="the run's record, as named by log_path= or JsonlLogger(...)")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="HTML", help="where to write the page (default: RECORD with the ending .html)"
    )
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    from safe_lr.report import write_report

    out = write_report(args.record, args.out or args.record.with_suffix(".html"))
    print(f"The report is in {out}")


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


_COMMANDS: tuple[Callable[[Any], None], ...] = (_add_report,)


if __name__ == "__main__":
    sys.exit(main())
