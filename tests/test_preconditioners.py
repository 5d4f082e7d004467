"""Every optimizer's coming step against the real one, and its registry."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from safe_lr.preconditioners import SGD, Preconditioner, preconditioner_of, register
from tests.cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_coming_step_is_the_real_step(case: Case) -> None:
    """From the first step on, with changing gradients and lr, and without touching the optimizer's state."""
    generator = torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.randn(2, 3, dtype=torch.float64, generator=generator))
    optimizer = case.optimizer([x])
    model, group = preconditioner_of(optimizer), optimizer.param_groups[0]
    for update in range(1, 30):
        group["lr"] = 0.05 / update
        x.grad = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        before = copy.deepcopy(optimizer.state_dict()["state"])
        predicted = model.coming_step(group, optimizer.state.get(x, {}), x, x.grad, group["lr"], update)
        torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)
        old = x.detach().clone()
        optimizer.step()
        torch.testing.assert_close(old + predicted, x.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False, "differentiable": False}])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_implementations_agree(make: type[torch.optim.Optimizer], options: dict[str, bool]) -> None:
    x = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = make([x], lr=0.1, weight_decay=0.01, **options)  # type: ignore[call-arg]
    for update in range(1, 5):
        x.grad = torch.tensor([0.1, 5.0, -1.0]) * update
        group, old = optimizer.param_groups[0], x.detach().clone()
        predicted = preconditioner_of(optimizer).coming_step(group, optimizer.state[x], x, x.grad, 0.1, update)
        optimizer.step()
        torch.testing.assert_close(old + predicted, x.detach(), rtol=1e-5, atol=1e-6)


def test_momentum_buffer_of_an_uncounted_run_counts_as_settled() -> None:
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=1e-3, momentum=0.9)
    for _ in range(400):
        x.grad = torch.ones_like(x)
        optimizer.step()
    model, group, state = preconditioner_of(optimizer), optimizer.param_groups[0], optimizer.state[x]
    torch.testing.assert_close(
        model.coming_step(group, state, x, x.grad, 1e-3, None), model.coming_step(group, state, x, x.grad, 1e-3, 401)
    )
    assert model.rule(group, state, None).flip == pytest.approx(3.8)
    assert model.rule(group, {}, 1).flip == 2.0


def test_unknown_optimizer_names_the_known_ones_and_the_way() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            return None

    with pytest.raises(TypeError, match=r"Odd; known: .*Adagrad, Adam, AdamW, .*safe_lr.register\(Odd, "):
        preconditioner_of(Odd([torch.zeros(1)], lr=0.1))
    register(Odd, SGD())
    assert isinstance(preconditioner_of(Odd([torch.zeros(1)], lr=0.1)), SGD)


def test_subclass_that_keeps_step_is_known() -> None:
    class Renamed(torch.optim.AdamW): ...

    assert preconditioner_of(Renamed([torch.zeros(1)])).decay({"weight_decay": 0.1}) == (0.0, 0.1)


@pytest.mark.parametrize("arguments", [(nn.Linear, SGD()), (torch.optim.SGD, SGD), (torch.optim.SGD, None)])
def test_register_refuses_other_things(arguments: tuple[type, Preconditioner]) -> None:
    with pytest.raises(TypeError, match=r"register\(\) takes"):
        register(*arguments)


def test_momentum_that_never_forgets_has_no_settled_limit() -> None:
    x = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([x], lr=0.1, momentum=1.0)
    x.grad = torch.ones(1)
    optimizer.step()
    with pytest.raises(ValueError, match="momentum 1 never forgets"):
        preconditioner_of(optimizer).rule(optimizer.param_groups[0], optimizer.state[x])
