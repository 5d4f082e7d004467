"""`safe-lr report`: an HTML page about one run, or about several side by side."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safe_lr.commands.parsers import add_command, add_json, as_json, naming


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "report",
        _run,
        brief="write an HTML page about a run, or several",
        about="Writes one self-contained HTML page about a run: curves, decisions and their reasons. Given several\n"
        "records it compares the runs. A record that is cut off or partly foreign is read as far as it is whole, and\n"
        "the page says what is not.",
        examples=("report decisions.jsonl -o report.html", "report first.jsonl second.jsonl -o comparison.html"),
    )
    parser.add_argument(
        "records", type=Path, nargs="+", metavar="RECORD", help="a run's record, as named by log_path= or JsonlLogger"
    )
    parser.add_argument(
        "-o", "--out", type=Path, metavar="HTML", help="where to write the page (default: the first RECORD as .html)"
    )
    add_json(parser)


def _run(args: argparse.Namespace) -> None:
    from safe_lr.comparison import write_comparison
    from safe_lr.loggers.facts import facts
    from safe_lr.loggers.records import read_jsonl
    from safe_lr.plots.timeline import shares, stretches
    from safe_lr.report import write_report

    out = args.out or args.records[0].with_suffix(".html")
    with naming(out):
        out = write_report(args.records[0], out) if len(args.records) == 1 else write_comparison(args.records, out)
    if not args.json:
        print(f"The report is in {out}")
        return
    runs: list[dict[str, Any]] = []
    for path in args.records:
        try:
            records = read_jsonl(path)
        except ValueError as error:  # foreign throughout; the comparison goes on without it
            runs.append({"record": path, "failure": str(error)})
            continue
        states = shares(stretches(records))
        runs.append({"record": path, "unreadable": records.unreadable, "ended": records.summary is not None})
        runs[-1] |= {**asdict(facts(records)), "states": states}
    print(as_json({"report": out, "runs": runs}))
