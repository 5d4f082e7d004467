"""The spike benchmark: its count against spikes made by hand, its runs against themselves, and its file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import spikes
from benchmarks.spikes import Stream, count_spikes, run


def test_spikes_are_counted_once_each() -> None:
    calm = [1.0, 1.2, 0.8] * 20
    assert count_spikes(calm) == (0, 0, pytest.approx(1.2))
    one = [*calm, 2.5, 1.9, 1.6, 1.4, *calm]  # begins above 2, lasts while above 1.5
    assert count_spikes(one)[:2] == (1, 3) and count_spikes(one)[2] == pytest.approx(2.5)
    assert count_spikes([*one, 5.0, *calm])[:2] == (2, 4)
    assert count_spikes([9.0, *calm]) == count_spikes(calm)  # the first ones are not judged
    assert count_spikes([*calm, float("nan")])[:2] == (1, 1)


def test_batches_are_the_same_for_every_method_and_shift_at_half_time() -> None:
    stream, again = Stream(3), Stream(3)
    for index, phase in ((0, 0), (7, 1)):
        (tokens, targets), (tokens_again, targets_again) = (s.batch(index, 16, phase) for s in (stream, again))
        assert torch.equal(tokens, tokens_again) and torch.equal(targets, targets_again)
    common = [torch.bincount(stream.batch(0, 4096, phase)[0].flatten()).argmax() for phase in (0, 1)]
    assert common[0] == 0 and common[1] == stream.frequencies[1].argmax() != 0


@pytest.mark.slow
def test_a_poisoned_batch_is_what_rewind_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {method: run(method, 0.01, 0, 300, poison=True) for method in spikes.METHODS}
    assert results["rewind"].drops == 1
    assert results["safe_lr"].final > 1.5 * results["rewind"].final  # without rewind it is felt
    assert results["safe_lr"].final < 0.5 * results["bare"].final and results["bare"].worst > 100
    assert run("bare", 0.01, 0, 300, poison=True).final == results["bare"].final
    monkeypatch.setattr(spikes, "POISON", 1e6)
    worse = run("rewind", 0.01, 0, 300, poison=True)  # nothing of the batch is left, so its size does not matter
    assert worse.drops == 1 and worse.final == results["rewind"].final
    assert run("safe_lr", 0.01, 0, 300, poison=True).final != results["safe_lr"].final


def test_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["spikes", "--quick", "--json", str(tmp_path / "deep" / "spikes.json")])
    spikes.main()
    saved = json.loads((tmp_path / "deep" / "spikes.json").read_text())
    assert [r["method"] for r in saved["runs"]] == list(spikes.METHODS) and saved["steps"] == 120
    assert "mean rewind" in capsys.readouterr().out
