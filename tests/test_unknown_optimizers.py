"""Optimizers that nobody described, and those that step by signs: rehearsals on copies, and trial steps alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.optimizer import register_optimizer_step_post_hook

import safe_lr
from safe_lr import CoherenceGuard, CoherenceScheduler
from safe_lr.preconditioners import FromUpdate, Preconditioner
from safe_lr.stability import UpdateRule


def unknown(known: type[Optimizer]) -> type[Optimizer]:
    """A subclass with a `step` of its own, which safe_lr therefore does not know."""

    class Unknown(known):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    return Unknown


def trained(make: Callable[[Any], Optimizer], steps: int = 6) -> tuple[nn.Module, Optimizer, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, 2, dtype=torch.float64)
    optimizer = make(model.parameters())

    def loss() -> Tensor:
        return (model(x) - y).square().mean()

    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    optimizer.zero_grad()
    loss().backward()
    return model, optimizer, loss


FAMILIES = [
    (SGD, {"lr": 0.05}, 1.0),
    (SGD, {"lr": 0.05, "momentum": 0.9}, None),
    (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}, None),
    (RMSprop, {"lr": 0.01}, 1.0),
    (Adam, {"lr": 0.01}, None),
    (AdamW, {"lr": 0.01, "weight_decay": 0.1}, None),
    (Adam, {"lr": 0.01, "maximize": True}, None),
]


@pytest.mark.parametrize(("known", "options", "ratio"), FAMILIES, ids=lambda x: str(getattr(x, "__name__", x)))
def test_inferred_limits_never_exceed_the_known_ones(known: Any, options: dict[str, Any], ratio: float | None) -> None:
    limits = []
    for make in (known, unknown(known)):
        _, optimizer, loss = trained(lambda params, make=make: make(params, **options))
        sign = -1 if options.get("maximize") else 1
        found = safe_lr.measure(optimizer, lambda: sign * loss(), tol=1e-9, preconditioner="from-update")  # noqa: B023
        limits.append(found.lr_limit)
    assert 0 < limits[1] <= limits[0] * (1 + 1e-6)
    if ratio is not None:  # without momentum the two are the same
        assert limits[1] == pytest.approx(limits[0] * ratio, rel=1e-6)


@pytest.mark.parametrize(("known", "options", "ratio"), FAMILIES, ids=lambda x: str(getattr(x, "__name__", x)))
def test_a_rehearsal_is_the_real_step_and_touches_nothing(known: Any, options: dict[str, Any], ratio: Any) -> None:
    model, optimizer, _ = trained(lambda params: unknown(known)(params, **options))
    torch.optim.lr_scheduler.StepLR(optimizer, 3)  # patches optimizer.step
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    before = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    inferred, group = FromUpdate(optimizer), optimizer.param_groups[0]
    steps = [
        inferred.coming_step(group, optimizer.state.get(p, {}), p, p.grad, group["lr"]) for p in model.parameters()
    ]
    after = (optimizer.state_dict(), model.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not calls
    old = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, x, step in zip(model.parameters(), old, steps, strict=True):
        torch.testing.assert_close(x + step, p.detach(), rtol=1e-12, atol=1e-14)


def test_every_record_says_that_p_was_inferred() -> None:
    model, optimizer, loss = trained(lambda params: unknown(Adam)(params, lr=30.0), steps=0)
    scheduler = CoherenceScheduler(optimizer, preconditioner="from-update", loggers=None)
    first = float(loss().detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        scheduler.observe(loss)
        optimizer.step()
        scheduler.step()
    told = [d for d in scheduler.history if d.action in ("cap", "keep", "raise")]
    assert len(told) > 2 and all("P inferred from the optimizer's own update" in d.reason for d in told)
    assert float(loss().detach()) < 0.95 * first


def test_a_preconditioner_may_be_handed_over() -> None:
    _, optimizer, loss = trained(lambda params: unknown(SGD)(params, lr=0.1))

    class Plain(Preconditioner):
        def diagonal(self, group: Any, state: Any, g: Tensor) -> Tensor:
            return torch.ones_like(g)

        def direction(self, group: Any, state: Any, g: Tensor, updates: int | None = None) -> Tensor:
            return g

        def rule(self, group: Any, state: Any, updates: int | None = None) -> UpdateRule:
            return UpdateRule()

    found = safe_lr.measure(optimizer, loss, preconditioner=Plain())
    assert found.lr_limit == pytest.approx(2 / found.lambda_max, rel=1e-3)
    with pytest.raises(ValueError, match=r"'from-update' or a safe_lr.Preconditioner, got 'guess'"):
        CoherenceGuard(optimizer, preconditioner="guess")


class Signs(Optimizer):
    """Steps by the sign of an average, as Lion does."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                m.lerp_(p.grad, 0.01)


def test_sign_steps_have_no_p_to_infer() -> None:
    _, optimizer, loss = trained(Signs)
    found = safe_lr.measure(optimizer, loss, preconditioner="from-update")
    assert "not well defined for Signs" in str(found.failure) and "register" in str(found.failure)
    with pytest.raises(TypeError, match="Signs; known: .*preconditioner='from-update'"):
        safe_lr.measure(optimizer, loss)


class Trusting(Optimizer):
    """LARS: the step is as long as the parameter. Keeps a log, a counter and a dict of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.log: list[int] = []
        self.count, self.stats = torch.zeros(1), {"n": 0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.log.append(1)
        self.count.add_(1)
        self.stats["n"] += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.norm() / p.grad.norm() * p.grad)


def test_rehearsals_are_made_where_the_parameter_is_and_leave_no_trace() -> None:
    w = nn.Parameter(10 * torch.ones(6))
    curvatures = 0.01 * torch.linspace(0.2, 1, 6)
    optimizer = Trusting([w], lr=20.0)
    guard = CoherenceGuard(optimizer, preconditioner="from-update", margin=0.5, loggers=None)
    everyone: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: everyone.append(1))
    for _ in range(30):
        optimizer.zero_grad()
        (curvatures * w**2).sum().div(2).backward()
        guard.observe(lambda: (curvatures * w**2).sum() / 2)
        optimizer.step()
    handle.remove()
    assert len(everyone) == len(optimizer.log) == int(optimizer.count) == optimizer.stats["n"] == 30
    assert float((curvatures * w.detach() ** 2).sum()) < 6.1  # what it began with; uncapped it is infinite


class CoupledDecay(Optimizer):
    """L2 decay through a fixed P of .01."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad + group["weight_decay"] * p) / 0.01)


def test_l2_decay_is_found_out() -> None:
    x = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = CoupledDecay([x], {"lr": 1e-3, "weight_decay": 1.0})
    found = safe_lr.measure(
        optimizer, lambda: x**2 @ torch.tensor([0.5, 0.25], dtype=torch.float64), preconditioner="from-update", tol=1e-8
    )
    assert found.lr_limit == pytest.approx(2 * 0.01 / (1 + 1.0), rel=1e-6)


def test_a_zero_gradient_has_a_response_too() -> None:
    """LoRA at its start: A's gradient is exactly zero, B's is not."""
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))
    x, y = torch.randn(16, 4), torch.randn(16, 3)
    limits = [
        safe_lr.measure(make([a, b], lr=0.1), lambda: (x @ a.T @ b.T - y).square().mean(), preconditioner="from-update")
        for make in (SGD, unknown(SGD))
    ]
    assert limits[1].lr_limit == pytest.approx(limits[0].lr_limit, rel=1e-2)


# ---- Lion: trial steps alone


def lion(params: Any, **options: Any) -> Optimizer:
    package = pytest.importorskip("pytorch_optimizer")
    made: Optimizer = package.Lion(params, **options)
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "weight_decouple": False},
        {"weight_decay": 0.1, "fixed_decay": True},
        {"betas": (0.95, 0.98), "foreach": False},
    ],
    ids=str,
)
def test_lions_coming_step_is_the_real_one(options: dict[str, Any]) -> None:
    x = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64))
    optimizer = lion([x], lr=0.1, **options)
    model, generator = safe_lr.preconditioners.preconditioner_of(optimizer), torch.Generator().manual_seed(0)
    for update in range(12):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + update)
        x.grad = torch.randn(x.shape, dtype=x.dtype, generator=generator)
        group, old = optimizer.param_groups[0], x.detach().clone()
        step = model.coming_step(group, optimizer.state.get(x, {}), x, x.grad, group["lr"])
        optimizer.step()
        torch.testing.assert_close(old + step, x.detach(), rtol=1e-12, atol=1e-14)


def test_lion_is_held_by_trial_steps_alone() -> None:
    model, optimizer, loss = trained(lambda params: lion(params, lr=10.0), steps=0)
    with pytest.raises(TypeError, match="Lion has no stability limit to measure"):
        safe_lr.measure(optimizer, loss)
    guard = CoherenceGuard(optimizer, loggers=None)
    first = float(loss().detach())
    for _ in range(120):
        optimizer.zero_grad()
        loss().backward()
        guard.observe(loss)
        optimizer.step()
    told = [d for d in guard.history if d.action in ("cap", "keep", "raise")]
    assert told and all("no limit exists" in d.reason and d.gamma is None for d in told)
    assert float(loss().detach()) < 0.7 * first
    assert guard.summary().num_matvecs == 0
    assert optimizer.param_groups[0]["lr"] == 10.0


def test_lion_on_a_probe_and_under_a_warm_up() -> None:
    model, optimizer, loss = trained(lambda params: lion(params, lr=5.0), steps=0)
    guard = CoherenceGuard(optimizer, probe=loss, loggers=None)
    first = float(loss().detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < first and guard.summary().capped_steps > 0

    model, optimizer, loss = trained(lambda params: lion(params, lr=1e-3), steps=0)
    warm_up = CoherenceScheduler(
        optimizer,
        schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 50)),
        loggers=None,
    )
    for step in range(60):
        optimizer.zero_grad()
        loss().backward()
        warm_up.observe(loss)
        optimizer.step()
        warm_up.step()
        assert warm_up.get_last_lr()[0] == pytest.approx(1e-3 * min(1.0, (step + 1) / 50), rel=1e-6)


def test_lion_takes_the_closures_of_its_curvature() -> None:
    model, optimizer, loss = trained(lambda params: lion(params, lr=5.0), steps=0)
    guard = CoherenceGuard(optimizer, curvature="empirical-fisher", loggers=None)
    loss().backward()
    guard.observe(lambda: loss().expand(4))
    optimizer.step()
    assert guard.last_decision is not None and guard.last_decision.failure is None
