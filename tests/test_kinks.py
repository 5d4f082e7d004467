"""Taking kinks out of a loss. The oracles are torch's own derivatives, and float64 measurements by exact products."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import safe_lr
from safe_lr import CoherenceGuard
from safe_lr.graphs import smooth
from safe_lr.kinks import Changed, Kinks

Make = Callable[[Tensor], Tensor]

KNOWN: dict[str, Make] = {
    "relu": F.relu,
    "relu of torch": torch.relu,
    "relu method": lambda x: x.relu(),
    "relu in place": lambda x: (x * 1).relu_(),
    "relu module in place": lambda x: nn.ReLU(inplace=True)(x * 1),
    "relu in place of torch": lambda x: torch.relu_(x * 1),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky relu in place": lambda x: F.leaky_relu(x * 1, 0.2, inplace=True),
    "relu6": lambda x: F.relu6(4 * x),
    "relu6 in place": lambda x: F.relu6(4 * x, inplace=True),
    "hardtanh": F.hardtanh,
    "hardtanh in place": lambda x: F.hardtanh_(x * 1),
    "threshold": lambda x: F.threshold(x, 0.1, -2.0),
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "abs": torch.abs,
    "abs of Python": abs,
    "abs in place": lambda x: (x * 1).abs_(),
    "clamp": lambda x: x.clamp(-0.3, 0.4),
    "clamp by name": lambda x: torch.clamp(x, max=0.4),
    "clamp in place": lambda x: (x * 1).clamp_(min=0.1),
    "clamp_min": lambda x: x.clamp_min(0.0),
    "clip": lambda x: x.clip(0.0, 1.0),
    "max pooling": lambda x: F.max_pool2d(x[None], 2),
    "max pooling, odd": lambda x: nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)(x),
    "max pooling in 1-D": lambda x: F.max_pool1d(x, 3, stride=1),
    "max pooling in 3-D": lambda x: F.max_pool3d(x[None], (1, 2, 2)),
    "adaptive max pooling": lambda x: F.adaptive_max_pool2d(x[None], 2),
    "adaptive max pooling in 1-D": nn.AdaptiveMaxPool1d(1),
}

LEFT_ALONE: dict[str, Make] = {
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.2, dtype=x.dtype)),
    "maximum": lambda x: torch.maximum(x, 0 * x),
    "sort": lambda x: x.sort().values,
    "bounds with a gradient": lambda x: x.clamp(min=x.mean()),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "a checkpoint": lambda x: checkpoint(torch.relu, x, use_reentrant=False),
    "a reentrant checkpoint": lambda x: checkpoint(torch.relu, x, use_reentrant=True),
}


def at(seed: int = 0) -> Tensor:
    """A place on no kink, but for one exact zero, where torch's derivative of ReLU is 0 and of abs too."""
    x = torch.randn(4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 0] = 0.0
    return x.requires_grad_()


def derivatives(f: Make, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and a Hessian product of a smooth function of f."""
    y = f(x)
    loss = (y**3 + torch.sin(y)).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (product,) = torch.autograd.grad(gradient, x, torch.ones_like(x))
    return y.detach(), gradient.detach(), product


@pytest.mark.parametrize("name", KNOWN)
def test_nothing_changes_where_the_kinks_were_met(name: str) -> None:
    x = at()
    plain = derivatives(KNOWN[name], x)
    kinks = Kinks()
    with kinks:
        first = derivatives(KNOWN[name], x)
    with kinks:
        again = derivatives(KNOWN[name], x)
    for found in (first, again):
        for ours, right in zip(found, plain, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", KNOWN)
def test_the_loss_is_smooth_between_the_kinks_and_beyond(name: str) -> None:
    """The piece goes on as a straight line: half-way between two places it is half-way between two values."""
    kinks, here, there = Kinks(), at(), at(1)
    with kinks:
        made = KNOWN[name](here)
    assert smooth(made.sum())
    values = []
    for place in (here, there, (here + there) / 2):
        with kinks:
            values.append(KNOWN[name](place.detach().requires_grad_()).detach())
    torch.testing.assert_close(values[2], (values[0] + values[1]) / 2)
    assert not torch.allclose(KNOWN[name](there.detach()), values[1])  # where the function itself bends


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_out_of_reach_keeps_its_kinks_and_shows_them(name: str) -> None:
    x, kinks = at(), Kinks()
    with kinks:
        made = LEFT_ALONE[name](x)
    with kinks:
        again = LEFT_ALONE[name](at(1))
    assert torch.equal(made, LEFT_ALONE[name](x)) and torch.equal(again, LEFT_ALONE[name](at(1)))
    assert name == "a checkpoint" or not smooth(made.sum())
    made.sum().backward()  # what is computed again is what was computed
    assert x.grad is not None


def test_what_has_no_gradient_is_no_kink() -> None:
    kinks, x = Kinks(), at()
    with kinks:
        torch.relu(x.detach())
        with torch.no_grad():
            torch.relu(x)
        made = torch.relu(x)
    with kinks:
        assert torch.equal(torch.relu(x), made)


@pytest.mark.parametrize(
    "second",
    [torch.abs, lambda x: torch.relu(x[:2]), lambda x: torch.relu(torch.relu(x)), torch.tanh],
    ids=["other", "smaller", "more", "none"],
)
def test_another_control_flow_is_told(second: Make) -> None:
    kinks = Kinks()
    with kinks:
        torch.relu(at())
    with pytest.raises(Changed, match="control flow"), kinks:
        second(at())


def test_transforms_of_torch_func_are_left_alone() -> None:
    """What they see is gone when they are done."""
    x, kinks = at(), Kinks()

    def loss() -> Tensor:
        per_example = torch.func.vmap(torch.func.grad(lambda row: torch.relu(row).square().sum()))
        return per_example(x.flatten(1)).square().mean() + torch.func.jvp(torch.relu, (x,), (x,))[1].square().mean()

    with warnings.catch_warnings():  # torch.func.jvp's own, at its first call
        warnings.simplefilter("ignore", DeprecationWarning)
        loss()
    with kinks:
        first = loss()
    with kinks:
        assert torch.equal(loss(), first)
    assert torch.equal(loss(), first)


def test_a_function_that_torch_cannot_differentiate_twice_is_a_line_all_the_same() -> None:
    x = at()
    with Kinks():
        made = F.hardsigmoid(x)
    torch.testing.assert_close(made, F.hardsigmoid(x))
    (ours,), (right,) = torch.autograd.grad(made.sum(), x), torch.autograd.grad(F.hardsigmoid(x).sum(), x)
    torch.testing.assert_close(ours, right)


def test_a_torch_that_does_not_tell_of_checkpoints_keeps_its_kinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    with Kinks():
        assert not smooth(torch.relu(at()).sum())


def test_pooling_is_left_alone_where_order_must_not_matter() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with Kinks():
            assert not smooth(F.max_pool2d(at(), 2).sum())
            assert smooth(torch.relu(at()).sum())
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_tensor_that_does_not_tell_its_slope_keeps_its_kinks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise NotImplementedError

    x = at()
    with monkeypatch.context() as patched, Kinks():
        patched.setattr(torch.autograd, "grad", refuses)
        made = torch.relu(x)
    assert torch.equal(made, torch.relu(x)) and not smooth(made.sum())


IN_PLACE: dict[str, Make] = {
    "relu in place": Tensor.relu_,
    "relu module in place": nn.ReLU(inplace=True),
    "relu in place of torch": torch.relu_,
    "leaky relu in place": lambda x: F.leaky_relu(x, 0.2, inplace=True),
    "hardtanh in place": F.hardtanh_,
    "abs in place": Tensor.abs_,
    "clamp in place": lambda x: x.clamp_(min=0.1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_function_in_place_changes_its_argument(name: str) -> None:
    """What reads the tensor afterwards, rather than what the function returns, sees it too."""
    kinks, apart = Kinks(), Kinks()
    for x in (at(), at(1)):
        with kinks:
            whole = torch.cat([x, x])
            IN_PLACE[name](whole[:4])
        with apart:
            expected = KNOWN[name](x)
        torch.testing.assert_close(whole[:4], expected)
        assert torch.equal(whole[4:], x)
        ours, right = (torch.autograd.grad(made.square().sum(), x)[0] for made in (whole[:4], expected))
        torch.testing.assert_close(ours, right)


BEHIND: dict[str, Make] = {
    "an infinite derivative": lambda h: (torch.relu(h).sqrt() - 1).square().mean(),
    "one of clamp": lambda h: (h.square().sum(-1) - 2).clamp(min=0).sqrt().mean() + h.cos().mean(),
    "an infinite second derivative": lambda h: torch.relu(h).pow(1.5).mean(),
    "the sign of zero": lambda h: torch.exp(-1 / torch.relu(h)).mean() + h.square().mean(),
    "an infinite argument": lambda h: (
        h.masked_fill(torch.eye(*h.shape).bool(), -torch.inf).clamp(min=-9.0).softmax(-1).square().mean()
    ),
}
"""What a shut gate hides: autograd selects there, and 0 times infinity is NaN."""


@pytest.mark.parametrize("width", [20, 220])
@pytest.mark.parametrize("name", BEHIND)
def test_what_a_shut_gate_hides_stays_hidden(name: str, width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8))
    x = torch.randn(256 if width > 20 else 16, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truth = safe_lr.measure(optimizer, lambda: BEHIND[name](model(x)), hvp="exact", tol=1e-4)
    found = safe_lr.measure(optimizer, lambda: BEHIND[name](model(x)), tol=0.01)
    assert truth.failure is None and found.failure is None
    assert found.lambda_max == pytest.approx(truth.lambda_max, rel=0.01)


@pytest.mark.parametrize("act", [F.gelu, F.relu], ids=["gelu", "relu"])
def test_jagged_tensors_are_measured(act: Make) -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(16, 32), nn.Linear(32, 1)
    rows = torch.nested.nested_tensor([torch.randn(k, 16) for k in (30, 50, 70)], layout=torch.jagged)
    optimizer = torch.optim.SGD([*first.parameters(), *last.parameters()], lr=0.1)

    def loss() -> Tensor:
        return last(act(first(rows)).values()).square().mean()

    truth = safe_lr.measure(optimizer, loss, hvp="lean", tol=1e-4)
    found = safe_lr.measure(optimizer, loss, tol=0.01)
    assert truth.failure is None and found.failure is None
    assert found.lambda_max == pytest.approx(truth.lambda_max, rel=0.01)


def test_nan_is_not_hidden() -> None:
    with Kinks():
        assert torch.relu(torch.tensor([float("nan"), 1.0], requires_grad=True)).isnan().tolist() == [True, False]


# ---- measurements


def convolutional() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A ReLU net with BatchNorm, max-pooling and dropout, large enough for differences, after ten updates."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.1), nn.AdaptiveMaxPool2d(4),
        nn.Flatten(), nn.Linear(512, 100), nn.ReLU6(), nn.Dropout(0.2), nn.Linear(100, 10),
    )  # fmt: skip
    x, y = torch.randn(32, 1, 12, 12), torch.randint(0, 10, (32,))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


@pytest.mark.parametrize("several", [False, True], ids=["a closure", "micro-batches"])
def test_a_relu_net_is_measured_by_differences(several: bool) -> None:
    model, x, y = convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    closures = [lambda: F.cross_entropy(model(x[:16]), y[:16]), lambda: F.cross_entropy(model(x[16:]), y[16:])]
    closure = closures if several else (lambda: F.cross_entropy(model(x), y))
    truth = safe_lr.measure(optimizer, closure, hvp="lean", tol=1e-4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = safe_lr.measure(optimizer, closure, tol=0.01)
    assert (found.failure, found.hvp) == (None, "one-sided")
    assert found.lambda_max == pytest.approx(truth.lambda_max, rel=0.01)
    assert found.loss == pytest.approx(truth.loss, rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # With the kinks left in, differences are wrong: the two steps disagree, and it is said.
    left = safe_lr.measure(optimizer, closure, hvp="one-sided", tol=0.01)
    assert left.failure is not None and "kinks" in left.failure


def test_a_control_flow_that_depends_on_the_parameters_is_measured_exactly() -> None:
    model, x, y = convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bias = model[-1].bias
    turn = float(bias.detach().sum())

    def loss() -> Tensor:
        made = F.cross_entropy(model(x), y)
        return made if float(bias.detach().sum()) == turn else torch.relu(made)

    truth = safe_lr.measure(optimizer, loss, hvp="exact", tol=1e-4)
    found = safe_lr.measure(optimizer, loss, tol=0.01)
    assert (found.failure, found.hvp) == (None, "exact")
    assert found.lambda_max == pytest.approx(truth.lambda_max, rel=0.01)


def test_a_run_of_a_relu_net_stays_with_differences() -> None:
    model, x, y = convolutional()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard, ways = CoherenceGuard(optimizer, loggers=None), []
    for _ in range(14):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        guard.observe(lambda: F.cross_entropy(model(x), y))
        optimizer.step()
        if guard.last_measurement is not None and guard.last_measurement.num_matvecs:
            ways.append(guard.last_measurement.hvp)
    assert len(ways) >= 3 and set(ways) == {"one-sided"}
    assert guard.summary().failures == 0
