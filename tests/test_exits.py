"""A run that nobody closes: its loggers are closed once its guard is dropped, or the interpreter exits."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from safe_lr import CoherenceGuard
from safe_lr.loggers import JsonlLogger, read_jsonl


class Recorder(JsonlLogger):
    """Counts how often it is closed."""

    closed = 0

    def close(self, summary: Mapping[str, Any]) -> None:
        self.closed += 1
        super().close(summary)


def trained(logger: JsonlLogger, steps: int) -> CoherenceGuard:
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([x], lr=0.1)
    guard = CoherenceGuard(optimizer, loggers=logger)
    for _ in range(steps):
        (x**2).sum().backward()
        guard.observe(lambda: (x**2).sum())
        optimizer.step()
        optimizer.zero_grad()
    return guard


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """The exit hooks of ours, which the interpreter is not told of."""
    found: list[Callable[[], None]] = []

    def register(hook: Any, *args: Any, **kwargs: Any) -> Any:
        if hook.__module__ == "safe_lr.exits":  # torch has its own
            found.append(hook)
        return hook

    monkeypatch.setattr(atexit, "register", register)
    monkeypatch.setattr(atexit, "unregister", lambda hook: found.remove(hook) if hook in found else None)
    return found


def test_a_guard_that_is_dropped_closes_its_record(tmp_path: Path, hooks: list[Callable[[], None]]) -> None:
    logger = Recorder(tmp_path / "run.jsonl")
    guard = trained(logger, 8)
    assert len(hooks) == 1
    del guard
    gc.collect()
    record = read_jsonl(tmp_path / "run.jsonl")
    assert record.summary is not None and record.summary["steps"] == 8
    assert record.rows[-1]["step"] == 7
    assert (logger.closed, hooks) == (1, [])


def test_exit_closes_once_and_in_the_own_process_only(
    tmp_path: Path, hooks: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = Recorder(tmp_path / "run.jsonl")
    guard = trained(logger, 3)
    (at_exit,) = hooks
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        at_exit()
    assert logger.closed == 0
    at_exit()
    guard.close()
    assert logger.closed == 1
    assert len(read_jsonl(tmp_path / "run.jsonl").rows) >= 2


def test_a_guard_that_never_ran_leaves_nothing_behind(tmp_path: Path, hooks: list[Callable[[], None]]) -> None:
    guard = trained(Recorder(tmp_path / "run.jsonl"), 0)
    del guard
    gc.collect()
    assert not (tmp_path / "run.jsonl").read_text()
    assert hooks == []
