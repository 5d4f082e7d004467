"""The command `safe-lr`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import safe_lr
from safe_lr.commands import COMMANDS

_STATUS = """exit status:
  0  done
  1  done, and the answer is no: lr beyond its limit (measure), nothing new (watch), no run finished (sweep run),
     every run failed (sweep agent)
  2  something is to be mended: one line on standard error says what
  130  interrupted (Ctrl-C)

`safe-lr COMMAND --help` has examples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; `argv` is without the program's name, None takes the process's own.

    A command sets `run` in its parser: it returns the exit status (None is 0), and raises `OSError`, `ValueError` or
    `ImportError` where the user has to mend something.

    Returns:
        The exit status: 0, 1 where the answer is no, or 2 after an error that the user can mend, which is told in one
        line.
    """
    parser = argparse.ArgumentParser(
        prog="safe-lr",
        description="Looks into what safe_lr did to a learning rate, measures, and sweeps.",
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"safe_lr {safe_lr.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    args = parser.parse_args(argv)
    try:
        status = args.run(args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("safe-lr: interrupted", file=sys.stderr)
        return 130  # as a shell has it: 128 + SIGINT
    except (OSError, ValueError, ImportError) as error:
        print(f"safe-lr: error: {_in_one_line(error)}", file=sys.stderr)
        return 2
    return status or 0


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"this needs the package {error.name!r}, which is not installed"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
