"""Several runs side by side in one self-contained HTML page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safe_lr.loggers.facts import facts
from safe_lr.loggers.records import Records, read_jsonl
from safe_lr.plots import Chart, Points, curve, layout, measured, number
from safe_lr.plots.timeline import IN_WORDS, STATES, stretches
from safe_lr.report import notes_on_file, other_than, template, timeline, write_page

LABELS = "ABCDEFGH"
_COLUMNS = (
    "steps",
    "capped",
    "first capped at",
    "last lr",
    "margin",
    "measurements",
    "failed",
    "cost a step",
    "last loss",
)


def write_comparison(jsonl_paths: Sequence[str | os.PathLike[str]], out_path: str | os.PathLike[str]) -> Path:
    """Writes one page about several runs.

    A record that is cut off is read as far as it is whole; one in which nothing is whole is left out, and the page says
    so.

    Args:
        jsonl_paths: Files of `JsonlLogger`'s, two to eight.
        out_path: The HTML file to write. Missing folders are made, an existing file is replaced.

    Returns:
        `out_path`.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: There are too few or too many records, none of them holds anything, or the page would replace one.
    """
    if not 2 <= len(jsonl_paths) <= len(LABELS):
        raise ValueError(f"{len(jsonl_paths)} records were given: a comparison takes two to {len(LABELS)}")
    out = other_than(jsonl_paths, out_path)
    found: list[Records] = []
    foreign: list[str] = []
    for path in jsonl_paths:
        try:
            found.append(read_jsonl(path))
        except ValueError as error:
            foreign.append(f"Left out: {error}.")
    if not found:
        raise ValueError(" ".join(foreign))
    write_page(render_comparison(found, names=_names(jsonl_paths) if not foreign else None, notes=foreign), out)
    return out


def render_comparison(runs: Sequence[Records], *, names: Sequence[str] | None = None, notes: Sequence[str] = ()) -> str:
    """Returns the page as one HTML document that loads nothing from elsewhere.

    Args:
        runs: What `read_jsonl` returns, for each run; at most eight.
        names: Their names; None takes the records' own.
        notes: Sentences to begin with.
    """
    names = [run.name or "a run" for run in runs] if names is None else names
    spans = [(found.first_step, found.first_step + found.steps - 1) for found in map(facts, runs) if found.steps]
    first, last = min((low for low, _ in spans), default=0), max((high for _, high in spans), default=0)
    rows, said = [], list(notes)
    for label, name, records in zip(LABELS, names, runs, strict=False):
        said += [f"{label}, {name}: {note}" for note in notes_on_file(records)]
        drawn = timeline(records)
        if drawn is None:
            said.append(f"{label}, {name}: the record ends before the first step.")
        rows.append({"label": label, "name": name, "timeline": drawn or _EMPTY, "figures": _figures(records)})
        rows[-1] |= _place(records, first, last)
    occurring = {part.state for records in runs for part in stretches(records)}
    return template("comparison.html").render(
        runs=rows,
        notes=said,
        first=f"{first:,}",
        last=f"{last:,}",
        states=[(state, "", IN_WORDS[state]) for state in STATES if state in occurring],
        charts=[drawn for chart in _charts(runs) if (drawn := layout(chart, first, last)) is not None],
        columns=_COLUMNS,
        settings=_differing(runs),
    )


_EMPTY: dict[str, Any] = {"parts": [], "sentence": "nothing"}


def _place(records: Records, first: int, last: int) -> dict[str, str]:
    """Where a run lies on the common scale of steps, in per cent."""
    found, total = facts(records), last - first + 1
    offset, width = 100 * (found.first_step - first) / total, 100 * found.steps / total
    return {"offset": f"{offset:.4g}" if found.steps else "0", "width": f"{width:.4g}"}


def _figures(records: Records) -> list[str]:
    found, lr, loss = facts(records), curve(records, "lr"), measured(records.decisions, "loss")
    return [
        f"{found.steps:,}",
        f"{100 * found.capped_share:.0f} %",
        "never" if found.first_capped is None else f"{found.first_capped:,}",
        number(lr[-1][1] if lr else None),
        number(found.margin_last),
        f"{found.measurements:,}",
        f"{found.failures:,}",
        number(found.cost / found.steps if found.steps else None),
        number(loss[-1][1] if loss else None),
    ]


def _charts(runs: Sequence[Records]) -> list[Chart]:
    def curves(name: str) -> dict[str, Points]:
        return {label: curve(records, name) for label, records in zip(LABELS, runs, strict=False)}

    def losses() -> dict[str, Points]:
        found = zip(LABELS, runs, strict=False)
        return {label: measured(records.decisions, "loss") for label, records in found}

    return [
        Chart("Applied learning rate", "The smaller of desired lr and cap.", curves("lr")),
        Chart(
            "Utilisation",
            "lr in units of its limit; 1 is the linear edge of stability.",
            curves("utilisation"),
            reference=1.0,
        ),
        Chart("Coherence gamma", "Curvature as the optimizer sees it, where it was measured.", curves("gamma")),
        Chart("Loss where it was measured", "Each on the batch of its step: noisy.", losses(), dots=True),
    ]


def _differing(runs: Sequence[Records]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs."""
    configs = [run.runs[-1]["config"] if run.runs else {} for run in runs]
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [json.dumps(config[key]) if key in config else "–" for config in configs]  # noqa: RUF001 (a dash)
        if len(set(values)) > 1:
            rows.append((str(key)[:60], [value[:80] for value in values]))
    return rows


def _names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files' names, with as many folders as tell them apart."""
    parts = [Path(path).absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]).replace("//", "/") for part in parts]
        if len(set(names)) == len(names):
            return names
    return names  # the same file twice
