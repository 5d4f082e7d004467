"""Every curvature and every way of making products, against dense matrices; what only some ways can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import safe_lr
from safe_lr import CoherenceGuard
from safe_lr.operators import (
    Curvature,
    _gradients_with_graph,
    exact_hessian,
    finite_difference_hessian,
    fisher,
    gauss_newton,
    lean_hessian,
    sampled_losses,
)


def network(activation: nn.Module | None = None) -> tuple[nn.Module, list[nn.Parameter], Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), activation or nn.Tanh(), nn.Linear(4, 3)).double()
    return model, list(model.parameters()), torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 3, (7,))


def dense(curvature: Curvature, params: list[nn.Parameter]) -> Tensor:
    """The matrix, from its products with all unit vectors."""
    sizes = [p.numel() for p in params]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=params[0].dtype):
        parts = [v.view_as(p) for v, p in zip(unit.split(sizes), params, strict=True)]
        columns.append(torch.cat([h.reshape(-1) for h in curvature.product(parts)]))
    return torch.stack(columns, 1)


def jacobian(outputs: Tensor, params: list[nn.Parameter]) -> Tensor:
    rows = [torch.autograd.grad(f, params, retain_graph=True) for f in outputs.reshape(-1)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def dense_hessian(loss: Tensor, params: list[nn.Parameter]) -> Tensor:
    grads = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params, create_graph=True)])
    return jacobian(grads, params)


def test_hessians_by_every_way() -> None:
    model, params, x, y = network()

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    truth = dense_hessian(loss(), params)
    for curvature in (exact_hessian(loss(), params), lean_hessian(loss, params)):
        torch.testing.assert_close(dense(curvature, params), truth, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dense(finite_difference_hessian(loss, params), params), truth, rtol=1e-4, atol=1e-6)
    gradients = [c.gradient for c in (lean_hessian(loss, params), finite_difference_hessian(loss, params))]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(gradients[0], list(torch.autograd.grad(loss(), params)))


def test_gauss_newton_is_j_transposed_bend_j() -> None:
    model, params, x, y = network()
    outputs = model(x)
    p = outputs.detach().softmax(-1)
    bend = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p)) / len(x)
    j = jacobian(outputs, params)
    found = dense(gauss_newton(outputs, F.cross_entropy(outputs, y), params), params)
    torch.testing.assert_close(found, j.T @ bend @ j)


def test_empirical_fisher_is_the_second_moment_of_gradients() -> None:
    model, params, x, y = network()
    losses = F.cross_entropy(model(x), y, reduction="none")
    g = jacobian(losses, params)
    found = fisher(losses, params, losses.mean())
    torch.testing.assert_close(dense(found, params), g.T @ g / len(x))
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in found.gradient]), g.mean(0))


def test_the_sampled_fisher_tends_to_gauss_newton() -> None:
    """With cross-entropy the true Fisher is the Gauss-Newton matrix; the mean over 3,000 draws comes within 4 %."""
    model, params, x, y = network()
    outputs = model(x)
    truth = dense(gauss_newton(outputs, F.cross_entropy(outputs, y), params), params)
    j = jacobian(outputs, params).reshape(len(x), 3, -1)
    p, total, draws = outputs.detach().softmax(-1), torch.zeros_like(truth), 3000
    for seed in range(draws):
        drawn = sampled_losses(outputs.detach(), seed)
        labels = (F.cross_entropy(outputs.detach()[:, None].expand(-1, 3, -1).reshape(-1, 3), torch.arange(3).repeat(len(x)), reduction="none").reshape(-1, 3) - drawn[:, None]).abs().argmin(1)  # fmt: skip # noqa: E501
        g = torch.einsum("bk,bkn->bn", p - F.one_hot(labels, 3), j)
        total += g.T @ g / len(x) / draws
    assert float((total - truth).norm() / truth.norm()) < 0.04
    one = dense(fisher(sampled_losses(outputs, 5), params, F.cross_entropy(outputs, y)), params)
    g = jacobian(sampled_losses(outputs, 5), params)
    torch.testing.assert_close(one, g.T @ g / len(x))


CLOSURES: dict[str, Callable[..., Any]] = {
    "hessian": lambda model, x, y: lambda: F.cross_entropy(model(x), y),
    "gauss-newton": lambda model, x, y: lambda: (model(x), lambda f: F.cross_entropy(f, y)),
    "fisher": lambda model, x, y: lambda: (model(x), lambda f: F.cross_entropy(f, y)),
    "empirical-fisher": lambda model, x, y: lambda: F.cross_entropy(model(x), y, reduction="none"),
}


@pytest.mark.parametrize("hvp", ["exact", "lean"])
@pytest.mark.parametrize("kind", CLOSURES)
def test_measurements_of_every_curvature_plain_and_preconditioned(kind: str, hvp: str) -> None:
    model, params, x, y = network()
    optimizer = torch.optim.Adam(params, lr=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    found = safe_lr.measure(optimizer, CLOSURES[kind](model, x, y), curvature=kind, hvp=hvp, tol=1e-8, seed=3)
    outputs = model(x)
    matrices = {
        "hessian": lambda: exact_hessian(F.cross_entropy(outputs, y), params),
        "gauss-newton": lambda: gauss_newton(outputs, F.cross_entropy(outputs, y), params),
        "fisher": lambda: fisher(sampled_losses(outputs, 3), params, F.cross_entropy(outputs, y)),
        "empirical-fisher": lambda: fisher(F.cross_entropy(outputs, y, reduction="none"), params, outputs.sum()),
    }
    h = dense(matrices[kind](), params)
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    v = torch.cat([(0.999 * optimizer.state[p]["exp_avg_sq"] + 0.001 * g**2).reshape(-1) for p, g in zip(params, grads, strict=True)])  # fmt: skip # noqa: E501
    scale = ((v / (1 - 0.999**301)).sqrt() + 1e-8).rsqrt()
    assert found.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(h).max()), rel=1e-6)
    assert found.gamma == pytest.approx(float(torch.linalg.eigvalsh(scale[:, None] * h * scale).max()), rel=1e-6)
    assert (found.curvature, found.hvp, found.failure) == (kind, hvp, None)
    assert found.loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()))


@pytest.mark.parametrize("kind", CLOSURES)
def test_a_run_under_every_curvature_is_protected(kind: str) -> None:
    model, params, x, y = network()
    guard = CoherenceGuard(torch.optim.Adam(params, lr=1.0), curvature=kind, loggers=None)
    first = float(F.cross_entropy(model(x), y).detach())
    for _ in range(25):
        guard.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        guard.observe(CLOSURES[kind](model, x, y))
        guard.optimizer.step()
    assert float(F.cross_entropy(model(x), y).detach()) < 0.9 * first
    assert guard.summary().failures == 0 and guard.summary().capped_steps > 0


@pytest.mark.parametrize(
    ("kind", "closure", "sentence"),
    [
        ("empirical-fisher", lambda m, x, y: F.cross_entropy(m(x), y), r"per-example losses, shape \(B,\).*shape \(\)"),
        ("gauss-newton", lambda m, x, y: F.cross_entropy(m(x), y), r"the pair \(outputs, loss_of_outputs\).*Tensor"),
        ("fisher", lambda m, x, y: (m(x), F.cross_entropy(m(x), y)), "loss_of_outputs must be callable.*Tensor"),
    ],
)
def test_closures_that_do_not_suit_the_curvature_are_named(kind: str, closure: Any, sentence: str) -> None:
    model, params, x, y = network()
    with pytest.raises(TypeError, match=sentence):
        safe_lr.measure(torch.optim.SGD(params, lr=0.1), lambda: closure(model, x, y), curvature=kind)


# ---- several micro-batches


@pytest.mark.parametrize("kind", CLOSURES)
def test_the_mean_of_micro_batches_is_the_whole_batch(kind: str) -> None:
    model, params, x, y = network()
    x, y = torch.cat([x, x[:1]]), torch.cat([y, y[:1]])
    optimizer = torch.optim.SGD(params, lr=0.1)
    parts = [CLOSURES[kind](model, x[k : k + 2], y[k : k + 2]) for k in range(0, 8, 2)]
    found = safe_lr.measure(optimizer, parts, curvature=kind, tol=1e-9)
    if kind != "fisher":  # its labels are drawn for each micro-batch
        whole = safe_lr.measure(optimizer, CLOSURES[kind](model, x, y), curvature=kind, tol=1e-9)
        assert found.lambda_max == pytest.approx(whole.lambda_max, rel=1e-7)
        assert found.loss == pytest.approx(whole.loss)
    assert found.hvp == "lean" and found.failure is None


def test_accumulated_gradients_are_measured_as_their_mean() -> None:
    model, params, x, y = network()
    guard = CoherenceGuard(torch.optim.SGD(params, lr=1e3), margin=0.5, loggers=None)
    for _ in range(20):
        guard.optimizer.zero_grad()
        parts = [CLOSURES["hessian"](model, x[k : k + 3], y[k : k + 3]) for k in (0, 3)]
        for part in parts:
            (part() / 2).backward()
        guard.observe(parts)
        guard.optimizer.step()
    assert guard.summary().failures == 0 and "times the closure's" not in guard.last_decision.reason


@pytest.mark.parametrize("options", [{"credit": 30}, {"credit": 0, "max_overhead": 0.3}, {"hvp": "lean", "credit": 20}])
def test_the_budget_is_kept_with_dearer_products(options: dict[str, Any]) -> None:
    model, params, x, y = network()
    guard = CoherenceGuard(torch.optim.SGD(params, lr=1e2, momentum=0.9), loggers=None, **options)
    for step in range(60):
        guard.optimizer.zero_grad()
        parts = [CLOSURES["hessian"](model, x[k : k + 3], y[k : k + 3]) for k in (0, 3)]
        for part in parts:
            (part() / 2).backward()
        guard.observe(parts if "hvp" not in options else parts[0])
        guard.optimizer.step()
        assert guard.summary().cost <= guard.policy.credit + guard.policy.max_overhead * (step + 1) + 1e-9
    assert guard.summary().measurements > 0


# ---- ways that work where others do not


class NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2)


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = NoDoubleBackward.apply(x)
        return made


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)
        return made


WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "plain": (lambda model: model, "exact"),
    "compiled": (lambda model: torch.compile(model, backend="aot_eager"), "exact"),
    "checkpointed": (lambda model: Checkpointed(model, reentrant=False), "exact"),
    "checkpointed reentrant": (lambda model: Checkpointed(model, reentrant=True), "finite-difference"),
    "custom function": (lambda model: nn.Sequential(model[0], Once(), model[2]), "finite-difference"),
}


@pytest.mark.parametrize("name", WAYS)
def test_auto_finds_a_way_and_the_limit_is_the_same(name: str) -> None:
    model, params, x, y = network()
    wrap, hvp = WAYS[name]
    wrapped = wrap(model)
    truth = float(torch.linalg.eigvalsh(dense_hessian(F.cross_entropy(model(x), y), params)).max())
    found = safe_lr.measure(torch.optim.SGD(params, lr=0.1), lambda: F.cross_entropy(wrapped(x), y))
    assert (found.failure, found.hvp) == (None, hvp)
    assert found.lambda_max == pytest.approx(truth, rel=2e-3)
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("kind", ["gauss-newton", "fisher", "empirical-fisher"])
@pytest.mark.parametrize("name", ["checkpointed reentrant", "custom function"])
def test_other_curvatures_fail_where_part_of_the_graph_is_hidden(name: str, kind: str) -> None:
    model, params, x, y = network()
    wrapped = WAYS[name][0](model)
    with pytest.raises(RuntimeError, match="differentiated twice|no second derivative"):
        safe_lr.measure(torch.optim.SGD(params, lr=0.1), CLOSURES[kind](wrapped, x, y), curvature=kind)


def test_rounding_behind_batchnorm_is_no_eigenvalue() -> None:
    """A bias before BatchNorm has a zero row in H and a tiny P: differences find rounding errors there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    truth = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y)).gamma
    found = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y), hvp="finite-difference", tol=1e-2)
    assert found.failure is not None or found.gamma == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_the_fisher_of_single_logits_is_refused(shape: tuple[int, ...]) -> None:
    w = nn.Parameter(torch.ones(shape))
    with pytest.raises(TypeError, match=r"logits of shape \(\.\.\., K\), K >= 2"):
        safe_lr.measure(torch.optim.SGD([w], lr=0.1), lambda: (w * 2, lambda f: f.sigmoid().mean()), curvature="fisher")


def test_more_that_does_not_go_together() -> None:
    model, params, x, y = network()
    optimizer = torch.optim.SGD(params, lr=0.1)
    with pytest.raises(ValueError, match="hvp='finite-difference' is for curvature='hessian'"):
        safe_lr.measure(optimizer, lambda: model(x).sum(), curvature="fisher", hvp="finite-difference")
    with pytest.raises(TypeError, match="loss_of_outputs does not use its argument"):
        safe_lr.measure(optimizer, lambda: (model(x), lambda f: model(x).square().mean()), curvature="gauss-newton")


def test_the_way_is_remembered_and_said() -> None:
    model, params, x, y = network()
    once = nn.Sequential(model[0], Once(), model[2])
    guard = CoherenceGuard(torch.optim.SGD(params, lr=1e3), loggers=None)
    for _ in range(20):
        guard.optimizer.zero_grad()
        F.cross_entropy(once(x), y).backward()
        guard.observe(lambda: F.cross_entropy(once(x), y))
        guard.optimizer.step()
    told = [d for d in guard.history if d.action in ("cap", "keep", "raise")]
    assert len(told) > 1 and all("by finite differences" in d.reason for d in told)
    assert told[1].cost < told[0].cost + 1 and guard.summary().failures == 0


def test_differences_over_kinks_fail_instead_of_returning_a_number() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    x, y = torch.randn(64, 3), torch.randint(0, 3, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y), hvp="finite-difference")
    assert found.failure is not None and "kinks (ReLU)" in found.failure and not found.limits
    assert safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y)).failure is None


def test_differences_put_the_parameters_back_to_the_bit() -> None:
    model, params, x, y = network()
    before = [p.detach().clone() for p in params]
    finite_difference_hessian(lambda: F.cross_entropy(model(x), y), params).product(
        [torch.ones_like(p) for p in params]
    )
    assert all(map(torch.equal, params, before)) and all(p.grad is None for p in params)


@pytest.mark.parametrize("failures", [1, 99])
def test_out_of_memory_goes_on_lean_and_then_holds(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, x, y = network()
    left = iter(range(failures))

    def scarce(loss: Tensor, parameters: Any) -> list[Tensor | None]:
        if next(left, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return _gradients_with_graph(loss, parameters)

    monkeypatch.setattr("safe_lr.operators._gradients_with_graph", scarce)
    guard = CoherenceGuard(torch.optim.SGD(params, lr=1e3), loggers=None)
    F.cross_entropy(model(x), y).backward()
    guard.observe(lambda: F.cross_entropy(model(x), y))
    if failures == 1:
        guard.optimizer.step()
        assert guard.last_measurement is not None and guard.last_measurement.hvp == "lean"
        assert guard.summary().capped_steps == 1
    else:
        with pytest.warns(RuntimeWarning, match="out of memory"):
            guard.optimizer.step()
        assert guard.last_decision is not None and guard.last_decision.action == "hold"


def test_a_closure_with_a_stream_of_its_own_is_named_and_measured() -> None:
    model, params, x, y = network()
    generator = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        return F.cross_entropy(model(x + torch.randn(x.shape, generator=generator, dtype=x.dtype)), y)

    guard = CoherenceGuard(torch.optim.SGD(params, lr=1e3), loggers=None)
    loss().backward()
    guard.observe(loss)
    guard.optimizer.step()
    assert guard.last_measurement is not None and guard.last_measurement.failure is None
    assert "two losses for one random state" in guard.last_decision.reason
    guard.observe(lambda: F.cross_entropy(model(x), y))


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_recurrent_networks_are_measured_exactly(cell: Any) -> None:
    torch.manual_seed(0)
    rnn, head = cell(3, 4, batch_first=True).double(), nn.Linear(4, 2).double()
    params = [*rnn.parameters(), *head.parameters()]
    x, y = torch.randn(5, 6, 3, dtype=torch.float64), torch.randint(0, 2, (5,))

    def loss() -> Tensor:
        return F.cross_entropy(head(rnn(x)[0][:, -1]), y)

    truth = float(torch.linalg.eigvalsh(dense_hessian(loss(), params)).max())
    assert safe_lr.measure(torch.optim.SGD(params, lr=0.1), loss).lambda_max == pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_measured_close_to_full_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def mixed() -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return F.cross_entropy(model(x), y)

    full = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y))
    assert safe_lr.measure(optimizer, mixed).lr_limit == pytest.approx(full.lr_limit, rel=0.03)


@pytest.mark.parametrize("max_basis", [2, 4])
def test_a_small_basis_finds_the_same_limit(max_basis: int) -> None:
    model, params, x, y = network()
    optimizer = torch.optim.Adam(params, lr=1e-3)
    free = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y), tol=1e-6)
    bound = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y), tol=1e-6, max_basis=max_basis)
    assert bound.lr_limit == pytest.approx(free.lr_limit, rel=1e-5) and bound.converged
    guard = CoherenceGuard(optimizer, max_basis=max_basis, loggers=None)
    F.cross_entropy(model(x), y).backward()
    guard.observe(lambda: F.cross_entropy(model(x), y))
    optimizer.step()
    assert guard.last_measurement is not None and guard.last_measurement.failure is None
    with pytest.raises(ValueError, match="max_basis must be an integer of at least 2"):
        CoherenceGuard(optimizer, max_basis=1)


# ---- one-sided differences


def counted(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable[[], Tensor], list[int]]:
    """A closure, and how often it was called."""
    calls: list[int] = []

    def loss() -> Tensor:
        calls.append(1)
        return F.cross_entropy(model(x), y)

    return loss, calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_sided_products_are_the_dense_hessian_to_a_hundredth(dtype: torch.dtype) -> None:
    model, params, x, y = network()
    truth = dense_hessian(F.cross_entropy(model(x), y), params)
    model, x = model.to(dtype), x.to(dtype)
    found = finite_difference_hessian(lambda: F.cross_entropy(model(x), y), params, one_sided=True)
    error = dense(found, params).double() - truth
    assert float(error.norm() / truth.norm()) < (1e-2 if dtype is torch.float32 else 1e-6)
    assert (found.hvp, found.cost_of_product) == ("one-sided", 1.0)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_one_sided_limits_are_the_exact_ones_to_a_hundredth(optimizer_class: Any) -> None:
    model, params, x, y = network(nn.GELU())
    model, x = model.float(), x.float()
    optimizer = optimizer_class(params, lr=1e-2)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    exact = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y))
    found = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y), hvp="one-sided", tol=1e-2)
    assert (found.failure, found.hvp) == (None, "one-sided")
    for name, limit in exact.limits.items():
        assert found.limits[name] == pytest.approx(limit, rel=1e-2)


@pytest.mark.parametrize(("hvp", "gradients"), [("finite-difference", 2), ("one-sided", 1)])
@pytest.mark.parametrize("bound", ["momentum", "lemma1"])
def test_the_cost_of_differences_is_what_was_evaluated(hvp: str, gradients: int, bound: str) -> None:
    """One evaluation for the gradient, and so many a product, the check's among them."""
    model, params, x, y = network()
    loss, calls = counted(model, x, y)
    optimizer = torch.optim.Adam(params, lr=1e-2)
    found = safe_lr.measure(optimizer, loss, bound=bound, hvp=hvp, tol=0.1, max_matvecs=12)
    assert found.failure is None and found.num_matvecs <= 12
    assert found.cost == len(calls) == 1 + gradients * found.num_matvecs


@pytest.mark.parametrize("hvp", ["finite-difference", "one-sided"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_differences_over_kinks_fail_or_are_right(optimizer_class: Any, hvp: str) -> None:
    """With BatchNorm the eigenvalues by two steps can agree by chance, far from the right one: the vectors do not."""
    failed = 0
    for seed in range(6):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 3))
        x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))
        optimizer = optimizer_class(model.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        right = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y)).gamma  # noqa: B023 (called at once)
        found = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y), hvp=hvp, tol=0.1)  # noqa: B023
        if found.failure is None:
            assert found.gamma == pytest.approx(right, rel=0.2)
        else:
            failed += 1
            assert "kinks (ReLU)" in found.failure and not found.limits
    assert failed > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_sided_differences_under_autocast_fail_and_say_so(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))

    def mixed() -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return F.cross_entropy(model(x), y)

    found = safe_lr.measure(torch.optim.SGD(model.parameters(), lr=1e-3), mixed, hvp="one-sided")
    assert found.failure is not None and "half precision" in found.failure and not found.limits


def test_one_sided_is_for_the_hessian() -> None:
    model, params, x, _ = network()
    with pytest.raises(ValueError, match="hvp='one-sided' is for curvature='hessian', got curvature='fisher'"):
        safe_lr.measure(torch.optim.SGD(params, lr=0.1), lambda: model(x).sum(), curvature="fisher", hvp="one-sided")


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("hvp", ["finite-difference", "one-sided"])
def test_a_run_on_differences_is_protected_within_its_budget(hvp: str, several: bool) -> None:
    model, params, x, y = network()
    guard = CoherenceGuard(torch.optim.SGD(params, lr=1e3), hvp=hvp, credit=20, loggers=None)
    parts = [CLOSURES["hessian"](model, x[k : k + 3], y[k : k + 3]) for k in (0, 3)][: 1 + several]
    first = sum(float(part().detach()) for part in parts)
    for step in range(60):
        guard.optimizer.zero_grad()
        for part in parts:
            (part() / len(parts)).backward()
        guard.observe(parts)
        guard.optimizer.step()
        assert guard.summary().cost <= guard.policy.credit + guard.policy.max_overhead * (step + 1) + 1e-9
    assert guard.summary().failures == 0 and guard.summary().measurements > 0
    assert sum(float(part().detach()) for part in parts) < first
    assert guard.last_measurement is not None and guard.last_measurement.hvp == hvp
    assert any(f"products by {'one-sided ' * (hvp == 'one-sided')}finite" in d.reason for d in guard.history)
