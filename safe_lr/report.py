"""One self-contained HTML page about a run: what happened to its learning rate, and why."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from safe_lr.decisions import Decision
from safe_lr.loggers.facts import Facts, facts, summary_of
from safe_lr.loggers.records import Records, read_jsonl
from safe_lr.plots import LR_LABELS, Chart, Points, curve, layout, measured, number
from safe_lr.plots.timeline import IN_WORDS, State, shares, stretches

_TABLE_ROWS = 80  # some 500 bytes each; with 12 curves of 240 points, 12 bytes each, the page stays below 100 KiB
_TEXT = 210  # longest reason
_SETTINGS = 60
_STRETCHES = 40


def write_report(jsonl_path: str | os.PathLike[str], out_path: str | os.PathLike[str]) -> Path:
    """Writes the report about a record file.

    Args:
        jsonl_path: A file written by `JsonlLogger`, also one of a killed or running job.
        out_path: The HTML file to write. Missing folders are made, an existing file is replaced.

    Returns:
        `out_path`.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: There is no record in the file, or both paths are the same.
    """
    out = other_than([jsonl_path], out_path)
    write_page(render(read_jsonl(jsonl_path)), out)
    return out


def other_than(sources: Sequence[str | os.PathLike[str]], out_path: str | os.PathLike[str]) -> Path:
    """Returns where to write, unless that would replace a source.

    Raises:
        ValueError: It would.
    """
    out = Path(out_path)
    if out.resolve() in {Path(source).resolve() for source in sources}:
        raise ValueError(f"the report would replace its own source {out}: give another path for it")
    return out


def write_page(page: str, out: Path) -> None:
    """Writes the page; missing folders are made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="replace")  # JSON may hold half a surrogate pair


def render(records: Records) -> str:
    """Returns the page as one HTML document that loads nothing from elsewhere.

    Args:
        records: What `read_jsonl` returns. Whatever is missing is left out, or said to be missing.

    Returns:
        HTML, below 100 KiB however long the run: curves are thinned with their extremes kept, and of many decisions the
        table holds the first, the last and those of most consequence.
    """
    shown = select(records.decisions, _TABLE_ROWS)
    found = facts(records)
    return template("report.html").render(
        name=records.name or "a run",
        version=records.runs[-1]["version"] if records.runs else "unknown",
        settings=_settings(records),
        advice=summary_of(records).advice,
        story=_story(found),
        tiles=_tiles(found),
        notes=_notes(records),
        timeline=timeline(records),
        charts=_charts(records),
        decisions=[_table_row(decision) for decision in shown],
        left_out=len(records.decisions) - len(shown),
        total=len(records.decisions),
        groups=any(decision.group for decision in records.decisions),
    )


def timeline(records: Records) -> dict[str, Any] | None:
    """Returns what the template draws of how lr stood against its cap; None where there is nothing.

    Args:
        records: A run's record.

    Example:
        >>> rows = [{"step": 0, "lr": 1.0, "cap": 4.0}, {"step": 3, "lr": 4.0, "cap": 4.0, "capped": 1.0}]
        >>> timeline(Records(rows=rows))["sentence"]
        'clear 75 % of the steps, capped 25 %; steps 0 to 2 clear, step 3 capped'
    """
    exact = stretches(records)
    if not exact:
        return None
    parts = stretches(records, most=_STRETCHES)
    total = parts[-1].last - parts[0].first + 1
    told = [f"{_steps(part.first, part.last)} {part.state}" for part in parts]
    portions: list[tuple[State, str, str]] = []
    for state, share in shares(exact).items():
        portions.append((state, _percent(share), IN_WORDS[state]))
    in_short = ", ".join(
        f"{state} {share}" + " of the steps" * (index == 0) for index, (state, share, _) in enumerate(portions)
    )
    return {
        "parts": [
            {
                "state": part.state,
                "width": f"{100 * part.steps / total:.4g}",
                "first": f"{part.first:,}",
                "last": f"{part.last:,}",
                "title": text,
                "named": part.steps > 0.03 * total,  # the word has room nowhere else
            }
            for part, text in zip(parts, told, strict=True)
        ],
        "first": f"{parts[0].first:,}",
        "last": f"{parts[-1].last:,}",
        "states": portions,
        "sentence": f"{in_short}; {', '.join(told)}" if len(told) <= 12 else in_short,
    }


def _steps(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _percent(share: float) -> str:
    return "under 1 %" if share < 0.01 else f"{100 * share:.0f} %"


def select(decisions: Sequence[Decision], limit: int) -> list[Decision]:
    """Chooses at most `limit` decisions to show, in order.

    The first and last few come first, then failures and holds, then caps, then changes of margin and betas, then the
    rest; where a kind does not fit, it is thinned evenly.

    Args:
        decisions: All of them.
        limit: Most to choose.

    Returns:
        The chosen ones, in their order.

    Example:
        >>> keep = [Decision(i, 0, "keep", "", 1.0, 1.0, 1.0, margin=0.5) for i in range(100)]
        >>> [decision.step for decision in select(keep, 6)]
        [0, 13, 37, 62, 86, 99]
    """
    ends = max(1, limit // 6)
    ranks: list[Callable[[int], bool]] = [
        lambda i: i < ends or i >= len(decisions) - ends,
        lambda i: decisions[i].action == "hold" or decisions[i].failure is not None,
        lambda i: decisions[i].action in ("cap", "drop", "rewind"),
        lambda i: decisions[i].action in ("margin", "betas", "eps"),
        lambda i: True,
    ]
    chosen: set[int] = set()
    for belongs in ranks:
        left = [i for i in range(len(decisions)) if i not in chosen and belongs(i)]
        chosen.update(_evenly(left, limit - len(chosen)))
    return [decisions[i] for i in sorted(chosen)]


def _evenly(indices: list[int], count: int) -> list[int]:
    """At most `count` of `indices`, evenly spread."""
    if len(indices) <= count:
        return indices
    return [indices[(2 * i + 1) * len(indices) // (2 * count)] for i in range(count)]


def _story(found: Facts) -> list[str]:
    """The run in plain sentences."""
    if not found.steps:
        return ["The record ends before the first step: there is nothing to show yet."]
    last = found.first_step + found.steps - 1
    steps = f"step {last:,}" if found.steps == 1 else f"steps {found.first_step:,} to {last:,}"
    sentences = [f"The record covers {_count(found.steps, 'optimizer step')} ({steps})."]
    if found.first_capped is None:
        sentences.append("The cap never came into play: the schedule asked for no more than was allowed.")
    else:
        sentences.append(
            f"The cap held the learning rate below the schedule at {_share(found)} of the steps, first at step"
            f" {found.first_capped:,}."
        )
    sentences.append(_margin_sentence(found))
    if found.measurements:
        sentences.append(
            f"Curvature was measured {_count(found.measurements, 'time')}; with the trial steps that cost"
            f" {_cost(found)} gradient evaluations, {number(found.cost / found.steps)} per step of the run."
        )
    else:
        sentences.append("No measurement is on record.")
    if found.failures:
        failed = "One measurement" if found.failures == 1 else f"{found.failures:,} measurements"
        sentences.append(f"{failed} failed; the last cap stayed in force, and the table gives the reason.")
    return [sentence for sentence in sentences if sentence]


def _margin_sentence(found: Facts) -> str:
    low, high, last = found.margin_low, found.margin_high, found.margin_last
    if low is None or high is None:
        return ""
    if low == high:
        text = f"The margin was {number(high)} of the limit throughout"
    else:
        text = f"The margin went from {number(found.margin_first)} to {number(last)} of the limit"
        text += f", between {number(low)} and {number(high)}"
    if found.first_beyond is not None:
        text += f"; it first went beyond 1, the linear edge, at step {found.first_beyond:,}"
    return f"{text}."


def _tiles(found: Facts) -> list[dict[str, str]]:
    capped = "never" if found.first_capped is None else _share(found)
    first = "" if found.first_capped is None else f"first at step {found.first_capped:,}"
    changed = found.margin_first != found.margin_last
    return [
        {"label": "steps", "value": f"{found.steps:,}", "note": ""},
        {"label": "capped", "value": capped, "note": first},
        {
            "label": "margin at the end",
            "value": number(found.margin_last),
            "note": f"{number(found.margin_first)} at first" if changed else "",
        },
        {
            "label": "measurements",
            "value": f"{found.measurements:,}",
            "note": f"{number(found.seconds)} s" if found.seconds else "",
        },
        {
            "label": "gradient evaluations",
            "value": _cost(found),
            "note": f"{number(found.cost / found.steps)} a step" if found.steps else "",
        },
        {"label": "failed", "value": f"{found.failures:,}", "note": "see the table" if found.failures else ""},
    ]


def _cost(found: Facts) -> str:
    return f"{found.cost:,.0f}" if found.cost >= 100 else number(found.cost)


def _share(found: Facts) -> str:
    return _percent(found.capped_share)


def notes_on_file(records: Records) -> list[str]:
    """Returns what is not whole about a record."""
    notes = []
    if records.unreadable:
        verb = "is" if records.unreadable == 1 else "are"
        more = ", ..." if records.unreadable > len(records.unreadable_at) else ""
        where = f" (at {', '.join(map(str, records.unreadable_at))}{more})" if records.unreadable_at else ""
        notes.append(f"{_count(records.unreadable, 'line')} of the file {verb} cut off or foreign and left out{where}.")
    if records.summary is None:
        notes.append("The run has not ended in order: it is still going, or it was killed.")
    return notes


def _notes(records: Records) -> list[str]:
    """What a reader must know about the record itself."""
    notes = notes_on_file(records)
    if len(records.runs) > 1:
        again = f"; {_count(records.superseded, 'record')} of steps taken again left out" if records.superseded else ""
        notes.append(f"The run was started or resumed {len(records.runs):,} times{again}.")
    still = {name: _range(curve(records, name)) for name in ("beta1", "beta2")}
    known = {name: low for name, (low, _) in still.items() if low is not None}
    if known and all(low == high for low, high in still.values()):  # else there is a chart
        notes.append(" and ".join(f"{name} was {number(value)}" for name, value in known.items()) + " throughout.")
    if any("/" in name for row in records.rows[-1:] for name in row):
        notes.append("The curves show the parameter group with the largest lr. One scale keeps all groups' ratios.")
    return notes


def _charts(records: Records) -> list[dict[str, Any]]:
    """The charts for which there is anything to draw."""

    def curves(*names: str) -> dict[str, Points]:
        return {name: curve(records, name) for name in names}

    curvature = {
        name: measured(records.decisions, name) or curve(records, name)  # a row repeats the last measured figure
        for name in ("lambda_max", "gamma")
    }
    charts = [
        Chart(
            "Learning rate",
            "The applied lr is the smaller of desired and cap. The tinted region lies beyond the linear limit.",
            {label: curve(records, name) for name, label in LR_LABELS.items()},
            shaded="limit",
        ),
        Chart(
            "Curvature",
            "As measured: lambda_max is the largest eigenvalue of the Hessian, gamma that of the Hessian as the"
            " optimizer sees it. A cross marks a failed measurement.",
            curvature,
            marks=[decision.step for decision in records.decisions if decision.failure is not None],
            dots=True,
        ),
        Chart(
            "Margin and utilisation",
            "The part of the limit that may be used, and the part that is. 1 is the linear edge of stability.",
            curves("margin", "utilisation"),
            reference=1.0,
        ),
    ]
    betas = curves("beta1", "beta2")
    if any(low != high for low, high in map(_range, betas.values())):
        charts.append(Chart("Betas", "Decay of the first and the second moment.", betas, log=False))
    found = facts(records)
    drawn = [layout(chart, found.first_step, found.first_step + found.steps - 1) for chart in charts]
    return [chart for chart in drawn if chart is not None]


def _range(points: Points) -> tuple[float | None, float | None]:
    values = [value for _, value in points]
    return min(values, default=None), max(values, default=None)


def _table_row(decision: Decision) -> dict[str, Any]:
    reason = decision.reason
    if decision.failure is not None and decision.failure not in reason:
        reason = f"{reason} Failure: {decision.failure}"
    same = decision.lr_before == decision.lr_after
    change = number(decision.lr_after) if same else f"{number(decision.lr_before)} → {number(decision.lr_after)}"
    return {
        "step": f"{decision.step:,}",
        "group": decision.group,
        "action": decision.action,
        "failed": decision.failure is not None,
        "figures": [
            number(decision.lr_desired),
            change,
            number(decision.lr_limit),
            number(decision.margin) + (" (beyond)" if decision.beyond_linear_limit else ""),
            *(number(value) for value in (decision.utilisation, decision.lambda_max, decision.gamma, decision.cost)),
        ],
        "reason": _clip(reason, _TEXT),
    }


def _settings(records: Records) -> list[tuple[str, str]]:
    config = records.runs[-1]["config"] if records.runs else {}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in config.items()}
    return [(_clip(str(name), 60), _clip(text, 120)) for name, text in list(texts.items())[:_SETTINGS]]


def _clip(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


@functools.cache
def template(name: str) -> jinja2.Template:
    """Returns one of the page templates."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("safe_lr", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
