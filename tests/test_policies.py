"""The policy's pure functions on edge values; the rule itself is tested on real runs in test_guard.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from safe_lr import policies
from safe_lr.controller import Controller
from safe_lr.measurement import Measurement
from safe_lr.policies import (
    FREE_UPDATES,
    HALVINGS,
    MARGIN_MIN,
    MARGIN_SEARCHED,
    MEMORY,
    NOISE_LIMIT,
    SMALL_BATCH,
    NormTrend,
    Policy,
    affordable,
    learned_margin,
    mean_limit,
    next_cap,
    next_gap,
    next_trial_gap,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"margin": m}, 'margin must be a number in (0, 1], the fraction of the stability limit to use, or "auto"')
          for m in (0, -1, 1.01, math.nan, math.inf, True, "Auto", None)],
        *[({"margin_max": m}, "margin_max must be at least 0.05") for m in (0.04, math.nan)],
        *[({"trial_slack": s}, "trial_slack must be in (0, 1]") for s in (0, 1.1, math.nan)],
        *[({"growth": g}, "growth must be at least 1") for g in (0.99, math.nan)],
        *[({"max_overhead": m}, "max_overhead must be at least 0") for m in (-0.1, math.nan)],
        *[({"credit": c}, "credit must be at least 0") for c in (-1, math.nan)],
    ],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Policy(**options)
    assert str(error.value).startswith(message)
    assert f"got {next(iter(options.values()))!r}" in str(error.value)


@pytest.mark.parametrize(
    ("margin", "margin_max", "first"), [("auto", 8, 2.0), ("auto", 0.2, 0.2), ("auto", 0.05, 0.05), (1, 8, 1.0)]
)
def test_first_margin(margin: float | str, margin_max: float, first: float) -> None:
    policy = Policy(margin, margin_max)
    assert (policy.first_margin, policy.learns) == (first, margin == "auto")


@pytest.mark.parametrize(
    ("cap", "target", "growth", "free", "expected"),
    [
        (None, 3.0, 1.02, False, 3.0),
        (1.0, 3.0, 1.02, True, 3.0),
        (1.0, 3.0, 1.02, False, 1.02),
        (1.0, 1.01, 1.02, False, 1.01),
        (1.0, 3.0, 1.0, False, 1.0),
        (1.0, 1e-9, 1.02, False, 1e-9),
        (1.0, math.inf, 1.02, False, 1.02),
    ],
)
def test_next_cap(cap: float | None, target: float, growth: float, free: bool, expected: float) -> None:
    assert next_cap(cap, target, growth, free=free) == expected


UP, DOWN, LEAST = policies.MARGIN_UP, policies.MARGIN_DOWN, policies.MARGIN_MIN


@pytest.mark.parametrize(
    ("margin", "planned", "desired", "failed", "alarm", "margin_max", "expected"),
    [
        (0.5, 0.5, 9.0, False, False, 8, 0.5 * UP),  # the cap binds and the step is fine
        (0.5, 0.5, 0.5, False, False, 8, 0.5),  # the schedule binds: nothing to learn
        (0.5, 0.44, 9.0, False, False, 8, 0.5),  # the growing cap, not the margin, holds lr back
        (0.5, 0.5, 9.0, True, False, 8, 0.5 / DOWN),
        (0.5, 0.5, 9.0, False, True, 8, 0.5 / DOWN),
        (0.5, 0.4, 0.4, True, False, 8, 0.4 / DOWN),  # below what was planned, or the cut would not cut
        (0.5, 0.0, 0.0, True, False, 8, 0.5 / DOWN),
        (LEAST, LEAST, 9.0, True, True, 8, LEAST),
        (0.5, 1e-9, 1e-9, False, True, 8, LEAST),
        (1.0, 1.0, 9.0, False, False, 1, 1.0),
        (0.99, 0.99, 9.0, False, False, 1, 1.0),
        (2.0, 2.0, 9.0, False, False, 1, 2.0),  # margin_max was lowered on resume: it does not cut
    ],
)
def test_learned_margin(
    margin: float, planned: float, desired: float, failed: bool, alarm: bool, margin_max: float, expected: float
) -> None:
    found = learned_margin(
        margin, planned=planned, desired=desired, lr_limit=1, trial_failed=failed, alarm=alarm, margin_max=margin_max
    )
    assert found == pytest.approx(expected, rel=1e-12)


def test_gaps() -> None:
    assert [next_gap(9, alarm=a, trial_failed=f) for a, f in ((0, 0), (0, 1), (1, 0), (1, 1))] == [22, 9, 2, 2]
    longest = {share: next_trial_gap(10**6, failed=False, max_overhead=share) for share in (0.05, 0.0, 1.0)}
    assert longest == {0.05: 54, 0.0: 1000, 1.0: 3}
    assert 2 / 3 / longest[0.05] <= policies.TRIAL_PART * 0.05
    assert [next_trial_gap(g, failed=True, max_overhead=0.05) for g in (2, 3, 9)] == [2, 2, 4]
    gap, gaps = 2, []
    for _ in range(20):
        gaps.append(gap := next_trial_gap(gap, failed=False, max_overhead=0.05))
    assert gaps == sorted(gaps) and gaps[-1] == 54  # it does not stick at a small gap


@pytest.mark.parametrize(("alarm", "expected"), [(True, 60 + 10 - 30), (False, 45 + 10 - 30)])
def test_routine_measurements_leave_a_reserve_to_alarms(alarm: bool, expected: float) -> None:
    assert affordable(Policy(), updates=200, spent=30, alarm=alarm) == expected
    assert affordable(Policy(credit=0, max_overhead=0), updates=10**9, spent=0, alarm=alarm) == 0


@pytest.mark.parametrize(
    ("norms", "norm", "alarming"),
    [
        ([], 1e9, False),
        ([], math.nan, True),
        ([], math.inf, True),
        ([1.0] * 9, 1e9, False),
        ([1.0] * 10, 2.9, False),
        ([1.0] * 10, 3.1, True),
        ([1.0] * 10, 0.0, False),
        ([1.0, 100.0] * 20, 300.0, False),  # a noisy run: 30 times the mean is nothing special
        ([1.0, 100.0] * 20, 1e8, True),
        ([1.0] * 10 + [math.nan, math.inf, 0.0], 3.1, True),  # those are not remembered
    ],
)
def test_norm_trend(norms: list[float], norm: float, alarming: bool) -> None:
    trend = NormTrend()
    for usual in norms:
        trend = trend.after(usual)
    assert trend.alarming(norm) is alarming


def test_norm_trend_is_the_plain_mean_and_variance_at_first() -> None:
    trend, logs = NormTrend(), [0.3, -1.0, 2.0, 0.7]
    for value in logs:
        trend = trend.after(math.exp(value))
    mean = sum(logs) / 4
    assert trend.mean == pytest.approx(mean)
    assert trend.variance == pytest.approx(sum((v - mean) ** 2 for v in logs) / 4)


def test_a_mean_limit_forgets_by_halves_on_a_log_scale() -> None:
    limit = None
    for measured in (1.0, 16.0, 16.0):
        limit = mean_limit(limit, measured, free=False)
    assert limit == pytest.approx(16 ** (1 - MEMORY**2))
    assert mean_limit(limit, 1e-9, free=True) == 1e-9


@pytest.mark.parametrize(("before", "measured"), [(1e-12, 1e12), (3.0, 3.0), (7.0, 0.1)])
def test_a_mean_limit_lies_between(before: float, measured: float) -> None:
    low, high = sorted((before, measured))
    assert low * (1 - 1e-12) <= mean_limit(before, measured, free=False) <= high * (1 + 1e-12)


def test_failed_trials_stop_at_the_limit_without_momentum_and_an_alarm_does_not() -> None:
    least = Policy().least_margin(38.0, adaptive=False)
    assert least * 38 == pytest.approx(NOISE_LIMIT)
    assert Policy().least_margin(38.0, adaptive=True) == pytest.approx(SMALL_BATCH * least)
    assert Policy(margin_max=1.0).least_margin(2.0, adaptive=True) == 1.0
    margin = loud = 2.0
    for _ in range(50):
        steps: dict[str, Any] = {
            "desired": 9.0,
            "lr_limit": 1.0,
            "trial_failed": True,
            "margin_max": 8.0,
            "least": least,
        }
        margin = learned_margin(margin, planned=margin, alarm=False, **steps)
        loud = learned_margin(loud, planned=loud, alarm=True, **steps)
    assert (margin, loud) == (least, MARGIN_MIN)


def test_what_a_search_found_is_the_margin() -> None:
    steps: dict[str, Any] = {"planned": 2.0, "desired": 9.0, "lr_limit": 1.0, "trial_failed": False, "margin_max": 8.0}
    assert learned_margin(2.0, alarm=False, least=0.1, found=0.25, **steps) == 0.25
    assert learned_margin(2.0, alarm=False, least=0.5, found=0.25, **steps) == 0.5


def controller(updates: int, **state: Any) -> Controller:
    made = Controller(Policy(trial_slack=0.25), least_cost=8.0)
    made.state.updates, made.state.flips = updates, [2.0]
    for name, value in state.items():
        setattr(made.state, name, value)
    return made


def test_a_young_run_searches_and_an_older_one_tries_once() -> None:
    failed = Measurement(lr_limit=1.0, loss=1.0, trial_loss=2.0, trial_lr=8.0)
    for updates, after in ((0, 4.0), (FREE_UPDATES - 1, 4.0), (FREE_UPDATES, None)):
        made = controller(updates)
        assert made.lr_to_try(Measurement(lr_limit=1.0), 100.0) == 8.0  # margin 2, four times as long
        assert made.lr_to_try(failed, 100.0) == after
    assert controller(0).lr_to_try(replace(failed, trial_loss=0.5), 100.0) is None
    assert controller(0).lr_to_try(replace(failed, trial_lr=8 / 2**HALVINGS), 100.0) is None
    assert controller(0, cost=59.9).lr_to_try(failed, 100.0) is None  # the credit is spent


def test_a_search_becomes_cap_and_reason() -> None:
    made = controller(0)
    found = Measurement(lr_limit=1.0, loss=1.0, trial_loss=0.9, trial_lr=4.0)
    failed, moved = made.settle(found, lr_ref=100.0, jump=None)
    assert failed and moved is not None and "no trial step longer than lr 4 lowers the batch's loss" in moved
    assert made.state.cap == made.state.margin == 1.0


def test_the_limit_in_force_is_the_newest_after_an_alarm() -> None:
    made = controller(50, figures={"lr_limit": 1.0})
    assert made.in_force(0.01) == pytest.approx(0.1)
    assert made.in_force(0.01, alarm=True) == 0.01
    strict = Controller(Policy(margin=0.5), least_cost=8.0)
    strict.state.updates, strict.state.figures = 50, {"lr_limit": 1.0}
    assert strict.in_force(0.01) == 0.01


def test_a_searched_limit_has_no_margin_beyond() -> None:
    made = Controller(Policy(), least_cost=8.0, searched=True)
    assert made.state.margin == made.policy.margin_max == MARGIN_SEARCHED
    assert Controller(Policy(margin=1), least_cost=8.0, searched=True).state.margin == 1
