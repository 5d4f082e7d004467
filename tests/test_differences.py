"""`hvp="auto"`: one-sided differences where the loss is smooth and they pay, exact products wherever they may not be.

The oracles are float64 measurements by exact products, closed forms, and counts of the closure's calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import safe_lr
from safe_lr import CoherenceGuard, objective
from safe_lr.closures import leave_no_trace
from safe_lr.eigenproblem import COLD_MATVECS, COLD_SETTLED, WARM_MATVECS, Eigenproblem
from safe_lr.ensemble import Ensemble
from safe_lr.graphs import graph_time, smooth
from safe_lr.lanczos import lanczos
from safe_lr.measurement import measure_step
from safe_lr.movers import movers
from safe_lr.settings import Settings

Make = Callable[[Tensor], Tensor]


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences on networks of any size."""
    monkeypatch.setattr(objective, "DIFFERENCES_SIZE", 0)


# ---- what is smooth

SMOOTH: dict[str, Make] = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softmax": lambda x: x.softmax(-1) ** 2,
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]) ** 3,
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "a mask": lambda x: x.masked_fill(torch.eye(4, dtype=torch.bool), 0.0) ** 2,
    "dropout": lambda x: F.dropout(x, 0.5) ** 2,
}

NOT_SMOOTH: dict[str, Make] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.2, requires_grad=True)),
    "selu": F.selu,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(min=0.1),
    "maximum": lambda x: torch.maximum(x, -x),
    "max": lambda x: x.max(-1).values,
    "amax": lambda x: x.amax(-1),
    "max pooling": lambda x: F.max_pool2d(x[None, None], 2),
    "topk": lambda x: x.topk(2).values,
    "sort": lambda x: x.sort().values,
    "median": lambda x: x.median(-1).values,
    "l1": lambda x: F.l1_loss(x, torch.zeros_like(x)),
    "half precision": lambda x: x.bfloat16().float(),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_operations(name: str) -> None:
    since, x = graph_time(), torch.randn(4, 4, requires_grad=True)
    assert smooth(SMOOTH[name](x * 1).sum(), since)


@pytest.mark.parametrize("name", NOT_SMOOTH)
def test_operations_whose_derivative_jumps_or_is_rounded(name: str) -> None:
    x = torch.randn(4, 4, requires_grad=True)
    assert not smooth(NOT_SMOOTH[name](x * 1).sum())


class Twice(torch.autograd.Function):
    """Knows its derivative; nobody knows whether that has jumps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def test_a_custom_function_is_not_taken_for_smooth() -> None:
    x = torch.ones(2, requires_grad=True)
    assert not smooth(Twice.apply(x).sum())


def test_what_was_computed_before_does_not_follow_the_parameters() -> None:
    x = torch.ones(2, requires_grad=True)
    y, since = torch.tanh(x), graph_time()
    assert smooth(y.square().sum()) and not smooth(y.square().sum(), since)
    assert smooth(torch.tanh(x).square().sum(), since)


# ---- which way "auto" goes


def network(activation: nn.Module) -> tuple[nn.Sequential, torch.optim.Optimizer, Tensor, Tensor]:
    """An MLP and a batch large enough for differences, after three updates of Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 220), activation, nn.Linear(220, 250), activation, nn.Linear(250, 8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = torch.randn(256, 30), torch.randint(0, 8, (256,))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, x, y


def counted(loss: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], list[int]]:
    """A closure, and how often it was called."""
    calls: list[int] = []

    def counting() -> Tensor:
        calls.append(1)
        return loss()

    return counting, calls


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("last", [None, "one-sided"])
def test_a_smooth_network_costs_a_gradient_a_product_and_the_limits_are_the_exact_ones(
    last: str | None, several: bool
) -> None:
    """One exact product checks each of the two solves, the first time."""
    model, optimizer, x, y = network(nn.GELU())
    truth = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y), hvp="exact", tol=1e-5)
    loss, calls = counted(lambda: F.cross_entropy(model(x), y))
    ensemble = Ensemble(optimizer)
    moving = movers(ensemble, [1.0])
    for mover in moving:
        mover.grad = None
    settings = Settings(tol=0.01, max_matvecs=100)
    closures = [loss, loss] if several else loss
    found = measure_step(moving, closures, settings, also=("lemma1",), last_hvp=last)
    assert (found.failure, found.hvp) == (None, "one-sided")
    for name, limit in found.limits.items():
        assert limit == pytest.approx(truth.limits[name], rel=5e-3)
    assert found.lambda_max == pytest.approx(truth.lambda_max, rel=5e-3) and found.upper >= truth.gamma
    evaluations = len(calls) / (1 + several)
    if last is not None:
        assert found.cost == evaluations == 1 + found.num_matvecs
    elif several:
        assert found.cost == 1 + (found.num_matvecs - 2) + 1 + 3 * 2  # lean ones
        assert evaluations == 1 + (found.num_matvecs - 2) + 1 + 2
    else:
        assert found.cost == 1 + (found.num_matvecs - 2) + 2 * 2
        assert evaluations == 1 + (found.num_matvecs - 2)


@pytest.mark.parametrize(
    "options", [{}, {"tol": 0.05, "smallest": True}, {"tol": 0.05, "max_matvecs": 6}, {"tol": 0.05, "hvp": "exact"}],
    ids=["finer than differences are right", "the smallest eigenvalue too", "no room for both", "asked for"],
)  # fmt: skip
def test_exact_products_where(options: dict[str, Any]) -> None:
    model, optimizer, x, y = network(nn.GELU())
    found = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y), **options)
    assert (found.failure, found.hvp) == (None, "exact")


def test_small_networks_have_exact_products() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(32, 8), torch.randint(0, 4, (32,))
    found = safe_lr.measure(torch.optim.SGD(model.parameters(), lr=0.1), lambda: F.cross_entropy(model(x), y), tol=0.05)
    assert (found.failure, found.hvp) == (None, "exact")


@pytest.mark.parametrize(
    ("activation", "hvp"),
    [(nn.PReLU(), "exact"), (nn.ReLU(), "one-sided"), (nn.GELU(), "one-sided")],
    ids=["kinks", "kinks that are taken out", "smooth"],
)
def test_finding_out_costs_nothing(activation: nn.Module, hvp: str) -> None:
    """The closure is called once, and its graph serves whatever is made of it."""
    model, optimizer, x, y = network(activation)
    loss, calls = counted(lambda: F.cross_entropy(model(x), y))
    found = safe_lr.measure(optimizer, loss, tol=0.05)
    assert (found.failure, found.hvp) == (None, hvp)
    assert len(calls) == (1 if hvp == "exact" else 1 + (found.num_matvecs - 2))


@pytest.mark.parametrize("hvp", ["exact", "lean", "auto"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_attention_inside_a_checkpoint(activation: str, hvp: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, activation=activation, dropout=0.0)
    head, x, y = nn.Linear(128, 4), torch.randn(4, 6, 128), torch.randint(0, 4, (4,))
    optimizer = torch.optim.SGD([*layer.parameters(), *head.parameters()], lr=0.1)
    truth = safe_lr.measure(optimizer, lambda: F.cross_entropy(head(layer(x).mean(1)), y), tol=1e-4)

    def loss() -> Tensor:
        return F.cross_entropy(head(checkpoint(layer, x, use_reentrant=False).mean(1)), y)

    found = safe_lr.measure(optimizer, loss, hvp=hvp, tol=0.01)
    assert found.failure is None and found.hvp in (hvp, "exact", "one-sided")
    assert found.lambda_max == pytest.approx(truth.lambda_max, rel=5e-3)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("outside", ["all of it", "a part of it"])
def test_a_graph_made_outside_the_closure_is_measured_exactly_and_left_whole(outside: str) -> None:
    torch.manual_seed(0)
    model, head = nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, 4)
    x, y = torch.randn(32, 8), torch.randint(0, 4, (32,))
    params = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(params, lr=0.1)
    truth = safe_lr.measure(optimizer, lambda: F.cross_entropy(head(model(x)), y), hvp="exact", tol=1e-4)
    features = model(x)
    whole = F.cross_entropy(head(features), y)
    closure = (lambda: whole) if outside == "all of it" else (lambda: F.cross_entropy(head(features), y))
    found = safe_lr.measure(optimizer, closure, tol=0.05)
    assert (found.failure, found.hvp) == (None, "exact")
    assert found.lambda_max == pytest.approx(truth.lambda_max, rel=0.01)
    whole.backward()
    assert all(p.grad is not None for p in params)


def test_several_closures_take_differences_at_any_size() -> None:
    """What they would take else, lean products, cost three gradients each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x, y = torch.randn(32, 8), torch.randint(0, 4, (32,))
    halves = [lambda: F.cross_entropy(model(x[:16]), y[:16]), lambda: F.cross_entropy(model(x[16:]), y[16:])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truth = safe_lr.measure(optimizer, halves, tol=1e-4)
    found = safe_lr.measure(optimizer, halves, tol=0.05)
    assert (truth.hvp, found.hvp, found.failure) == ("lean", "one-sided", None)
    assert found.lambda_max == pytest.approx(truth.lambda_max, rel=0.02)


@pytest.mark.usefixtures("any_size")
def test_autocast_is_measured_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))

    def mixed() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x), y)

    found = safe_lr.measure(torch.optim.SGD(model.parameters(), lr=1e-3), mixed, tol=0.05)
    assert (found.failure, found.hvp) == (None, "exact")


DETACHED: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "two views": lambda model, a, b: -F.cosine_similarity(model(a), model(b).detach()).mean(),
    "a weight": lambda model, a, _: (model(a).square() / (model(a).detach().square() + 0.1)).mean(),
    "a focal loss": lambda model, a, _: (
        -((1 - model(a).softmax(-1)[:, 0]).detach() ** 2 * model(a).log_softmax(-1)[:, 0])
    ).mean(),
    "a policy's ratio": lambda model, a, _: (
        model(a).log_softmax(-1)[:, 0] - model(a).log_softmax(-1)[:, 0].detach()
    ).exp().mean(),
    "a target": lambda model, a, b: (model(a)[:, 0] - 0.9 * model(b)[:, 0].detach() - 1).square().mean(),
}  # fmt: skip


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("name", DETACHED)
def test_what_the_closure_detaches_is_no_part_of_the_hessian(name: str) -> None:
    """Differences follow it all the same, smoothly, and two steps agree: exact products tell."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))
    x = torch.randn(64, 12)
    near = x + 0.1 * torch.randn(64, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss() -> Tensor:
        return DETACHED[name](model, x, near)

    truth = safe_lr.measure(optimizer, loss, hvp="exact", tol=1e-4)
    found = safe_lr.measure(optimizer, loss, tol=0.05)
    assert found.failure is None
    assert found.lambda_max == pytest.approx(truth.lambda_max, rel=0.06)


def bent(x: Tensor) -> Tensor:
    """A ReLU that the graph does not tell."""
    return torch.where(x > 0, x, 0.0 * x)


class Bent(nn.Module):
    """The same as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return bent(x)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [False, True], ids=["one eigenvalue", "a spectrum"])
def test_what_differences_hide_is_found_though_the_eigenvector_they_give_is_right(spread: bool, seed: int) -> None:
    """H has 4 and less on x, 20 on y; differences see no y at all, for what is detached takes its slope away."""
    torch.manual_seed(seed)
    x, y = nn.Parameter(torch.randn(6000)), nn.Parameter(torch.ones(60))
    h = 4 * torch.rand(6000) if spread else torch.full((6000,), 4.0)
    optimizer = torch.optim.SGD([x, y], lr=0.1)

    def loss() -> Tensor:
        return (h * x**2).sum() / 2 + (10 * y**2 - 20 * y.detach() * y).sum()

    found = safe_lr.measure(optimizer, loss, tol=0.1, seed=seed)
    assert (found.failure, found.hvp) == (None, "exact")
    assert found.lambda_max == pytest.approx(20.0, rel=0.02)


def test_differences_that_failed_hold_no_vectors_while_exact_products_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 220), Bent(), nn.Linear(220, 250), Bent(), nn.Linear(250, 8))
    optimizer, x, y = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(512, 30), torch.randint(0, 8, (512,))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    alive: list[weakref.ref[Eigenproblem]] = []
    living: list[int] = []
    original = Eigenproblem.__init__

    def noted(self: Eigenproblem, *args: Any, **options: Any) -> None:
        living.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(self))
        original(self, *args, **options)

    monkeypatch.setattr(Eigenproblem, "__init__", noted)
    moving = movers(Ensemble(optimizer), [1.0])
    for mover in moving:
        mover.grad = None
    settings = Settings(tol=0.1, max_matvecs=100)
    found = measure_step(moving, lambda: F.cross_entropy(model(x), y), settings, last_hvp="one-sided")
    assert (found.failure, found.hvp) == (None, "exact")
    assert living == [0, 0]


# ---- the check, and what it takes out


def test_central_differences_take_out_what_the_step_leaves_in_too() -> None:
    """L = x^2 / 2 + a x^4 / 24 at zero: L'' = 1, and a central difference has 1 + a e^2 / 6."""
    x, step = nn.Parameter(torch.zeros(1)), float(torch.finfo(torch.float32).eps ** (1 / 3)) / 4
    a = 0.3 / step**2  # off by 5 %
    optimizer = torch.optim.SGD([x], lr=0.1)
    found = safe_lr.measure(optimizer, lambda: (x**2 / 2 + a * x**4 / 24).sum(), hvp="finite-difference", tol=0.01)
    assert found.lambda_max == pytest.approx(1.0, rel=1e-3)


def test_one_sided_differences_take_out_what_the_step_leaves_in() -> None:
    """L = x^2 / 2 + a x^3 / 6 at zero: L'' = 1, and a one-sided difference has 1 +- a e / 2."""
    x, step = nn.Parameter(torch.zeros(1)), float(torch.finfo(torch.float32).eps ** (1 / 2))
    a = 0.12 / step  # off by 6 %
    optimizer = torch.optim.SGD([x], lr=0.1)
    found = safe_lr.measure(optimizer, lambda: (x**2 / 2 + a * x**3 / 6).sum(), hvp="one-sided", tol=0.01)
    assert found.lambda_max == pytest.approx(1.0, rel=1e-3)


class Stateful(nn.Module):
    """Its output depends on how often it was called: spectral normalisation, truncated backpropagation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.inner = nn.Linear(30, 220)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        made: Tensor = torch.tanh(self.inner(x)) * (1 + 0.1 * self.calls)
        return made


@pytest.mark.parametrize("case", ["kinks", "state"])
def test_where_differences_fail_their_check_products_are_exact_after_all(case: str) -> None:
    torch.manual_seed(0)
    body: nn.Module = Stateful() if case == "state" else nn.Linear(30, 220)
    middle, head = nn.Linear(220, 250), nn.Linear(250, 8)
    x, y = torch.randn(512, 30), torch.randint(0, 8, (512,))
    bend = bent if case == "kinks" else torch.tanh
    params = [p for m in (body, middle, head) for p in m.parameters()]
    optimizer = torch.optim.SGD(params, lr=0.1)
    with torch.no_grad():
        for p in params:
            p.mul_(3)

    def loss() -> Tensor:
        return F.cross_entropy(head(bend(middle(bend(body(x))))), y)

    truth = safe_lr.measure(optimizer, loss, hvp="exact", tol=1e-4)
    assert "finite differences" in (safe_lr.measure(optimizer, loss, hvp="one-sided", tol=0.05).failure or "")
    counting, calls = counted(loss)
    found = safe_lr.measure(optimizer, counting, tol=0.05)
    assert (found.failure, found.hvp) == (None, "exact")
    assert found.lambda_max == pytest.approx(truth.lambda_max, rel=0.01)
    assert found.loss == truth.loss
    by_differences = len(calls) - 1  # the first call's graph serves both
    assert found.cost == 1 + by_differences + 2 * (found.num_matvecs - by_differences)
    if case == "state":
        assert isinstance(body, Stateful) and body.calls == 0


@pytest.mark.parametrize("error", [IndexError, StopIteration])
def test_a_closure_that_can_be_evaluated_only_once_is_measured_exactly(error: type[Exception]) -> None:
    model, optimizer, x, y = network(nn.GELU())
    truth = safe_lr.measure(optimizer, lambda: F.cross_entropy(model(x), y), hvp="exact", tol=1e-4)
    batches = [x]

    def once() -> Tensor:
        if not batches:
            raise error
        return F.cross_entropy(model(batches.pop()), y)

    found = safe_lr.measure(optimizer, once, tol=0.05)
    assert (found.failure, found.hvp) == (None, "exact")
    assert found.gamma == pytest.approx(truth.gamma, rel=0.02)
    assert found.cost == 1 + 1 + 2 * (found.num_matvecs - 1)  # the product that could not be made counts


def test_reset_puts_modules_back_and_goes_on() -> None:
    norm = nn.BatchNorm1d(3)
    with leave_no_trace(list(norm.parameters())) as untouched:
        untouched.call(lambda: norm(torch.randn(8, 3)).sum())
        assert int(norm.num_batches_tracked) == 1
        untouched.reset()
        assert int(norm.num_batches_tracked) == 0
        untouched.call(lambda: norm(torch.randn(8, 3)).sum())
    assert int(norm.num_batches_tracked) == 0


def test_a_run_stays_with_what_worked_and_leaves_it_where_it_no_longer_does() -> None:
    model, optimizer, x, y = network(nn.GELU())
    guard = CoherenceGuard(optimizer, loggers=None)
    ways = []
    for _ in range(25):
        due = guard.due
        if due and len(ways) == 2:
            model[1] = model[3] = Bent()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        guard.observe(lambda: F.cross_entropy(model(x), y))
        optimizer.step()
        if due and guard.last_measurement is not None and guard.last_measurement.num_matvecs:
            ways.append(guard.last_measurement.hvp)
    assert ways[:3] == ["one-sided", "one-sided", "exact"] and set(ways[2:]) == {"exact"}
    assert guard.summary().failures == 0


def test_a_run_stays_within_its_budget_on_differences() -> None:
    """With the least that a routine measurement waits for, there is room for one by differences."""
    model, optimizer, x, y = network(nn.GELU())
    guard, ways = CoherenceGuard(optimizer, loggers=None, credit=40, max_overhead=0.5), []
    for step in range(120):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        guard.observe(lambda: F.cross_entropy(model(x), y))
        optimizer.step()
        assert guard.summary().cost <= 40 + 0.5 * (step + 1) + 1e-9
        if guard.last_measurement is not None and guard.last_measurement.num_matvecs:
            ways.append(guard.last_measurement.hvp)
    assert set(ways) == {"one-sided"} and guard.summary().measurements >= 4


@pytest.mark.usefixtures("any_size")
def test_a_detached_term_that_comes_in_later_is_found_by_the_next_exact_check() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 5))
    optimizer, weight = torch.optim.SGD(model.parameters(), lr=1e-3), [0.0]
    x, y = torch.randn(64, 12), torch.randint(0, 5, (64,))
    near = x + 0.1 * torch.randn(64, 12)

    def loss() -> Tensor:
        apart = (model(x) - model(near).detach()).square().sum(-1).mean()
        return F.cross_entropy(model(x), y) + weight[0] * apart

    guard, ways = CoherenceGuard(optimizer, loggers=None, credit=400), []
    for step in range(130):
        weight[0] = 10.0 * (step > 5)
        optimizer.zero_grad()
        loss().backward()
        guard.observe(loss)
        optimizer.step()
        if guard.last_measurement is not None and guard.last_measurement.num_matvecs:
            ways.append(guard.last_measurement.hvp)
    truth = safe_lr.measure(optimizer, loss, hvp="exact")
    assert ways[0] == "one-sided" and ways[-1] == "exact"
    assert guard.last_measurement is not None
    assert guard.last_measurement.gamma == pytest.approx(truth.gamma, rel=0.15)


def test_processes_that_train_together_take_exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass through DistributedDataParallel may wait for the other ranks, which need not make as many."""
    model, optimizer, x, y = network(nn.GELU())
    loss, calls = counted(lambda: F.cross_entropy(model(x), y))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    found = safe_lr.measure(optimizer, loss, tol=0.05)
    assert (found.failure, found.hvp, len(calls)) == (None, "exact", 1)


# ---- an LSTM whose kernel is fused up to the first derivative alone


class Recurrent(nn.Module):
    """An LSTM and a head, with kinks between them or without."""

    def __init__(self, *, kinks: bool = False) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(64, 3)
        self.between = nn.Sequential(nn.Linear(8, 64), nn.ReLU() if kinks else nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.between(self.lstm(x)[0][:, -1]))
        return made


def recurrent(*, kinks: bool = False) -> tuple[Recurrent, torch.optim.Optimizer, Callable[[], Tensor], float]:
    """The net (of large weights: kinks are then many), an optimizer, the loss, lambda_max in float64."""
    torch.manual_seed(0)
    model, exact = Recurrent(kinks=kinks), Recurrent(kinks=kinks).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    exact.load_state_dict(model.state_dict())
    x, y = torch.randn(16, 6, 4), torch.randint(0, 3, (16,))
    truth = safe_lr.measure(
        torch.optim.SGD(exact.parameters()), lambda: F.cross_entropy(exact(x.double()), y), hvp="exact", tol=1e-6
    )
    assert truth.lambda_max is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, lambda: F.cross_entropy(model(x), y), truth.lambda_max


fused_lstm = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@fused_lstm
@pytest.mark.parametrize("several", [False, True])
def test_auto_takes_differences_through_a_fused_lstm(several: bool) -> None:
    _, optimizer, loss, truth = recurrent()
    found = safe_lr.measure(optimizer, [loss, loss] if several else loss, tol=0.01)
    assert (found.failure, found.hvp) == (None, "one-sided")
    assert found.lambda_max == pytest.approx(truth, rel=0.01)
    assert found.cost == 1 + (found.num_matvecs - 1) + (1 + 3 if several else 2)


@fused_lstm
@pytest.mark.parametrize(
    ("options", "hvp"),
    [({}, "exact"), ({"hvp": "exact", "tol": 0.1}, "exact"), ({"tol": 0.1, "max_matvecs": 6}, "exact")],
    ids=["finer than differences are right", "asked for", "no room for both"],
)
def test_exact_products_go_through_a_fused_lstm_where(options: dict[str, Any], hvp: str) -> None:
    _, optimizer, loss, truth = recurrent()
    found = safe_lr.measure(optimizer, loss, **options)
    assert (found.failure, found.hvp) == (None, hvp)
    assert found.lambda_max == pytest.approx(truth, rel=0.1 if options else 1e-3)
    assert found.cost == 1 + 2 * found.num_matvecs


@fused_lstm
def test_kinks_elsewhere_are_taken_out() -> None:
    _, optimizer, loss, truth = recurrent(kinks=True)
    found = safe_lr.measure(optimizer, loss, tol=0.01)
    assert (found.failure, found.hvp) == (None, "one-sided")
    assert found.lambda_max == pytest.approx(truth, rel=0.01)


@fused_lstm
def test_kinks_elsewhere_that_cannot_be_taken_out_leave_exact_products() -> None:
    model, optimizer, loss, truth = recurrent(kinks=True)
    model.between[1] = Leaning()
    found = safe_lr.measure(optimizer, loss, tol=0.01)
    assert (found.failure, found.hvp) == (None, "exact")
    assert found.lambda_max == pytest.approx(truth, rel=1e-3)
    assert found.cost == 1 + 2 * found.num_matvecs


class Leaning(nn.Module):
    """A ReLU that `Kinks` does not know, and the graph does."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, torch.zeros_like(x))


class Attending(nn.Module):
    """Attention between two maps, and a kink if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.out, self.kinked = nn.Linear(8, 24), nn.Linear(8, 1), False

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*self.maps(x).unsqueeze(1).chunk(3, dim=-1)).squeeze(1)
        return (self.out(torch.maximum(mixed, 0 * mixed) if self.kinked else mixed) - 1).square().mean()


@pytest.mark.usefixtures("any_size")
def test_attention_runs_on_its_own_kernel_where_no_product_is_exact() -> None:
    """The first measurement is checked by exact products, the next is not, unless it proves to be kinked."""
    torch.manual_seed(0)
    model = Attending()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(4, 6, 8)
    model(x).backward()
    kernels: list[bool] = []
    measured = []

    def loss() -> Tensor:
        kernels.append(torch.backends.cuda.flash_sdp_enabled())  # or only the one that can be differentiated twice
        return model(x)

    for last_hvp, kinked in ((None, False), ("one-sided", False), ("one-sided", True)):
        model.kinked = kinked
        kernels.clear()
        found = measure_step(
            movers(Ensemble(optimizer), [1.0]), loss, Settings(tol=0.1, max_matvecs=60), last_hvp=last_hvp
        )
        measured.append((found.hvp, found.failure, kernels[0], any(kernels), all(kernels)))
    assert measured == [
        ("one-sided", None, False, False, False),
        ("one-sided", None, True, True, True),
        ("exact", None, True, True, False),
    ]


def test_a_cold_solve_may_stop_early_only_well_within_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(*args: Any, **options: Any) -> Any:
        asked.append((options["min_matvecs"], options["settled"]))
        return lanczos(*args, **options)

    monkeypatch.setattr("safe_lr.eigenproblem.lanczos", noted)
    model, optimizer, x, y = network(nn.Tanh())
    moving = movers(Ensemble(optimizer), [1.0])
    first = measure_step(moving, lambda: F.cross_entropy(model(x), y), Settings(hvp="exact"))
    measure_step(moving, lambda: F.cross_entropy(model(x), y), Settings(hvp="exact"), warm=first.vectors)
    assert set(asked) == {(COLD_MATVECS, COLD_SETTLED), (WARM_MATVECS, 1)}
