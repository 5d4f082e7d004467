"""Closed forms against the solver, and the solver against real optimizers on quadratics with a frozen P."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import safe_lr
from safe_lr.preconditioners import preconditioner_of
from safe_lr.stability import Rule, UpdateRule, lr_limit, spectral_radius, transition_matrix, warm_decay
from tests.cases import CASES, Case, freeze, frozen, preconditioner, quadratic

Array = npt.NDArray[np.float64]

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
    assert lr_limit(RULES[1], np.ones((3, 1)), np.ones(5)).shape == (3, 5)
    assert lr_limit(RULES[1], np.zeros((0, 3))).shape == (0, 3)
    assert lr_limit(RULES[1], 1.0).shape == ()
    assert transition_matrix(RULES[1], np.ones(3), 2.0).shape == (3, 2, 2)
    assert transition_matrix(late(3), np.ones((2, 3)), 2.0, np.zeros(3)).shape == (2, 3, 4, 4)
    assert spectral_radius(late(3), np.ones((2, 1)), np.ones(3)).shape == (2, 3)
    assert math.isinf(lr_limit(RULES[0], 0.0))


def random_rules(count: int, seed: int) -> list[UpdateRule]:
    """Rules over the whole range: decays up to .9999, weights over six orders of magnitude, none negative."""
    rng = np.random.default_rng(seed)
    rules = []
    for _ in range(count):
        decay = float(rng.choice([0.0, 0.5, 0.9, 1 - 10 ** rng.uniform(-4, 0)]))
        average, gradient = (float(rng.choice([0.0, 1.0, 10 ** rng.uniform(-3, 3)])) for _ in range(2))
        rules.append(UpdateRule(decay, average, gradient or 1.0 * (average == 0)))
    return rules


@pytest.mark.parametrize("seed", range(4))
def test_closed_form_is_what_the_solver_finds(seed: int) -> None:
    """Over decay, from_average, from_gradient, curvature and decoupled decay; the solver knows none of the formulas."""
    rng = np.random.default_rng(100 + seed)
    for rule in random_rules(60, seed):
        gamma = 10 ** rng.uniform(-9, 9, size=3)
        weight_decay = gamma * rng.choice([0.0, 1e-4, 0.1, 1.0, 1e4], size=3)
        closed = 2 / (2 / rule.flip * gamma + weight_decay)
        assert lr_limit(rule, gamma, weight_decay) == pytest.approx(closed, rel=1e-10), rule


@pytest.mark.parametrize("weight_decay", [0.0, 0.7])
def test_limit_holds_for_all_smaller_curvatures_too(weight_decay: float) -> None:
    for rule in random_rules(30, seed=9):
        limit = 0.999 * lr_limit(rule, 3.0, weight_decay)
        below = np.linspace(0, 3.0, 200)[1 - bool(weight_decay) :]
        assert (spectral_radius(rule, limit, below, weight_decay) < 1).all()
        assert (np.diff(lr_limit(rule, below[1:], weight_decay)) < 0).all()


@pytest.mark.parametrize(
    ("gamma", "weight_decay", "limit"),
    [
        (0.0, 0.0, math.inf),
        (0.0, 2.0, 1.0),
        (math.inf, 0.0, 0.0),
        (0.0, math.inf, 0.0),
        (math.nan, 0.0, math.nan),
        (math.nan, math.inf, math.nan),
        (1e-300, 0.0, 3.8e301),
        (5e-324, 0.0, math.inf),  # beyond the largest float
        (1e308, 1e308, 2 / (1 / 19 + 1) / 1e308),
        (-1.0, 0.0, 0.0),  # downhill for ever
        (-1.0, 2.0, 2 / (2 - 1 / 19)),  # the decay holds it
    ],
)
def test_limit_of_extreme_curvatures(gamma: float, weight_decay: float, limit: float) -> None:
    assert float(lr_limit(UpdateRule(0.9, 1.0, 0.0), gamma, weight_decay)) == pytest.approx(limit, nan_ok=True)


def test_limit_of_a_rule_without_gradient_is_infinite() -> None:
    assert lr_limit(UpdateRule(0.9, 0.0, 0.0), 1.0) == math.inf == UpdateRule(0.9, 0.0, 0.0).flip


@dataclass(frozen=True)
class Matrix:
    """A rule that is nothing but its A, row by row."""

    rows: Callable[[Array, Array], list[list[Array | float]]]

    def matrix(self, h: Array, decay: Array) -> Array:
        rows = [np.stack([np.broadcast_to(x, h.shape) for x in row], axis=-1) for row in self.rows(h, decay)]
        return np.stack(rows, axis=-2)


def late(steps: int) -> Matrix:
    """x' = x - h x_{t - steps}; the state is (x_t, ..., x_{t - steps})."""
    shift = [[float(i == j) for j in range(steps + 1)] for i in range(steps)]
    return Matrix(lambda h, decay: [[1 - decay, *[0.0] * (steps - 1), -h], *shift])


def schedule_free(b: float, c: float) -> Matrix:
    """(z, x) with the gradient at y = (1 - b) z + b x: z' = z - h y, x' = (1 - c) x + c z'."""
    return Matrix(lambda h, _: [[1 - h * (1 - b), -h * b], [c * (1 - h * (1 - b)), 1 - c - c * h * b]])


def two_buffers(slow: float, fast: float, weight: float) -> Matrix:
    """x' = x - (fast average' + weight * slow average'): AdEMAMix's two averages; the state is (x, fast, slow)."""
    r = 1 - fast, 1 - slow
    return Matrix(
        lambda h, decay: [
            [1 - decay - h * (r[0] + weight * r[1]), -fast, -weight * slow],
            [r[0] * h, fast, 0.0],
            [r[1] * h, 0.0, slow],
        ]
    )


OTHER_RULES: list[tuple[str, Rule, float]] = [
    # The exit is not at z = -1: a gradient that is late by n steps, lr * gamma < 2 sin(pi / (4 n + 2)).
    ("late by 1", late(1), 1.0),
    ("late by 2", late(2), 2 * math.sin(math.pi / 10)),
    ("late by 7", late(7), 2 * math.sin(math.pi / 30)),
    # More than one average.
    ("schedule-free, settled", schedule_free(0.9, 1e-9), 2 / (1 - 0.9)),
    ("schedule-free, young", schedule_free(0.9, 0.25), UpdateRule(0.75, 0.9, 0.1).flip),
    ("two buffers alike are one", two_buffers(0.9, 0.9, 0.5), 38 / 1.5),
    ("two buffers", two_buffers(0.99, 0.9, 2.0), 2 / (0.1 / 1.9 + 2 * 0.01 / 1.99)),
    # The stable set is (0, h1) and (h2, h3): two steps in turn, one ten times the other, |(1 - h)(1 - 10 h)| < 1.
    ("period of two", Matrix(lambda h, _: [[(1 - h) * (1 - 10 * h)]]), (11 - math.sqrt(41)) / 20),
    # The stable set does not begin at 0: whatever curves less is amplified.
    ("stable on (1, 2) only", Matrix(lambda h, _: [[1 + h - h * h]]), 0.0),
    ("ascent", Matrix(lambda h, _: [[1 + h]]), 0.0),
    # |z| = 1 all the way: momentum that forgets nothing, x'' = -h x by leapfrog. The roots meet at the exit.
    ("undamped", Matrix(lambda h, _: [[1 - h, 1.0], [-h, 1.0]]), 4.0),
    # A negative weight of the fresh gradient: the product of the two z leaves first, a (1 + h) = 1.
    ("negative weight", UpdateRule(0.9, 2.0, -1.0), 1 / 9),
    # Implicit: x' = x / (1 + h), stable for ever.
    ("implicit", Matrix(lambda h, _: [[1 / (1 + h)]]), math.inf),
]


@pytest.mark.parametrize(("rule", "limit"), [row[1:] for row in OTHER_RULES], ids=[row[0] for row in OTHER_RULES])
@pytest.mark.parametrize("gamma", [1.0, 3e-7, 4e11])
def test_solver_on_rules_without_a_flip(rule: Rule, limit: float, gamma: float) -> None:
    """Against limits known from the literature, or worked out by hand from the characteristic polynomial."""
    assert float(lr_limit(rule, gamma)) == pytest.approx(limit / gamma, rel=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_late_gradient_leaves_through_a_complex_pair(steps: int) -> None:
    z = np.linalg.eigvals(transition_matrix(late(steps), lr_limit(late(steps), 1.0), 1.0))
    outermost = z[np.abs(z).argmax()]
    assert abs(outermost) == pytest.approx(1, abs=1e-8)
    assert abs(np.angle(outermost)) == pytest.approx(math.pi / (2 * steps + 1))


def test_nesterov_written_with_its_own_two_buffers_is_the_update_rule() -> None:
    """torch's form keeps the sum of gradients, not the average, and looks ahead: x' = x - lr (g + mu buf')."""
    for mu in (0.0, 0.5, 0.9, 0.99):
        torchs = Matrix(lambda h, decay, mu=mu: [[1 - decay - h * (1 + mu), -mu * mu], [h, mu]])
        ours = UpdateRule(mu, from_average=mu / (1 - mu), from_gradient=1.0)
        for weight_decay in (0.0, 0.3):
            assert lr_limit(torchs, 2.0, weight_decay) == pytest.approx(lr_limit(ours, 2.0, weight_decay), rel=1e-10)
        assert lr_limit(torchs, 1.0) == pytest.approx(2 * (1 + mu) / (1 + 2 * mu))


def random_problems(count: int) -> list[tuple[Array, Array]]:
    """Positive definite Hessians with positive diagonal P, over two decades, that do not commute."""
    rng = np.random.default_rng(7)
    roots = [rng.normal(size=(4, 4)) for _ in range(count)]
    return [(root @ root.T, 10 ** rng.uniform(-1, 1, size=4)) for root in roots]


def test_coherence_is_the_limit_without_momentum() -> None:
    """The paper's Eq. 12 by its own definition, on M = I - lr P^-1 H: rho(M) < 1 just where lr < 2 / gamma."""
    for h, p in random_problems(50):
        limit = 2 / np.linalg.eigvalsh(h / np.sqrt(np.outer(p, p))).max()
        below, above = (np.abs(np.linalg.eigvals(np.eye(4) - f * limit * h / p[:, None])).max() for f in (0.999, 1.001))
        assert below < 1 < above


def test_equation_13_needs_h_and_p_to_commute() -> None:
    """No pairing of H's eigenvalues with P's entries gives the eigenvalues of P^-1 H; on a diagonal H one does."""
    for h, p in random_problems(50):
        lam = np.linalg.eigvalsh(h)
        gamma = np.linalg.eigvals(h / p[:, None]).real.max()
        paired = [max(lam[list(order)] / p) for order in itertools.permutations(range(4))]
        assert min(abs(np.array(paired) / gamma - 1)) > 1e-4
        assert np.linalg.eigvals(np.diag(lam / p)).real.max() == pytest.approx(max(lam / p))


def test_lemma_1_is_sufficient_and_not_necessary() -> None:
    """lambda_max / p_min >= gamma for every H; that it were necessary fails at once: twice its lr is stable too."""
    loosest = 1.0
    for h, p in random_problems(200):
        lemma1 = 2 * p.min() / np.linalg.eigvalsh(h).max()
        assert np.abs(np.linalg.eigvals(np.eye(4) - 0.999 * lemma1 * h / p[:, None])).max() < 1
        loosest = max(loosest, 2 / np.linalg.eigvalsh(h / np.sqrt(np.outer(p, p))).max() / lemma1)
    assert loosest > 2


def test_negative_curvature_is_unstable_at_every_lr() -> None:
    """Why gamma is the largest algebraic eigenvalue and not, as in Eq. 16, the largest magnitude."""
    assert (spectral_radius(UpdateRule(), [1e-3, 1.0, 100.0], -2.0) > 1).all()
    assert lr_limit(UpdateRule(), -2.0) == 0


def test_the_settled_limit_is_too_much_for_a_young_average() -> None:
    """A bias-corrected average with decay .9 at half of 38 / gamma, from step 0: 22,500-fold before it settles."""
    lam = np.linspace(0.0025, 1, 400)
    x, average, peak = np.ones_like(lam), np.zeros_like(lam), 1.0
    for t in range(1, 500):
        average = 0.9 * average + 0.1 * lam * x
        x = x - 19.0 * average / (1 - 0.9**t)
        peak = max(peak, float(np.abs(x).max()))
    assert peak == pytest.approx(22_500, rel=0.01)
    assert np.abs(x).max() < 1e-3  # it is stable all the same


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
