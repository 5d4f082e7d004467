"""When betas and eps move: the pure part."""

import math
from itertools import pairwise

import pytest
import torch

from safe_lr.tuning import (
    HARD,
    PATIENCE,
    PRESSES,
    SETTLING,
    SLACK,
    STEP,
    Dial,
    Tuning,
    clipped,
    decay_at,
    eps_at,
    memory,
    pressure,
)

WHY = "the cap binds"


def ready(gamma=10.0, **options):
    return Dial(**options).saw(gamma)


def turned(dial, press, updates=SETTLING, wait=100.0, **options):
    return dial.turned(press, WHY, updates=updates, wait=wait, **options)


# ---- settings


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("beta1_range", (0.95, 0.9)),
        ("beta1_range", (0.9, 0.9)),
        ("beta1_range", (0.9, 1.0)),
        ("beta2_range", (-0.1, 0.9)),
        ("beta2_range", (0.9, math.nan)),
        ("eps_range", (1e-3, 1e-8)),
        ("eps_range", (-1e-8, 1e-3)),
        ("eps_range", (0.0, math.inf)),
    ],
)
def test_an_empty_or_impossible_range_is_refused_with_the_mend(option, value):
    with pytest.raises(ValueError, match=f"{option} must be two numbers, 0 <= lowest < highest.* such as .*; got "):
        Tuning(**{option: value})


@pytest.mark.parametrize("value", [0.9, "0.9, 0.95", (0.9,), (0.9, 0.92, 0.95), (0.9, "0.95"), (True, 0.95), None])
def test_a_range_is_a_pair_of_numbers(value):
    with pytest.raises(TypeError, match="beta1_range must be two numbers"):
        Tuning(beta1_range=value)


@pytest.mark.parametrize("option", ["tune_betas", "tune_eps"])
def test_it_is_a_flag(option):
    with pytest.raises(TypeError, match=f"{option} must be True or False, got 1"):
        Tuning(**{option: 1})


def test_a_list_will_do_for_a_range():
    assert Tuning(beta1_range=[0, 0.5]).beta1_range == (0.0, 0.5)


@pytest.mark.parametrize(
    ("own", "ends"),
    [
        ((0.9, 0.999), (0.95, 0.99)),
        ((0.92, 0.995), (0.95, 0.99)),
        ((0.0, 0.999), (None, 0.99)),  # nobody who goes without momentum is given some
        ((0.9, 0.95), (0.95, None)),
        ((0.95, 0.99), (None, None)),  # at the ends already
        ((0.99, 0.9999), (None, None)),
        ((None, 0.995), (None, 0.99)),
        (tuple(float(torch.tensor(b)) for b in (0.9, 0.999)), (0.95, 0.99)),  # as tensors hold them
        (tuple(float(torch.tensor(b)) for b in (0.95, 0.99)), (None, None)),
    ],
)
def test_a_beta_outside_of_its_range_stays(own, ends):
    assert Tuning().ends(*own) == ends


# ---- positions


@pytest.mark.parametrize(("own", "end"), [(0.9, 0.95), (0.999, 0.99), (0.0, 0.9), (0.5, 0.5)])
def test_a_decays_memory_goes_from_end_to_end_in_equal_factors(own, end):
    decays = [decay_at(i / 10, own, end) for i in range(11)]
    assert decays[0] == own and decays[-1] == end  # exactly
    factors = [(1 - a) / (1 - b) for a, b in pairwise(decays)]
    assert factors == pytest.approx([((1 - own) / (1 - end)) ** 0.1] * 10)


def test_what_stays_stays():
    assert decay_at(0.7, 0.8, None) == 0.8
    assert eps_at(0.7, 1e-8, 0.0) == 1e-8  # nothing is known of the second moment


@pytest.mark.parametrize("updates", [1, 7, 100, 100_000])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_memory_is_the_sum_of_the_weights_over_the_newest(decay, updates):
    weights = [decay**age for age in range(updates)]
    assert memory(decay, updates) == pytest.approx(sum(weights) / weights[0])


@pytest.mark.parametrize(("position", "inside"), [(-0.1, 0.0), (1e-12, 0.0), (0.3, 0.3), (1.0, 1.0), (1.2, 1.0)])
def test_a_position_lies_inside(position, inside):
    assert clipped(position) == inside


# ---- pressure


def test_where_lr_follows_the_cap_a_trial_step_speaks_for_a_larger_one():
    assert pressure(0.2, 0.1, longer=4.0)[0] == 2.0  # a desired lr goes before
    assert pressure(math.inf, 0.1, longer=4.0) == (4.0, "a step 4 times as long would be fine")
    press, why = pressure(math.inf, 0.1, longer=None)
    assert SLACK < press < PRESSES and why == "nothing says that lr is too small"


# ---- the dial


@pytest.mark.parametrize("press", [PRESSES, 2.0, HARD, 1e6, math.inf])
def test_the_harder_the_cap_binds_the_longer_the_move(press):
    dial, reason = turned(ready(), press)
    expected = STEP * min(1.0, math.log(press) / math.log(HARD))
    assert dial.position == dial.moved == pytest.approx(expected) and reason == WHY
    assert dial.before == 10.0 and dial.gamma is None and dial.free_at == SETTLING + 100


@pytest.mark.parametrize("press", [0.0, SLACK, 1.0, PRESSES - 0.01])
def test_without_pressure_the_users_own_values_stay(press):
    dial = ready()
    assert turned(dial, press) == (dial, None)


@pytest.mark.parametrize("press", [0.0, 100.0])
def test_nothing_moves_before_its_time(press):
    dial = ready(position=0.5, free_at=200)
    assert turned(dial, press, updates=199) == (dial, None)
    assert turned(dial, press, updates=200)[0].position != 0.5


def test_nothing_moves_before_a_gamma_was_measured():
    assert turned(Dial(position=0.5), 100.0) == (Dial(position=0.5), None)


def test_slack_leads_back_to_exactly_the_users_own_values():
    dial, positions = ready(position=0.3), [0.3]
    for updates in range(1000, 2000, 200):
        dial, reason = turned(dial.saw(10.0), SLACK, updates=updates)
        positions.append(dial.position)
    assert positions == pytest.approx([0.3, 0.3 - STEP, 0.3 - 2 * STEP, 0.0, 0.0, 0.0])
    assert dial.position == 0.0


def test_a_move_that_lowered_gamma_is_followed_by_the_next():
    dial, _ = turned(ready(), HARD)
    dial, reason = turned(dial.saw(8.0), HARD, updates=500)
    assert dial.position == pytest.approx(2 * STEP) and dial.failures == 0
    assert reason == "gamma 10 -> 8 since the last move; the cap binds"


def test_what_followed_is_said_where_nothing_moves_on():
    dial, _ = turned(ready(), HARD)
    dial, reason = turned(dial.saw(8.0), 1.0, updates=500)
    assert (dial.position, dial.moved, reason) == (pytest.approx(STEP), 0.0, "gamma 10 -> 8 since the last move")
    assert turned(dial.saw(7.0), 1.0, updates=700)[1] is None  # once


@pytest.mark.parametrize("gamma", [10.0, 12.0])
@pytest.mark.parametrize("press", [0.1, 1.0, HARD])
def test_a_move_that_did_not_help_is_taken_back_exactly(gamma, press):
    start = ready(position=0.3)
    dial, _ = turned(start, 3.0)
    dial, reason = turned(dial.saw(gamma), press, updates=500)
    assert dial.position == pytest.approx(0.3) and dial.failures == 1
    assert reason == f"gamma 10 -> {gamma:g} since the last move, which did not help and is taken back"
    assert dial.free_at == 500 + 200  # the wait doubles


def test_the_wait_doubles_up_to_a_bound_and_a_success_ends_it():
    dial, waits, updates = ready(), [], SETTLING
    for _ in range(PATIENCE + 3):
        dial, _ = turned(dial, HARD, updates=updates)  # forward
        updates = dial.free_at
        dial, _ = turned(dial.saw(99.0), HARD, updates=updates)  # and back
        waits.append(dial.free_at - updates)
        updates = dial.free_at
        dial = Dial(dial.position, free_at=dial.free_at, failures=dial.failures).saw(10.0)
    assert waits == [100 * 2 ** min(i, PATIENCE) for i in range(1, PATIENCE + 4)]
    dial, _ = turned(dial, HARD, updates=updates)
    assert turned(dial.saw(1.0), HARD, updates=dial.free_at)[0].failures == 0


def test_a_wait_is_at_least_as_long_as_a_young_run():
    assert turned(ready(), HARD, updates=50, wait=0.0)[0].free_at == 50 + SETTLING


@pytest.mark.parametrize(("press", "moves"), [(HARD, False), (SLACK, True)])
def test_a_held_dial_moves_back_only(press, moves):
    dial, _ = turned(ready(position=0.5), press, held=True)
    assert (dial.position != 0.5) == moves


def test_gamma_is_a_mean_that_starts_anew_with_each_move():
    dial = Dial().saw(16.0).saw(1.0)
    assert dial.gamma == pytest.approx(4.0)
    moved, _ = turned(dial, HARD)
    assert moved.before == pytest.approx(4.0) and moved.saw(9.0).gamma == 9.0
