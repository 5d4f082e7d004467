"""Every figure of a measurement against closed forms on quadratics and dense eigensolvers on networks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import safe_lr
from safe_lr.eigenproblem import Eigenproblem
from safe_lr.ensemble import Ensemble
from safe_lr.movers import movers, shares
from safe_lr.operators import exact_hessian
from safe_lr.preconditioners import preconditioner_of
from tests.cases import CASES, Case, quadratic


def dense(closure: Callable[[], Tensor], params: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradient (n,) and the Hessian (n, n) in float64 of what the closure returns, row by row."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        grads = torch.autograd.grad(closure(), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [
        torch.cat([r.reshape(-1) for r in torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)])
        for g in flat
    ]
    h = torch.stack(rows).double()
    return flat.detach().double(), (h + h.T) / 2


def diagonal(optimizer: torch.optim.Optimizer, gradient: Tensor) -> Tensor:
    """P of the coming step on that gradient, flat, from the optimizer's own formula in tests/test_preconditioners."""
    model, parts, offset = preconditioner_of(optimizer), [], 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            g = gradient[offset : offset + p.numel()].view_as(p).to(p.dtype)
            g = model.descent_gradient(group, p, g)
            parts.append(model.diagonal(group, optimizer.state.get(p, {}), g).double().expand(p.shape).reshape(-1))
            offset += p.numel()
    return torch.cat(parts)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("past", [0, 3])
def test_quadratic_with_known_h_and_p(case: Case, past: int) -> None:
    """Every figure to 1e-8 in float64: fresh optimizers and ones with a history, L2 and decoupled decay, maximize."""
    generator = torch.Generator().manual_seed(3)
    h = quadratic(9, generator)
    sign = -1.0 if case.options.get("maximize") else 1.0
    x = nn.Parameter(torch.randn(9, dtype=torch.float64, generator=generator))
    optimizer = case.optimizer([x], lr=1e-3)
    for _ in range(past):
        x.grad = sign * h @ x.detach()
        optimizer.step()
    found = safe_lr.measure(optimizer, lambda: sign * 0.5 * x @ h @ x, tol=1e-10)

    model, group = preconditioner_of(optimizer), optimizer.param_groups[0]
    l2, decoupled = model.decay(group, optimizer.state.get(x, {}))
    p = diagonal(optimizer, sign * h @ x.detach())
    full = h + l2 * torch.eye(9, dtype=torch.float64)
    lambda_max = np.linalg.eigvalsh(full.numpy())[-1]
    gamma = scipy.linalg.eigh(full.numpy(), torch.diag(p).numpy(), eigvals_only=True)[-1]
    c = model.rule(group, optimizer.state.get(x, {})).flip
    expected = {
        "lambda_max": lambda_max,
        "gamma": gamma,
        "p_min": float(p.min()),
        "p_min_all": float(p.min()),
        "p_eff": lambda_max / gamma,
        "lr_limit": 2 / (2 / c * gamma + decoupled),
        "upper": gamma,
        "loss": float(sign * 0.5 * x.detach() @ h @ x.detach()),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-8), name
    assert found.limits == pytest.approx(
        {
            "lemma1": 2 / (lambda_max / float(p.min()) + decoupled),
            "coherence": 2 / (gamma + decoupled),
            "momentum": 2 / (2 / c * gamma + decoupled),
        },
        rel=1e-8,
    )
    assert found.limits["lemma1"] <= found.limits["coherence"] * (1 + 1e-9)  # Lemma 1 is sufficient, not necessary
    assert (found.converged, found.failure) == (True, None)
    assert found.residual <= 1e-8 * gamma
    assert found.cost == 1 + 2 * found.num_matvecs


def test_groups_with_their_own_lr_momentum_and_decay_fold_into_one_limit() -> None:
    """Against the generalised eigenproblem, with decoupled decay on the diagonal, and the flip of the whole system."""
    generator = torch.Generator().manual_seed(0)
    h = quadratic(6, generator)
    a, b = (nn.Parameter(torch.randn(3, dtype=torch.float64, generator=generator)) for _ in range(2))
    optimizer = torch.optim.AdamW(
        [{"params": [a], "lr": 1e-3, "betas": (0.5, 0.9)}, {"params": [b], "lr": 4e-3, "betas": (0.95, 0.9)}],
        weight_decay=50.0,
    )

    def loss() -> Tensor:
        x = torch.cat([a, b])
        return 0.5 * x @ h @ x

    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    found = safe_lr.measure(optimizer, loss, tol=1e-10)
    p = diagonal(optimizer, h @ torch.cat([a, b]).detach())
    share = torch.tensor([0.25] * 3 + [1.0] * 3, dtype=torch.float64)
    model = preconditioner_of(optimizer)
    c = torch.tensor([model.rule(g, optimizer.state[g["params"][0]]).flip for g in optimizer.param_groups])
    d = 2 / c.repeat_interleave(3).double() * share / p
    folded = d.sqrt()[:, None] * h * d.sqrt() + torch.diag(share * 50.0)
    limit = 2 / float(torch.linalg.eigvalsh(folded)[-1])
    assert found.lr_limit == pytest.approx(limit, rel=1e-8)

    # State (x, average) of all six coordinates at that limit: an eigenvalue sits at -1, and none lies further out.
    decay = torch.tensor([0.5] * 3 + [0.95] * 3, dtype=torch.float64)
    step = torch.diag(limit * share / p)
    average = torch.cat([torch.diag(1 - decay) @ h, torch.diag(decay)], 1)
    moved = torch.cat([torch.eye(6, dtype=torch.float64) - torch.diag(limit * share * 50.0), torch.zeros(6, 6)], 1)
    z = torch.linalg.eigvals(torch.cat([moved - step @ average, average]))
    assert float((z + 1).abs().min()) == pytest.approx(0, abs=2e-4)  # 200 updates: b1 = .95 is settled to 3e-5
    assert float(z.abs().max()) == pytest.approx(1, abs=2e-4)


class Attention(nn.Module):
    """One transformer block with torch's default scaled-dot-product attention."""

    def __init__(self, d: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(10, d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm, self.head, self.heads = nn.LayerNorm(d), nn.Linear(d, 10), heads

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).view(*tokens.shape, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        return self.head(self.norm(x + self.out(y)))


class LoRA(nn.Module):
    """A frozen layer and a low-rank correction that starts at zero: A's gradient is zero, its rows of H are not."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 4).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + x @ self.a.T @ self.b.T


def zero_head() -> nn.Module:
    """The last layer starts at zero: every earlier gradient is zero, but not its rows of H."""
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4))
    nn.init.zeros_(model[2].weight)
    return model


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Dropout(0.2), nn.Linear(10, 4)),
    "cnn with BatchNorm in train mode": cnn,
    "transformer": Attention,
    "zero head": zero_head,
    "LoRA": LoRA,
}


def make(network: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = NETWORKS[network]()
    shape: tuple[int, ...] = (8, 1, 6, 6) if network.startswith("cnn") else (8, 6)
    x = torch.randint(10, (4, 5)) if network == "transformer" else torch.randn(shape)
    y = torch.randint(4, (20,) if network == "transformer" else (8,))
    return model, lambda: F.cross_entropy(model(x).flatten(0, -2), y)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("network", NETWORKS)
def test_network_against_a_dense_eigensolver(network: str, optimizer: str) -> None:
    """lambda_max and gamma to 1e-3 in float32 at the default tolerance, lightly trained; dropout's mask included."""
    model, closure = make(network)
    params = [p for p in model.parameters() if p.requires_grad]
    opt = getattr(torch.optim, optimizer)(params, lr=1e-3)
    for _ in range(0 if network in ("zero head", "LoRA") else 3):
        opt.zero_grad()
        closure().backward()
        opt.step()
    rng = torch.get_rng_state()
    found = safe_lr.measure(opt, closure)
    torch.set_rng_state(rng)
    gradient, h = dense(closure, params)
    p = diagonal(opt, gradient)
    assert found.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-3)
    scaled = h / p.sqrt()[:, None] / p.sqrt()
    assert found.gamma == pytest.approx(float(torch.linalg.eigvalsh(scaled)[-1]), rel=1e-3)
    assert found.p_min_all == pytest.approx(float(p.min()), rel=1e-4)
    if optimizer != "SGD":
        flat = (p <= float(torch.tensor(opt.param_groups[0].get("eps", 0.0)))) & (h.abs().sum(1) == 0)
        assert found.p_min == pytest.approx(float(p[~flat].min()), rel=1e-4)


@pytest.mark.parametrize("max_basis", [3, None])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("network", ["mlp", "transformer"])
def test_smallest_eigenvalue_against_a_dense_eigensolver(network: str, optimizer: str, max_basis: int | None) -> None:
    """Of H, indefinite, whatever P is; the rest of the measurement stays as it is."""
    model, closure = make(network)
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3)
    opt.zero_grad()
    closure().backward()
    opt.step()
    rng = torch.get_rng_state()
    plain = safe_lr.measure(opt, closure)
    found = safe_lr.measure(opt, closure, smallest=True, max_basis=max_basis, max_matvecs=5000)
    torch.set_rng_state(rng)
    truth = torch.linalg.eigvalsh(dense(closure, list(model.parameters()))[1])
    assert truth[0] < 0
    assert plain.lambda_min is None
    assert found.lambda_min == pytest.approx(float(truth[0]), rel=1e-3)
    assert found.lambda_max == pytest.approx(float(truth[-1]), rel=1e-3)
    assert found.gamma == pytest.approx(plain.gamma, rel=1e-3)
    assert found.converged
    assert found.num_matvecs > plain.num_matvecs  # from the same space, continued: its cost is counted
    assert found.cost == 1 + 2 * found.num_matvecs


@pytest.mark.parametrize("maximize", [False, True])
def test_smallest_eigenvalue_of_a_quadratic(maximize: bool) -> None:
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    h = torch.tensor([5.0, 1.0, -2.0, 0.5], dtype=torch.float64)
    sign = -1 if maximize else 1
    found = safe_lr.measure(
        torch.optim.SGD([w], lr=0.1, weight_decay=0.25, maximize=maximize), lambda: sign * h @ w**2 / 2, smallest=True
    )
    assert (found.lambda_max, found.lambda_min) == (pytest.approx(5.25), pytest.approx(-1.75))
    with pytest.raises(ValueError, match="smallest=True needs a max_basis of at least 3.*got 2"):
        safe_lr.measure(torch.optim.SGD([w], lr=0.1), lambda: h @ w**2, smallest=True, max_basis=2)


class Bytes(TorchDispatchMode):
    """The most bytes at once in storages of torch's operators under it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id_of(t) for t in args if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.alive = {k: (ref, size) for k, (ref, size) in self.alive.items() if not ref.expired()}
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, Tensor) and id_of(t) not in given:
                self.alive[id_of(t)] = StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_vectors_that_live_at_once(optimizer: str) -> None:
    """Beside parameters, optimizer and the gradient's graph; forty layers, whose own temporaries weigh little."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(40) for layer in (nn.Linear(100, 100, bias=False), nn.Tanh())))
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3)
    x = torch.randn(1, 100)
    model(x).square().sum().backward()
    opt.step()
    moving = movers(Ensemble(opt), [1.0])
    curvature = exact_hessian(model(x).square().sum(), list(model.parameters()))
    with Bytes() as counted:
        problem = Eigenproblem(
            moving, curvature, tol=1e-4, max_matvecs=100, max_basis=2, cautious=True, seed=0, warm={}
        )
        found = problem.solve("momentum")
    assert found["converged"]
    assert problem.num_matvecs > 4  # it restarted
    assert counted.peak / (4 * 40 * 100 * 100) <= 4.1


def test_p_min_leaves_out_dead_coordinates_only() -> None:
    """One input is always 0: its weights get no gradient and have a zero row. A zero head's gradients are zero, too."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 5), torch.randn(16, 2)
    x[:, 2] = 0
    model = nn.Linear(5, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    found = safe_lr.measure(optimizer, lambda: F.mse_loss(model(x), y))
    assert found.p_min_all == pytest.approx(1e-8)
    assert found.p_min is not None
    assert found.p_min > 1e-4
    head = zero_head()
    inputs, labels = torch.randn(16, 6), torch.randint(4, (16,))
    found = safe_lr.measure(torch.optim.Adam(head.parameters(), lr=1e-3), lambda: F.cross_entropy(head(inputs), labels))
    assert found.p_min == found.p_min_all == pytest.approx(1e-8)


def test_parameters_that_cannot_move_do_not_count() -> None:
    a, b, c, d = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(4))
    b.requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": [a, b, d]}, {"params": [c], "lr": 0.0}], lr=0.1)
    found = safe_lr.measure(optimizer, lambda: (a**2).sum() + 50 * (b**2).sum() + 500 * (c**2).sum())
    assert found.lambda_max == pytest.approx(2.0)  # not frozen b, not c at lr 0, not unused d


def test_all_lrs_zero_take_the_initial_ones_ratios() -> None:
    assert shares([0.0, 0.0], [1.0, 4.0]) == (0.0, [0.25, 1.0])
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 4.0}])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert optimizer.param_groups[0]["lr"] == 0.0
    found = safe_lr.measure(optimizer, lambda: (3 * a**2 + b**2).sum(), tol=1e-10)
    assert found.lr_limit == pytest.approx(2 / max(0.25 * 6, 2.0))


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda w: (w * math.nan).square().sum(), "the loss is nan"),
        (lambda w: (w * 1e30).square().sum(), "the loss is inf"),
        (lambda w: w.sum(), "curves nowhere upwards"),
        (lambda w: -w.square().sum(), "curves nowhere upwards"),
        (lambda w: (w - 1).abs().add(1e-30).pow(0.5).sum(), "not finite|no step can use|nowhere"),
    ],
)
def test_numbers_that_allow_no_limit_are_a_failure(loss: Callable[[Tensor], Tensor], reason: str) -> None:
    w = nn.Parameter(torch.ones(3))
    found = safe_lr.measure(torch.optim.Adam([w], lr=0.1), lambda: loss(w))
    assert found.failure is not None
    assert re.search(reason, found.failure)
    assert math.isnan(found.lr_limit)
    assert found.limits == {}


def test_nan_in_the_optimizers_state_is_a_failure() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([w], lr=0.1)
    w.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[w]["exp_avg_sq"][1] = math.nan
    found = safe_lr.measure(optimizer, lambda: w.square().sum())
    assert "holds negative numbers or NaN in exp_avg_sq" in str(found.failure)


def test_bad_arguments_are_named() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(TypeError, match="needs a closure"):
        safe_lr.measure(optimizer)
    for name, choices in (
        ("bound", "'lemma1', 'coherence', 'momentum'"),
        ("curvature", "'hessian', 'gauss-newton', 'fisher', 'empirical-fisher'"),
        ("hvp", "'auto', 'exact', 'lean', 'finite-difference', 'one-sided'"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be one of {choices}, got 'x'"):
            safe_lr.measure(optimizer, lambda: w.sum(), **{name: "x"})
    with pytest.raises(ValueError, match=r"tol must lie in \(0, 1\), got 0"):
        safe_lr.measure(optimizer, lambda: w.sum(), tol=0)
    with pytest.raises(TypeError, match="LBFGS has no stability limit .*strong_wolfe"):
        safe_lr.measure(torch.optim.LBFGS([w]), lambda: w.sum())
    with pytest.raises(ValueError, match="no parameter of the optimizer requires grad"):
        safe_lr.measure(torch.optim.SGD([torch.zeros(1)], lr=0.1), lambda: w.sum())
