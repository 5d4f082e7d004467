"""Rewinding against runs that never met the poison, and against the very parameters that it goes back to."""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR

from safe_lr import CoherenceGuard, CoherenceScheduler, RewindsExhausted
from safe_lr.accounts import State
from safe_lr.controller import Controller
from safe_lr.cuts import cut, go_back
from safe_lr.drift import Drift as SeenDrift
from safe_lr.ensemble import Ensemble
from safe_lr.measurement import Measurement
from safe_lr.norms import NormTrend
from safe_lr.policies import CALM_UPDATES, Policy, annealed
from safe_lr.rewind import DROPS, EVERY, MOST, Losses, Signs, Trouble, judge, outlying
from safe_lr.rewinder import Rewinder
from safe_lr.settings import COST_OF_LOSS
from tests.cases import CASES, Case

NAN, INF = math.nan, math.inf
NETS = [Case(SGD, {"momentum": 0.9}), Case(Adam), Case(AdamW, {"weight_decay": 0.1}), Case(RMSprop)]
POISONS = ("nan", "scaled", "inputs", "labels")


class Run:
    """A network with BatchNorm on batches that are known by their number, so that one can be left out.

    Poisons: an input is NaN; the loss is 1e4 times itself; the inputs are (which BatchNorm hides from the gradient);
    every label is wrong.
    """

    def __init__(self, case: Case, lr: float = 0.02, *, dropout: float = 0.0, **options: Any) -> None:
        torch.manual_seed(1)
        draw = torch.Generator().manual_seed(2)
        self.x = torch.randn(256, 6, generator=draw)
        self.y = (self.x @ torch.randn(6, 3, generator=draw)).argmax(1)
        layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)]
        self.model = nn.Sequential(*layers)
        self.optimizer = case.optimizer(self.model.parameters(), lr)
        self.sign = -1.0 if case.options.get("maximize") else 1.0
        self.guard = CoherenceGuard(self.optimizer, **{"loggers": None, "credit": 300, "rewind": True, **options})
        self.before: list[dict[str, Any]] = []  # the model as each update found it
        self.losses: list[float] = []

    @property
    def rewinder(self) -> Rewinder:
        assert self.guard.rewinder is not None
        return self.guard.rewinder

    def batch(self, number: int, poison: str | None = None) -> Callable[[], Tensor]:
        chosen = torch.randint(256, (32,), generator=torch.Generator().manual_seed(number))
        x, y, scale = self.x[chosen], self.y[chosen], self.sign
        if poison == "nan":
            x = x.clone().index_fill_(0, torch.tensor([0]), NAN)
        elif poison == "scaled":
            scale *= 1e4
        elif poison == "inputs":
            x = x * 1e4
        elif poison == "labels":
            y = (y + 1) % 3
        return lambda: scale * nn.functional.cross_entropy(self.model(x), y)

    def step(self, number: int, poison: str | None = None) -> None:
        loss_of = self.batch(number, poison)
        self.optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        self.losses.append(loss.item())
        self.before.append({k: v.clone() for k, v in self.model.state_dict().items()})
        self.guard.observe(loss_of, loss=loss)
        self.optimizer.step()

    def run(self, numbers: Any, poison: dict[int, str] | None = None) -> Run:
        for number in numbers:
            self.step(number, (poison or {}).get(number))
        return self

    def final(self) -> list[Any]:
        states = [list(v.values()) for v in self.optimizer.state.values()]
        return plain([list(self.model.state_dict().values()), states])

    def parameters_were(self, update: int) -> bool:
        """Whether the parameters are those that the update found; only for runs without a drop before."""
        now = dict(self.model.named_parameters())
        return all(torch.equal(now[name], self.before[update][name]) for name in now)

    def shake(self, factor: float = 30.0) -> None:
        """What a bad step does: the parameters are far off."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(factor * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to_dense().tolist()
    return [plain(item) for item in value] if isinstance(value, list) else value


def told(guard: CoherenceGuard) -> list[Any]:
    """The decisions but for rewinds and wall time."""
    return [
        (d.step, d.action, d.lr_after, d.margin, d.cap) for d in guard.history if d.action not in ("drop", "rewind")
    ]


# ---- a poisoned batch


@pytest.mark.parametrize("case", CASES, ids=str)
def test_after_a_nan_batch_every_optimizer_goes_on_as_if_it_had_never_been(case: Case) -> None:
    poisoned = Run(case).run(range(25), {17: "nan"})
    clean = Run(case).run(n for n in range(25) if n != 17)
    assert poisoned.final() == clean.final()
    assert told(poisoned.guard) == told(clean.guard)
    assert (poisoned.rewinder.drops, poisoned.rewinder.rewinds) == (1, 0)
    assert (poisoned.guard.summary().drops, poisoned.guard.summary().rewinds) == (1, 0)
    assert (poisoned.guard.summary().steps, clean.rewinder.drops) == (24, 0)
    decision = next(d for d in poisoned.guard.history if d.action == "drop")
    assert decision.step == 17 and "dropped, the batch is to blame: the gradient norm is nan" in decision.reason


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("case", NETS, ids=str)
def test_after_a_batch_that_is_far_out_too(case: Case, poison: str) -> None:
    poisoned = Run(case).run(range(70), {55: poison})
    clean = Run(case).run(n for n in range(70) if n != 55)
    assert poisoned.rewinder.drops == 1 and poisoned.rewinder.rewinds == 0
    assert poisoned.final() == clean.final()


@pytest.mark.slow
@pytest.mark.parametrize(("case", "poison"), list(zip(NETS, POISONS, strict=True)), ids=str)
def test_a_poisoned_step_costs_at_most_a_hundredth_of_the_final_loss(case: Case, poison: str) -> None:
    """Beside a run that sees the good batch in its place. Without `rewind` each of these costs more, measured here."""

    def final(poisons: dict[int, str], rewind: bool) -> float:
        run = Run(case, lr=0.005, rewind=rewind).run(range(300), poisons)
        run.model.eval()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(run.model(run.x), run.y))

    good = final({}, rewind=False)
    assert final({200: poison}, rewind=True) <= 1.01 * good
    assert not final({200: poison}, rewind=False) <= 1.01 * good


def test_the_gradients_are_given_back() -> None:
    run = Run(Case(Adam)).run(range(3))
    run.step(3, "nan")
    grads = [p.grad for p in run.model.parameters()]
    assert all(g is not None for g in grads) and any(not torch.isfinite(g).all() for g in grads if g is not None)
    assert not run.rewinder.dropping


def test_the_lr_of_a_dropped_update_is_given_back() -> None:
    run = Run(Case(SGD), lr=1e3, margin=0.5).run(range(4))
    run.step(4, "nan")
    assert run.optimizer.param_groups[0]["lr"] == 1e3 and run.guard.summary().capped_steps == 4


def test_a_buffer_that_the_user_writes_survives_a_drop() -> None:
    run = Run(Case(Adam))
    run.model.register_buffer("temperature", torch.ones(()))
    run.run(range(5))
    run.model.temperature.fill_(7.0)
    run.step(5, "nan")
    assert run.model.temperature == 7 and run.rewinder.drops == 1
    assert torch.isfinite(run.model[1].running_mean).all()


def test_looking_closer_leaves_the_buffers_of_a_model_that_is_not_looked_at() -> None:
    """Two models in turns: the snapshot holds the buffers of one, the batch that looks wrong is the other's."""
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)) for _ in range(2))
    optimizer = Adam([*one.parameters(), *other.parameters()], lr=1e-3)
    guard = CoherenceGuard(optimizer, rewind=True, loggers=None, credit=0)

    def step(model: nn.Module, scale: float = 1.0) -> None:
        x = torch.randn(16, 3)
        optimizer.zero_grad()
        loss = scale * model(x).square().mean()
        loss.backward()
        guard.observe(lambda: scale * model(x).square().mean(), loss=loss)
        optimizer.step()

    for _ in range(EVERY + 3):
        step(one)
    before = {name: value.clone() for name, value in one.named_buffers()}
    step(other, 9.0)
    assert [d.action for d in guard.history] == ["drop"]
    assert all(torch.equal(value, before[name]) for name, value in one.named_buffers())


def test_outliers_that_stay_are_what_is_usual_now() -> None:
    """After DROPS drops in a row updates are made: a loss that is in other units from now on must not end training."""
    run = Run(Case(SGD), lr=1e-6).run(range(40), dict.fromkeys(range(25, 40), "scaled"))
    assert run.rewinder.drops == DROPS and run.guard.summary().steps == 40 - DROPS


def test_a_nan_batch_now_and_then_is_survived() -> None:
    run = Run(Case(Adam)).run(range(60), dict.fromkeys(range(3, 60, 3), "nan"))
    clean = Run(Case(Adam)).run(n for n in range(60) if n % 3 or n == 0)
    assert run.final() == clean.final() and run.rewinder.drops == 19


def test_step_with_a_closure() -> None:
    """Lightning's way: the gradients come to be inside `optimizer.step`."""
    finals = []
    for poison, numbers in (({5: "nan"}, range(9)), ({}, [n for n in range(9) if n != 5])):
        run = Run(Case(Adam))
        for number in numbers:
            loss_of = run.batch(number, poison.get(number))

            def backward(loss_of: Callable[[], Tensor] = loss_of, run: Run = run) -> Tensor:
                run.optimizer.zero_grad()
                loss = loss_of()
                loss.backward()
                return loss

            run.guard.observe(loss_of)
            run.optimizer.step(backward)
        finals.append(run.final())
    assert finals[0] == finals[1]


def test_a_poisoned_micro_batch() -> None:
    """Gradient accumulation: one of three is NaN, none of them counts."""

    def accumulate(updates: list[int], poisoned: int | None) -> Run:
        run = Run(Case(Adam))
        for update in updates:
            closures = [run.batch(3 * update + k, "nan" if update == poisoned and k == 1 else None) for k in range(3)]
            run.optimizer.zero_grad()
            losses = [closure() / 3 for closure in closures]
            for loss in losses:
                loss.backward()
            run.guard.observe(closures, loss=sum(losses))
            run.optimizer.step()
        return run

    poisoned, clean = accumulate(list(range(8)), 5), accumulate([0, 1, 2, 3, 4, 6, 7], None)
    assert poisoned.final() == clean.final() and poisoned.rewinder.drops == 1


def test_two_optimizers_drop_together() -> None:
    finals = []
    for poisoned in (True, False):
        torch.manual_seed(0)
        a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        optimizers = [SGD([a], lr=0.1, momentum=0.9), Adam([b], lr=0.1)]
        guard = CoherenceGuard(optimizers, loggers=None, rewind=True)
        for step in range(8):
            if step == 5 and not poisoned:
                continue
            factor = NAN if step == 5 else 1.0

            def loss(factor: float = factor, a: Tensor = a, b: Tensor = b) -> Tensor:
                return (factor * a * a + (a * b) ** 2).sum()

            for optimizer in optimizers:
                optimizer.zero_grad()
            loss().backward()
            guard.observe(loss)
            for optimizer in optimizers:
                optimizer.step()
        finals.append([a.tolist(), b.tolist(), guard.summary().steps])
        guard.close()
    assert finals[0] == finals[1]


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_that_the_scaler_skips_is_none(fused: bool) -> None:
    run = Run(Case(Adam, {"fused": fused}))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for number in range(12):
        loss_of = run.batch(number)
        run.optimizer.zero_grad()
        loss = loss_of()
        scaler.scale(loss).backward()
        if number == 6:
            run.model[0].weight.grad[0, 0] = INF
        run.guard.observe(loss_of, loss=loss)
        scaler.step(run.optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert run.guard.summary().steps == 11 and run.rewinder.drops == run.rewinder.rewinds == 0


def test_statistics_that_a_skipped_batch_has_spoilt_are_mended() -> None:
    """GradScaler skips the update of a NaN batch, but the batch went through BatchNorm: the next update sees that."""
    run = Run(Case(Adam))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for number in range(9):
        loss_of = run.batch(number, "nan" if number == 5 else None)
        run.optimizer.zero_grad()
        loss = loss_of()
        scaler.scale(loss).backward()
        run.guard.observe(loss_of)
        scaler.step(run.optimizer)
        scaler.update()
        assert bool(torch.isfinite(run.model[1].running_mean).all()) == (number != 5)
    assert run.rewinder.drops == 1 and run.guard.summary().steps == 7


# ---- a step that did harm


@pytest.mark.parametrize("harm", ["jump", "nan"])
@pytest.mark.parametrize("case", [*NETS, Case(Adam, {"maximize": True})], ids=str)
def test_it_goes_back_to_the_snapshot_and_cuts(case: Case, harm: str) -> None:
    run = Run(case).run(range(34))
    state, cap = run.guard.summary(), run.guard.summary().cap
    run.shake(30.0 if harm == "jump" else NAN)
    run.step(34)
    trouble = run.rewinder.tries[-1]
    assert trouble.action == "rewind" and trouble.step == 34 and 0 < 34 - trouble.back_to <= EVERY
    assert run.parameters_were(trouble.back_to)
    assert run.guard.summary().steps == 34 and run.guard.summary().cost >= state.cost
    decision = run.guard.last_decision
    assert decision.action == "rewind" and f"back from update 34 to {trouble.back_to}" in decision.reason
    assert cap is not None and decision.cap < cap and decision.margin < state.margin
    assert (run.guard.summary().drops, run.guard.summary().rewinds) == (0, 1)
    run.run(range(35, 100))
    before, after = (run.sign * sum(losses) for losses in (run.losses[14:34], run.losses[-20:]))
    assert run.rewinder.rewinds == 1 and after < before


def test_the_optimizer_goes_back_with_the_parameters() -> None:
    run = Run(Case(Adam)).run(range(34))
    steps = [int(state["step"]) for state in run.optimizer.state.values()]
    run.shake(NAN)
    run.step(34)
    back = run.rewinder.tries[-1].back_to
    assert set(steps) == {34} and {int(state["step"]) for state in run.optimizer.state.values()} == {back}


@pytest.mark.parametrize("options", [{"margin": 0.5}, {"credit": 0}])
def test_a_fixed_margin_stays_and_without_a_limit_there_is_no_cap_to_cut(options: dict[str, Any]) -> None:
    run = Run(Case(Adam), **options).run(range(25))
    before = run.guard.summary()
    run.shake()
    run.step(25)
    after = run.guard.summary()
    assert run.rewinder.rewinds == 1
    if "margin" in options:
        assert after.margin == 0.5 and after.cap < before.cap
    else:
        assert after.cap is None


def test_a_jump_without_a_loss_is_seen_by_the_gradient() -> None:
    run = Run(Case(SGD))
    for number in range(35):
        if number == 34:
            run.shake()
        loss_of = run.batch(number)
        run.optimizer.zero_grad()
        loss_of().backward()
        run.before.append({k: v.clone() for k, v in run.model.state_dict().items()})
        run.guard.observe(loss_of)
        run.optimizer.step()
    assert run.rewinder.rewinds == 1 and run.parameters_were(run.rewinder.tries[-1].back_to)


def test_random_streams_go_back_once() -> None:
    """Dropout's masks are drawn again after the first rewind, not after a second in a row."""
    run = Run(Case(Adam), dropout=0.3).run(range(20))
    run.step(20)  # a snapshot is taken at this update
    drawn = torch.rand(3), random.random()
    for again in (True, False):
        run.shake(NAN)
        run.step(21)
        assert run.rewinder.tries[-1].back_to == 20
        assert ((torch.rand(3).equal(drawn[0])), random.random() == drawn[1]) == (again, again)


def test_the_schedule_inside_goes_back_and_one_outside_stays() -> None:
    for inside in (True, False):
        run = Run(Case(SGD), lr=1e-3)
        run.guard.close()
        if inside:
            scheduler: Any = CoherenceScheduler(
                run.optimizer, lambda o: CosineAnnealingLR(o, T_max=50), rewind=True, loggers=None
            )
            run.guard = scheduler._guard
        else:
            run.guard = CoherenceGuard(run.optimizer, rewind=True, loggers=None)
            scheduler = CosineAnnealingLR(run.optimizer, T_max=50)
        lrs = []
        for number in range(30):
            if number == 27:
                run.shake(NAN)
            lrs.append(scheduler.get_desired_lr()[0] if inside else run.optimizer.param_groups[0]["lr"])
            run.step(number)
            scheduler.step()
        assert run.rewinder.rewinds == 1 and run.rewinder.tries[-1].back_to == 20
        # update 27 was not made: the schedule inside goes on from where it was at 20, plus that one call of step()
        assert scheduler.last_epoch == (23 if inside else 30)
        curve = CosineAnnealingLR(SGD([torch.ones(1, requires_grad=True)], lr=1e-3), T_max=50)
        curve.optimizer.step()
        expected = []
        for _ in range(30):
            expected.append(curve.optimizer.param_groups[0]["lr"])
            curve.step()
        rest = expected[21:23] if inside else expected[28:30]
        assert lrs == pytest.approx([*expected[:28], *rest])
        run.guard.close()


@pytest.mark.parametrize("option", ["tune_betas", "tune_eps"])
def test_betas_and_eps_go_back_with_the_moments_and_move_on(option: str) -> None:
    run = Run(Case(Adam), lr=3.0, max_overhead=99, **{option: True})
    (group,), numbers, own = run.optimizer.param_groups, iter(range(999)), ((0.9, 0.999), 1e-8)
    seen: dict[int, Any] = {}  # betas, eps and moments as each update found them

    def values() -> Any:
        return group["betas"], group["eps"]

    def step() -> None:
        seen[run.guard.summary().steps] = values(), plain([list(v.values()) for v in run.optimizer.state.values()])
        if run.guard.summary().steps % 10 == 2:
            run.guard._state.due_at = 0  # moves come with measurements
        run.step(next(numbers))

    for updates_since in (0, EVERY):  # first to a snapshot from before the move, then to one from after it
        while values() == own:
            step()
        for _ in range(updates_since):
            step()
        moves = sum(d.action == option[5:] for d in run.guard.history)
        run.shake(NAN)
        step()
        trouble = run.rewinder.tries[-1]
        assert trouble.action == "rewind" and (values() == own) == (updates_since == 0)
        assert seen[trouble.back_to] == (values(), plain([list(v.values()) for v in run.optimizer.state.values()]))
    for _ in range(100):
        step()
    assert run.rewinder.rewinds == 2
    assert sum(d.action == option[5:] for d in run.guard.history) > moves
    assert not [d for d in run.guard.history if d.action == "hold"]  # nobody else writes them
    assert sum(run.losses[-10:]) < sum(run.losses[:10])
    run.guard.close()
    assert values() == own


@pytest.mark.parametrize("option", ["tune_betas", "tune_eps"])
def test_a_dropped_update_leaves_betas_and_eps_alone(option: str) -> None:
    poisoned = Run(Case(Adam), lr=3.0, max_overhead=99, **{option: True}).run(range(60), {12: "nan", 50: "nan"})
    clean = Run(Case(Adam), lr=3.0, max_overhead=99, **{option: True}).run(n for n in range(60) if n not in (12, 50))
    assert poisoned.final() == clean.final() and told(poisoned.guard) == told(clean.guard)
    assert any(d.action == option[5:] for d in clean.guard.history)


# ---- a loss that drifts up


class Drift:
    """Three parameters that follow a path of the test's own, under batches whose losses, w x^2, differ tenfold."""

    def __init__(self, lr: float = 1e3, told: Callable[[int], float] = lambda number: 1.0, **options: Any) -> None:
        self.x, self.told = nn.Parameter(torch.ones(3)), told  # the unit of the loss that is told
        self.optimizer = SGD([self.x], lr=lr)
        self.guard = CoherenceGuard(self.optimizer, **{"loggers": None, "rewind": True, **options})
        self.number = 0

    @staticmethod
    def weight(number: int) -> float:
        return math.exp(1.2 * math.sin(number))

    def run(self, path: Callable[[int], float], updates: int = 100) -> Drift:
        for number in range(self.number, self.number + updates):
            with torch.no_grad():
                self.x.fill_(path(number))

            def loss_of(weight: float = self.weight(number)) -> Tensor:
                return weight * self.x.square().mean()

            self.optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            self.guard.observe(loss_of, loss=self.told(number) * loss)
            self.optimizer.step()
        self.number += updates
        return self

    @property
    def rewinder(self) -> Rewinder:
        assert self.guard.rewinder is not None
        return self.guard.rewinder

    def room(self) -> Drift:
        """Leaves room for a cut: the cap is three times the noise limit."""
        state = self.guard._state
        state.multiple, state.margin = 3.0, 3.0 * state.share
        state.cap = state.margin * state.figures["lr_limit"]
        return self

    @property
    def cuts(self) -> list[Any]:
        return [d for d in self.guard.history if "under the last snapshot it is" in d.reason]


def test_a_loss_that_drifts_up_cuts_the_margin_and_nothing_goes_back() -> None:
    """Twelve percent an update: no batch looks wrong beside others, but one is worse than ten updates ago."""
    run = Drift().run(lambda number: 1.0, 61)
    run.room()
    run.run(lambda number: 1.06 ** (number - 60), 9)
    state = run.room().guard._state
    unit = state.share * state.figures["lr_limit"]
    state.cap = 2 * unit  # still on its way up
    assert not run.cuts
    run.run(lambda number: 1.06 ** (number - 60), 1)
    (cut,) = run.cuts
    assert (cut.action, cut.step) == ("margin", 70)  # the snapshot is of 60
    then = Drift.weight(70)
    assert f"the batch's loss is {then * 1.06**20:.4g}, under the last snapshot it is {then:.4g}" in cut.reason
    assert state.multiple == pytest.approx(2 / 1.5)
    assert cut.cap == pytest.approx(2 * unit / 1.5) and cut.lr_after == pytest.approx(cut.cap)
    assert run.x[0].item() != 1.0  # nothing went back
    assert run.guard.summary().rewinds == run.guard.summary().drops == 0


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (lambda number: 1.0, {}),
        (lambda number: 0.98**number, {}),
        (lambda number: 1.2 if number % 10 == 0 else 1.0, {}),  # 1.44 times as bad
        (lambda number: 1.5 if number % 10 == 5 else 1.0, {}),  # and over by the next look
        (lambda number: 1.06 ** max(0, number - 60), {"lr": 1e-6}),  # lr is not what the cap holds back
        (lambda number: 1.06 ** max(0, number - 60), {"margin": 0.5}),  # nothing to cut
    ],
)
def test_what_is_no_drift(path: Callable[[int], float], options: dict[str, Any]) -> None:
    run = Drift(**options).run(path, 55)
    run.room()
    run.run(path, 25)
    assert not run.cuts and run.guard.summary().rewinds == 0


def test_looking_for_drift_costs_a_forward_pass_every_ten_updates_and_no_measurement() -> None:
    """Where the loss is told, and the cap holds lr back; and one more, once, to see what is told."""
    with_it, without = (Drift(rewind=rewind).run(lambda number: 1.0, 96).guard for rewind in (True, False))
    assert told(with_it) == told(without)
    assert with_it.summary().cost == pytest.approx(without.summary().cost + 10 * COST_OF_LOSS)
    uncapped = [Drift(1e-6, rewind=rewind).run(lambda number: 1.0, 96).guard for rewind in (True, False)]
    assert uncapped[0].summary().cost == uncapped[1].summary().cost


def test_a_drift_is_seen_in_whatever_unit_the_loss_is_told() -> None:
    """A part of it under accumulation, a sum of a batch's losses, and one that changes on the way."""

    def cuts(told: Callable[[int], float]) -> list[Any]:
        run = Drift(told=told).run(lambda number: 1.0, 61)
        run.room()
        return [(d.step, d.reason) for d in run.run(lambda number: 1.06 ** (number - 60), 11).cuts]

    (seen,) = expected = cuts(lambda number: 1.0)
    assert seen[0] == 70
    for unit in (1 / 2, 1 / 4, 1 / 8, 32.0):
        assert cuts(lambda number, unit=unit: unit) == expected  # type: ignore[misc]
    assert cuts(lambda number: 1.0 if number < 65 else 1 / 8) == expected


def test_a_told_loss_that_has_risen_is_looked_at_again() -> None:
    """It may be of another dropout mask: what the closure returns is what counts."""
    run = Drift(told=lambda number: 1.0 if number < 65 else 3.0).run(lambda number: 1.0, 61)
    run.room()
    assert not run.run(lambda number: 1.0, 25).cuts


@pytest.mark.parametrize(("now", "drifted"), [(0.4, False), (0.5, True)])
def test_losses_that_are_not_positive_are_compared_in_units_of_what_is_usual(now: float, drifted: bool) -> None:
    """log 1.5 = .405 of it is what tells."""
    assert SeenDrift().seen_in((now, 0.0), Losses((-1.0,) * 10)) == drifted


def test_a_margin_that_drift_has_cut_stays_so_for_a_while_and_has_a_floor() -> None:
    control = Controller(Policy(), least_cost=8.0)
    state = replace(control.state, updates=100, share=0.5, multiple=3.0, margin=1.5, cap=1.5, gap=40)
    control.state = replace(state, figures={"lr_limit": 1.0})
    assert cut(control) == "margin 1.5 -> 1, cap 1.5 -> 1" and control.state.calm_until == 100 + CALM_UPDATES
    for multiple in (4 / 3, 8 / 9, 16 / 27, 32 / 81, 64 / 243, 128 / 729, 256 / 2187, 0.1):
        assert cut(control) is not None
        assert (control.state.multiple, control.state.cap) == pytest.approx((multiple, multiple / 2))
    control.state.updates = 120
    left = annealed(120)
    for multiple, margin, cap in ((0.1, 0.05, 0.05), (0.05, 0.025, 0.025), (0.05, 0.025, 0.01)):
        control.state.multiple, control.state.margin, control.state.cap = multiple, left * margin, left * cap
        before = replace(control.state)
        assert cut(control) is None  # at the floor, or cut further by trial steps
        assert control.state == replace(before, calm_until=120 + CALM_UPDATES)
    control.state.cap = None
    assert cut(control) is None


@pytest.mark.parametrize(
    ("policy", "cap", "multiple", "now", "told"),
    [
        (Policy(), 1.0, 4 / 3, 2 / 3, "margin 3 -> 0.667, cap 1 -> 0.667"),  # the cap is still climbing to the margin's
        (Policy(), 0.06, 0.1, 0.05, "margin 3 -> 0.05, cap 0.06 -> 0.05"),  # ... and no further than the floor
        (Policy(), 0.05, 0.1, 0.05, "margin 3 -> 0.05"),
        (Policy(), 0.04, 0.1, 0.04, "margin 3 -> 0.05"),
        (Policy(margin_max=1.0), 1.0, 4 / 3, 2 / 3, "margin 1 -> 0.667, cap 1 -> 0.667"),
        (Policy(margin_max=0.05), 0.05, 6.0, 0.05, None),
    ],
)
def test_drift_cuts_from_what_was_used(
    policy: Policy, cap: float, multiple: float, now: float, told: str | None
) -> None:
    control = Controller(policy, least_cost=8.0)
    state = replace(control.state, updates=100, share=0.5, multiple=6.0, cap=cap, gap=40, figures={"lr_limit": 1.0})
    control.state = replace(state, margin=min(3.0, policy.margin_max))
    assert cut(control) == told
    assert (control.state.multiple, control.state.cap) == pytest.approx((multiple, now))
    assert control.state.calm_until == 100 + CALM_UPDATES
    assert control.state.margin == pytest.approx(min(multiple / 2, policy.margin_max))


def test_looking_back_leaves_the_budget_of_measurements_alone() -> None:
    """Where many batches look wrong looks had spent it all, and no limit was measured for a thousand updates."""
    control = Controller(Policy(), least_cost=8.0)
    before = control.affordable(alarm=False), control.affordable(alarm=True)
    control.state.looked(500.0)
    assert (control.affordable(alarm=False), control.affordable(alarm=True)) == before
    assert control.state.summary().cost == 500.0
    back = control.state.gone_back(Controller(Policy(), least_cost=8.0).state.state_dict())
    assert (back.cost, back.look_cost) == (500.0, 500.0)


# ---- giving up


@pytest.mark.parametrize("most", [True, 2])
def test_when_nothing_helps_it_says_what_was_tried(most: int) -> None:
    run = Run(Case(Adam), rewind=most).run(range(15))
    allowed = MOST if most is True else most
    with pytest.raises(RewindsExhausted, match=r"every gradient was not finite: look for NaN") as caught:
        run.run(range(15, 99), dict.fromkeys(range(15, 99), "nan"))
    tries = caught.value.tries
    assert [t.action for t in tries] == ["drop"] * DROPS + ["rewind"] * (allowed + 1)
    assert [(d.action, d.reason) for d in run.guard.history][-len(tries) :] == [(t.action, t.reason) for t in tries]
    assert run.guard.summary().rewinds == run.rewinder.rewinds == allowed + 1  # the last one was made too
    assert run.optimizer.param_groups[0]["lr"] == 0.02
    assert all(t.step == 15 and math.isnan(t.norm) and t.lr > 0 for t in tries)
    caps = [t.cap for t in tries[DROPS:]]
    assert caps == pytest.approx([caps[0] / 1.5**k for k in range(allowed + 1)])  # cut again each time
    message = str(caught.value)
    assert f"{allowed + 1} rewinds in a row did not help" in message and "back from update 15 to 10" in message
    assert run.parameters_were(10)  # finite and whole, to be saved
    assert all(p.grad is not None for p in run.model.parameters())
    with pytest.raises(RewindsExhausted):  # whoever goes on all the same is still watched
        run.step(99, "nan")
    run.step(100)
    assert run.guard.summary().steps == 16


def test_a_jump_that_comes_again_ends_too_but_not_after_healthy_progress() -> None:
    run = Run(Case(Adam), rewind=1).run(range(15))
    run.shake()
    run.step(15)
    run.run(range(16, 60))  # healthy
    run.shake()
    run.step(60)
    assert run.rewinder.rewinds == 2
    run.shake()
    with pytest.raises(RewindsExhausted, match="lr is not what is wrong"):
        run.step(61)


def test_a_closure_that_cannot_be_evaluated_leaves_it_to_the_gradient() -> None:
    run = Run(Case(Adam), credit=0).run(range(15))

    def broken() -> Tensor:
        raise ValueError("no such file")

    for number in range(15, 20):
        loss = run.batch(number, "nan" if number == 15 else None)()
        run.optimizer.zero_grad()
        loss.backward()
        run.guard.observe(broken)
        run.optimizer.step()
    assert run.rewinder.drops == 1 and run.guard.summary().steps == 19


def test_without_any_closure_gradient_and_parameters_tell() -> None:
    run = Run(Case(Adam), credit=0, max_overhead=0)

    def step(number: int, poison: str | None = None) -> None:
        run.optimizer.zero_grad()
        run.batch(number, poison)().backward()
        run.before.append({k: v.clone() for k, v in run.model.state_dict().items()})
        run.optimizer.step()

    for number in range(15):
        step(number, "nan" if number == 14 else None)
    assert (run.rewinder.drops, run.rewinder.rewinds, run.guard.summary().steps) == (1, 0, 14)
    run.shake(NAN)
    step(15)
    assert run.rewinder.rewinds == 1 and run.parameters_were(10)


def test_what_is_counted_and_spent_stays_so() -> None:
    """The run's own state: margin, limit and usual norms go back, counts do not, and a measurement is due."""
    then = State(
        multiple=4.0,
        margin=2.0,
        expected_cost=9.0,
        share=0.5,
        votes=[1.0],
        updates=10,
        cap=0.5,
        due_at=40,
        cost=20.0,
        figures={"lr_limit": 1.0},
    )
    then.trend = CALM
    now = replace(
        then,
        multiple=0.6,
        margin=0.3,
        share=0.4,
        votes=[0.2],
        alone=True,
        updates=17,
        cap=0.1,
        cost=33.0,
        trend=NOISY,
        figures={"lr_limit": 0.2},
        gap=4,
        measured_at=15,
        usual=0.25,
        lowest=0.125,
    )
    back = now.gone_back(then.state_dict())
    assert (back.multiple, back.margin, back.cap, back.trend) == (4.0, 2.0, 0.5, CALM)
    assert (back.figures, back.share, back.votes, back.alone) == ({"lr_limit": 1.0}, 0.5, [1.0], False)
    assert (back.updates, back.cost, back.due_at) == (17, 33.0, 17)
    assert (back.measured_at, back.usual, back.lowest) == (0, None, None)
    unmeasured = replace(then, cap=None, figures={})
    kept = now.gone_back(unmeasured.state_dict())
    assert (kept.cap, kept.figures, kept.gap, kept.multiple) == (0.1, {"lr_limit": 0.2}, 4, 4.0)
    assert (kept.share, kept.votes, kept.alone) == (0.4, [0.2], True)
    assert (kept.measured_at, kept.usual, kept.lowest) == (15, 0.25, 0.125)


@pytest.mark.parametrize(("wanted", "used"), [(9.0, 0.4), (0.1, 0.1), (INF, 0.4)])
def test_multiple_and_cap_are_cut_below_the_step_that_did_harm(wanted: float, used: float) -> None:
    control = Controller(Policy(), least_cost=8.0)
    state = replace(control.state, updates=20, share=0.5, multiple=2.0, cap=0.4, figures={"lr_limit": 1.0})
    control.state, earlier = state, replace(state, updates=10, multiple=3.0, margin=1.5, cap=0.6)
    go_back(control, earlier.state_dict(), wanted)
    assert control.state.multiple == pytest.approx(max(0.05 / 0.5, used / 0.5 / 1.5))
    assert control.state.margin == pytest.approx(control.state.multiple * 0.5)
    assert control.state.cap == pytest.approx(used / 1.5) and control.state.updates == 20
    control.state = replace(state, cap=None, figures={}, multiple=1.2)  # not measured yet
    go_back(control, replace(earlier, cap=None, figures={}).state_dict(), wanted)
    assert control.state.multiple == pytest.approx(1.2 / 1.5) and control.state.cap is None
    fixed = Controller(Policy(margin=0.5), least_cost=8.0)
    fixed.state = replace(state, multiple=2.0, margin=0.5)
    go_back(fixed, replace(earlier, margin=0.5).state_dict(), wanted)
    assert (fixed.state.margin, fixed.state.cap) == (0.5, pytest.approx(used / 1.5))


def test_after_going_back_room_raises_nothing_for_a_while() -> None:
    """The trial steps of the measurement that is due at once look as they did before the step that did harm."""
    control = Controller(Policy(), least_cost=8.0)
    state = replace(control.state, updates=100, held=100, share=0.5, multiple=3.0, margin=1.5, cap=1.5, gap=40)
    control.state = replace(state, figures={"lr_limit": 1.0}, flips=[2.0])
    go_back(control, control.state.state_dict(), wanted=9.0)
    assert control.state.multiple == pytest.approx(2.0)

    def measured() -> tuple[Any, float]:
        planned = control.planned(1.0, 9.0)
        found = Measurement(lr_limit=1.0, loss=1.0, trial_loss=0.5, trial_lr=8.1 * planned)
        return control.settle(found, lr_ref=9.0, jump=None)[0], control.state.multiple

    assert measured() == ("fine", pytest.approx(2.0))
    control.restore(State.from_state_dict(control.state.state_dict()))  # a resumed run is as calm
    control.state.updates = control.state.held = 139
    assert measured() == ("fine", pytest.approx(2.0))
    control.state.updates = control.state.held = 140
    assert measured() == ("roomy", pytest.approx(2.0 * 140 / 139))


def test_going_back_at_an_lr_of_zero_leaves_a_cap_that_can_rise() -> None:
    """A schedule that touches 0: an earlier step did the harm. A cap of 0 would stay 0 for good."""
    control = Controller(Policy(), least_cost=8.0)
    control.state = replace(control.state, updates=100, share=0.5, cap=0.4, figures={"lr_limit": 1.0})
    go_back(control, control.state.state_dict(), wanted=0.0)
    assert control.state.cap == 0.4 and control.state.margin == pytest.approx(2.0 / 1.5 * 0.5)
    assert control.cap_under(1.0) > 0


# ---- when nothing is wrong, and when it is off


@pytest.mark.parametrize("lr", [0.02, 1e3])  # within the cap and held back by it
@pytest.mark.parametrize("case", NETS, ids=str)
def test_a_healthy_run_is_the_same_with_and_without(case: Case, lr: float) -> None:
    with_it, without = (Run(case, lr, dropout=0.2, rewind=rewind).run(range(40)) for rewind in (True, False))
    assert with_it.final() == without.final()
    assert told(with_it.guard) == told(without.guard) == told(with_it.guard)
    assert not [d for d in with_it.guard.history if d.action in ("drop", "rewind")]


def test_off_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing of it may run")

    monkeypatch.setattr("safe_lr.guard.Rewinder", refuse)
    run = Run(Case(Adam), rewind=False).run(range(5))
    run.guard.observe(run.batch(5), loss=torch.ones(()))
    assert run.guard.rewinder is None and run.guard._loss is None and run.guard.rewind_memory() == 0
    assert "rewind" not in run.guard.state_dict()


@pytest.mark.parametrize("value", [0, -1, 2.5, "yes", None])
def test_a_wrong_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="rewind must be True, False or the most rewinds"):
        Run(Case(SGD), rewind=value)


# ---- memory, saving


def test_no_room_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safe_lr.rewinder.free_memory", lambda device: 1000)
    optimizer = Adam([nn.Parameter(torch.ones(1000))])
    with pytest.raises(MemoryError, match="12 kB on cpu .*, 1 kB are free"):
        CoherenceScheduler(optimizer, rewind=True, loggers=None)
    assert not optimizer._optimizer_step_pre_hooks  # no hook stays behind
    rewinder = Rewinder(Ensemble(optimizer), free=lambda device: 12_004)
    assert rewinder.nbytes == 12_004


def test_the_figure_is_parameters_state_and_buffers() -> None:
    run = Run(Case(Adam))
    scheduler_side = run.guard.rewind_memory()
    run.run(range(12))
    parameters = sum(p.numel() for p in run.model.parameters())
    state, buffers = 2 * 4 * parameters + 6 * 4, 2 * 16 * 4 + 8  # two averages and six steps; two statistics, a count
    assert scheduler_side == 4 * parameters + state
    assert run.guard.rewind_memory() == 4 * parameters + state + 2 * buffers  # the buffers are kept twice


def test_the_counts_are_saved_and_load_safely() -> None:
    run = Run(Case(Adam), rewind=2).run(range(15))
    run.shake()
    run.step(15)
    run.step(16, "nan")
    buffer = io.BytesIO()
    torch.save(run.guard.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = Run(Case(Adam), rewind=2)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    other.guard.load_state_dict(state)
    assert str(other.guard.state_dict()["rewind"]) == str(run.guard.state_dict()["rewind"])  # NaN is not itself
    assert (other.rewinder.rewinds, other.rewinder.drops) == (1, 1)
    assert [t.action for t in other.rewinder.tries] == ["rewind", "drop"]
    other.run(range(17, 25))  # goes on, with a snapshot of its own
    plain_guard = Run(Case(Adam), rewind=False).guard
    plain_guard.load_state_dict(state)  # rewind was switched off since
    other.guard.load_state_dict(plain_guard.state_dict())  # and on


# ---- the judgement itself

USUAL = Losses(tuple(1 + 0.02 * (k % 5 - 2) for k in range(40)))
CALM = NormTrend(mean=0.0, variance=0.01, count=100)
NOISY = NormTrend(mean=0.0, variance=1.0, count=100)


@pytest.mark.parametrize(
    ("signs", "action"),
    [
        (Signs(now=1.0, then=1.0), "apply"),
        (Signs(now=1.05, then=1.0), "apply"),
        (Signs(now=3.0, then=1.0), "rewind"),
        (Signs(now=3.0, then=1.0, outlier=True), "rewind"),
        (Signs(now=3e4, then=2.9e4, outlier=True), "drop"),
        (Signs(now=3e4, then=2.9e4), "apply"),
        (Signs(now=NAN, then=1.0), "rewind"),
        (Signs(now=1.0, then=NAN), "apply"),
        (Signs(finite=False, now=INF, then=1.0), "rewind"),
        (Signs(finite=False, now=NAN, then=NAN), "drop"),
        (Signs(finite=False, now=NAN, then=NAN, drops=DROPS), "rewind"),
        (Signs(finite=False, intact=False), "rewind"),
        (Signs(finite=False), "drop"),
    ],
    ids=str,
)
def test_who_is_to_blame(signs: Signs, action: str) -> None:
    assert judge(signs, USUAL) == action


def test_what_is_far_out() -> None:
    assert not outlying(29.0, CALM) and outlying(31.0, CALM)
    assert not outlying(31.0, NOISY) and outlying(math.exp(6.1), NOISY)
    assert not outlying(1e9, NormTrend(count=3)) and not outlying(INF, CALM)
    assert outlying(4.0, CALM, 3.0, USUAL) and not outlying(4.0, CALM, 1.9, USUAL)  # both, or not
    assert not outlying(2.9, CALM, 30.0, USUAL) and not outlying(4.0, CALM)
    assert outlying(31.0, NormTrend(mean=0.0, variance=0.0, count=20))


def test_losses_that_are_not_positive_are_compared_by_difference() -> None:
    usual = Losses(tuple(-10 + 0.1 * (k % 5 - 2) for k in range(40)))
    assert usual.jumped(-5.0, -10.0) and not usual.jumped(-9.9, -10.0) and not usual.jumped(-12.0, -10.0)
    assert usual.suspicious(-5.0) and not usual.suspicious(-9.9) and usual.suspicious(INF)
    assert len(usual.after(-10.0).last) == 41 and usual.after(NAN) is usual
    assert Losses().spread is None and Losses().median == 0 and not Losses().suspicious(1e9)
    constant = Losses((1.0,) * 20)
    assert constant.spread == 0 and constant.suspicious(1.2) and not constant.suspicious(1.0)


def test_the_diagnosis_can_be_read() -> None:
    trouble = Trouble(7, "rewind", 0, 50.0, 2.0, 9.0, 1.0, 0.1, 0.5, 0.02, 0.7)
    assert trouble.reason == (
        "back from update 7 to 0: the gradient norm is 50, usual is 2; the batch's loss is 9, under the last snapshot "
        "it is 1; margin now 0.5, cap 0.02"
    )
    assert isinstance(RewindsExhausted([trouble]), RuntimeError)


# ---- several processes


def _leave() -> None:
    """Ends a rank once all have come so far, without the interpreter's own end, in which torch's threads may abort."""
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    run = Run(Case(Adam), credit=0)  # measuring is not what is tested
    ddp = nn.parallel.DistributedDataParallel(run.model)
    seen = []
    for number in range(60):
        if number == 40 and rank == 1:
            run.shake(NAN)  # one rank alone breaks: both go back
        poison = "labels" if number == 25 and rank == 1 else None
        if number == 30 and rank == 0:
            poison = "nan"
        chosen = torch.randint(256, (32,), generator=torch.Generator().manual_seed(2 * number + rank))
        x, y = run.x[chosen], run.y[chosen]
        if poison == "nan":
            x = x * NAN
        if poison == "labels":
            y = (y + 1) % 3

        def loss_of(x: Tensor = x, y: Tensor = y) -> Tensor:
            return nn.functional.cross_entropy(ddp(x), y)

        run.optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        # Rank 1 tells no loss for a while: then none is known, on any rank.
        run.guard.observe(loss_of, loss=None if number > 50 and rank == 1 else loss)
        run.optimizer.step()
        seen.append((run.rewinder.drops, run.rewinder.rewinds))
    parameters = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    own = [dist.new_group([other]) for other in range(2)][rank]
    alone = Run(Case(Adam), credit=0, process_group=own).run(range(20), {15: "nan"} if rank == 0 else {})
    torch.save((seen, parameters, alone.rewinder.drops), Path(folder) / f"{rank}.pt")
    _leave()


@pytest.mark.slow
def test_all_ranks_decide_together(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    (seen, first, alone), (others, second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (alone, other) == (1, 0)  # a group of its own: no other rank has a say
    assert seen == others and torch.equal(first, second) and torch.isfinite(first).all()
    assert seen[29][0] + 1 == seen[30][0]  # the NaN batch of one rank
    assert seen[39][1] + 1 == seen[40][1] == seen[-1][1]  # the parameters of one rank


def _drifting_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    fixed = torch.ones(3)
    drift = Drift(probe=None)
    drift.guard.close()
    drift.guard = CoherenceGuard(
        drift.optimizer, loggers=None, rewind=True, probe=lambda: (drift.x * fixed).square().mean()
    )
    drift.run(lambda number: 1.0, 61)
    drift.room()
    drift.run(lambda number: 1.1 ** (rank * (number - 60)), 15)  # one rank's loss alone
    torch.save([(d.step, d.reason) for d in drift.cuts], Path(folder) / f"{rank}.pt")
    _leave()


@pytest.mark.slow
def test_all_ranks_see_drift_together(tmp_path: Path) -> None:
    mp.spawn(_drifting_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [step for step, _ in first] == [step for step, _ in second] == [70]
