"""`CoherenceScheduler` as a torch scheduler. The oracle is torch: a twin optimizer under the bare schedule."""

import gc
import io
import weakref
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, Rprop
from torch.optim import lr_scheduler as lrs

from safe_lr import CoherenceGuard, CoherenceScheduler
from safe_lr.policies import FREE_UPDATES

LR = 1e-3  # far below every limit of the loss |x|^2 / 2
STEPS = 30

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "constant": lambda o: lrs.ConstantLR(o, factor=1.0, total_iters=0),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, T_max=STEPS),
    "cosine-short": lambda o: lrs.CosineAnnealingLR(o, T_max=12, eta_min=LR / 50),
    "one-cycle": lambda o: lrs.OneCycleLR(o, max_lr=[4 * LR, LR], total_steps=STEPS + 1),
    "one-cycle-fixed": lambda o: lrs.OneCycleLR(o, max_lr=LR, total_steps=STEPS + 1, cycle_momentum=False),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=4, T_mult=2),
    "warm-up": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.01, total_iters=6), lrs.CosineAnnealingLR(o, T_max=20)], [6]
    ),
    "lambda-from-0": lambda o: lrs.LambdaLR(o, lambda step: min(1.0, step / 8)),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.97),
    "multi-step": lambda o: lrs.MultiStepLR(o, [5, 14, 22], gamma=0.3),
    "step": lambda o: lrs.StepLR(o, 7, gamma=0.5),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.93),
    "cyclic": lambda o: lrs.CyclicLR(o, LR / 10, LR, step_size_up=5, mode="exp_range", gamma=0.99),
    "polynomial": lambda o: lrs.PolynomialLR(o, total_iters=25, power=2.0),
    "chained": lambda o: lrs.ChainedScheduler([lrs.LinearLR(o, 0.1, total_iters=9), lrs.ExponentialLR(o, 0.95)]),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=2, cooldown=1),
}
OPTIMIZERS = {"sgd": lambda groups: SGD(groups, lr=LR, momentum=0.9), "adam": lambda groups: Adam(groups, lr=LR)}


class Run:
    """Two groups (lr ratio 4) on |x|^2 / 2, optionally seen by the guard as sharper; `log` is what each update used."""

    def __init__(self, make: Callable[[Any], Optimizer], lr: float | Tensor = LR) -> None:
        self.params = [nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([0.5]))]
        quarter = lr / 4
        self.optimizer = make([{"params": [self.params[0]], "lr": lr}, {"params": [self.params[1]], "lr": quarter}])
        self.log: list[Any] = []

    def loss(self) -> Tensor:
        return sum(((p**2).sum() / 2 for p in self.params), torch.zeros(()))

    def update(self, scheduler: Any, steps: int = 1, *, sharpness: float = 1.0, metrics: bool = False) -> "Run":
        for _ in range(steps):
            loss = self.loss()
            loss.backward()
            if isinstance(scheduler, CoherenceScheduler):
                scheduler.observe(lambda: sharpness * self.loss())
            self.optimizer.step()
            groups = self.optimizer.param_groups
            self.log.append([{k: group.get(k) for k in ("lr", "momentum", "betas")} for group in groups])
            # A metric that stops improving halfway.
            scheduler.step(max(0.0, 1.0 - 0.1 * len(self.log))) if metrics else scheduler.step()
            self.optimizer.zero_grad()
        return self

    @property
    def lrs(self) -> list[list[float]]:
        return [[float(group["lr"]) for group in groups] for groups in self.log]


def ours(run: Run, schedule: Any = None, **options: Any) -> CoherenceScheduler:
    return CoherenceScheduler(run.optimizer, schedule, **{"margin": 0.5, "loggers": None, **options})


def capped(**options: Any) -> tuple[Run, CoherenceScheduler]:
    """A run whose lr of 1.0 the guard has capped to .5 * 2 / 100 = .01."""
    run = Run(lambda groups: SGD(groups), lr=options.pop("lr", 1.0))
    scheduler = ours(run, **options)
    run.update(scheduler, sharpness=100.0)
    return run, scheduler


# ---- nothing capped, and no longer capped


@pytest.mark.parametrize("made", ["lambda", "made"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_an_uncapped_run_is_torchs_to_the_bit(name: str, optimizer: str, made: str) -> None:
    twin, mine, metrics = Run(OPTIMIZERS[optimizer]), Run(OPTIMIZERS[optimizer]), name == "plateau"
    twin.update(SCHEDULES[name](twin.optimizer), STEPS, metrics=metrics)
    scheduler = ours(mine, SCHEDULES[name] if made == "lambda" else SCHEDULES[name](mine.optimizer))
    mine.update(scheduler, STEPS, metrics=metrics)
    assert mine.log == twin.log
    assert all(map(torch.equal, mine.params, twin.params))
    assert scheduler.get_last_lr() == scheduler.get_desired_lr() == [g["lr"] for g in twin.optimizer.param_groups]
    summary = scheduler.summary()
    assert (summary.capped_steps, summary.failures, summary.steps) == (0, 0, STEPS)
    assert summary.measurements > 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_cap_that_was_lifted_leaves_no_trace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safe_lr.controller.next_gap", lambda *_, **__: 1)  # measure at each update
    make, metrics = OPTIMIZERS["sgd"], name == "plateau"
    twin, mine = Run(make), Run(make)
    bare, scheduler = SCHEDULES[name](twin.optimizer), ours(mine, SCHEDULES[name], credit=1e9, growth=1e9)
    for step in range(STEPS):
        twin.update(bare, metrics=metrics)
        mine.update(scheduler, sharpness=1e6 if 10 <= step <= 20 else 1.0, metrics=metrics)
        assert scheduler.get_desired_lr() == [g["lr"] for g in twin.optimizer.param_groups]
        if 10 <= step <= 20:
            (a, b), (want_a, want_b) = mine.lrs[step], twin.lrs[step]
            assert a < want_a
            assert b < want_b
            assert a / b == pytest.approx(want_a / want_b, rel=1e-12)
        else:
            assert mine.log[step] == twin.log[step]
    assert scheduler.summary().capped_steps == 11


@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25)], ids=["float", "tensor"])
def test_a_cap_is_margin_times_limit_and_closing_takes_it_back(lr: Any) -> None:
    run, scheduler = capped(lr=lr)
    before = [group["lr"] for group in run.optimizer.param_groups]
    assert [float(x) for x in scheduler.get_last_lr()] == pytest.approx([0.01, 0.0025], rel=0.01)
    assert scheduler.get_desired_lr() == [0.25, 0.0625]
    if isinstance(lr, Tensor):
        run.update(scheduler, 3, sharpness=100.0)
        assert all(group["lr"] is x for group, x in zip(run.optimizer.param_groups, before, strict=True))
        assert all(shown is not x for shown, x in zip(scheduler.get_last_lr(), before, strict=True))
    for _ in range(2):
        scheduler.close()
        assert [float(g["lr"]) for g in run.optimizer.param_groups] == [0.25, 0.0625]
    run.optimizer.step()
    assert [float(g["lr"]) for g in run.optimizer.param_groups] == [0.25, 0.0625]


def test_a_closed_scheduler_is_the_bare_schedule() -> None:
    run, scheduler = capped()
    scheduler.close()
    scheduler.step()
    assert scheduler.get_last_lr() == [1.0, 0.25]


def test_a_tensor_lr_under_a_schedule_is_torchs() -> None:
    twin, mine = (Run(lambda groups: SGD(groups, foreach=False), lr=torch.tensor(LR)) for _ in range(2))
    tensor = mine.optimizer.param_groups[0]["lr"]
    bare, scheduler = lrs.ExponentialLR(twin.optimizer, 0.9), ours(mine, lambda o: lrs.ExponentialLR(o, 0.9))
    for _ in range(10):
        twin.update(bare)
        mine.update(scheduler)
        assert scheduler.get_last_lr() == [g["lr"] for g in twin.optimizer.param_groups]
    assert mine.optimizer.param_groups[0]["lr"] is tensor


# ---- ours inside torch's


@pytest.mark.parametrize("combine", ["chained-first", "chained-last", "sequential-first", "sequential-last"])
def test_ours_inside_torchs_combinations_is_torchs(combine: str) -> None:
    def combined(optimizer: Optimizer, wrap: Callable[[Any], Any]) -> Any:
        kind, place = combine.split("-")
        parts = [lrs.LinearLR(optimizer, 0.1, total_iters=8), lrs.ExponentialLR(optimizer, 0.9)]
        index = 0 if place == "first" else 1
        parts[index] = wrap(parts[index])
        return lrs.ChainedScheduler(parts) if kind == "chained" else lrs.SequentialLR(optimizer, parts, [8])

    twin, mine = Run(OPTIMIZERS["sgd"]), Run(OPTIMIZERS["sgd"])
    inner: list[CoherenceScheduler] = []

    def wrap(part: Any) -> CoherenceScheduler:
        inner.append(ours(mine, part))
        return inner[0]

    bare, outer = combined(twin.optimizer, lambda part: part), combined(mine.optimizer, wrap)
    for step in range(20):
        twin.update(bare)
        loss = mine.loss()
        loss.backward()
        inner[0].observe(mine.loss)
        mine.update(outer)
        assert mine.log[step] == twin.log[step]
        assert outer.get_last_lr() == bare.get_last_lr()
    assert inner[0].last_epoch == bare._schedulers[int(combine.endswith("last"))].last_epoch


# A sibling that computes its next lr from the present one must not see the cap: what it makes of it would be taken for
# someone's wish, and the desired lr would shrink for good.
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("combine", ["chained", "sequential"])
def test_no_cap_leaks_into_a_sibling(combine: str, place: str) -> None:
    def combined(optimizer: Optimizer, wrap: Callable[[Any], Any]) -> Any:
        ours_is, other = lrs.ConstantLR(optimizer, 1.0, 0), lrs.ExponentialLR(optimizer, 0.9)
        parts = [wrap(ours_is), other] if place == "first" else [other, wrap(ours_is)]
        if combine == "sequential":
            return lrs.SequentialLR(optimizer, parts, [3])
        return lrs.ChainedScheduler(parts)

    twin, mine = (Run(lambda groups: SGD(groups), lr=1.0) for _ in range(2))
    inner: list[CoherenceScheduler] = []
    used: list[float] = []
    mine.optimizer.register_step_post_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    bare = combined(twin.optimizer, lambda part: part)
    outer = combined(mine.optimizer, lambda part: inner.append(ours(mine, part)) or inner[0])
    for _ in range(8):
        twin.update(bare)
        mine.loss().backward()
        inner[0].observe(lambda: 100 * mine.loss())
        mine.update(outer)
        assert outer.optimizer.param_groups[0]["lr"] == bare.optimizer.param_groups[0]["lr"]
        assert used[-1] == pytest.approx(0.01, rel=0.01)
    assert inner[0].get_last_lr()[0] == pytest.approx(0.01, rel=0.01)
    assert inner[0].get_desired_lr() == [group["lr"] for group in twin.optimizer.param_groups]


@pytest.mark.parametrize("make", [lambda opt: 3, lambda opt: lrs.StepLR(SGD(Run(SGD).params), 1)])
def test_a_failed_constructor_leaves_no_hook(make: Callable[[Any], Any]) -> None:
    optimizer = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError, match="schedule"):
        CoherenceScheduler(optimizer, schedule=make)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_a_scheduler_that_is_gone_leaves_the_desired_lr() -> None:
    run, scheduler = capped()
    alive = weakref.ref(scheduler)
    del scheduler
    gc.collect()
    assert alive() is None
    run.loss().backward()
    run.optimizer.step()
    assert [group["lr"] for group in run.optimizer.param_groups] == [1.0, 0.25]


def test_the_cap_may_be_observed_at_lr_0() -> None:
    run = Run(lambda groups: SGD(groups), lr=1.0)
    scheduler = ours(run, lambda o: lrs.LambdaLR(o, lambda step: step / 4), growth=1.0)
    run.update(scheduler, 12, sharpness=100.0)
    assert run.lrs[0] == [0.0, 0.0]
    assert all(lr == pytest.approx([0.01, 0.0025], rel=0.01) for lr in run.lrs[1:])
    assert scheduler.get_desired_lr() == [3.0, 0.75]


def test_it_is_a_torch_scheduler_and_shows_the_inner_schedule() -> None:
    run = Run(OPTIMIZERS["sgd"])
    scheduler = ours(run, lambda o: lrs.CosineAnnealingLR(o, T_max=7))
    assert isinstance(scheduler, lrs.LRScheduler)
    assert (scheduler.T_max, scheduler.base_lrs, scheduler.last_epoch) == (7, [LR, LR / 4], 0)
    assert scheduler.optimizer is run.optimizer
    with pytest.raises(AttributeError, match="no_such_thing"):
        scheduler.no_such_thing  # noqa: B018


# ---- what others do to the groups


def test_someone_elses_write_wins() -> None:
    run, scheduler = capped()
    run.optimizer.param_groups[1]["lr"] = 1e-4
    assert scheduler.get_desired_lr() == [1.0, 1e-4]
    scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.01, rel=0.01)
    assert scheduler.get_last_lr()[1] <= 1e-4
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-5
    run.update(scheduler, 2, sharpness=100.0)
    assert scheduler.get_last_lr() == scheduler.get_desired_lr() == [1e-5, 1e-5]


def test_a_group_that_is_added_later_is_capped_too() -> None:
    run, scheduler = capped()
    run.params.append(nn.Parameter(torch.tensor([3.0])))
    run.optimizer.add_param_group({"params": [run.params[2]], "lr": 0.5})
    run.update(scheduler, 2, sharpness=100.0)
    assert scheduler.get_desired_lr() == [1.0, 0.25, 0.5]
    assert scheduler.get_last_lr() == pytest.approx([0.01, 0.0025, 0.005], rel=0.01)
    assert scheduler.last_decision.step == 1  # the new group's first update is measured


@pytest.mark.parametrize("how", ["added", "from-0"])
def test_the_first_update_of_a_new_group_is_protected(how: str) -> None:
    run = Run(lambda groups: SGD(groups[:1] if how == "added" else groups), lr=0.01)
    run.optimizer.param_groups[-1]["lr"] *= how == "added"
    guard = CoherenceGuard(run.optimizer, margin=0.5, loggers=None, restore=False)
    for _ in range(2):
        (100 * run.loss()).backward()
        guard.observe(lambda: 100 * run.loss())
        run.optimizer.step()
        run.optimizer.zero_grad()
        if how == "added" and len(run.optimizer.param_groups) == 1:
            run.optimizer.add_param_group({"params": [run.params[1]]})
        run.optimizer.param_groups[1]["lr"] = 1.0
    assert run.loss() < 1.0  # lr 1.0 is fifty times the limit 2 / 100


# ---- saving and resuming


def saved(*parts: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Training:
    """An MLP with dropout at a hundred times too large an lr."""

    def __init__(self, optimizer: str, warm_start: bool) -> None:
        torch.manual_seed(1)
        self.x, self.y = torch.randn(64, 6), torch.randint(0, 3, (64,))
        self.model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 3))
        params = self.model.parameters()
        self.optimizer = SGD(params, lr=50.0, momentum=0.9) if optimizer == "sgd" else Adam(params, lr=1.0)
        schedule = SCHEDULES["warm-up"]
        self.scheduler = CoherenceScheduler(self.optimizer, schedule, warm_start=warm_start, credit=200, loggers=None)
        self.lrs: list[float] = []

    def train(self, steps: range) -> "Training":
        for step in steps:
            x, y = self.x[step % 4 :: 4], self.y[step % 4 :: 4]

            def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
                return nn.functional.cross_entropy(self.model(x), y)

            loss().backward()
            self.scheduler.observe(loss)
            self.optimizer.step()
            self.lrs += self.scheduler.get_last_lr()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return self

    @property
    def decisions(self) -> list[dict[str, Any]]:
        return [{**asdict(decision), "seconds": 0} for decision in self.scheduler.history]


@pytest.mark.parametrize("first", ["optimizer", "scheduler"])
@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_goes_on_bit_for_bit(optimizer: str, warm_start: bool, first: str) -> None:
    whole = Training(optimizer, warm_start).train(range(24))
    stopped = Training(optimizer, warm_start).train(range(12))
    parts = [stopped.model, stopped.optimizer, stopped.scheduler]
    model, optim, sched, rng = saved(*(part.state_dict() for part in parts), torch.get_rng_state())
    del stopped, parts
    resumed = Training(optimizer, warm_start)
    resumed.model.load_state_dict(model)
    if first == "optimizer":
        resumed.optimizer.load_state_dict(optim)
    resumed.scheduler.load_state_dict(sched)
    if first == "scheduler":
        resumed.optimizer.load_state_dict(optim)
    torch.set_rng_state(rng)
    resumed.train(range(12, 24))
    assert resumed.lrs == whole.lrs[12:]
    assert resumed.decisions == [decision for decision in whole.decisions if decision["step"] >= 12]
    assert any(decision["num_matvecs"] for decision in resumed.decisions)
    assert whole.scheduler.summary().capped_steps > 12
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
    ends = [{**asdict(run.scheduler.summary()), "seconds": 0, "advice": ()} for run in (resumed, whole)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedules_state_survives_a_safe_load(name: str) -> None:
    run, again, metrics = Run(OPTIMIZERS["sgd"]), Run(OPTIMIZERS["sgd"]), name == "plateau"
    scheduler, other = ours(run, SCHEDULES[name]), ours(again, SCHEDULES[name])
    run.update(scheduler, 9, sharpness=1e6, metrics=metrics)
    other.load_state_dict(saved(scheduler.state_dict())[0])
    again.optimizer.load_state_dict(saved(run.optimizer.state_dict())[0])
    assert other.get_desired_lr() == scheduler.get_desired_lr()
    assert other.get_last_lr() == scheduler.get_last_lr()
    again.log += run.log
    for _ in range(6):
        run.update(scheduler, sharpness=1e6, metrics=metrics)
        again.update(other, sharpness=1e6, metrics=metrics)
        assert other.get_desired_lr() == scheduler.get_desired_lr()


def test_reading_lrs_between_the_two_loads_changes_nothing() -> None:
    run, scheduler = capped()
    again = Run(lambda groups: SGD(groups), lr=1.0)
    other = ours(again)
    other.load_state_dict(saved(scheduler.state_dict())[0])
    other.get_desired_lr()
    again.optimizer.load_state_dict(saved(run.optimizer.state_dict())[0])
    assert other.get_desired_lr() == [1.0, 0.25]


# ---- mistakes


@pytest.mark.parametrize("state", [{}, {"schedule": {}}, {"last_epoch": 3, "_last_lr": [0.1]}])
def test_a_foreign_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a CoherenceScheduler's state: .*missing.*pass it as schedule="):
        ours(Run(OPTIMIZERS["sgd"])).load_state_dict(state)


def test_a_state_with_another_number_of_groups_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    one = CoherenceScheduler(SGD([p], lr=0.1), loggers=None)
    with pytest.raises(ValueError, match="2 parameter groups, the optimizer has 1"):
        one.load_state_dict(ours(Run(OPTIMIZERS["sgd"])).state_dict())


@pytest.mark.parametrize(("name", "metrics"), [("cosine", 0.5), ("plateau", None), ("cosine", len), ("constant", 0)])
def test_metrics_are_for_a_plateau_and_it_needs_them(name: str, metrics: Any) -> None:
    scheduler = ours(Run(OPTIMIZERS["sgd"]), SCHEDULES[name])
    with pytest.raises(
        TypeError, match="call step\\(metrics\\)" if metrics is None else "step\\(\\) takes no argument"
    ):
        scheduler.step() if metrics is None else scheduler.step(metrics)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("bound", "lema1", "'lemma1', 'coherence', 'momentum'"),
        ("bound", None, "'lemma1', 'coherence', 'momentum'"),
        ("curvature", "hesian", "one of 'hessian'"),
        ("hvp", "fast", "'auto', 'exact'"),
        ("on_failure", "explode", "'hold', 'raise'"),
        *(("margin", value, '"auto"') for value in (0, 1.5, -1, True, float("nan"), "learn")),
        *(("growth", value, "at least 1") for value in (0.9, float("nan"))),
        *(("trial_slack", value, "in \\(0, 1\\]") for value in (0, 2)),
        *(("tol", value, "in \\(0, 1\\)") for value in (0, 1, -0.1)),
        ("max_matvecs", 2, "at least 3"),
        ("max_overhead", -1, "at least 0"),
        ("credit", -1, "at least 0"),
        ("lambda_every", 0, "at least 1"),
        ("margin_max", 0, "at least 0.05"),
    ],
)
def test_a_wrong_option_is_refused_with_the_choices(option: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must .*{says}"):
        ours(Run(OPTIMIZERS["sgd"]), **{option: value})


def test_what_cannot_be_scheduled_is_refused() -> None:
    run, other = Run(OPTIMIZERS["sgd"]), Run(OPTIMIZERS["sgd"])
    for schedule in (SCHEDULES["cosine"](other.optimizer), lambda _: SCHEDULES["cosine"](other.optimizer)):
        with pytest.raises(TypeError, match="belongs to another optimizer"):
            ours(run, schedule)
    for schedule in (3, lambda o: None, lambda o: o):
        with pytest.raises(TypeError, match="must be a torch scheduler or make one"):
            ours(run, schedule)
    with pytest.raises(TypeError, match="Rprop has no stability limit.*Use Adam"):
        CoherenceScheduler(Rprop(run.params), loggers=None)
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer"):
        CoherenceScheduler(run.params, loggers=None)
    with pytest.raises(ValueError, match="requires grad"):
        CoherenceScheduler(SGD([torch.ones(2)], lr=0.1), loggers=None)


@pytest.mark.parametrize("half", [5, 10, 50])
def test_a_fixed_margin_is_kept_while_a_schedule_cycles_momentum(half: int) -> None:
    """c moves with momentum: lr_limit = 2 (1 + mu) / lambda, at every update."""
    h = torch.tensor([4.0, 1.0], dtype=torch.float64)
    x = nn.Parameter(torch.tensor([1e-3, 1.0], dtype=torch.float64))
    optimizer = SGD([x], lr=1.0, momentum=0.9)
    cycle = {"base_lr": 10.0, "max_lr": 50.0, "base_momentum": 0.2, "max_momentum": 0.95}
    scheduler = CoherenceScheduler(
        optimizer, lambda o: lrs.CyclicLR(o, step_size_up=half, **cycle), margin=1.0, growth=1e9, loggers=None
    )
    for update in range(300):
        (h * x * x).sum().div(2).backward()
        scheduler.observe(lambda: (h * x * x).sum() / 2)
        optimizer.step()
        group = optimizer.param_groups[0]
        if update > FREE_UPDATES:
            assert group["lr"] <= 2 * (1 + group["momentum"]) / 4 * 1.001, update
        scheduler.step()
        optimizer.zero_grad()
