"""benchmarks/longer_runs.py: that it runs, pairs what belongs together, and makes a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import longer_runs
from benchmarks.lr_robustness import Row
from benchmarks.tables import longer


def test_a_warm_up_that_the_cap_leaves_alone_is_the_one_without_it() -> None:
    """At a thousandth of the usual lr nothing is capped, and the two runs are the same to the bit."""
    cell = Row("teacher", "rmsprop").cell("constant", 3e-6, 1, 20)
    plain, ours = (longer_runs.warm((cell, guarded)) for guarded in (False, True))
    assert plain["score"] == ours["score"] and ours["capped"] == 0.0
    capped = longer_runs.warm((Row("teacher", "rmsprop").cell("constant", 1.0, 1, 20), True))
    assert capped["capped"] > 0.5 and capped["score"] != plain["score"]


def test_the_seed_that_lr_is_picked_on_is_not_scored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["longer_runs", "--seeds", "0", "1"])
    with pytest.raises(SystemExit):
        longer_runs.main()
    assert "seed 0 is the one that lr is picked on" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "longer.json"
    args = [
        "longer_runs",
        "--tasks",
        "teacher",
        "--seeds",
        "1",
        "2",
        "--steps",
        "40",
        "--cache",
        str(tmp_path / "cache"),
    ]
    monkeypatch.setattr("sys.argv", [*args, "--json", str(out)])
    longer_runs.main()
    result = json.loads(out.read_text())
    assert [row["row"] for row in result["rows"]] == ["teacher/rmsprop", "teacher/adagrad"]
    for row in result["rows"]:
        assert all(len(row[name]["all"]) == 2 for name in ("1x", "100x", "warm-up"))
        assert 0 <= row["warm-up"]["capped"] <= 1
    assert result["100x"]["worst"] == max(row["100x"]["mean"] for row in result["rows"])
    assert "teacher/adagrad" in longer(result) and "100x" in capsys.readouterr().out
