"""The policy's pure functions on edge values; the rule itself is tested on real runs in test_guard.py."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from safe_lr.accounts import State
from safe_lr.cadence import (
    TRIAL_GAP,
    TRIAL_PART,
    affordable,
    next_gap,
    next_trial_gap,
)
from safe_lr.controller import Controller
from safe_lr.cuts import cut, go_back
from safe_lr.measurement import Measurement
from safe_lr.norms import NormTrend
from safe_lr.policies import (
    ANNEALED_TO,
    ANNEALING,
    CALM_UPDATES,
    CATCH_UP,
    FREE_UPDATES,
    HALVINGS,
    MARGIN_MIN,
    MARGIN_SEARCHED,
    MARGIN_YOUNG,
    MATURE,
    MULTIPLE_DRIFT,
    MULTIPLE_FAILED,
    MULTIPLE_LEAST,
    MULTIPLE_LOW,
    MULTIPLE_MOST,
    MULTIPLE_START,
    ROOM,
    STEADY_FROM,
    STEP,
    UNAVERAGED,
    Policy,
    Trial,
    annealed,
    judged,
    learned_growth,
    learned_multiple,
    median_limit,
    next_cap,
    next_crest,
    next_rung,
    noise_share,
    pace,
    rungs,
)
from safe_lr.stability import UpdateRule, lr_limit


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
    ("margin", "margin_max", "share", "expected"),
    [("auto", 8, 1.0, 2.0), ("auto", 8, 0.1, 0.2), ("auto", 0.2, 1.0, 0.2), (1, 8, 0.1, 1.0), (0.3, 0.1, 1.0, 0.3)],
)
def test_the_margin_is_a_multiple_of_the_noise_limit(
    margin: float | str, margin_max: float, share: float, expected: float
) -> None:
    policy = Policy(margin, margin_max)
    assert policy.margin_at(2.0, share) == pytest.approx(expected, rel=1e-12)
    assert policy.learns == (margin == "auto")


@pytest.mark.parametrize("b", [0.0, 0.5, 0.9, 0.99])
def test_the_noise_limit_does_not_grow_with_an_average_and_shrinks_with_a_sum(b: float) -> None:
    average = UpdateRule(decay=b, from_average=1, from_gradient=0)
    heavy = UpdateRule(decay=b, from_average=1 / (1 - b), from_gradient=0)
    assert noise_share(average.flip, average.gain, averaged=True) * average.flip == pytest.approx(2)
    sums = noise_share(heavy.flip, heavy.gain, averaged=True) * heavy.flip
    assert sums == pytest.approx(2 * (1 - b) ** 0.5)
    assert 2 * (1 - b) <= sums * (1 + 1e-12) and sums <= heavy.flip * (1 + 1e-12)  # between the two limits
    assert noise_share(2.0, 1.0, averaged=False) == UNAVERAGED


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


@pytest.mark.parametrize(
    ("multiple", "trial", "used", "options", "expected"),
    [
        (2.0, "roomy", 2.0, {}, 2 * STEP),
        (MULTIPLE_MOST, "roomy", 2.0, {}, MULTIPLE_MOST),
        (99.0, "roomy", 2.0, {}, 99.0),  # saved under a higher ceiling: a good trial does not cut
        (2.0, "fine", 2.0, {}, 2.0),
        (6.0, "tight", 6.0, {}, 6 / STEP),
        (6.0, "tight", 3.0, {}, 3 / STEP),  # below what was planned, or the cut would not cut
        (6.0, "tight", 0.0, {}, 6 / STEP),
        (2.1, "tight", 2.1, {}, MULTIPLE_LEAST),
        (1.1, "tight", 1.1, {}, 1.1),  # already below that floor
        (2.1, "tight", 2.1, {"again": True}, 2.1 / STEP),
        (0.3, "tight", 0.3, {"again": True}, MULTIPLE_LOW),
        (1.1, "bad", 1.1, {}, 1.1 / STEP),
        (0.6, "bad", 0.6, {}, MULTIPLE_FAILED),
        (0.6, "bad", 0.6, {"least": 0.01}, 0.6 / STEP),  # an alarm
        (9.0, "tight", 2.0, {"found": 3.0}, 3.0),  # what a search found
        (2.0, "bad", 2.0, {"found": 1e-3}, MULTIPLE_FAILED),
    ],
)
def test_learned_multiple(
    multiple: float, trial: Trial, used: float, options: dict[str, float], expected: float
) -> None:
    assert learned_multiple(multiple, trial, used=used, **options) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("slack", [0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("binding", [True, False])
def test_trial_steps_go_from_long_to_short_and_each_says_something_else(slack: float, binding: bool) -> None:
    lengths = rungs(slack, binding=binding, halvings=3)
    assert lengths == sorted(set(lengths), reverse=True) and lengths[-1] == 0.125
    last, seen = None, []
    while (length := next_rung(lengths, last, failed=True)) is not None:
        seen.append(length)
        last = length * (1 + 1e-9)  # lrs are rounded
    assert seen == lengths
    says = [judged(length, slack, failed=False) for length in lengths]
    expected = ["roomy"] * binding + ["fine"] + ["tight"] * (slack < 1) + ["bad"] * 3
    assert says == expected and {judged(length, slack, failed=True) for length in lengths} == {"bad"}
    assert max(lengths) == pytest.approx((ROOM if binding else 1) / slack)


def test_the_cap_catches_up_where_there_is_room_and_waits_after_a_failure() -> None:
    rises = {trial: learned_growth(1.02, held=1000, trial=trial) for trial in ("roomy", "fine", "tight", "bad")}
    assert rises == {"roomy": 1.02**CATCH_UP, "fine": 1.0005, "tight": 1.0, "bad": 1.0}
    assert learned_growth(1.0, held=5, trial="roomy") == 1.0  # growth=1 keeps its word


def test_gaps() -> None:
    assert [next_gap(9, alarm=a, trial_failed=f) for a, f in ((0, 0), (0, 1), (1, 0), (1, 1))] == [27, 9, 3, 3]
    gap, gaps = 2, []
    for _ in range(20):
        gaps.append(gap := next_trial_gap(gap))
    assert gaps == sorted(gaps) and gaps[-1] == TRIAL_GAP and TRIAL_PART < 1  # it does not stick at a small gap


@pytest.mark.parametrize(("alarm", "expected"), [(True, 120 + 10 - 30), (False, 90 + 10 - 30)])
def test_routine_measurements_leave_a_reserve_to_alarms(alarm: bool, expected: float) -> None:
    assert affordable(120.0, 0.05, updates=200, spent=30, alarm=alarm) == expected
    assert affordable(0.0, 0.0, updates=10**9, spent=0, alarm=alarm) == 0


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


def test_one_outlier_of_three_moves_no_median() -> None:
    assert median_limit([1.0, 1e-3, 1.0]) == pytest.approx(1.0)
    assert median_limit([1e-3, 2.0, 1.0, 1.0]) == pytest.approx(1.0)
    assert median_limit([1.0, 1e-4]) == pytest.approx(1e-2)
    assert median_limit([7.0]) == pytest.approx(7.0)


def controller(updates: int, **state: Any) -> Controller:
    made = Controller(Policy(), least_cost=8.0)
    made.state.updates = updates
    made.starts([UpdateRule()])  # gradient descent: c = 2, and the noise limit is the limit
    for name, value in state.items():
        setattr(made.state, name, value)
    return made


FOUND = Measurement(lr_limit=1.0, loss=1.0, trial_loss=2.0)


def test_a_young_run_searches_and_an_older_one_asks_whether_there_is_room() -> None:
    young, old = controller(0), controller(FREE_UPDATES, cap=2.0)
    tried: list[float] = []
    for made in (young, old):
        tried.clear()
        found = replace(FOUND, trial_loss=None)
        while (lr := made.lr_to_try(found, 1.0, 100.0)) is not None:
            tried.append(lr)
            found = replace(FOUND, trial_lr=lr)  # none is fine
        if made is young:
            assert tried == [2.0, 1.0, *(1.0 / 2**k for k in range(1, HALVINGS + 1))]  # at a margin of MARGIN_YOUNG
        else:
            assert tried == [16.0, 4.0, 2.0]
    assert old.lr_to_try(replace(FOUND, trial_lr=16.0, trial_loss=0.5), 1.0, 100.0) is None
    assert old.lr_to_try(replace(FOUND, trial_loss=None), 1.0, 0.5) == 1.0  # the cap does not bind: only what may fail
    broke = controller(FREE_UPDATES, cap=2.0, cost=120 + 0.05 * FREE_UPDATES - 0.1)
    assert broke.lr_to_try(replace(FOUND, trial_lr=4.0), 1.0, 100.0) is None  # the credit is spent
    strict = Controller(Policy(margin=0.5), least_cost=8.0)
    assert strict.lr_to_try(replace(FOUND, trial_loss=None), 1.0, 100.0) is None


def test_a_search_becomes_cap_and_reason() -> None:
    made = controller(0)
    found = replace(FOUND, trial_loss=0.9, trial_lr=0.5)
    trial, moved = made.settle(found, lr_ref=100.0, jump=None)
    assert trial == "bad" and moved is not None and "no trial step longer than lr 0.5 lowers the batch's loss" in moved
    assert made.state.cap == made.state.margin == MULTIPLE_FAILED


def test_a_limit_in_force_is_a_median_of_limits_at_the_present_momentum() -> None:
    made = controller(50, votes=[0.5, 0.5])  # limits over c
    assert made.in_force(1e-6) == pytest.approx(1.0)  # c = 2
    made.starts([UpdateRule(decay=0.9, from_average=1, from_gradient=0)])
    assert made.in_force(1e-6) == pytest.approx(19.0)  # c = 38
    strict = Controller(Policy(margin=0.5), least_cost=8.0)
    strict.state.updates, strict.state.votes = 50, [0.5, 0.5]
    assert strict.in_force(0.01) == 0.01
    young = controller(MATURE, votes=[0.5])
    assert young.in_force(0.01) == 0.01


def test_a_low_limit_counts_alone_only_where_the_planned_step_fails() -> None:
    low = replace(FOUND, lr_limit=0.01)
    for loss, expected in ((2.0, 0.01), (0.5, 1.0)):
        made = controller(50, votes=[0.5, 0.5], cap=1.0)
        planned = made.planned(made.in_force(low.lr_limit), 100.0)
        weighed = made.weighed(replace(low, trial_lr=planned, trial_loss=loss), 100.0)
        assert weighed.lr_limit == pytest.approx(expected)
        assert made.state.votes == [0.5, 0.5, 0.005]
    made = controller(MATURE - 1)
    assert made.weighed(low, 100.0).lr_limit == 0.01 and made.state.votes == []


def alarmed() -> Controller:
    """Thirty updates old, lr 2 at a limit of 1, after an alarm whose batch had a limit of a hundredth."""
    made = controller(30, votes=[0.5, 0.5], cap=2.0, multiple=2.0)
    low = made.weighed(replace(FOUND, lr_limit=0.01, trial_loss=None), 100.0, alarm=True)
    made.settle(low, lr_ref=100.0, jump="the gradient norm is 9, usual is 1")
    assert (low.lr_limit, made.state.cap, made.state.alone) == (0.01, 0.02, True)
    made.state.updates += 5
    return made


def room(made: Controller, lr_limit: float) -> Measurement:
    """Trial steps of which even the longest is fine."""
    return replace(FOUND, lr_limit=lr_limit, trial_lr=8 * made.planned(lr_limit, 100.0), trial_loss=0.9)


def test_the_limit_of_an_alarm_counts_alone_until_trial_steps_have_found_room_up_to_the_others() -> None:
    made = alarmed()
    fine = replace(FOUND, lr_limit=0.01, trial_lr=2 * made.planned(0.01, 100.0), trial_loss=0.9)
    assert made.settle_trial(fine, 100.0) is None
    assert made.state.alone and made.state.figures["lr_limit"] == 0.01
    for before, after in ((0.01, 0.04), (0.04, 0.16), (0.16, 0.64), (0.64, 1.0)):  # as far as the trials reach
        told = made.settle_trial(room(made, before), 100.0)
        assert told is not None and told[0] == "raise" and f"limit {before:.3g} -> {after:.3g}, of 1 before" in told[1]
        assert made.state.figures["lr_limit"] == made.state.measured_limit == pytest.approx(after)
        assert made.state.multiple == 2.0  # the limit was too low, not the multiple
        assert made.state.alone is (after < 1)
    assert made.state.cap == pytest.approx(made.policy.growth ** (4 * 5) * 0.02, rel=1e-2)  # raised slowly
    made.state.cap = 2.0
    told = made.settle_trial(room(made, 1.0), 100.0)
    assert told is not None and told[0] == "margin" and made.state.multiple == 3.0


def test_trial_steps_that_fail_after_one_with_room_lower_lr() -> None:
    made = alarmed()
    made.settle_trial(room(made, 0.01), 100.0)
    for _ in range(20):
        made.state.updates += 1
        made.state.cap = made.cap_under(made.state.figures["lr_limit"])
    caps = [made.state.cap]
    for _ in range(3):
        limit = made.state.figures["lr_limit"]
        bad = replace(FOUND, lr_limit=limit, trial_lr=made.planned(limit, 100.0))
        made.settle_trial(bad, 100.0)
        caps.append(made.state.cap)
    assert caps[0] == pytest.approx(0.08) and all(b < 0.7 * a for a, b in itertools.pairwise(caps))


def test_after_a_rewind_room_raises_no_limit_either() -> None:
    made = alarmed()
    made.state.calm_until = made.state.updates + 10
    assert made.settle_trial(room(made, 0.01), 100.0) is None
    assert (made.state.alone, made.state.trial, made.state.figures["lr_limit"]) == (True, "fine", 0.01)
    assert made.state.course.so_far["trials"] == 1


def test_the_next_measurement_ends_what_counts_alone() -> None:
    made = alarmed()
    made.state.figures["lr_limit"] = 0.01
    assert made.weighed(replace(FOUND, lr_limit=1.1, trial_loss=None), 100.0).lr_limit == pytest.approx(1.0)
    assert not made.state.alone


def test_the_margin_follows_the_momentum_of_a_young_average() -> None:
    made = Controller(Policy(), least_cost=8.0, unaveraged=UNAVERAGED)
    margins = []
    for decay in (0.0, 0.5, 0.9):
        made.starts([UpdateRule(decay=decay, from_average=1, from_gradient=0)])
        margins.append(made.state.margin)
    assert margins == [MARGIN_YOUNG, *(pytest.approx(MULTIPLE_START * 2 / c) for c in (6, 38))]
    made.state.updates = FREE_UPDATES
    made.starts([UpdateRule(from_average=1, from_gradient=0)])
    assert made.state.margin == MULTIPLE_START
    rms = Controller(Policy(), least_cost=8.0, unaveraged=UNAVERAGED)
    rms.starts([UpdateRule()])
    assert rms.state.margin == UNAVERAGED * MULTIPLE_START
    nothing = Controller(Policy(), least_cost=8.0)
    nothing.starts([None])
    assert nothing.state.margin == MARGIN_YOUNG
    muon = Controller(Policy(), least_cost=8.0, tolerance=8.0)
    muon.starts([UpdateRule(decay=0.9, from_average=1, from_gradient=0)])
    assert muon.state.margin == pytest.approx(8 * MULTIPLE_START * 2 / 38)


def test_a_searched_limit_has_no_margin_beyond() -> None:
    made = Controller(Policy(), least_cost=8.0, searched=True)
    made.starts([UpdateRule()])
    assert made.state.margin == made.policy.margin_max == MARGIN_SEARCHED
    assert Controller(Policy(margin=1), least_cost=8.0, searched=True).state.margin == 1


# ---- with the run's length


def test_the_noise_limit_is_annealed_by_a_power_of_the_runs_length_to_a_half() -> None:
    assert [annealed(updates) for updates in (0, 1, STEADY_FROM)] == [1.0, 1.0, 1.0]
    for length in (150, 400, 1_500):
        assert annealed(length) == pytest.approx((STEADY_FROM / length) ** ANNEALING, rel=1e-12)
    assert [annealed(updates) for updates in (1_600, 10**9)] == [ANNEALED_TO, ANNEALED_TO]


FREE_BEFORE = 700
"""Updates at which the cap held nothing back: they count for no rule of the run's length."""


def updated(made: Controller, updates: int) -> float:
    """The cap after so many updates at it, as it is decided on."""
    made.state.updates, made.state.held = updates + FREE_BEFORE, updates
    made.anneal()
    made.state.cap = made.cap_under(made.state.figures["lr_limit"])
    return made.state.cap


@pytest.mark.parametrize(
    ("policy", "options", "ratio"),
    [
        (Policy(), {}, 0.5),
        (Policy(follow_limit=True), {}, 0.5),
        (Policy(margin_max=1.0), {}, 1.0),  # 2 is cut to 1 at first, and half of 2 still is
        (Policy(margin_max=1.5), {}, 1 / 1.5),
        (Policy(margin=0.7), {}, 1.0),  # a number is kept strictly
        (Policy(), {"searched": True}, 1.0),  # that limit is of the coming step alone, whatever gamma follows
    ],
)
def test_a_learned_margin_is_annealed_between_measurements(
    policy: Policy, options: dict[str, Any], ratio: float
) -> None:
    made = Controller(policy, least_cost=8.0, **options)
    made.starts([UpdateRule()])
    made.state.updates, made.state.held = 100 + FREE_BEFORE, 100
    made.anneal()
    made.settle(Measurement(lr_limit=1.0), lr_ref=100.0, jump=None)
    first, multiple = updated(made, 100), made.state.multiple
    assert updated(made, 1_600) == pytest.approx(ratio * first, rel=1e-12)
    assert made.state.cap == pytest.approx(made.state.margin) and made.state.multiple == multiple
    again = Controller(policy, least_cost=8.0, **options)
    again.restore(made.state)  # a resumed run goes on as annealed as it was
    assert updated(again, 1_600) == pytest.approx(ratio * first, rel=1e-12)


def late(multiple: float, updates: int, *, share: float = 1.0, tried_at: int = 0) -> Controller:
    """A run under that multiple whose cap has held lr back for so many updates; before them lr was below it."""
    made = Controller(Policy(), least_cost=8.0)
    length = updates + FREE_BEFORE
    made.state = replace(
        made.state, multiple=multiple, told=multiple, updates=length, held=updates, share=share, tried_at=tried_at
    )
    made.state.figures["lr_limit"], made.state.measured_limit, made.state.flips = 1.0, 1.0, [2.0]
    made.anneal()
    made.state.cap = made.state.margin
    return made


@pytest.mark.parametrize("updates", [100, 2_000, 100_000])
def test_failed_trials_and_cuts_late_in_a_run_start_from_what_was_used(updates: int) -> None:
    """The multiple is in units of the annealed noise limit: annealing does not count twice, and lifts no floor."""
    made = late(4.5, updates)
    cap = made.state.cap or 0.0
    bad = Measurement(lr_limit=1.0, loss=1.0, trial_lr=cap, trial_loss=2.0)
    assert made.settle_trial(bad, 100.0) is not None
    assert made.state.multiple == pytest.approx(3.0) and made.state.cap == pytest.approx(cap / STEP)
    made = late(2.0, updates, share=1 / 19)  # a settled Adam
    cap = made.state.cap or 0.0
    go_back(made, made.state.state_dict(), 100.0)
    assert made.state.multiple == pytest.approx(2.0 / STEP) and made.state.cap == pytest.approx(cap / STEP)
    made = late(2.0, updates, share=1 / 19)
    assert cut(made) is not None
    assert made.state.multiple == pytest.approx(2.0 / STEP) and made.state.cap == pytest.approx(cap / STEP)


def test_above_its_start_the_multiple_moves_no_faster_than_the_runs_length() -> None:
    assert [pace(STEADY_FROM, 99), pace(1_000, 950), pace(1_000, 0)] == [STEP, pytest.approx(1.0526, rel=1e-4), STEP]
    slow = {"step": 1.1}
    assert learned_multiple(3.0, "roomy", used=3.0, **slow) == pytest.approx(3.3)
    assert learned_multiple(3.3, "tight", used=3.3, **slow) == pytest.approx(3.0)  # as slowly as it rises
    assert learned_multiple(3.0, "bad", used=3.0, **slow) == 2.0  # what does harm is cut at once
    assert learned_multiple(0.5, "roomy", used=0.5, **slow) == 0.75  # and given back at once
    assert [learned_multiple(m, "roomy", used=m, **slow) for m in (1.5, 1.999)] == [2.0, 2.0]  # so far and no further


def with_room(gap: int, last: int) -> dict[int, float]:
    """The caps of a run whose trial steps, so many updates apart, all find room."""
    made, caps = late(2.0, 100, tried_at=100), {}
    made.policy = replace(made.policy, margin_max=1e9)
    for updates in range(100 + gap, last + 1, gap):
        updated(made, updates)
        longest = ROOM / made.policy.trial_slack * made.planned(1.0, math.inf)
        made.settle_trial(Measurement(lr_limit=1.0, loss=1.0, trial_loss=0.5, trial_lr=longest), math.inf)
        caps[updates] = made.state.margin
    return caps


def test_where_every_trial_step_finds_room_lr_rises_like_the_runs_length_however_many_there_are() -> None:
    """As the multiple does, less annealing. In full steps it would be at MULTIPLE_MOST by update 500."""
    runs = [with_room(gap, 1_500) for gap in (20, 50, 100)]
    assert all(run[1_500] / run[300] == pytest.approx((1_500 / 300) ** (1 - ANNEALING), rel=0.05) for run in runs)


# ---- the crest


def test_the_crest_is_the_highest_cap_until_it_has_held_lr_back_for_a_hundred_updates() -> None:
    crest, seen = None, []
    for count, cap in {13: 1.0, 60: 3.0, 99: 2.0, 100: 2.5, 101: 7.0, 5_000: 1.0}.items():
        crest = next_crest(crest, cap, held=count)
        seen.append(crest)
    assert seen == [1.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert next_crest(None, 7.0, held=101) is None  # a state of a version that knew of none


def held(updates: int, wanted: float, limit: float, made: Controller) -> float:
    """The cap at that update, where so much is wanted and the limit is that."""
    made.state.updates, made.state.figures["lr_limit"] = max(made.state.updates, updates), limit
    made.begin(wanted)
    made.state.cap = made.cap_under(limit)
    made.state.stepped(wanted, min(wanted, made.state.cap), capped=wanted > made.state.cap)
    return made.state.cap


def test_a_limit_that_rises_late_in_a_run_lifts_no_cap_that_holds_lr_back() -> None:
    """It has mostly followed lr. Without a crest the cap would be at 2.7 by then."""
    made = late(2.0, 99)
    made.state.trial = "roomy"
    caps = {updates: held(updates, 100.0, updates / 100, made) for updates in range(99, 1_000)}
    assert caps[100] == pytest.approx(2.0, rel=0.01)
    for updates in (101, 400, 999):
        assert caps[updates] == pytest.approx(caps[100] * annealed(updates), rel=1e-12)
    assert made.state.held == 1_000 and made.state.updates == 1_000 + FREE_BEFORE
    # but what lies below it is given back as fast as ever
    made.state.cap = caps[999] / 4
    again = [held(updates, 100.0, 10.0, made) for updates in range(1_000, 1_020)]
    assert again[0] == pytest.approx(caps[999] / 4 * 1.02**5) and again[-1] == pytest.approx(
        caps[100] * annealed(1_019), rel=1e-12
    )


@pytest.mark.parametrize("wanted", [0.5, 0.0])  # less than the cap; a part of it, where lr follows it
def test_updates_at_which_the_cap_holds_nothing_back_neither_anneal_it_nor_set_its_crest(wanted: float) -> None:
    """A long warm-up is not to come upon a cap of its first hundred updates, annealed for its whole length."""
    made = Controller(Policy(), least_cost=8.0)
    made.starts([UpdateRule()])
    made.settle(Measurement(lr_limit=1.0), lr_ref=100.0, jump=None)
    for updates in range(1, 400):
        held(updates, wanted, 1.0, made)
    assert made.state.held == 0 and made.highest == math.inf and made.annealed == 1.0
    assert made.state.cap == made.state.margin == MULTIPLE_START
    after = [held(updates, 100.0, 1.0, made) for updates in range(400, 700)]
    assert after[99] == MULTIPLE_START == made.state.crest and made.state.held == 300
    assert after[-1] == pytest.approx(MULTIPLE_START * annealed(299), rel=1e-12)
    for updates in range(700, 1_000):
        held(updates, wanted, 1.0, made)
    assert made.state.held == 300 and made.state.cap == pytest.approx(after[-1], rel=1e-2)


@pytest.mark.parametrize(("cap", "said"), [(2.0, "is above the cap 2 = 2 x limit 1"), (0.5, "0.5, on its way to 2 x")])
def test_a_cap_that_may_not_rise_at_once_is_told_to_be_on_its_way(cap: float, said: str) -> None:
    made = late(2.0, 50)
    made.state.cap = cap
    action, reason = made.state.explain(Measurement(lr_limit=1.0), 100.0, cap, capped=True)
    assert action == "cap" and said in reason


def test_the_caps_of_a_young_run_are_no_part_of_its_crest() -> None:
    made = Controller(Policy(), least_cost=8.0)
    made.starts([UpdateRule()])
    made.settle(Measurement(lr_limit=9.0), lr_ref=100.0, jump=None)
    for updates in range(1, 200):
        held(updates, 100.0, 9.0 if updates < FREE_UPDATES - 1 else 1.0, made)
    assert made.state.crest == MULTIPLE_START


def test_a_margin_that_allows_what_is_wanted_is_not_wound_up_while_the_cap_is_on_its_way() -> None:
    """After one odd batch: each trial step at the low lr finds room."""
    made = late(2.0, 20)
    made.state.cap = 0.001
    for gap in range(10):
        held(1_000 + gap, 0.05, 1.0, made)
        assert made.planned(1.0, 0.05) < 0.05
        longest = ROOM / made.policy.trial_slack * made.planned(1.0, 0.05)
        made.settle_trial(Measurement(lr_limit=1.0, loss=1.0, trial_loss=0.5, trial_lr=longest), 0.05)
    assert made.state.trial == "roomy" and made.state.multiple == 2.0


def test_while_the_crest_binds_trial_steps_do_not_wind_the_multiple_up() -> None:
    """Else a limit that falls later would find a margin that nothing had tried."""
    made = late(2.0, 100)
    for updates in range(100, 400):
        held(updates, 100.0, 1.0 if updates < 200 else 4.0, made)
        longest = ROOM / made.policy.trial_slack * made.planned(made.state.figures["lr_limit"], 100.0)
        before = made.state.multiple
        if updates in (250, 350):
            made.settle_trial(Measurement(lr_limit=4.0, loss=1.0, trial_loss=0.5, trial_lr=longest), 100.0)
            assert made.state.trial == "roomy" and made.state.multiple == before
    assert held(400, 100.0, 0.5, made) == pytest.approx(2.0 * annealed(400) * 0.5)


@pytest.mark.parametrize(
    ("policy", "options"), [(Policy(margin=1.0), {}), (Policy(), {"searched": True})], ids=["fixed", "searched"]
)
def test_a_margin_that_is_not_learned_from_noise_has_no_crest(policy: Policy, options: dict[str, Any]) -> None:
    made = Controller(policy, least_cost=8.0, **options)
    made.settle(Measurement(lr_limit=1.0), lr_ref=100.0, jump=None)
    caps = [held(updates, 100.0, updates / 10, made) for updates in range(1, 1_000)]
    assert made.state.crest is None and caps[-1] > 3 * caps[99]


def test_an_lr_that_a_cap_holds_back_now_and_then_is_left_alone_in_between() -> None:
    """A crest of the dips alone would lie below lr, and hold it back for good."""
    made = late(2.0, 99)
    made.state.held, made.state.trial = 0, "roomy"
    for updates in range(99, 3_000):
        dip = updates % 100 < 10
        cap = held(updates, 1.2, 0.5 if dip else 1.0, made)
        assert dip or updates % 100 < 60 or cap > 1.2
    assert made.state.held > 2 * STEADY_FROM and made.state.crest == 2.0


def test_updates_without_any_cap_are_no_part_of_the_run_that_is_annealed() -> None:
    """A closure that comes late, or measurements that fail at first."""
    made = Controller(Policy(), least_cost=8.0)
    for _ in range(110):
        made.begin(100.0)
        made.state.stepped(100.0, 100.0, capped=False)
    made.starts([UpdateRule()])
    made.settle(Measurement(lr_limit=1.0), lr_ref=100.0, jump=None)
    assert made.state.held == 1 and made.annealed == 1.0 and made.highest == math.inf


def test_a_crest_of_a_learned_margin_does_not_bind_a_fixed_one_that_goes_on_from_it() -> None:
    learned = late(2.0, 400)
    learned.state.crest = 0.1
    assert learned.cap_under(1.0) == pytest.approx(0.1 * annealed(400))
    fixed = Controller(Policy(margin=0.5), least_cost=8.0)
    fixed.restore(learned.state)
    assert fixed.highest == math.inf and fixed.cap_under(1.0) == 0.5


@pytest.mark.parametrize(("updates", "bound"), [(STEADY_FROM, False), (STEADY_FROM + 1, True)])
def test_the_crest_binds_from_the_update_after_the_hundredth_on(updates: int, bound: bool) -> None:
    made = late(2.0, updates)
    made.state.crest = 0.1
    assert (made.highest < math.inf) is bound and (made.cap_under(1.0) < 0.2) is bound


def test_a_run_that_goes_back_to_before_its_first_limit_keeps_the_crest_with_the_cap() -> None:
    made = late(2.0, 300)
    made.state.crest = 0.7
    earlier = Controller(Policy(), least_cost=8.0).state.state_dict()
    go_back(made, earlier, 100.0)
    assert made.state.crest == 0.7 and made.state.held == 300


def test_a_cut_under_the_crest_tells_of_the_cap_that_there_was() -> None:
    made = late(2.0, 400)
    made.state.crest = made.state.cap = 0.2
    told = cut(made)
    assert told is not None and f"cap {0.2 * annealed(400):.3g} -> {0.2 / STEP:.3g}" in told


def test_some_are_annealed_by_a_power() -> None:
    made = Controller(Policy(margin_max=1e9), least_cost=8.0, tolerance=16.0, annealing=2.0)
    made.starts([UpdateRule()])
    margins = []
    for made.state.held in (0, 100, 400, 1_600, 10**6):
        made.anneal()
        margins.append(made.state.margin)
    assert margins == pytest.approx([16 * MULTIPLE_START * left for left in (1, 1, 0.5, 0.25, 0.25)])


def test_steps_that_shrink_by_themselves_are_not_annealed_but_have_a_crest() -> None:
    made = Controller(Policy(), least_cost=8.0, annealing=0.0)
    made.state = replace(late(2.0, 99).state)
    caps = [held(updates, 100.0, updates / 100, made) for updates in range(99, 1_000)]
    assert caps[-1] == made.state.crest == 2.0 and made.annealed == 1.0


def test_a_margin_at_what_decay_leaves_raises_the_multiple_no_further_and_a_lower_limit_leaves_more() -> None:
    made = late(8.0, 200, tried_at=10)
    made.state.cap, made.state.decay = 1.5, 0.5
    made.state.figures["lr_limit"] = 1.0
    made.anneal()
    assert made.state.margin == 2.0  # lr = 1 / .5
    tried = Measurement(lr_limit=1.0, loss=1.0, trial_loss=0.5, trial_lr=64.0)
    before = made.state.multiple
    assert made.settle_trial(tried, math.inf) is None
    assert (made.state.multiple, made.state.trial) == (before, "roomy")
    found = made.weighed(Measurement(lr_limit=0.1, decay=0.5), 1e-3)
    made.settle(found, lr_ref=1e-3, jump=None)
    assert made.state.margin == pytest.approx(min(8.0, 8.0 * annealed(200)))
    assert made.weighed(Measurement(lr_limit=0.01, decay=100.0), 1e-3).lr_limit <= 2 / 100


def test_a_margin_at_its_ceiling_raises_the_multiple_no_further() -> None:
    """Else annealing would have to undo first what never was in force."""
    made = late(8.0, 200, tried_at=10)
    made.state.multiple = made.state.told = 8.1 / annealed(200)
    made.anneal()
    made.state.cap = 8.0
    tried = Measurement(lr_limit=1.0, loss=1.0, trial_loss=0.5, trial_lr=64.0)
    before = made.state.multiple
    assert made.settle_trial(tried, math.inf) is None
    assert (made.state.multiple, made.state.trial) == (before, "roomy")


def test_small_moves_of_the_margin_are_told_once_they_add_up() -> None:
    made, told = late(3.0, 10_000, tried_at=9_900), []
    for updates in range(10_000, 12_001, 100):
        updated(made, updates)
        tried = Measurement(lr_limit=1.0, loss=1.0, trial_loss=0.5, trial_lr=8.0 * (made.state.cap or 0.0))
        told += [said[1] for said in [made.settle_trial(tried, 100.0)] if said is not None]
    assert made.state.multiple == pytest.approx(3.0 * 12_000 / 9_900)
    assert len(told) == 3 and told[0].startswith("margin 1.5 -> 1.58: even a trial step")


@pytest.mark.parametrize("beta1", [0.9, 0.96])
def test_what_did_harm_cuts_at_least_as_far_as_a_failed_trial(beta1: float) -> None:
    def control() -> Controller:
        made = Controller(Policy(), least_cost=8.0)
        made.settle(Measurement(lr_limit=1.0), lr_ref=10.0, jump=None)
        made.state.updates, made.state.share = 90, (1 - beta1) / (1 + beta1)
        made.anneal()
        made.state.cap = made.state.margin
        return made

    once = control()
    saved, before = once.state.state_dict(), once.state.multiple
    go_back(once, saved, 10.0)
    assert once.state.multiple == pytest.approx(before / STEP)
    for _ in range(8):
        go_back(once, once.state.state_dict(), 10.0)
    assert once.state.multiple == pytest.approx(min(MULTIPLE_FAILED, MARGIN_MIN / once.annealed_share))
    assert once.state.multiple <= MULTIPLE_FAILED

    def after(jump: str | None) -> float:
        made = control()
        bad = Measurement(lr_limit=1.0, trial_lr=made.state.margin, loss=1.0, trial_loss=9.0)
        made.settle(bad, lr_ref=10.0, jump=jump)
        return made.state.multiple

    assert after("the loss jumped") == after(None) < before


def test_a_rewind_keeps_the_calm_of_a_cut_since_the_snapshot() -> None:
    control = Controller(Policy(), least_cost=8.0)
    control.settle(Measurement(lr_limit=0.2), lr_ref=1.0, jump=None)
    saved = control.state.state_dict()
    control.state.updates += 5
    cut(control)
    go_back(control, saved, 1.0)
    assert control.state.calm_until == 5 + CALM_UPDATES


def test_what_an_older_state_was_told_of_is_its_own_margin() -> None:
    saved = State(multiple=6.0, margin=0.3, updates=700, expected_cost=8.0).state_dict()
    del saved["told"], saved["tried_at"]
    older = State.from_state_dict(saved)
    assert (older.told, older.tried_at) == (6.0, 700)


def test_a_growth_beyond_all_numbers_is_no_error() -> None:
    assert learned_growth(1e100, held=50, trial="roomy") == math.inf


def test_what_annealing_alone_has_lowered_is_not_told_as_a_cut() -> None:
    control = Controller(Policy(), least_cost=8.0)
    state = replace(control.state, updates=500, held=500, share=0.5, multiple=MULTIPLE_DRIFT, figures={"lr_limit": 1.0})
    control.state = state
    control.anneal()
    state.cap = state.margin  # of update 500
    state.updates = state.held = 501
    control.anneal()
    assert state.margin < state.cap and cut(control) is None


def test_a_margin_below_its_ceiling_is_told_as_annealed_only_by_as_much_as_it_is() -> None:
    for ceiling, part in ((8.0, annealed(800)), (0.05, 1.0), (0.7, annealed(800) / 0.7)):
        control = Controller(Policy(margin_max=ceiling), least_cost=8.0)
        control.state.updates, control.state.held, control.state.share = 800, 800, 0.5
        control.anneal()
        assert control.annealed_part == pytest.approx(part, rel=1e-12)


@pytest.mark.parametrize(("gamma", "decay"), [(10.0, 0.0), (10.0, 0.1), (1.0, 1.0), (1e-6, 3.0)])
@pytest.mark.parametrize(("then", "now"), [(0.0, 0.9), (0.9, 0.5), (0.9, 0.9)])
def test_a_limit_that_follows_momentum_is_the_rules_own_with_decoupled_decay(
    gamma: float, decay: float, then: float, now: float
) -> None:
    before, after = (UpdateRule(decay=b, from_average=1.0, from_gradient=0.0) for b in (then, now))
    made = Controller(Policy(margin=0.9), least_cost=8.0)
    made.starts([before])
    limit = float(lr_limit(before, gamma, decay))
    made.settle(made.weighed(Measurement(lr_limit=limit, decay=decay), 1e9), lr_ref=1e9, jump=None)
    made.follow([after])
    assert made.state.figures["lr_limit"] == pytest.approx(float(lr_limit(after, gamma, decay)), rel=1e-9)
