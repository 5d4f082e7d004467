"""Closed forms against the transition matrix, and the matrix against real optimizers on quadratics with a frozen P."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import safe_lr
from safe_lr.preconditioners import preconditioner_of
from safe_lr.stability import UpdateRule, lr_limit, spectral_radius, transition_matrix, warm_decay
from tests.cases import CASES, Case, freeze, frozen, preconditioner, quadratic

RULES = [
    UpdateRule(),
    UpdateRule(0.9, 1.0, 0.0),
    UpdateRule(0.9, 10.0, 0.0),
    UpdateRule(0.9, 9.0, 1.0),
    UpdateRule(0.5, 1.0, 0.3),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
def test_limit_is_where_the_spectral_radius_reaches_one(rule: UpdateRule, weight_decay: float) -> None:
    gamma = 3.0
    limit = float(lr_limit(rule, gamma, weight_decay))
    inside = spectral_radius(rule, np.linspace(0, 1, 1001)[1:-1] * limit, gamma, weight_decay)
    assert (inside < 1).all()
    assert spectral_radius(rule, limit * 1.0001, gamma, weight_decay) > 1
    z = np.linalg.eigvals(transition_matrix(rule, limit, gamma, weight_decay))
    assert np.abs(z + 1).min() == pytest.approx(0, abs=1e-9)  # it leaves through z = -1


def test_limits_are_vectorised() -> None:
    assert lr_limit(RULES[1], np.array([[1.0, 2.0], [4.0, 8.0]])).shape == (2, 2)
    assert transition_matrix(RULES[1], np.ones(3), 2.0).shape == (3, 2, 2)
    assert math.isinf(lr_limit(RULES[0], 0.0))


def test_warm_decay_is_the_bias_corrected_average() -> None:
    """m_hat_t = decay_t m_hat_{t-1} + (1 - decay_t) g_t, from Adam's own definition of m_hat."""
    rng, b, m, hat = np.random.default_rng(0), 0.9, 0.0, 0.0
    for t in range(1, 50):
        g = rng.normal()
        m = b * m + (1 - b) * g
        decay = warm_decay(b, t, caution=1)
        hat = decay * hat + (1 - decay) * g
        assert hat == pytest.approx(m / (1 - b**t), abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_settled_limit_is_the_known_constant(case: Case) -> None:
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = frozen(case, x, lr=0.1)
    freeze(optimizer, x, torch.ones(1, dtype=torch.float64), past=10**6)
    if optimizer.param_groups[0].get("momentum") and "alpha" not in optimizer.param_groups[0]:
        optimizer.state[x]["momentum_buffer"] = torch.zeros_like(x)
    rule = preconditioner_of(optimizer).rule(optimizer.param_groups[0], optimizer.state[x])
    assert rule.flip == pytest.approx(case.c, rel=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_real_optimizer_turns_unstable_at_the_measured_limit(case: Case) -> None:
    """On a random quadratic that does not commute with P: 1 % below the limit it decays, 1 % above it grows."""
    generator = torch.Generator().manual_seed(1)
    h, p = quadratic(5, generator), preconditioner(case, 5, generator)
    sign = -1.0 if case.options.get("maximize") else 1.0
    x = nn.Parameter(torch.randn(5, dtype=torch.float64, generator=generator))
    optimizer = frozen(case, x, lr=1.0)
    past = 10**6

    def loss() -> torch.Tensor:
        return sign * 0.5 * x @ h @ x

    def growth(lr: float) -> float:
        """Log growth of parameters and momenta over the second half of the run; rescaled all along: it is linear."""
        fresh = frozen(case, x, lr)
        x.data.fill_(1.0)
        total = 0.0
        for step in range(3000):
            x.grad = sign * (h @ x.detach())
            freeze(fresh, x, p, past + step)
            fresh.step()
            linear = [x.data, *(s for name, s in fresh.state[x].items() if name in ("exp_avg", "momentum_buffer"))]
            scale = float(torch.stack([v.norm() for v in linear if isinstance(v, torch.Tensor)]).max()) * 1e3
            for v in linear:
                if isinstance(v, torch.Tensor):
                    v.div_(scale)
            total += math.log(scale) if step >= 1500 else 0.0
        return total

    freeze(optimizer, x, p, past)
    if case.options.get("momentum") and case.make is torch.optim.SGD:
        optimizer.state[x]["momentum_buffer"] = torch.zeros_like(x)
    limit = safe_lr.measure(optimizer, loss, tol=1e-10).lr_limit
    assert growth(0.99 * limit) < 0 < growth(1.01 * limit)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_amplified_fourfold_from_step_zero_at_margin_one(case: Case) -> None:
    """Following the limit of each coming step on a frozen quadratic, from a fresh optimizer, along all eigenvectors."""
    lam = torch.cat([torch.linspace(0.01, 1, 40), 1 - torch.logspace(-6, -2, 10)]).double()
    p = torch.full_like(lam, 1e8 if case.make is torch.optim.Adagrad else 1.0)
    sign = -1.0 if case.options.get("maximize") else 1.0
    x = nn.Parameter(torch.full_like(lam, 1e-6))  # so small that its gradients do not move the frozen P
    optimizer = frozen(case, x, lr=0.0)
    model, group = preconditioner_of(optimizer), optimizer.param_groups[0]
    l2, decoupled = model.decay(group)
    peak = 1.0
    for step in range(600):
        freeze(optimizer, x, p, step)
        x.grad = sign * lam * x.detach()
        flip = model.rule(group, optimizer.state[x], step + 1).flip
        group["lr"] = float(2 / (2 / flip * (1.0 + l2) / p[0] + decoupled))
        optimizer.step()
        peak = max(peak, float(x.detach().abs().max()) / 1e-6)
    assert peak <= 4.0
