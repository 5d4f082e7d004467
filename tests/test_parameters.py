"""Parameters of every kind, against a dense D^1/2 H D^1/2 that is put together here from the optimizer's definition."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop, SparseAdam

import safe_lr
from safe_lr import CoherenceGuard

Loss = Callable[[], Tensor]


def dense_limit(loss: Loss, parts: list[tuple[nn.Parameter, Tensor | float, float, float, float]]) -> float:
    """2 / lambda_max(D^1/2 H D^1/2 + diag(share wd)), for (parameter, P, c, share, decoupled decay) of each mover.

    H comes from differentiating every entry of the gradient, complex numbers as pairs of reals.
    """
    params = [p for p, *_ in parts]
    grads = torch.autograd.grad(loss(), params, create_graph=True, allow_unused=True)
    real = [_real(torch.zeros_like(p) if g is None else g.to_dense()) for p, g in zip(params, grads, strict=True)]
    rows = []
    for entry in torch.cat(real):
        second = (
            torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
            if entry.requires_grad
            else [None] * len(params)
        )
        row = [torch.zeros_like(p) if s is None else s.to_dense() for p, s in zip(params, second, strict=True)]
        rows.append(torch.cat([_real(part) for part in row]))
    h = torch.stack(rows).detach().double()
    h = (h + h.T) / 2
    d, decay = [], []
    for p, scale, c, share, wd in parts:
        size = _real(p.detach()).numel()
        entries = scale.reshape(-1).double() if isinstance(scale, Tensor) else torch.full((size,), scale).double()
        d.append(2 / c * share / entries)
        decay.append(torch.full((size,), share * wd).double())
    root = torch.cat(d).sqrt()
    top = torch.linalg.eigvalsh(root[:, None] * h * root + torch.diag(torch.cat(decay))).max()
    return float(2 / top)


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def adam_p(optimizer: Any, p: nn.Parameter, group: int = 0) -> Tensor:
    """Adam's P of the coming step, by its definition: a real step on a copy, then sqrt(v_hat) + eps."""
    twin = copy.deepcopy(optimizer)
    for mine, other in zip(
        [q for g in optimizer.param_groups for q in g["params"]],
        [q for g in twin.param_groups for q in g["params"]],
        strict=True,
    ):
        other.grad = None if mine.grad is None else mine.grad.detach().clone()
        if mine is p:
            match = other
    twin.step()
    state, options = twin.state[match], twin.param_groups[group]
    v = state["exp_avg_sq"]
    v = torch.view_as_real(v) if v.is_complex() else v
    return (v / (1 - options["betas"][1] ** int(state["step"]))).sqrt() + options["eps"]


def settled(optimizer: Any, loss: Loss, steps: int = 400) -> None:
    """Trains until c has reached its end, and leaves a fresh gradient."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    optimizer.zero_grad()
    loss().backward()


C = 2 * 1.9 / 0.1  # of Adam at b1 = .9


def test_complex_parameters_are_pairs_of_reals() -> None:
    torch.manual_seed(0)
    z = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    a = torch.randn(4, 3, dtype=torch.complex128)

    def loss() -> Tensor:
        return (a @ z - 1).abs().pow(2).mean() + 0.1 * (z.real**4 + z.imag.cos()).sum()

    optimizer = Adam([z], lr=1e-3)
    settled(optimizer, loss)
    found = safe_lr.measure(optimizer, loss, tol=1e-8)
    assert found.lr_limit == pytest.approx(dense_limit(loss, [(z, adam_p(optimizer, z), C, 1.0, 0.0)]), rel=1e-6)
    guard = CoherenceGuard(optimizer, loggers=None)
    guard.observe(loss)
    optimizer.step()
    assert guard.last_decision is not None and guard.last_decision.failure is None
    assert guard.last_decision.trial_loss is not None


@pytest.mark.parametrize("make", [SGD, Adam, RMSprop])
def test_bfloat16_parameters_are_measured_in_float32(make: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randn(64, 2)
    half = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).bfloat16()
    full = copy.deepcopy(half).float()
    limits = []
    for model in (half, full):
        dtype = next(model.parameters()).dtype
        optimizer = make(model.parameters(), lr=1e-2)

        def loss(model: nn.Module = model, dtype: torch.dtype = dtype) -> Tensor:
            return (model(x.to(dtype)).float() - y).square().mean()

        limits.append(safe_lr.measure(optimizer, loss).lr_limit)
        before = copy.deepcopy(model.state_dict())
        guard = CoherenceGuard(optimizer, loggers=None)
        optimizer.zero_grad()
        loss().backward()
        guard.observe(loss)
        optimizer.step()
        assert guard.last_decision is not None and guard.last_decision.failure is None
        assert all(v.dtype == dtype for v in model.state_dict().values())
        assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert limits[0] == pytest.approx(limits[1], rel=0.05)  # Hessian products in bfloat16 carry three digits at most


@pytest.mark.parametrize("make", [SGD, SparseAdam])
def test_sparse_gradients_are_those_of_the_dense_embedding(make: Any) -> None:
    torch.manual_seed(0)
    tokens, y = torch.randint(0, 6, (32,)), torch.randn(32)
    sparse = nn.Embedding(8, 3, sparse=True).double()  # two rows are never met
    dense = nn.Embedding(8, 3).double()
    dense.load_state_dict(sparse.state_dict())
    limits = []
    for embedding, optimizer in (
        (sparse, make(sparse.parameters(), lr=1e-3)),
        (dense, (Adam if make is SparseAdam else SGD)(dense.parameters(), lr=1e-3)),
    ):

        def loss(embedding: nn.Module = embedding) -> Tensor:
            return (embedding(tokens).sum(1).tanh() - y).square().mean()

        settled(optimizer, loss, 300)
        limits.append(safe_lr.measure(optimizer, loss, tol=1e-8).lr_limit)
    assert limits[0] == pytest.approx(limits[1], rel=1e-5)  # Adam's eps stands elsewhere in SparseAdam


def test_tied_parameters_count_once() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 4).double()
    head = nn.Linear(4, 5, bias=False).double()
    head.weight = embedding.weight
    tokens = torch.randint(0, 5, (20,))

    def loss() -> Tensor:
        return F.cross_entropy(head(embedding(tokens)), tokens.flip(0))

    optimizer = Adam({id(p): p for p in [*embedding.parameters(), *head.parameters()]}.values(), lr=1e-3)
    settled(optimizer, loss)
    oracle = dense_limit(loss, [(embedding.weight, adam_p(optimizer, embedding.weight), C, 1.0, 0.0)])
    assert safe_lr.measure(optimizer, loss, tol=1e-8).lr_limit == pytest.approx(oracle, rel=1e-6)


@pytest.mark.parametrize("lrs", [(1e-3, 2e-4), (1e-3, 0.0), (0.0, 0.0)], ids=str)
def test_groups_of_every_kind_have_one_exact_limit(lrs: tuple[float, float]) -> None:
    """Different lr, betas, decay; a frozen parameter; one that the loss does not use; lr 0 in one group or in all."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, 5).double(), nn.Linear(5, 1).double()
    frozen, unused = nn.Parameter(torch.ones(5).double(), requires_grad=False), nn.Parameter(torch.ones(2).double())
    x = torch.randn(16, 4, dtype=torch.float64)

    def loss() -> Tensor:
        return (b((a(x) * frozen).tanh()) - 1).square().mean()

    optimizer = AdamW(
        [
            {"params": [*a.parameters(), frozen], "lr": lrs[0], "weight_decay": 0.3},
            {"params": [*b.parameters(), unused], "lr": lrs[1], "betas": (0.8, 0.98), "weight_decay": 4.0},
        ]
    )
    initial = [1e-3, 2e-4]
    for group, lr in zip(optimizer.param_groups, initial, strict=True):
        group["initial_lr"] = lr
    settled(optimizer, loss, 300)
    shares = [1.0, lrs[1] / lrs[0]] if lrs[0] else [1.0, 0.2]
    parts = [
        (p, adam_p(optimizer, p, k), 2 * (1 + b1) / (1 - b1), shares[k], wd)
        for k, (layer, b1, wd) in enumerate([(a, 0.9, 0.3), (b, 0.8, 4.0)])
        if shares[k]
        for p in layer.parameters()
    ]
    found = safe_lr.measure(optimizer, loss, tol=1e-8)
    assert found.lr_limit == pytest.approx(dense_limit(loss, parts), rel=1e-6)


# ---- state that does not fit


def spoilt(how: str) -> tuple[Any, Loss]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(8, 3)

    def loss() -> Tensor:
        return model(x).square().mean()

    optimizer = Adam([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=1e-3)
    settled(optimizer, loss, 3)
    state = optimizer.state[model[2].weight]
    if how == "of another optimizer":
        optimizer.state[model[2].weight] = {"momentum_buffer": torch.zeros_like(model[2].weight)}
    elif how == "half-initialised":
        del state["exp_avg_sq"]
    elif how == "NaN":
        state["exp_avg_sq"][0, 1] = float("nan")
    elif how == "negative":
        state["exp_avg_sq"][0, 1] = -1e-12
    elif how == "of another shape":
        state["exp_avg_sq"] = torch.ones(7)
    return optimizer, loss


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (
            "of another optimizer",
            "has no step, exp_avg, exp_avg_sq .it has momentum_buffer.: was it loaded from another",
        ),
        ("half-initialised", "has no exp_avg_sq"),
        ("NaN", "holds negative numbers or NaN in exp_avg_sq"),
        ("negative", "holds negative numbers or NaN in exp_avg_sq"),
        ("of another shape", r"holds exp_avg_sq of shape \(7,\)"),
    ],
)
def test_state_that_does_not_fit_is_a_failure_that_names_the_group(how: str, sentence: str) -> None:
    optimizer, loss = spoilt(how)
    found = safe_lr.measure(optimizer, loss)
    assert np.isnan(found.lr_limit) and not found.limits
    assert found.failure is not None and found.failure.startswith("parameter group 1: ")
    assert re.search(sentence, found.failure), found.failure
