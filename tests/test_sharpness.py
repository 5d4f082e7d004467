"""The sharpness of Eq. 24 against brute force over the disk, closed forms, and closures that break their contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safe_lr import sam_sharpness
from safe_lr.closures import ClosureError

SURFACES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bowl": lambda a, b: 3 * a * a + 0.5 * b * b + a * b,
    "valley": lambda a, b: (1 - a) ** 2 + 10 * (b - a * a) ** 2,
    "waves": lambda a, b: torch.sin(3 * a) * torch.cos(2 * b) + 0.1 * a * b,
    "summit inside": lambda a, b: -((a - 0.52) ** 2) - (b - 0.31) ** 2,
    "saddle": lambda a, b: (a - 0.4) ** 2 - (b - 0.3) ** 2,
}
W = (0.5, 0.3)


def weights() -> nn.Parameter:
    return nn.Parameter(torch.tensor(W, dtype=torch.float64))


def brute_force(surface: Callable[[Tensor, Tensor], Tensor], rho: float) -> float:
    """The largest rise over a polar grid of the disk, rim included."""
    radius = torch.linspace(0, rho, 401, dtype=torch.float64)[:, None]
    angle = torch.linspace(0, 2 * math.pi, 2881, dtype=torch.float64)
    a, b = torch.tensor(W, dtype=torch.float64)
    return float(surface(a + radius * angle.cos(), b + radius * angle.sin()).max() - surface(a, b))


@pytest.mark.parametrize("rho", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("name", SURFACES)
def test_many_steps_find_the_maximum_and_one_step_is_sams(name: str, rho: float) -> None:
    x, surface = weights(), SURFACES[name]
    truth = brute_force(surface, rho)

    def loss() -> Tensor:
        return surface(x[0], x[1])

    found = [sam_sharpness(loss, [x], rho=rho, steps=steps) for steps in (1, 2, 5, 50)]
    assert found == sorted(found)  # more steps never find less
    assert found[-1] == pytest.approx(truth, rel=1e-4)
    g = torch.autograd.grad(loss(), [x])[0]
    a, b = x.detach() + rho * g / g.norm()
    assert found[0] == pytest.approx(max(0.0, float(surface(a, b) - loss().detach())), rel=1e-9)


def test_never_below_zero_because_no_move_is_in_the_ball() -> None:
    x = weights()
    assert sam_sharpness(lambda: SURFACES["summit inside"](x[0], x[1]), [x], rho=0.5) == 0.0  # the step overshoots


def test_at_a_minimum_one_step_finds_nothing_and_more_find_the_top_eigenvector() -> None:
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    h = torch.tensor([8.0, 2.0, 1.0], dtype=torch.float64)

    def loss() -> Tensor:
        return h @ x**2 / 2

    assert sam_sharpness(loss, [x], rho=0.1) == 0.0
    for seed in range(5):
        assert sam_sharpness(loss, [x], rho=0.1, steps=30, seed=seed) == pytest.approx(8.0 * 0.1**2 / 2, rel=1e-6)
    twice = [sam_sharpness(loss, [x], steps=2, seed=7) for _ in range(2)]
    assert twice[0] == twice[1] > 0


def test_the_norm_is_that_of_all_parameters_together() -> None:
    """On a linear loss the rise is rho ||g||, over everything that requires grad, once each."""
    a, b, frozen = (nn.Parameter(torch.full((n,), 2.0, dtype=torch.float64)) for n in (3, 4, 5))
    frozen.requires_grad_(False)
    c = nn.Parameter(torch.ones(1, dtype=torch.complex128))

    def loss() -> Tensor:
        return 2 * a.sum() + 3 * b.sum() + 100 * frozen.sum() + (c.real + 2 * c.imag).sum()

    expected = 0.05 * math.sqrt(4 * 3 + 9 * 4 + 1 + 4)
    assert sam_sharpness(loss, [a, b, frozen, c, a]) == pytest.approx(expected, rel=1e-9)


def test_several_closures_count_as_their_mean() -> None:
    x = weights()
    closures = [lambda k=k: SURFACES["bowl"](x[0], x[1]) * k for k in (1.0, 3.0)]
    mean = sam_sharpness(lambda: SURFACES["bowl"](x[0], x[1]) * 2, [x], steps=3)
    assert sam_sharpness(closures, [x], steps=3) == pytest.approx(mean, rel=1e-12)


def test_reentrant_checkpointing_hides_nothing() -> None:
    layer, head = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    params = [*layer.parameters(), *head.parameters()]
    inputs = x.clone().requires_grad_()
    plain = sam_sharpness(lambda: head(layer(x).tanh()).square().mean(), params)
    hidden = sam_sharpness(
        lambda: head(checkpoint(lambda i: layer(i).tanh(), inputs, use_reentrant=True)).square().mean(), params
    )
    assert hidden == pytest.approx(plain, rel=1e-12)


def test_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    x = torch.randn(6, 3)
    model(x).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads if g is not None]
    stream = torch.get_rng_state()
    for steps in (1, 4):
        first, second = (sam_sharpness(lambda: model(x).square().mean(), model.parameters(), steps=steps) for _ in "ab")
        assert first == second > 0  # one dropout mask throughout
    with pytest.raises(ZeroDivisionError):
        sam_sharpness(lambda: model(x).mean() / (1 // (0 if calls() > 2 else 1)), model.parameters(), steps=5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(grads, values, strict=True))
    assert torch.equal(torch.get_rng_state(), stream)


_CALLS: list[int] = []


def calls() -> int:
    _CALLS.append(1)
    return len(_CALLS)


def test_a_loss_that_overflows_inside_the_ball_is_infinite() -> None:
    x = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    assert sam_sharpness(lambda: -torch.log(0.51 - x).sum(), [x]) == math.inf
    assert sam_sharpness(lambda: -torch.log(0.51 - x).sum(), [x], steps=5) == math.inf


BROKEN: dict[str, tuple[Callable[[nn.Parameter], Any], str]] = {
    "a float": (lambda x: x.sum().item(), "drop .item()"),
    "nothing": (lambda x: None, "forget to return"),
    "a vector": (lambda x: x * 2, "reduce it"),
    "detached": (lambda x: x.detach().sum(), "no graph"),
    "backward": (lambda x: (x.sum().backward(), x.sum())[1], "called backward"),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_contract_is_named(name: str, steps: int) -> None:
    x = weights()
    make, message = BROKEN[name]
    with pytest.raises(ClosureError, match=message):
        sam_sharpness(lambda: make(x), [x], steps=steps)
    assert x.grad is None


def test_a_loss_computed_beforehand_is_named() -> None:
    x = weights()
    loss = x.square().sum()
    with pytest.raises(ClosureError, match="compute the loss again"):
        sam_sharpness(lambda: loss, [x], steps=1)
    loss = x.square().sum()
    loss.backward()
    with pytest.raises(ClosureError, match="compute the loss again"):
        sam_sharpness(lambda: loss, [x])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": 0.0}, ValueError, "rho is the radius.*got 0.0"),
        ({"rho": math.nan}, ValueError, "rho is the radius.*got nan"),
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1; got 0"),
        ({"steps": 1.5}, ValueError, "steps must be an integer.*got 1.5"),
        ({"params": []}, ValueError, "requires grad; got 0"),
        ({"params": torch.ones(2)}, TypeError, r"model.parameters\(\) or \[x\]; got Tensor"),
        ({"params": [{"params": []}]}, TypeError, "got dict"),
        ({"params": [torch.ones(2, requires_grad=True) * 2]}, ValueError, "leaf tensors"),
        ({"closure": 3}, TypeError, "takes a closure.*got int"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x = weights()
    arguments = {"closure": lambda: x.sum(), "params": [x], **options}
    with pytest.raises(error, match=message):
        sam_sharpness(**arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_rise_from_a_loss_that_is_not_finite(value: float) -> None:
    x = weights()
    with pytest.raises(ValueError, match="measure where both are finite"):
        sam_sharpness(lambda: x.sum() * value, [x])
