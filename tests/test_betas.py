"""Moving betas and eps on real optimizers: nothing jumps, the limit follows, and what is not ours is left alone."""

from __future__ import annotations

import copy
import gc
import io
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, SparseAdam
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from safe_lr import CoherenceGuard, CoherenceScheduler, measure
from safe_lr.preconditioners import preconditioner_of
from safe_lr.preconditioners.moves import age, movable_decays, move_decays, typical_root
from safe_lr.tuning import STEP, STEP_FRESH, decay_at
from tests.cases import Case

MOVED = [
    Case(Adam),
    Case(Adam, {"amsgrad": True}),
    Case(Adam, {"foreach": True}),
    Case(Adam, {"fused": True}),
    Case(Adam, {"betas": (torch.tensor(0.9), torch.tensor(0.999)), "foreach": False}),
    Case(Adam, {"maximize": True, "weight_decay": 0.1}),
    Case(AdamW, {"weight_decay": 0.1, "amsgrad": True, "foreach": True}),
    Case(NAdam),
    Case(NAdam, {"momentum_decay": 0.1, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    Case(RAdam),
    Case(RAdam, {"weight_decay": 0.1, "foreach": True}),
    Case(Adamax),
    Case(Adamax, {"weight_decay": 0.1, "foreach": True}),
    Case(RMSprop, {"alpha": 0.999}),
    Case(RMSprop, {"alpha": 0.999, "momentum": 0.9, "centered": True}),
]

FAR = (0.95, 0.99)

OLD, OLD_AVERAGE = 200, 1000  # updates; the second for an average that nothing corrects, of decay .999


class Stream:
    """An optimizer on a stream of gradients of its own."""

    def __init__(self, case: Case, noise: float = 1.0, dtype: torch.dtype = torch.float64) -> None:
        self.x = torch.nn.Parameter(torch.linspace(-1, 1, 3000, dtype=dtype))
        self.optimizer = Case(case.make, copy.deepcopy(case.options)).optimizer([self.x], 1e-3)  # betas as tensors
        self.noise, self.generator = noise, torch.Generator().manual_seed(3)

    def step(self, steps: int = 1) -> torch.Tensor:
        """Makes updates; returns the last one."""
        before = self.x.detach().clone()
        for _ in range(OLD_AVERAGE if steps == OLD and "alpha" in self.optimizer.defaults else steps):
            size = torch.linspace(0.5, 2, len(self.x), dtype=self.x.dtype)
            random = torch.randn(len(self.x), dtype=self.x.dtype, generator=self.generator)
            self.x.grad = size * (1 - self.noise + self.noise * random)
            before = self.x.detach().clone()
            self.optimizer.step()
        return self.x.detach() - before

    def twin(self) -> Stream:
        """The same, from here on, as another optimizer."""
        return copy.deepcopy(self)

    @property
    def decays(self) -> tuple[float | None, float | None]:
        return movable_decays(preconditioner_of(self.optimizer), self.optimizer.param_groups[0])

    def move(self, beta1: float | None, beta2: float | None) -> bool:
        optimizer = self.optimizer
        now = self.decays
        to = (beta1 if now[0] is not None else None), beta2
        return move_decays(preconditioner_of(optimizer), optimizer.param_groups[0], [*optimizer.state.values()], to)

    def move_one_step(self) -> bool:
        (first, second), step = self.decays, STEP_FRESH if isinstance(self.optimizer, NAdam) else STEP
        return self.move(None if first is None else decay_at(step, first, FAR[0]), decay_at(step, second, FAR[1]))


# ---- the averages


@pytest.mark.parametrize("updates", [0, 12, OLD])
@pytest.mark.parametrize("case", MOVED, ids=str)
def test_there_and_back_again_is_nothing(case: Case, updates: int) -> None:
    stream = Stream(case)
    stream.step(updates)
    still, (first, second) = stream.twin(), stream.decays
    if case.make is RMSprop and updates == 12:
        assert not stream.move(*FAR)  # too young
        return
    assert stream.move(*FAR)
    assert stream.decays == pytest.approx((FAR[0] if first is not None else None, FAR[1]))
    assert stream.move(first, second) and stream.decays == (first, second)
    for _ in range(5):
        torch.testing.assert_close(stream.step(), still.step(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("updates", [20, 60, OLD])
@pytest.mark.parametrize("case", MOVED, ids=str)
def test_after_a_move_the_first_update_changes_by_less_than_a_hundredth(case: Case, updates: int, noise: float) -> None:
    stream = Stream(case, noise)
    stream.step(updates)
    still = stream.twin()
    assert stream.move_one_step() == (case.make is not RMSprop or updates == OLD)
    assert float(stream.step().norm() / still.step().norm()) == pytest.approx(1, abs=0.01)


STEADY = [Case(Adam), Case(Adam, {"amsgrad": True}), Case(AdamW), Case(Adamax), Case(NAdam), Case(SparseAdam)]


@pytest.mark.parametrize("case", STEADY, ids=str)
def test_under_steady_gradients_the_averages_become_those_of_the_new_betas_all_along(case: Case) -> None:
    stream, other = Stream(case, noise=0.0), Stream(Case(case.make, {**case.options, "betas": FAR}), noise=0.0)
    stream.step(30), other.step(30)
    assert stream.move(*FAR)
    ((state,), (expected,)) = stream.optimizer.state.values(), other.optimizer.state.values()
    names = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} - ({"exp_avg"} if case.make is NAdam else set())
    for name in names & set(state):
        torch.testing.assert_close(state[name], expected[name], rtol=1e-9, atol=0)
    if case.make is not NAdam:  # it corrects by the product of its decays as they were: another road to the same place
        torch.testing.assert_close(stream.step(), other.step(), rtol=1e-9, atol=0)


def test_left_as_they_were_the_averages_would_make_a_step_three_times_too_large() -> None:
    stream = Stream(Case(Adam), noise=0.0)
    stream.step(50)
    careless, careful, still = stream.twin(), stream.twin(), stream.twin()
    careless.optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    assert careful.move(0.9, 0.95)
    usual = still.step().norm()
    second = (0.95 * (1 - 0.999**50) + 0.05) / (1 - 0.95**51)  # of g^2, which is 1
    assert float(careless.step().norm() / usual) == pytest.approx(second**-0.5, rel=1e-6) and second**-0.5 > 3
    assert float(careful.step().norm() / usual) == pytest.approx(1, rel=1e-6)


def test_amsgrads_maximum_goes_on_with_its_correction() -> None:
    stream = Stream(Case(Adam, {"amsgrad": True}))
    stream.step(20)
    ((before,),) = (copy.deepcopy([*stream.optimizer.state.values()]),)
    assert stream.move(*FAR)
    (after,) = stream.optimizer.state.values()
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        torch.testing.assert_close(after[name] / (1 - 0.99**20), before[name] / (1 - 0.999**20))
    torch.testing.assert_close(after["exp_avg"] / (1 - 0.95**20), before["exp_avg"] / (1 - 0.9**20))


def test_across_the_onset_of_rectification_nothing_can_go_on() -> None:
    stream = Stream(Case(RAdam))
    stream.step(3)  # not rectified yet
    before = copy.deepcopy([*stream.optimizer.state.values()])
    assert not stream.move(*FAR) and stream.decays == (0.9, 0.999)
    stream.step(9)
    assert not stream.move(0.9, 0.5)  # would never be rectified again
    assert stream.move(*FAR)
    (state,) = before
    assert int(state["step"]) == 3


def test_options_that_are_tensors_are_written_in_place() -> None:
    stream = Stream(Case(Adam, {"betas": (torch.tensor(0.9), torch.tensor(0.999)), "foreach": False}))
    betas = stream.optimizer.param_groups[0]["betas"]
    stream.step(20)
    assert stream.move(*FAR)
    assert all(ours is theirs for ours, theirs in zip(stream.optimizer.param_groups[0]["betas"], betas, strict=True))
    assert [float(b) for b in betas] == pytest.approx(FAR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_half_precision_and_complex_moments_move_too(dtype: torch.dtype) -> None:
    x = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = Adam([x], lr=1e-3)
    for _ in range(20):
        x.grad = torch.ones_like(x)
        optimizer.step()
    before = optimizer.state[x]["exp_avg_sq"].clone()
    assert move_decays(preconditioner_of(optimizer), optimizer.param_groups[0], [optimizer.state[x]], FAR)
    factor = (1 - 0.99**20) / (1 - 0.999**20)
    torch.testing.assert_close(optimizer.state[x]["exp_avg_sq"], before * factor)


def test_each_parameter_has_an_age_of_its_own() -> None:
    x, y = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = Adam([x, y])
    for update in range(20):
        x.grad, y.grad = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        if update < 15:
            y.grad = None
        optimizer.step()
    states = [optimizer.state[p] for p in (x, y)]
    assert age(states) == 20 and int(states[1]["step"]) == 5
    assert move_decays(preconditioner_of(optimizer), optimizer.param_groups[0], states, FAR)
    for state, t in zip(states, (20, 5), strict=True):
        assert float(state["exp_avg_sq"]) == pytest.approx(1 - 0.99**t)


@pytest.mark.parametrize("case", [Case(Adam), Case(RMSprop), Case(Adagrad), Case(RAdam), Case(Adamax)], ids=str)
def test_the_typical_root_is_a_quantile_of_what_eps_is_added_to(case: Case) -> None:
    stream = Stream(case)
    stream.step(20)
    (state,), (group,) = stream.optimizer.state.values(), stream.optimizer.param_groups
    root = {
        Adam: lambda: (0.999 * state["exp_avg_sq"] / (1 - 0.999**21)).sqrt(),
        RMSprop: lambda: (0.99 * state["square_avg"]).sqrt(),
        Adagrad: lambda: state["sum"].sqrt(),
        RAdam: lambda: (0.999 * state["exp_avg_sq"]).sqrt(),
        Adamax: lambda: 0.999 * state["exp_inf"],
    }[case.make]()
    found = typical_root(preconditioner_of(stream.optimizer), group, [state], 0.1)
    assert found == pytest.approx(float(root.quantile(0.1)), rel=1e-5)


def test_nothing_is_typical_before_the_first_gradient() -> None:
    x = torch.zeros(3, requires_grad=True)
    optimizer = Adam([x])
    model, (group,) = preconditioner_of(optimizer), optimizer.param_groups
    assert typical_root(model, group, [], 0.1) is None
    x.grad = torch.zeros(3)
    optimizer.step()
    assert typical_root(model, group, [optimizer.state[x]], 0.1) is None


# ---- under a guard


class Training:
    """A small classifier that is measured at every tenth update; `rows` holds what each update was made with."""

    def __init__(self, make: Any = Adam, lr: float = 3.0, schedule: Any = None, seed: int = 1, **options: Any) -> None:
        torch.manual_seed(seed)
        self.x = torch.randn(256, 8, dtype=torch.float64)
        self.y = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()(self.x).argmax(1)
        self.model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 4)).double()
        self.optimizer = make(self.model.parameters(), lr=lr)
        known = {"loggers": None, "max_overhead": 99.0, **options}
        self.scheduler = CoherenceScheduler(self.optimizer, schedule, **known)
        self.rows: list[tuple[float, Any, float]] = []

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.x[self.batch]), self.y[self.batch])

    def train(self, updates: int, first: int = 0) -> Training:
        for update in range(first, first + updates):
            self.batch = torch.randint(256, (192,), generator=torch.Generator().manual_seed(update))
            self.optimizer.zero_grad()
            self.loss().backward()
            self.scheduler.observe(self.loss)
            state = self.scheduler._guard._state
            state.due_at = 10 * (state.updates // 10)
            if state.updates % 10:
                state.due_at += 10
            self.optimizer.step()
            group = self.optimizer.param_groups[0]
            self.rows.append((group["lr"], group.get("betas", group.get("momentum")), group.get("eps", 0.0)))
            self.scheduler.step()
        return self

    def told(self, *actions: str) -> list[Any]:
        return [decision for decision in self.scheduler.history if decision.action in actions]


def test_off_by_default() -> None:
    run = Training().train(60)
    assert {row[1:] for row in run.rows} == {((0.9, 0.999), 1e-8)}
    assert not run.told("betas", "eps", "hold") and run.scheduler.summary().capped_steps == 60


@pytest.mark.parametrize("bound", ["momentum", "coherence"])
def test_the_limit_in_force_is_that_of_the_betas_in_force(bound: str) -> None:
    schedule = partial(LambdaLR, lr_lambda=lambda update: 1.0 if update < 65 else 1e-6)
    run = Training(schedule=schedule, tune_betas=True, margin=0.5, tol=1e-5, bound=bound)
    checked, betas = {"up": 0, "down": 0}, [(0.9, 0.999)]

    def check(*_: Any) -> None:  # after the guard's own hook: inside the very update that the move is for
        decision = run.scheduler.last_decision
        if decision is None or decision.action != "betas" or decision.step != len(run.rows):
            return
        fresh = measure(run.optimizer, run.loss, tol=1e-6, bound=bound)
        assert decision.lr_limit == pytest.approx(fresh.lr_limit, rel=1e-3)
        assert run.optimizer.param_groups[0]["lr"] <= 0.5 * fresh.lr_limit * 1.001
        assert decision.lr_after == run.optimizer.param_groups[0]["lr"] <= decision.cap
        assert (decision.beta1, decision.beta2) == run.optimizer.param_groups[0]["betas"]
        if "->" in decision.reason.split(":")[0]:
            checked["up" if run.optimizer.param_groups[0]["betas"] > betas[-1] else "down"] += 1
        betas.append(run.optimizer.param_groups[0]["betas"])

    run.optimizer.register_step_pre_hook(check)
    run.train(150)
    assert checked["up"] >= 2 and checked["down"] >= 1, checked


def test_the_limit_follows_a_beta1_that_moves() -> None:
    run = Training(tune_betas=True, margin=0.5, beta2_range=(0.9, 0.95)).train(25)  # beta2 stays
    held, moved = run.told("hold")[0], run.told("betas")[0]
    assert "beta2 0.999 stays" in held.reason and moved.beta2 == 0.999
    measured = next(d for d in run.scheduler.history if d.step == moved.step and d.num_matvecs)
    t = moved.step + 1
    c = [flip(b1, t) for b1 in (0.9, moved.beta1)]
    assert moved.lr_limit / measured.lr_limit == pytest.approx(c[1] / c[0], rel=1e-6) and c[1] > c[0]


def flip(b1: float, t: int) -> float:
    """2 (1 + a) / (1 - a), a the decay of an average that is 1 + .9 (t - 1) updates old."""
    age = 1 + 0.9 * (t - 1)
    a = b1 * (1 - b1 ** (age - 1)) / (1 - b1**age)
    return 2 * (1 + a) / (1 - a)


def test_a_beta1_that_is_taken_back_takes_the_cap_with_it() -> None:
    run = Training(tune_betas=True, margin=0.5, growth=1e3).train(21)
    tuner = run.scheduler._guard._tuner
    assert run.told("betas")
    tuner.betas.dial = replace(tuner.betas.dial, before=1e-9)  # whatever gamma is now, the move did not help
    run.train(30, first=21)
    back = next(d for d in run.told("betas") if "taken back" in d.reason)
    measured = next(d for d in run.scheduler.history if d.step == back.step and d.num_matvecs)
    assert measured.lr_after == pytest.approx(0.5 * measured.lr_limit)
    assert back.lr_limit < 0.97 * measured.lr_limit and back.lr_before == measured.lr_after
    assert run.rows[back.step][0] == back.lr_after == pytest.approx(0.5 * back.lr_limit)


def test_a_young_average_goes_on_growing_old_after_a_verdict_that_moves_nothing() -> None:
    run = Training(tune_betas=True, margin=0.5).train(21)
    guard = run.scheduler._guard
    guard._tuner.betas.dial = replace(guard._tuner.betas.dial, before=1e9, position=1.0)  # it helped, and is at the end
    run.train(10, first=21)
    while not run.told("betas")[-1].reason.startswith("betas stay"):
        run.train(10, first=len(run.rows))
    verdict = run.told("betas")[-1]
    assert len(run.rows) == verdict.step + 1
    run.train(3, first=len(run.rows))
    t = verdict.step + 1
    rise = flip(verdict.beta1, t + 3) / flip(verdict.beta1, t)
    assert guard._state.figures["lr_limit"] / verdict.lr_limit == pytest.approx(rise, rel=1e-6) and rise > 1.0005


def test_every_move_is_a_decision_and_what_followed_is_said() -> None:
    run = Training(tune_betas=True).train(200)
    moves = [d for d in run.told("betas") if "->" in d.reason.split(":")[0]]
    changes = [now for old, now in pairwise(run.rows) if old[1] != now[1]]
    assert len(moves) == len(changes) >= 2
    assert [(d.beta1, d.beta2) for d in moves] == [row[1] for row in changes]
    assert "the desired lr is" in moves[0].reason and "since the last move" not in moves[0].reason
    assert all("gamma " in d.reason and "since the last move" in d.reason for d in run.told("betas")[1:])
    measured = {d.step for d in run.scheduler.history if d.num_matvecs}
    steps = [d.step for d in moves]
    assert set(steps) <= measured and len(set(steps)) == len(steps)
    assert all(d.num_matvecs == 0 and d.cost == 0 for d in moves)  # the measurement's own row has them
    for earlier, later in pairwise(moves):
        assert later.step - earlier.step >= min(earlier.step, 1 / (1 - 0.999)) * 0.9  # as long as the memory lasts


def test_slack_at_a_schedules_end_brings_the_users_own_values_back() -> None:
    schedule = partial(LambdaLR, lr_lambda=lambda update: 1.0 if update < 65 else 1e-6)
    run = Training(schedule=schedule, tune_betas=True, beta1_range=(0.5, 0.95), beta2_range=(0.9, 0.999))
    run.optimizer.param_groups[0]["betas"] = (0.7, 0.95)  # short memories: time for many moves
    run.train(180)
    moved = [row[1] for row in run.rows]
    assert max(b1 for b1, _ in moved) > 0.75 and min(b2 for _, b2 in moved) < 0.945
    assert moved[-1] == (0.7, 0.95)
    back = [d.reason for d in run.told("betas") if d.step >= 65 and "the desired lr is" in d.reason]
    ratios = [float(reason.split("the desired lr is ")[1].removesuffix(" times the cap")) for reason in back]
    assert ratios and max(ratios) < 0.001


def test_someone_elses_momentum_cycle_is_left_alone() -> None:
    cycle = {"max_lr": 1.0, "total_steps": 90}
    run = Training(schedule=lambda opt: OneCycleLR(opt, **cycle), tune_betas=True).train(80)
    bare = Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = OneCycleLR(bare, **cycle)
    for _, betas, _ in run.rows:
        assert betas == bare.param_groups[0]["betas"]
        bare.step()
        schedule.step()
    assert [d.reason.split(": ")[1] for d in run.told("hold")][-1] == "someone else writes betas"
    assert len(run.told("hold")) <= 2 and not run.told("betas")  # one for beta1, which starts at the end of its range


def test_an_optimizer_without_betas_trains_on_as_ever() -> None:
    tuned, plain = Training(SGD, tune_betas=True).train(60), Training(SGD).train(60)
    assert tuned.rows == plain.rows
    (held,) = tuned.told("hold")
    assert held.reason == "parameter group 0: the optimizer has no betas that tune_betas could move"
    assert held.failure is None and tuned.scheduler.summary().failures == 0


@pytest.mark.parametrize(("margin", "moves"), [("auto", True), (0.5, False)])
def test_where_lr_follows_the_cap_a_trial_step_must_ask_for_more(margin: Any, moves: bool) -> None:
    run = Training(seed=0, tune_betas=True, follow_limit=True, margin=margin, margin_max=0.2).train(80)
    told = [decision.reason for decision in run.told("betas")]
    assert bool(told) == moves
    if moves:  # a young run tries no longer ones
        assert "a step 2 times as long would be fine" in told[0]
        assert any("a step 8 times as long would be fine" in reason for reason in told[1:])


@pytest.mark.parametrize("how", ["closed", "dropped", "succeeded"])
def test_in_the_end_the_users_own_values_come_back(how: str) -> None:
    run = Training(seed=2, tune_betas=True, tune_eps=True).train(80)
    _, (b1, b2), eps = run.rows[-1]
    assert b1 > 0.9 and b2 < 0.999 and eps > 1e-8
    states = [*run.optimizer.state.values()]
    t = int(states[0]["step"])
    seen = [s["exp_avg_sq"] / (1 - b2**t) for s in states]
    if how == "closed":
        run.scheduler.close()
    elif how == "succeeded":
        with pytest.warns(RuntimeWarning, match="already had a safe_lr scheduler"):
            CoherenceGuard(run.optimizer, loggers=None).close()
    else:
        del run.scheduler
        gc.collect()
    group = run.optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.999), 1e-8, 3.0)
    torch.testing.assert_close([s["exp_avg_sq"] / (1 - 0.999**t) for s in states], seen)


def saved(*parts: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("first", ["optimizer", "scheduler"])
def test_a_resumed_run_goes_on_bit_for_bit(first: str) -> None:
    options = {"seed": 4, "tune_betas": True, "tune_eps": True}
    whole, stopped = Training(**options).train(80), Training(**options).train(40)
    assert stopped.rows[-1][1] != (0.9, 0.999) and stopped.rows[-1][2] > 1e-8
    model, optimizer, scheduler = saved(
        *(p.state_dict() for p in (stopped.model, stopped.optimizer, stopped.scheduler))
    )
    resumed = Training(**options)
    resumed.model.load_state_dict(model)
    loads = [lambda: resumed.optimizer.load_state_dict(optimizer), lambda: resumed.scheduler.load_state_dict(scheduler)]
    for load in loads if first == "optimizer" else loads[::-1]:
        load()
    resumed.train(40, first=40)
    assert resumed.rows == whole.rows[40:]
    assert len(whole.told("betas", "eps")) > len(stopped.told("betas", "eps"))
    later = [{**asdict(d), "seconds": 0} for d in whole.scheduler.history if d.step >= 40]
    assert [{**asdict(d), "seconds": 0} for d in resumed.scheduler.history] == later
    resumed.scheduler.close()
    assert resumed.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_state_of_the_first_versions_is_loaded() -> None:
    state = Training().train(20).scheduler.state_dict()
    del state["guard"]["tuner"]
    run = Training(tune_betas=True)
    run.scheduler.load_state_dict(state)
    run.train(40, first=20)
    assert run.told("betas")


def test_eps_lifts_p_min_and_the_limit_counts_it() -> None:
    run = Training(tune_eps=True, margin=0.5, tol=1e-5, lambda_every=1)
    seen = []

    def check(*_: Any) -> None:
        decision = run.scheduler.last_decision
        if decision is not None and decision.action == "eps" and decision.step == len(run.rows):
            fresh = measure(run.optimizer, run.loss, tol=1e-6)
            assert decision.lr_limit == pytest.approx(fresh.lr_limit, rel=1e-3)
            group = run.optimizer.param_groups[0]
            moved, group["eps"] = group["eps"], 1e-8
            without = measure(run.optimizer, run.loss, tol=1e-6)
            group["eps"] = moved
            assert fresh.p_min == pytest.approx(without.p_min + moved - 1e-8, rel=1e-6) and fresh.gamma <= without.gamma
            seen.append(moved)

    run.optimizer.register_step_pre_hook(check)
    run.train(150)
    assert len(seen) >= 2 and seen[0] > 1e-8


def test_a_failed_measurement_moves_nothing_and_undoes_eps() -> None:
    run = Training(tune_betas=True, tune_eps=True).train(14)
    values = run.rows[-1][1:]

    def fails() -> Tensor:
        raise ValueError("no loss")

    run.scheduler._guard._probe = [fails]
    run.scheduler._guard._state.due_at = 0
    with pytest.warns(RuntimeWarning, match="could not measure"):
        run.train(40, first=14)
    assert {row[1:] for row in run.rows[14:]} == {values}


@pytest.mark.parametrize("option", ["tune_betas", "tune_eps"])
@pytest.mark.parametrize("make", [AdamW, NAdam, RAdam, Adamax])
def test_other_optimizers_are_tuned_too(make: Any, option: str) -> None:
    run = Training(make, lr=30.0, margin_max=0.2, **{option: True}).train(60)
    assert run.told("betas" if option == "tune_betas" else "eps")
    assert all(d.failure is None for d in run.scheduler.history)
    assert float(run.loss().detach()) < 1.2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"beta1_range": (0.95, 0.9)}, ValueError),
        ({"beta2_range": (0.99, 1.0)}, ValueError),
        ({"eps_range": 1e-8}, TypeError),
        ({"tune_betas": "yes"}, TypeError),
    ],
)
def test_bad_options_are_refused_and_leave_no_hook(options: dict[str, Any], error: type[Exception]) -> None:
    optimizer = Adam([torch.zeros(1, requires_grad=True)])
    with pytest.raises(error, match=next(iter(options))):
        CoherenceScheduler(optimizer, **options)
    assert not optimizer._optimizer_step_pre_hooks


def test_the_config_that_loggers_are_told_has_the_ranges() -> None:
    config = CoherenceGuard(
        Adam([torch.zeros(1, requires_grad=True)]), loggers=None, tune_betas=True, beta1_range=[0.8, 0.9]
    )._config()
    assert config["tune_betas"] is True and config["beta1_range"] == (0.8, 0.9) and config["tune_eps"] is False


# ---- a small demonstration; benchmarks say how much it is worth


def final_loss(run: Training) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(run.model(run.x), run.y))


def test_at_an_lr_that_fits_nothing_moves_to_the_bit() -> None:
    plain, tuned = (Training(lr=0.003, tune_betas=tune, tune_eps=tune).train(100) for tune in (False, True))
    assert tuned.rows == plain.rows and final_loss(tuned) == final_loss(plain)
    assert not tuned.told("betas", "eps", "hold")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("option", ["tune_betas", "tune_eps"])
def test_at_a_hundred_times_that_lr_moves_say_what_they_did_and_do_no_harm(option: str, seed: int) -> None:
    plain, tuned = Training(seed=seed).train(150), Training(seed=seed, **{option: True}).train(150)
    told = tuned.told("betas" if option == "tune_betas" else "eps")
    assert len(told) >= 2 and "since the last move" in told[1].reason
    assert all(0.9 <= b1 <= 0.95 and 0.99 <= b2 <= 0.999 and 1e-8 <= eps <= 1e-3 for _, (b1, b2), eps in tuned.rows)
    assert final_loss(tuned) < 2 * final_loss(plain) < 0.2
