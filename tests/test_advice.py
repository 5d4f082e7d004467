"""Advice: what a user is told follows from numbers, and the numbers are counted right, live and from a record."""

import math
import random
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_loggers import play

from safe_lr import CoherenceGuard
from safe_lr.accounts import State
from safe_lr.advice import BIN, ENOUGH, YOUNG, Course, advise
from safe_lr.decisions import Decision, Figures, Summary
from safe_lr.loggers import JsonlLogger, Records, read_jsonl
from safe_lr.loggers.facts import summary_of
from safe_lr.policies import FREE_UPDATES
from safe_lr.report import render


def summary(**changes):
    """A run of 1,000 steps at lr .1 that nothing is to be said of but its cost."""
    quiet = {
        "steps": 1000, "measurements": 9, "failures": 0, "num_matvecs": 30, "cost": 50.0, "overhead": 0.05,
        "capped_steps": 0, "first_capped_step": None, "worst_utilisation": 0.5, "margin": 0.5, "cap": 0.2,
        "lr_limit": 0.4, "seconds": 1.5, "lr_desired_low": 0.1, "lr_desired_high": 0.1, "lr_applied_high": 0.1,
    }  # fmt: skip
    return Summary(**quiet | changes)


def capped(**changes):
    """The same with an lr of 1 that was capped in 930 steps."""
    held = {
        "capped_steps": 930, "first_capped_step": 70, "last_capped_step": 999, "pressure": 20.0, "pressure_max": 50.0,
        "lr_desired_low": 1.0, "lr_desired_high": 1.0, "lr_applied_high": 0.06, "cap_low": 0.02,
    }  # fmt: skip
    return summary(**held | changes)


def said(run, topic=None):
    return [advice.text for advice in advise(run) if topic in (None, advice.topic)]


# ---- the sentences


def test_a_quiet_run_is_told_that_nothing_bound_and_what_it_cost():
    assert said(summary()) == [
        "The cap never bound in 1,000 steps: every lr was applied as desired.",
        "Measuring cost 50 gradient evaluations, 5 % of what the 1,000 steps took, and 1.5 s.",
    ]
    assert advise(summary(steps=0)) == []


def test_how_often_and_how_hard_the_cap_bound():
    (cap,) = (advice for advice in advise(capped()) if advice.topic == "cap")
    assert cap.text.startswith("The cap bound in 930 of 1,000 steps (93 %): the desired lr was 20 times")
    assert cap.figures == {"capped_steps": 930, "steps": 1000, "pressure": 20.0, "pressure_max": 50.0}


def test_a_constant_lr_could_be_the_largest_that_was_applied():
    lower, safe = said(capped(), "lr")
    assert lower == "lr could be lowered from 1 to 0.06, the largest that was applied, without losing anything."
    assert safe == "An lr of 0.02 would have been below the cap throughout, the first 13 updates apart."


def test_nothing_is_said_of_lowering_where_the_desired_lr_was_applied_at_times():
    assert not any("lowered" in text for text in said(capped(lr_applied_high=1.0)))
    assert not any("lowered" in text for text in said(capped(capped_steps=499)))


def test_of_a_schedule_the_peak_is_named():
    lower = said(capped(lr_desired_low=0.0), "lr")[0]
    assert "a peak of 0.06, the largest lr that was applied, instead of 1 would let more of its shape through" in lower


@pytest.mark.parametrize(("cap_low", "told"), [(0.39, False), (0.4, True), (3.0, True)])
def test_lr_may_be_too_small_where_the_cap_was_far_above_throughout(cap_low, told):
    run = summary(cap_low=cap_low, trials=12, trial_room=2.0)
    assert any("lr may be too small" in text for text in said(run, "lr")) == told
    if told:
        assert f"never below {cap_low / 0.1:.3g} times 0.1, and all 12 trial steps, at least 2 times" in said(run)[2]


def test_one_failed_trial_or_too_few_are_no_sign_of_room():
    assert not any("too small" in text for text in said(summary(cap_low=3.0, trials=12, trials_failed=1, trial_room=2)))
    few = said(summary(cap_low=3.0, trials=ENOUGH - 1, trial_room=2.0), "lr")
    assert few[1] == "lr may be too small: the cap was never below 30 times 0.1."


@pytest.mark.parametrize(
    ("room", "failed", "told"), [(8.0, 0, True), (2.0, 0, False), (8.0, 1, False), (None, 0, False)]
)
def test_the_cap_may_be_too_low_where_long_trial_steps_were_all_fine(room, failed, told):
    found = said(capped(trials=9, trials_failed=failed, trial_room=room), "lr")
    assert any("The cap may be too low: all 9 trial steps, at least 8 times" in text for text in found) == told


@pytest.mark.parametrize(
    ("capped_steps", "last", "told"),
    [(37, 36, True), (20, 36, True), (17, 36, False), (250, 249, True), (251, 250, False)],
)
def test_what_bound_at_the_start_only_is_a_warm_up(capped_steps, last, told):
    found = said(summary(capped_steps=capped_steps, first_capped_step=0, last_capped_step=last), "warm-up")
    wanted = f"The cap bound only in the first {last + 1} of 1,000 updates: a warm-up of that length would do the same."
    assert found == [wanted] * told


def test_betas():
    still = {"beta1_first": 0.9, "beta2_first": 0.999, "beta1": 0.9, "beta2": 0.999}
    assert said(summary(**still), "betas") == []
    assert said(capped(**still), "betas") == [
        "Betas stayed at (0.9, 0.999): tune_betas=True lets them move towards (0.95, 0.99) while the cap binds; "
        "in nine benchmarks that gained nothing."
    ]
    assert said(capped(**still | {"beta2": 0.99, "beta2_first": 0.99}), "betas") == []  # there is no room
    assert said(capped(beta1=0.9, beta1_first=0.9), "betas") == []  # momentum alone
    moved = said(summary(**still | {"beta1": 0.95, "beta2": 0.993}), "betas")
    assert moved == ["Betas moved, beta1 from 0.9 to 0.95 and beta2 from 0.999 to 0.993: a new run could start there."]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"failures": 2}, "2 of 9 measurements failed"),
        ({"unprotected_steps": 1}, "1 update had no cap yet"),
        ({"measurements": 4}, "All limits of the run stand on 4 measurements"),
        ({"unconverged": 3}, "3 of 9 measurements ran out of products"),
        ({"differences": 9}, "9 measurements took central finite differences"),
        ({"inferred": True}, "inferred from the optimizer's own updates"),
        ({"summed": 2, "gradient_ratio": 4.02}, "up to 4.02 times the closure's"),
        ({"unrepeatable": True}, "two losses for one random state"),
        ({"beyond_steps": 5}, "beyond the linear limit in 5 steps (under 1 %)"),
    ],
)
def test_each_doubt_is_told_where_it_is_one(changes, words):
    assert said(summary(), "doubt") == []
    (doubt,) = said(summary(**changes), "doubt")
    assert words in doubt


def test_a_run_without_any_limit_is_not_said_to_be_within_it():
    first, *rest = said(summary(cap=None, lr_limit=None, unprotected_steps=1000, failures=9))
    assert first == "No limit was measured in 1,000 steps: every lr was applied as desired, unprotected."
    assert sum("no cap yet" in text for text in rest) == 0


def test_where_lr_follows_the_limit_nothing_is_desired():
    run = summary(lr_desired_low=None, lr_desired_high=None, lr_applied_high=0.3, cap_low=0.1)
    assert said(run, "cap") == ["lr followed the limit for 1,000 steps, up to 0.3."]
    assert not any("too small" in text for text in said(run))


# ---- the numbers


def test_the_median_is_right_to_its_bin_and_nothing_grows_with_the_run():
    random.seed(0)
    course, exact = Course(), []
    for step in range(3000):
        exact.append(10 ** random.uniform(0.1, 3))
        course.step(step, desired=exact[-1], applied=1.0, cap=1.0, lr_limit=2.0)
    assert course.figures()["pressure"] == pytest.approx(statistics.median(exact), rel=BIN - 1)
    assert course.so_far["pressure_max"] == pytest.approx(max(exact))
    assert len(course.pressures) <= 1 + math.log(1000, BIN)
    assert sum(course.pressures.values()) == 3000


def test_what_an_update_leaves_behind():
    course = Course()
    course.step(0, desired=1.0, applied=1.0, cap=None, lr_limit=None)  # no cap yet
    course.step(1, desired=1.0, applied=0.001, cap=0.001, lr_limit=0.01)  # young: that cap says nothing
    course.step(YOUNG, desired=0.5, applied=0.3, cap=0.3, lr_limit=0.2, times=10)
    course.step(YOUNG + 10, desired=0.1, applied=0.1, cap=0.25, lr_limit=0.2)
    so_far = Figures(**course.so_far)
    assert so_far.unprotected_steps == 1 and so_far.beyond_steps == 10
    assert (so_far.lr_desired_low, so_far.lr_desired_high, so_far.lr_applied_high) == (0.1, 1.0, 1.0)
    assert so_far.cap_low == 0.25 and so_far.last_capped_step == YOUNG + 9
    assert YOUNG == FREE_UPDATES


def test_a_zero_lr_is_not_under_pressure():
    course = Course()
    course.step(0, desired=0.0, applied=0.0, cap=1.0, lr_limit=2.0)
    assert course.so_far["pressure_max"] is None and course.so_far["last_capped_step"] is None
    assert course.figures()["pressure"] is None


def bowl(**options):
    """A guard on 2 x1^2 + x2^2 / 2 at an lr far too high, after 50 updates; lr_limit is 2 / 4."""
    x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    curvature = torch.tensor([2.0, 0.5])
    optimizer = torch.optim.SGD([x], lr=100.0)
    guard = CoherenceGuard(optimizer, loggers=None, **options)
    for _ in range(50):
        loss = (x**2 * curvature).sum()
        loss.backward()
        guard.observe(lambda: (x**2 * curvature).sum())
        optimizer.step()
        optimizer.zero_grad()
    return guard


def test_a_real_run_is_told_its_closed_form():
    run = bowl(margin=0.5).summary()
    assert run.pressure == pytest.approx(400, rel=BIN - 1) and run.pressure_max == pytest.approx(400, rel=1e-4)
    assert run.cap_low == pytest.approx(0.25, rel=1e-4) and run.unprotected_steps == 0
    assert str(run).count("\n* ") == len(run.advice) == len(advise(run))
    assert "The cap bound in 50 of 50 steps (100 %): the desired lr was 400 times" in str(run)
    assert "lr could be lowered from 100 to 0.25" in str(run)


def test_the_promised_lr_gives_the_same_run():
    """lr lowered to the largest that was applied: not one update changes."""
    x = {}
    for lr in (100.0, None):
        p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        optimizer = torch.optim.Adam([p], lr=lr or x["advised"])
        guard = CoherenceGuard(optimizer, margin=0.5, loggers=None)
        for _ in range(60):
            loss = (p**2 * torch.tensor([2.0, 0.5])).sum()
            loss.backward()
            guard.observe(lambda p=p: (p**2 * torch.tensor([2.0, 0.5])).sum())
            optimizer.step()
            optimizer.zero_grad()
        x[lr] = p.detach()
        if lr:
            (x["advised"],) = [a.figures["lr_applied_high"] for a in advise(guard.summary()) if "lowered" in a.text]
    assert x["advised"] < 50 and torch.equal(x[100.0], x[None])


def test_trials_of_the_learned_margin_are_counted():
    run = bowl(trial_slack=0.5).summary()
    assert run.trials >= 1 and run.trials_failed <= run.trials


def test_the_state_goes_round(tmp_path):
    guard = bowl(margin=0.5)
    torch.save(guard.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    state = State.from_state_dict(loaded["state"])
    assert state.course == guard._state.course and state.course.pressures is not loaded["state"]["course"]["pressures"]
    assert state.summary() == guard.summary()
    del loaded["state"]["course"]
    assert State.from_state_dict(loaded["state"]).course == Course()


# ---- from a record


@pytest.mark.parametrize("every", [1, 10])
def test_a_record_tells_what_the_run_itself_tells(tmp_path, every):
    path = tmp_path / "run.jsonl"
    x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = torch.optim.SGD([{"params": [x]}], lr=100.0, momentum=0.9)
    guard = CoherenceGuard(optimizer, margin=0.5, loggers=JsonlLogger(path, every=every))
    for _ in range(50):
        loss = (x**2 * torch.tensor([2.0, 0.5])).sum()
        loss.backward()
        guard.observe(lambda: (x**2 * torch.tensor([2.0, 0.5])).sum())
        optimizer.step()
        optimizer.zero_grad()
    guard.close()
    whole = guard.summary()
    assert summary_of(read_jsonl(path)) == whole
    assert list(whole.advice) == read_jsonl(path).summary["advice"]
    killed = "".join(line for line in path.read_text().splitlines(True) if '"kind":"summary"' not in line)
    path.write_text(killed)
    again = summary_of(read_jsonl(path))
    named = ("steps", "capped_steps", "last_capped_step", "pressure_max", "lr_applied_high", "beta1")
    assert [getattr(again, name) for name in named] == pytest.approx([getattr(whole, name) for name in named], rel=0.01)
    kept = [row["cap"] for row in read_jsonl(path).rows if row["step"] >= YOUNG]  # the rows that were written
    assert again.cap_low == min(kept) and (every > 1 or again.cap_low == whole.cap_low)
    page = render(read_jsonl(path))
    assert page.index(again.advice[0]) < page.index("The record covers")


def test_the_group_with_the_largest_desired_lr_speaks():
    rows = [
        {"step": k, "lr": 0.01, "lr_desired": 0.1, "lr/g1": 0.1, "lr_desired/g1": 1.0, "cap": 0.1} for k in range(20)
    ]
    found = summary_of(Records(rows=rows))
    assert (found.lr_desired_high, found.lr_applied_high, found.cap_low) == (1.0, 0.1, 0.1)


def test_a_record_of_a_run_that_followed_the_limit():
    runs = [{"version": "1", "config": {"follow_limit": True}}]
    rows = [{"step": k, "lr": 0.1, "lr_desired": 0.1, "cap": 0.1, "capped": 0} for k in range(20)]
    assert summary_of(Records(runs=runs, rows=rows)).advice[0] == "lr followed the limit for 20 steps, up to 0.1."


def test_a_record_with_little_in_it_is_no_error(tmp_path: Path):
    assert summary_of(Records()).advice == ()
    told = play([JsonlLogger(tmp_path / "a.jsonl")], 300)
    found = summary_of(read_jsonl(tmp_path / "a.jsonl"))
    assert found.capped_steps == len(told["capped"]) and found.beta1 > found.beta1_first == 0.9
    assert found.unconverged == 0
    only = summary_of(Records(decisions=[Decision(0, 0, "hold", "", 1.0, 1.0, 1.0, 0.5, failure="loss is nan")]))
    assert only.failures == 1 and only.advice


def test_the_summary_is_plain_in_json():
    told = summary(advice=("a", "b")).to_dict()
    assert told["advice"] == ["a", "b"] and set(told) == set(asdict(summary()))


def test_updates_that_were_not_made_are_told():
    assert said(summary(drops=1), "rewind") == [
        "1 update was dropped: gradient or loss of the batch was not finite, or far out. Look at the data."
    ]
    (drops, rewinds) = said(summary(drops=3, rewinds=2), "rewind")
    assert drops.startswith("3 updates were dropped") and rewinds.startswith("The run went back 2 times")
    assert said(summary(), "rewind") == []


def test_every_figure_is_declared_once():
    own = set(Summary.__annotations__)
    assert not own & set(Figures.__annotations__) and set(Course().figures()) == set(Figures.__annotations__)


def test_a_run_that_goes_back_forgets_nothing_of_its_course():
    state = bowl(margin=0.5)._state
    saved = state.state_dict()
    for _ in range(10):
        state.stepped(100.0, 0.25, capped=True)
    again = state.gone_back(saved)
    assert sum(again.course.pressures.values()) == again.capped_steps == again.updates == 60
