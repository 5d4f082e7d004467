"""The Python blocks of README.md, CONTRIBUTING.md and docs/ run as they stand, page by page, after a common start."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What the pages take for granted: a model, its data, an optimizer.
BEGINNING = """
import torch
from torch import nn
torch.manual_seed(0)
inputs = torch.randn(640, 4)
targets = inputs @ torch.randn(4, 1)
loader = list(zip(inputs.split(16), targets.split(16)))
steps = len(loader)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
criterion = nn.MSELoss()
optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
"""


def blocks(page: Path) -> list[tuple[int, str]]:
    """Returns the page's ```python blocks with the line that each begins on."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in found]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_blocks_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    exec(BEGINNING, names)
    for line, code in blocks(page):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)  # tracebacks then show the page's own line
    for name in ("scheduler", "guard"):
        if name in names:
            names[name].close()


def test_readme_has_the_drop_in_and_it_protects():
    """The six lines of the README, at an lr 100 times too high for this problem, end far below where they began."""
    _, code = next(block for block in blocks(ROOT / "README.md") if "scheduler.observe" in block[1])
    names = {"__name__": "page"}
    exec(BEGINNING, names)
    first = names["criterion"](names["model"](names["inputs"]), names["targets"]).item()
    exec(code, names)
    last = names["criterion"](names["model"](names["inputs"]), names["targets"]).item()
    summary = names["scheduler"].summary()
    assert last < 0.5 * first
    assert summary.steps == names["steps"]
    assert summary.capped_steps > 0
    names["scheduler"].close()


def test_the_first_screen_has_two_commands():
    first_screen = (ROOT / "README.md").read_text().split("\n## ")[0]
    assert re.findall(r"^(?: {4}|\$ )?((?:make|pip|python) .*)$", first_screen, re.MULTILINE) == [
        "make demo",
        "make test",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if "://" not in target:
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name} links to {target}, which does not exist"
            if anchor and there.suffix == ".md":
                assert anchor in headings(there), f"{page.name} links to #{anchor}, which {there.name} does not have"


def headings(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
