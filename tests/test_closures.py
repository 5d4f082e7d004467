"""Leave no trace: everything the user owns, bit for bit, in good times and bad."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safe_lr
from safe_lr.closures import ClosureError, leave_no_trace


class Untidy(nn.Module):
    """A model that touches all it can: BatchNorm, dropout, a hidden state, a counter, a renormed embedding, a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, max_norm=0.5)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.out = nn.Linear(8, 1)
        self.hidden = torch.zeros(8)
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        self.cached = torch.ones(3)
        random.random()
        np.random.rand()
        x = self.drop(self.norm(self.embed(tokens) + self.hidden))
        self.hidden = x.mean(0).detach()
        return self.out(torch.tanh(self.frozen(x)))


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": [p.grad for p in model.parameters()],
        "grad_values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        # A renormed embedding is written by the forward pass itself; nothing else may look written to autograd.
        "versions": [p._version for n, p in model.named_parameters() if not n.startswith("embed")],
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "own": {k: v for k, v in vars(model).items() if not k.startswith("_")},
        "rng": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state()),
        "hooks": len(torch.nn.modules.module._global_forward_pre_hooks),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert all(a is b for a, b in zip(before["grads"], after["grads"], strict=True))
    for name in ("values", "grad_values", "flags", "modes", "versions", "optimizer", "own", "hooks"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)
    assert before["rng"][:2] == after["rng"][:2]
    assert torch.equal(before["rng"][2], after["rng"][2])


def raise_in_the_middle(model: nn.Module, tokens: Tensor, y: Tensor) -> Tensor:
    F.mse_loss(model(tokens), y)
    raise RuntimeError("in the middle")


CLOSURES: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "good": lambda model, tokens, y: F.mse_loss(model(tokens), y),
    "raises": raise_in_the_middle,
    "detached": lambda model, tokens, y: F.mse_loss(model(tokens), y).detach(),
    "backward": lambda model, tokens, y: F.mse_loss(model(tokens), y).backward(),
    "changes mode": lambda model, tokens, y: F.mse_loss(model.eval()(tokens), y),
    "freezes": lambda model, tokens, y: (
        F.mse_loss(model(tokens), y) + sum(p.requires_grad_(False).sum() * 0 for p in model.out.parameters())
    ),
    "moves parameters": lambda model, tokens, y: (
        F.mse_loss(model(tokens), y) + 0 * model.out.weight.data.mul_(1.5).sum()
    ),
    "nan": lambda model, tokens, y: F.mse_loss(model(tokens), y) * torch.nan,
}


@pytest.mark.parametrize("name", CLOSURES)
@pytest.mark.parametrize("train", [True, False])
def test_measuring_leaves_no_trace(name: str, train: bool) -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Untidy().train(train)
    tokens, y = torch.randint(20, (16,)), torch.randn(16, 1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(tokens), y).backward()
        optimizer.step()
    before = snapshot(model, optimizer)
    try:
        failure = safe_lr.measure(optimizer, lambda: CLOSURES[name](model, tokens, y)).failure
        assert (failure is None) == (name != "nan")
    except (RuntimeError, TypeError):
        assert name not in ("good", "changes mode", "moves parameters", "nan")
    assert_same(before, snapshot(model, optimizer))


def test_a_graph_the_user_holds_still_works() -> None:
    """Measuring between forward and backward bumps no version counter."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    x = torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(x).square().mean()
    scheduler = safe_lr.CoherenceScheduler(optimizer, loggers=None)
    scheduler.measure(lambda: model(x).square().mean())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda w: w.sum().item(), r"must return the loss as a tensor, got float; drop .item\(\)"),
        (lambda w: None, "must return the loss as a tensor, got NoneType"),
        (lambda w: w * 2, r"one real number, got shape \(3,\), torch.float32; reduce it: loss.mean\(\)"),
        (lambda w: (w * 1j).sum(), "one real number"),
        (lambda w: w.sum().detach(), "detached loss"),
        (lambda w: w.square().sum().backward(), r"called backward\(\)"),
    ],
)
def test_bad_closures_are_named(closure: Callable[[Tensor], Any], message: str) -> None:
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(ClosureError, match=message):
        safe_lr.measure(torch.optim.SGD([w], lr=0.1), lambda: closure(w))
    assert w.grad is None


def test_a_one_element_loss_of_any_shape_will_do() -> None:
    w = nn.Parameter(torch.ones(3))
    found = safe_lr.measure(torch.optim.SGD([w], lr=0.1), lambda: w.square().sum()[None, None])
    assert found.gamma == pytest.approx(2.0)


def test_every_evaluation_sees_the_same_random_state() -> None:
    w = nn.Parameter(torch.ones(1000))
    with leave_no_trace([w]) as untouched:
        first = untouched.call(lambda: F.dropout(w).sum()).item()
        second = untouched.call(lambda: F.dropout(w).sum()).item()
        with untouched.moved([torch.ones(1000)]):
            moved = untouched.call(lambda: F.dropout(w).sum()).item()
    assert first == second
    assert moved == pytest.approx(2 * first)
    assert torch.equal(w.detach(), torch.ones(1000))


def test_measuring_inside_no_grad() -> None:
    w = nn.Parameter(torch.ones(3))
    with torch.no_grad():
        assert safe_lr.measure(torch.optim.SGD([w], lr=0.1), lambda: w.square().sum()).failure is None


def test_gradients_come_back_when_a_module_cannot_be_restored() -> None:
    with warnings.catch_warnings(record=True):  # deprecated, not gone
        warnings.simplefilter("always")
        model = torch.jit.script(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 2)
    model(x).square().mean().backward()
    before = [p.grad for p in model.parameters()], {k: v.clone() for k, v in model.state_dict().items()}
    safe_lr.measure(optimizer, lambda: model(x).square().mean())
    assert all(p.grad is g and g is not None for p, g in zip(model.parameters(), before[0], strict=True))
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())


class Hoarder(nn.Module):
    """Grows a buffer, a list, a dict and a tensor attribute in place, in a method that is not `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("queue", torch.zeros(2))
        self.register_buffer("count", torch.zeros(()))
        self.seen: list[int] = []
        self.stats = {"n": 0}
        self.total = torch.zeros(1)

    def loss(self) -> Tensor:
        self.queue.resize_(len(self.queue) + 1)
        self.count += 1
        self.seen.append(1)
        self.stats["n"] += 1
        self.total += 1
        return self.weight.square().sum()


@pytest.mark.parametrize("where", ["list", "holder"])
def test_what_a_method_does_in_place_is_undone(where: str) -> None:
    class Trainer: ...

    hoarder, trainer = Hoarder(), Trainer()
    trainer.model = hoarder  # type: ignore[attr-defined]
    models = [hoarder]
    closure = (lambda: models[0].loss()) if where == "list" else (lambda: trainer.model.loss())  # type: ignore[attr-defined]
    found = safe_lr.measure(torch.optim.SGD(hoarder.parameters(), lr=0.1), closure)
    assert found.lr_limit == pytest.approx(1.0)
    assert hoarder.queue.tolist() == [0, 0] and int(hoarder.count) == 0
    assert (hoarder.seen, hoarder.stats, hoarder.total.tolist()) == ([], {"n": 0}, [0.0])


def test_tensor_hooks_neither_run_nor_count() -> None:
    x, calls = nn.Parameter(torch.ones(2)), []
    x.register_hook(lambda g: calls.append(1) or g * 0.5)
    found = safe_lr.measure(torch.optim.SGD([x], lr=0.1), lambda: x**2 @ torch.tensor([2.0, 0.5]))
    assert found.lambda_max == pytest.approx(4.0) and not calls
    (x**2).sum().backward()
    assert calls == [1] and x.grad.tolist() == [1.0, 1.0]


def test_attention_keeps_its_own_kernel_until_something_is_differentiated_twice() -> None:
    """Beside speed it is the forward pass that training makes."""
    w = nn.Parameter(torch.ones(1))
    kernels = []
    with leave_no_trace([w]) as untouched:
        kernels.append(torch.backends.cuda.flash_sdp_enabled())
        for _ in range(2):
            untouched.differentiate_twice()
            kernels.append(torch.backends.cuda.flash_sdp_enabled())
    assert kernels == [True, False, False] and torch.backends.cuda.flash_sdp_enabled()
