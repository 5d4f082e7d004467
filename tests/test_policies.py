"""The policy's pure functions on edge values; the rule itself is tested on real runs in test_guard.py."""

from __future__ import annotations

import math
from typing import Any

import pytest

from safe_lr import policies
from safe_lr.policies import NormTrend, Policy, affordable, learned_margin, next_cap, next_gap, next_trial_gap


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
