"""benchmarks/poison.py: a tiny run of all, and what is made of results whose answer is known."""

import json
import math

import pytest

from benchmarks.lr_robustness import Row
from benchmarks.poison import Benchmark, markdown

LORA = Row("lora", "adam")


@pytest.mark.slow
def test_a_dropped_batch_is_one_that_was_left_out(tmp_path):
    benchmark = Benchmark(tmp_path, {LORA: -4}, seeds=(1,), steps=60)
    benchmark.run(workers=0)
    result = benchmark.result()
    json.dumps(result, allow_nan=False)
    rewind = [row for row in result["rows"] if row["protection"] == "rewind"]
    assert [(row["equal"], row["drops"], row["rewinds"]) for row in rewind] == [(1.0, 1.0, 0.0)] * 2
    assert all(row["cost"] == row["left_out"] for row in rewind) and result["poison_equal"] == 1
    bare = next(row for row in result["rows"] if (row["protection"], row["poison"]) == ("safe_lr", "nan"))
    assert bare["broken"] == 1 and bare["cost"]["mean"] is None
    assert "| lora/adam | nan | safe_lr | broken in 1 |" in markdown(result)


def test_costs_are_paired_and_the_worst_counts(tmp_path, monkeypatch):
    benchmark = Benchmark(tmp_path, {LORA: -4}, seeds=(1, 2), steps=60)

    def get(cell):
        worse = {"left out": 1.01, "nan": 1.01, "scaled": 1.5}.get(dict(cell.options)["poison"], 1.0)
        loss = worse * 10.0**cell.seed
        return {"score": loss, "val": loss, "drops": 1, "rewinds": 0}

    monkeypatch.setattr(benchmark.cache, "get", get)
    result = benchmark.result()
    assert result["poison_worst_cost"] == pytest.approx(0.5) and result["poison_equal"] == 0.5
    assert math.isclose(result["rows"][0]["left_out"]["mean"], 0.01, rel_tol=1e-9)


def test_without_rewind_the_first_seeds_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.poison.CONTRAST", 1)
    benchmark = Benchmark(tmp_path, {LORA: -4}, seeds=(1, 2), steps=60)
    runs = [(cell.seed, dict(cell.options).get("rewind", False)) for cell in benchmark.cells()]
    assert sorted(set(runs)) == [(1, False), (1, True), (2, True)] and len(runs) == 12
