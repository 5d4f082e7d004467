"""The published tables are what the committed JSON says."""

import json

import pytest

from benchmarks.tables import MARKED, PAGES, RESULTS, TABLES, written


def test_every_table_is_published_and_up_to_date() -> None:
    names = [match["name"] for page in PAGES for match in MARKED.finditer(page.read_text())]
    assert set(names) == set(TABLES)
    for page in PAGES:
        assert written(page.read_text()) == page.read_text(), f"run `python -m benchmarks.tables`: {page.name}"


def test_a_table_follows_its_json(tmp_path) -> None:
    result = json.loads((RESULTS / "lr_robustness.json").read_text())
    result["gap_against_overhead"] = [{"credit": 7.0, "overhead": 0.125, "median": 0.5, "worst": 2.0}]
    (tmp_path / "lr_robustness.json").write_text(json.dumps(result))
    page = "a\n<!-- table: budgets -->\nold\n<!-- end -->\nb"
    assert written(page, tmp_path).splitlines()[-3:] == ["| 7 | 12.5% | +50.0% | +200% |", "<!-- end -->", "b"]
    with pytest.raises(KeyError):
        written("<!-- table: nothing -->\n<!-- end -->")
