"""follow_limit=True: no lr to choose."""

import copy
import json

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from safe_lr import CoherenceGuard, CoherenceScheduler


def quadratic(lr, schedule=None, *, steps=40, groups=False, **options):
    """Returns the scheduler and its lrs at each update, on a loss with H = diag(4, 1): the limit of GD is .5."""
    x, y = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    params = [{"params": [x], "lr": lr}, {"params": [y], "lr": lr / 10}] if groups else [x, y]
    optimizer = torch.optim.SGD(params, lr=lr)
    scheduler = CoherenceScheduler(optimizer, schedule, follow_limit=True, margin=0.5, **options)

    def loss():
        return (2 * x**2 + 0.5 * y**2).sum()

    applied = []
    for _ in range(steps):
        loss().backward()
        scheduler.observe(loss)
        optimizer.step()
        applied.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step()
        optimizer.zero_grad()
    return scheduler, applied


@pytest.mark.parametrize("lr", [1e-9, 0.3, 1e9])
def test_lr_is_the_cap_whatever_lr_the_optimizer_was_given(lr):
    scheduler, applied = quadratic(lr)
    assert [lrs[0] for lrs in applied] == pytest.approx([0.25] * len(applied), rel=1e-6)
    assert scheduler.get_last_lr() == scheduler.get_desired_lr() == pytest.approx([0.25], rel=1e-6)
    assert scheduler.summary().capped_steps == 0


def test_a_schedule_shapes_it():
    _, applied = quadratic(7.0, lambda opt: CosineAnnealingLR(opt, T_max=40))
    reference = CosineAnnealingLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), T_max=40)
    for (lr,) in applied:
        assert lr == pytest.approx(0.25 * reference.get_last_lr()[0], rel=1e-6, abs=1e-12)
        reference.optimizer.step()
        reference.step()


def test_one_cycle_is_shaped_by_its_own_largest_lr():
    _, applied = quadratic(1.0, lambda opt: OneCycleLR(opt, max_lr=3.0, total_steps=41, cycle_momentum=False))
    lrs = [lr for (lr,) in applied]
    assert max(lrs) == pytest.approx(0.25, rel=2e-3)  # the peak lies between two steps
    assert lrs[0] == pytest.approx(0.25 / 25, rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "lr", "shape"),
    [
        (lambda opt: CyclicLR(opt, 0.1, 1.0, step_size_up=10, cycle_momentum=False), 5.0, {10: 1.0, 20: 0.1, 25: 0.55}),
        (lambda opt: LambdaLR(opt, lambda step: 4.0 if step < 9 else 1.0), 1e-3, {0: 1.0, 8: 1.0, 9: 0.25}),
    ],
)
def test_a_schedule_that_goes_above_its_first_lr_is_shaped_by_the_largest_so_far(schedule, lr, shape):
    _, applied = quadratic(lr, schedule)
    assert {step: applied[step][0] / 0.25 for step in shape} == pytest.approx(shape, rel=1e-6)


@pytest.mark.parametrize("lr", [1e-3, 7.0])
def test_what_nobody_named_the_largest_lr_of_shapes_it_too(lr):
    """ReduceLROnPlateau and a loop that writes lr by hand leave no initial_lr; a resumed run knows the largest."""
    scheduler, _ = quadratic(lr, lambda opt: ReduceLROnPlateau(opt, patience=5), steps=0)
    (x, _), optimizer = scheduler.optimizer.param_groups[0]["params"], scheduler.optimizer
    applied = []
    for _ in range(8):
        x.grad = 4 * x.detach()
        scheduler.observe(lambda: (2 * x**2).sum())
        optimizer.step()
        applied.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1.0)
    assert applied == pytest.approx([0.25] * 7 + [0.025], rel=1e-6)
    twin, _ = quadratic(lr, lambda opt: ReduceLROnPlateau(opt, patience=5), steps=0)
    twin.optimizer.load_state_dict(optimizer.state_dict())
    twin.load_state_dict(scheduler.state_dict())
    assert twin._guard.rates.shape == scheduler._guard.rates.shape == pytest.approx(0.1)


def test_the_groups_keep_their_ratio():
    _, applied = quadratic(1.0, groups=True)
    assert all(first == pytest.approx(10 * second) for first, second in applied)
    assert applied[-1][0] == pytest.approx(0.25, rel=1e-6)  # H_yy counts a tenth


def test_the_optimizers_own_lr_holds_while_nothing_was_measured_and_after_close():
    x = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([x], lr=0.01)
    scheduler = CoherenceScheduler(optimizer, follow_limit=True)

    def fails():
        raise ValueError("no loss")

    x.grad = torch.ones(1)
    scheduler.observe(fails)
    with pytest.warns(RuntimeWarning, match="could not measure"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.01
    scheduler.close()
    scheduler, _ = quadratic(3.0)
    optimizer = scheduler.optimizer
    scheduler.close()
    assert optimizer.param_groups[0]["lr"] == 3.0


def test_a_resumed_run_goes_on():
    scheduler, applied = quadratic(1.0)
    twin, _ = quadratic(1.0, steps=1)
    twin.load_state_dict(json.loads(json.dumps({**scheduler.state_dict(), "guard": _plain(scheduler)})))
    assert twin.get_last_lr() == pytest.approx(applied[-1], rel=1e-6)


def _plain(scheduler):
    return {**scheduler.state_dict()["guard"], "vectors": {}}


def test_the_record_says_what_was_applied():
    scheduler, _ = quadratic(1e9)
    assert all(d.lr_desired == pytest.approx(0.25, rel=1e-6) for d in list(scheduler.history)[1:])
    assert not any(d.action == "cap" for d in list(scheduler.history)[1:])


def test_a_guard_follows_inside_the_step_only():
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([x], lr=5.0)
    guard = CoherenceGuard(optimizer, follow_limit=True, margin=0.5)
    x.grad = 4 * x.detach()
    guard.observe(lambda: 2 * (x**2).sum())
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 5.0
    assert torch.allclose(x, torch.zeros(2), atol=1e-5)  # 1 - .25 * 4


def test_it_is_a_flag():
    with pytest.raises(TypeError, match="follow_limit must be True or False, got 'yes'"):
        CoherenceScheduler(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), follow_limit="yes")


def test_where_no_update_follows_a_guard_gives_the_lr_back():
    class Stops:
        def start(self, config): ...
        def step(self, row): ...
        def close(self, summary): ...
        def decide(self, decision):
            raise Exception  # W&B's sweep agent stops a run so

    x = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([x], lr=5.0)
    guard = CoherenceGuard(optimizer, margin=0.5, loggers=Stops())
    x.grad = 4 * x.detach()
    guard.observe(lambda: 2 * (x**2).sum())
    with pytest.raises(Exception, match="^$"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 5.0


class Noisy:
    """A net trained on noisy targets, by a learned margin."""

    def __init__(self, optimizer, schedule=None):
        torch.manual_seed(0)
        self.teacher = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
        self.model = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        self.optimizer = optimizer(self.model)
        self.scheduler = CoherenceScheduler(self.optimizer, schedule, follow_limit=True)

    def train(self, steps):
        """Returns the lrs of these updates."""
        return [self.step(number) for number in steps]

    def step(self, number):
        draw = torch.Generator().manual_seed(number)
        x = torch.randn(64, 10, generator=draw)
        y = self.teacher(x).detach() + 0.1 * torch.randn(64, 1, generator=draw)

        def loss():
            return ((self.model(x) - y) ** 2).mean()

        self.optimizer.zero_grad()
        loss().backward()
        self.scheduler.observe(loss)
        self.optimizer.step()
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        return lr


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: torch.optim.Adam(model.parameters()),
        lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
    ],
)
def test_a_low_shape_does_not_wind_the_margin_up(optimizer):
    """Trial steps judge the cap, not the part of it that is applied, which has room whatever the cap is."""
    whole = Noisy(optimizer)
    small = Noisy(optimizer, lambda opt: LambdaLR(opt, lambda step: 1.0 if step < 13 else 0.05))
    for run in (whole, small):
        run.train(range(100))
    caps = [run.scheduler.summary().cap for run in (whole, small)]
    assert caps[1] < 2 * caps[0]  # judged as if at the cap: 14 and 3 times


def two_groups(model):
    first, second = model[0].parameters(), model[2].parameters()
    return torch.optim.AdamW([{"params": first}, {"params": second, "betas": (0.8, 0.99)}])


@pytest.mark.parametrize("optimizer", [two_groups, lambda model: torch.optim.SGD(model.parameters(), momentum=0.9)])
@pytest.mark.parametrize("at", [105, 143])
def test_a_resumed_run_goes_on_to_the_bit_where_decays_are_read_at_every_tenth_update(optimizer, at):
    run, resumed = Noisy(optimizer), Noisy(optimizer)
    run.train(range(at))
    for name in ("model", "optimizer", "scheduler"):
        getattr(resumed, name).load_state_dict(copy.deepcopy(getattr(run, name).state_dict()))
    assert resumed.train(range(at, at + 40)) == run.train(range(at, at + 40))
