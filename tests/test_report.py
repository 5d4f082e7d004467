"""The report: one small page that holds together, and curves that lie where arithmetic puts them."""

import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_loggers import Quiet, play

from safe_lr.decisions import ACTIONS, Decision
from safe_lr.loggers import JsonlLogger, Logger, Records, read_jsonl
from safe_lr.plots import HEIGHT, POINTS, Axis, Chart, curve, layout, linear_axis, log_axis, lr_curve, spread, thin
from safe_lr.report import render, select, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A strict enough reading: tags must nest; text, attributes and table rows are kept."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open or "style" in self.open:
            return
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def drawings(html: str) -> dict[str, ElementTree.Element]:
    """The charts by title."""
    found = re.findall(r"<svg role=.*?</svg>\s*</div>", html, flags=re.DOTALL)
    roots = [ElementTree.fromstring(text.removesuffix("</div>").strip()) for text in found]
    return {str(root.findtext("title")): root for root in roots}


def lines_of(drawing: ElementTree.Element) -> dict[str, list[tuple[float, float]]]:
    found = {}
    for line in drawing.iter("polyline"):
        pairs = [pair.split(",") for pair in line.attrib["points"].split()]
        found[line.attrib["data-label"]] = [(float(x), float(y)) for x, y in pairs]
    return found


def value_at(drawing: ElementTree.Element, y: float) -> float:
    low, high = float(drawing.attrib["data-low"]), float(drawing.attrib["data-high"])
    return low * (high / low) ** (1 - y / HEIGHT)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Records, dict[str, Any]]:
    path = tmp_path_factory.mktemp("run") / "decisions.jsonl"
    told = play([JsonlLogger(path)], 3000)
    return read_jsonl(path), told


def test_the_page_stands_alone_and_is_well_formed(run: tuple[Records, dict[str, Any]]) -> None:
    html = render(run[0])
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert len(html.encode()) < 100 * 1024
    assert not re.search(r"""(src|href)\s*=(?!"#)|url\(|@import|https?://""", html)
    assert {tag for tag, _ in page.tags} >= {"h1", "h2", "figure", "table", "thead", "details", "dl"}
    headers = [attributes for tag, attributes in page.tags if tag == "th"]
    assert all(attributes.get("scope") in ("col", "row") for attributes in headers)
    scrolling = [attributes for _, attributes in page.tags if attributes.get("class") == "scroll"]
    assert all(attributes["role"] == "region" and attributes["tabindex"] == "0" for attributes in scrolling)
    assert "prefers-color-scheme: dark" in html
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        assert set((attributes.get("aria-labelledby") or "").split()) <= set(ids)


def test_the_summary_tells_what_happened(run: tuple[Records, dict[str, Any]]) -> None:
    words = Page(render(run[0])).words
    capped = run[1]["capped"]
    assert "covers 3,000 optimizer steps (steps 0 to 2,999)" in words
    assert f"at {100 * len(capped) / 3000:.0f} % of the steps, first at step {capped[0]:,}" in words
    assert f"measured 120 times; with the trial steps that cost {120 * 6.5:.0f} gradient evaluations, 0.26 per" in words
    assert "3 measurements failed" in words


def test_curves_lie_where_the_numbers_are(run: tuple[Records, dict[str, Any]]) -> None:
    records, told = run
    drawing = drawings(render(records))["Learning rate"]
    lines = lines_of(drawing)
    assert list(lines) == ["limit", "cap", "desired", "applied"]
    for label, name in (("limit", "lr_limit"), ("cap", "cap"), ("applied", "lr"), ("desired", "lr_desired")):
        assert len(lines[label]) <= POINTS
        for x, y in lines[label]:
            row = told["rows"][round(x * 2999 / 1000)]
            expected = max(row[name], float(drawing.attrib["data-low"]))
            assert value_at(drawing, y) == pytest.approx(expected, rel=2e-3)
    low, high = min(run[1]["rows"], key=lambda row: row["lr_limit"]), max(y for _, y in lines["limit"])
    assert value_at(drawing, high) == pytest.approx(low["lr_limit"], rel=2e-3)  # the one dip survives thinning


def test_every_line_is_named_in_words_and_apart_from_others(run: tuple[Records, dict[str, Any]]) -> None:
    for drawing in drawings(render(run[0])).values():
        labels = [text for text in drawing.iter("text") if (text.get("class") or "").startswith("label")]
        assert [label.text for label in labels] == list(lines_of(drawing))
        heights = sorted(float(label.attrib["y"]) for label in labels)
        assert all(after - before >= 14.99 for before, after in itertools.pairwise(heights))
        description = drawing.findtext("desc") or ""
        assert all(f"{label.text}: " in description for label in labels)
        assert set((drawing.attrib["aria-labelledby"]).split()) == {
            element.attrib["id"] for element in drawing if element.tag in ("title", "desc")
        }


def test_failures_are_marked(run: tuple[Records, dict[str, Any]]) -> None:
    marks = [text for text in drawings(render(run[0]))["Curvature"].iter("text") if text.get("class") == "mark"]
    assert [float(mark.attrib["x"].rstrip("%")) for mark in marks] == [
        pytest.approx(100 * step / 2999, abs=0.01) for step in (475, 1475, 2475)
    ]


def test_the_table_says_how_many_it_leaves_out(run: tuple[Records, dict[str, Any]]) -> None:
    records, told = run
    page = Page(render(records))
    body = [row for row in page.rows if len(row) > 3 and row[0].replace(",", "").isdigit()]
    assert len(body) == 80
    assert f"80 of {len(told['decisions'])} decisions are shown" in page.words
    assert f"{len(told['decisions']) - 80} are left out" in page.words
    steps = [int(row[0].replace(",", "")) for row in body]
    assert steps == sorted(steps)
    assert {0, 475, 1475, 2475, 2975} <= set(steps)
    assert all(row[2] for row in body)  # a reason each


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    play([JsonlLogger(path)], 30_000, seed=3)
    reason = 'the cap is <lower> & "narrow"; ' * 40
    long = [Decision(i, 1, ACTIONS[i % 8], reason, 1.0, 1.0, 0.5, 0.5, failure=reason) for i in range(30_000, 31_000)]
    records = read_jsonl(path)
    records.decisions.extend(long)
    assert len(render(records).encode()) < 100 * 1024


@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_short_runs(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "run.jsonl"
    play([JsonlLogger(path)], steps)
    html = render(read_jsonl(path))
    page = Page(html)
    if steps == 0:
        assert "ends before the first step" in page.words
        assert "No decision is on record" in page.words
    else:
        assert f"covers {steps} optimizer step" in page.words
        assert "Learning rate" in drawings(html)
        assert len(list(drawings(html)["Learning rate"].iter("circle"))) == (4 if steps == 1 else 0)


def test_records_with_holes() -> None:
    hold = Decision(5, 0, "hold", "loss is nan", 1.0, 1.0, math.nan, 0.5, failure="loss is nan")
    assert "One measurement failed" in Page(render(Records(decisions=[hold]))).words
    assert drawings(render(Records(rows=[{"step": 0, "lr": 0.0, "lr_desired": 0.0}]))) == {}  # no place on a log axis
    nothing = Page(render(Records())).words
    assert "nothing to show yet" in nothing


def test_text_is_escaped() -> None:
    evil = Decision(0, 0, "cap", "<script>alert(1)</script>", 1.0, 1.0, 0.5, 0.5)
    html = render(Records(decisions=[evil], name="<b>", runs=[{"version": "<i>", "config": {"<u>": "</table>"}}]))
    assert "<script>alert" not in html
    assert "<script>alert(1)</script>" in Page(html).words


def test_a_truncated_file_says_so(tmp_path: Path) -> None:
    path, out = tmp_path / "run.jsonl", tmp_path / "made" / "report.html"
    play([JsonlLogger(path)], 300)
    path.write_bytes(path.read_bytes()[:-400])
    assert write_report(path, out) == out
    words = Page(out.read_text()).words
    assert "1 line of the file is cut off or foreign" in words
    assert "has not ended in order" in words


def test_the_record_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    play([JsonlLogger(path)], 3)
    with pytest.raises(ValueError, match="would replace its own source"):
        write_report(path, tmp_path / "." / "run.jsonl")


def test_a_margin_beyond_one_and_constant_betas_are_told() -> None:
    rows = [{"step": i, "lr": 0.1, "margin": 0.8 + 0.1 * i, "beta1": 0.9, "beta2": 0.999} for i in range(5)]
    beyond = Decision(3, 0, "margin", "", 0.1, 0.1, 0.1, margin=1.1, beyond_linear_limit=True)
    html = render(Records(rows=rows, decisions=[beyond]))
    words = Page(html).words
    assert "went from 0.8 to 1.2 of the limit, between 0.8 and 1.2; it first went beyond 1" in words
    assert "at step 3" in words
    assert "1.1 (beyond)" in words
    assert "beta1 was 0.9 and beta2 was 0.999 throughout" in words
    assert "Betas" not in drawings(html)


# ---- the parts


def test_select_prefers_what_went_wrong() -> None:
    decisions = [Decision(i, 0, "keep", "", 1.0, 1.0, 1.0, 0.5) for i in range(500)]
    for i in (77, 200, 310):
        decisions[i] = Decision(i, 0, "hold", "", 1.0, 1.0, 1.0, 0.5, failure="nan")
    decisions[123] = Decision(123, 0, "cap", "", 1.0, 1.0, 0.5, 0.5)
    chosen = select(decisions, 24)
    steps = [decision.step for decision in chosen]
    assert len(steps) == 24
    assert steps == sorted(steps)
    assert {0, 1, 2, 3, 77, 123, 200, 310, 496, 497, 498, 499} <= set(steps)
    assert select(decisions[:10], 24) == decisions[:10]
    assert select([], 24) == []


@pytest.mark.parametrize("count", [0, 1, 4, 299, 300, 301, 5000, 99_999])
def test_thin_keeps_ends_and_extremes(count: int) -> None:
    points = [(float(i), math.sin(i * 0.7) * (50 if i == count // 3 else 1)) for i in range(count)]
    kept = thin(points, 300)
    assert len(kept) <= 300
    assert kept == sorted(kept)
    assert set(kept) <= set(points)
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])
        values = [value for _, value in points]
        assert {min(values), max(values)} <= {value for _, value in kept}


@pytest.mark.parametrize(
    "values", [[1.0], [1e-12, 3e4], [0.0, 0.3], [7e-5, 7.1e-5], [1e308, 1.0], [5e-324], [2.0, 5.0]]
)
def test_a_log_axis_holds_its_values_between_ticks(values: list[float]) -> None:
    axis = log_axis(values)
    assert 0 < axis.low < axis.high < math.inf
    assert len(axis.ticks) >= 2
    assert list(axis.ticks) == sorted(axis.ticks)
    assert all(0.0 <= axis.at(value) <= 1.0 for value in values)
    assert axis.at(axis.low) == 0.0
    assert axis.at(axis.high) == 1.0
    middle = math.sqrt(axis.low) * math.sqrt(axis.high)
    assert axis.at(middle) == pytest.approx(0.5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.9, 0.999), (-3.0, 1.0), (0, 1), (0, 123_456), (5, 5)])
def test_a_linear_axis_has_even_ticks(low: float, high: float) -> None:
    for axis in (linear_axis(low, high), linear_axis(math.floor(low), math.ceil(high), whole=True)):
        steps = [after - before for before, after in itertools.pairwise(axis.ticks)]
        assert steps == pytest.approx([steps[0]] * len(steps)) if steps else len(axis.ticks) == 1
        assert axis.low <= low
        assert axis.high >= high
        assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert all(float(tick).is_integer() for tick in linear_axis(round(low), round(high), whole=True).ticks)


def test_a_tail_to_zero_does_not_flatten_the_rest() -> None:
    points = [(float(i), 1.0 if i < 990 else 10.0 ** -(i - 980)) for i in range(1000)]
    drawn = layout(Chart("lr", "", {"lr": points}), 0, 999)
    assert drawn is not None
    assert drawn["y"].low == pytest.approx(0.1)
    assert drawn["clipped"] == "0.1"


def test_spread_labels_stay_apart_and_inside() -> None:
    assert spread([], 15.0, 240.0) == []
    moved = spread([240.0, 239.0, 0.0, 240.0], 15.0, 240.0)
    assert sorted(moved) == [0.0, 210.0, 225.0, 240.0]


def test_an_axis_clips_to_its_edges() -> None:
    axis = Axis(1.0, 100.0, True, (1.0, 100.0))
    assert (axis.at(0.0), axis.at(10.0), axis.at(1e9)) == (0.0, pytest.approx(0.5), 1.0)


def test_a_record_without_rows_is_drawn_from_its_decisions() -> None:
    decisions = [Decision(i, 0, "cap", "", 1.0, 1.0, 0.5 / (i + 1), 0.5, lr_limit=1.0) for i in range(3)]
    records = Records(decisions=decisions)
    assert curve(records, "lr") == [(0, 0.5), (1, 0.25), (2, 0.5 / 3)]
    assert "Learning rate" in drawings(render(records))


def test_lr_curve_draws_the_numbers(run: tuple[Records, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records, told = run
    ax = lr_curve(records)
    lines = {str(line.get_label()): line for line in ax.get_lines()}
    assert set(lines) == {"limit", "cap", "desired", "applied"}
    for step, value in zip(*lines["applied"].get_data(), strict=True):
        assert value == told["rows"][int(step)]["lr"]
    assert ax.get_yscale() == "log"
    out = tmp_path / "lr.png"
    ax.figure.savefig(out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert lr_curve(records, ax) is ax
    assert not lr_curve(Records(rows=[{"step": 0, "lr": 0.0}])).get_lines()


def test_quiet_loggers_are_loggers() -> None:
    assert isinstance(Quiet(), Logger)
    play([Quiet()], 3)
