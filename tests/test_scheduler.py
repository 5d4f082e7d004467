"""`CoherenceScheduler` as a torch scheduler. The oracle is torch: a twin optimizer under the bare schedule."""

import io
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, Rprop
from torch.optim import lr_scheduler as lrs

from safe_lr import CoherenceScheduler

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
    monkeypatch.setattr("safe_lr.guard.next_gap", lambda *_, **__: 1)  # measure at each update
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


def test_a_tensor_lr_under_a_schedule_is_torchs() -> None:
    twin, mine = (Run(lambda groups: SGD(groups, foreach=False), lr=torch.tensor(LR)) for _ in range(2))
    tensor = mine.optimizer.param_groups[0]["lr"]
    bare, scheduler = lrs.ExponentialLR(twin.optimizer, 0.9), ours(mine, lambda o: lrs.ExponentialLR(o, 0.9))
    for _ in range(10):
        twin.update(bare)
        mine.update(scheduler)
        assert scheduler.get_last_lr() == [g["lr"] for g in twin.optimizer.param_groups]
    assert mine.optimizer.param_groups[0]["lr"] is tensor
