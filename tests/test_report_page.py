"""The report in a real browser: no complaint, no sideways scrolling, dark mode, keyboard and screen reader.

The screenshots stay in runs/report_page/, to be looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_loggers import play

from safe_lr.comparison import write_comparison
from safe_lr.loggers import JsonlLogger
from safe_lr.report import write_report
from tests.browser import CHROMIUM, Browser, chromium

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

WIDTHS = (1280, 420)
PICTURES = Path(__file__).parents[1] / "runs" / "report_page"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    records = []
    for index, steps in enumerate((1500, 1000, 1200)):
        records.append(folder / f"run{index}.jsonl")
        play([JsonlLogger(records[-1])], steps, seed=index)
    records[2].write_bytes(records[2].read_bytes()[:-300] + b"\nforeign\n")
    return {
        "report": write_report(records[0], folder / "report.html"),
        "comparison": write_comparison(records, folder / "comparison.html"),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_page_shows_without_complaint(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.errors.clear()
    browser.open(pages[name], width=width, dark=dark)
    picture = PICTURES / f"{name}-{width}{'-dark' * dark}.png"
    browser.picture(picture)
    assert browser.errors == []
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert browser.run("document.documentElement.scrollWidth") <= width, "only tables may scroll sideways"
    assert browser.run("document.querySelectorAll('polyline').length") >= 4
    assert browser.run(CLOSEST) >= 12, "blocks of the page touch each other"
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", light))) < 3 * 64) == dark


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_text_has_contrast(browser: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    """WCAG 2.1, 1.4.3: at least 4.5 to 1 for every text, against the nearest background colour around it."""
    browser.open(pages[name], width=1280, dark=dark)
    lowest = browser.run(CONTRAST)
    assert lowest[0] >= 4.5, lowest


CLOSEST = """(() => {
  const shown = [...document.querySelectorAll('section[aria-labelledby], figure, details, .story, .tiles')]
    .map((block) => block.getBoundingClientRect()).filter((box) => box.height).sort((a, b) => a.top - b.top);
  return Math.min(...shown.slice(1).map((box, i) => box.top - shown[i].bottom));
})()"""

CONTRAST = """(() => {
  const linear = (v) => v / 255 <= .03928 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = (rgb) => { const [r, g, b] = rgb.map(linear); return .2126 * r + .7152 * g + .0722 * b; };
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > .99) return c.slice(0, 3); } return [255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
    if (["SCRIPT", "STYLE", "TITLE", "DESC"].includes(e.tagName.toUpperCase())) continue;
    const style = getComputedStyle(e), ink = numbers(e instanceof SVGElement ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(ink), light(behind(e))];
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 120)]);
  }
  return found.sort((x, y) => x[0] - y[0])[0];
})()"""


def test_the_keyboard_reads_the_curves(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], width=1280)
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.className") == "skip"
    assert browser.run("document.activeElement.getBoundingClientRect().top") >= 0, "it shows when it is reached"
    for _ in range(20):
        browser.press("Tab", 9)
        if browser.run("document.activeElement.className") == "cursor":
            break
    assert browser.run("document.activeElement.getAttribute('aria-label')").startswith("Learning rate")
    before = browser.run("document.activeElement.getAttribute('aria-valuetext')")
    browser.press("End", 35)
    after = browser.run("document.activeElement.getAttribute('aria-valuetext')")
    assert before.startswith("step 0 ")
    assert after.startswith("step 1,499 ")
    assert "applied " in after
    shown = browser.run("document.activeElement.nextElementSibling.textContent")
    assert shown == after, "what is read out is what is seen"
    browser.press("ArrowLeft", 37)
    assert browser.run("document.activeElement.value") == "999"


def test_the_slider_and_the_pointer_read_the_same(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], width=1280)
    middle = """(() => { const p = document.querySelector('.plot'), b = p.querySelector('svg').getBoundingClientRect();
      p.dispatchEvent(new PointerEvent('pointermove', {clientX: b.left + b.width / 2, bubbles: true}));
      return p.closest('figure').querySelector('.readout').textContent; })()"""
    pointed = browser.run(middle)
    slid = browser.run(
        """(() => { const s = document.querySelector('.cursor'); s.value = 500; s.dispatchEvent(new Event('input'));
        return s.getAttribute('aria-valuetext'); })()"""
    )
    assert pointed == slid
    assert pointed.startswith("step 749 ")


def test_a_screen_reader_is_told_how_lr_stood(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["report"], width=1280)
    tree = browser.tree()
    strips = [name for role, name in tree if role in ("image", "img") and "of the steps" in name]
    assert len(strips) == 1
    assert "capped" in strips[0] and "clear" in strips[0]
    roles = {role for role, _ in tree}
    assert {"main", "heading", "table", "slider", "region"} <= roles
    assert all(name for role, name in tree if role in ("slider", "region", "image", "img", "link"))
    headings = [name for role, name in tree if role == "heading"]
    assert headings[:3] == ["Learning-rate report", "What to know", "Stability at a glance"]
    assert browser.run("document.querySelector('main') !== null && document.documentElement.lang") == "en"
    browser.open(pages["comparison"], width=1280)
    lanes = [name for role, name in browser.tree() if role in ("image", "img") and "of the steps" in name]
    assert [name.split(",")[0] for name in lanes] == ["A", "B", "C"]
