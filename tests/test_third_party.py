"""The adapters of other packages' optimizers against the packages themselves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import safe_lr
from safe_lr import CoherenceScheduler
from safe_lr.preconditioners import preconditioner_of
from safe_lr.stability import UpdateRule, transition_matrix

SHAPES = ((3, 4), (5,), (2, 3, 2))


@dataclass(frozen=True)
class Case:
    """An optimizer of another package, with options.

    Attributes:
        name: `package.ClassName`.
        options: Keyword arguments beside params and lr.
        hidden: What the package keeps on the optimizer, so that the group has to repeat it.
        shapes: Of the parameters.
        lr: The first lr.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    lr: float = 0.05

    def __str__(self) -> str:
        return self.name.rsplit(".", 1)[-1] + "".join(f"-{k}={v}" for k, v in self.options.items())

    def optimizer(self, params: Any, lr: float | None = None) -> Any:
        package, name = self.name.rsplit(".", 1)
        group = {"params": list(params)} | {key: self.options[key] for key in self.hidden}
        optimizer = getattr(pytest.importorskip(package), name)([group], lr=lr or self.lr, **self.options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer


ADAMW, SGD = "schedulefree.AdamWScheduleFree", "schedulefree.SGDScheduleFree"
PRODIGY, SOAP, SHAMPOO = "prodigyopt.Prodigy", "pytorch_optimizer.SOAP", "pytorch_optimizer.Shampoo"

CASES = [
    Case(ADAMW),
    Case(ADAMW, {"weight_decay": 0.1, "warmup_steps": 7, "foreach": False}),
    Case(ADAMW, {"betas": (0.95, 0.98), "r": 1.5, "weight_lr_power": 1.0, "eps": 1e-3}),
    Case(SGD),
    Case(SGD, {"momentum": 0.5, "weight_decay": 0.1, "warmup_steps": 5}),
    Case(SGD, {"weight_lr_power": 0.0, "r": 2.0, "foreach": False}),
    Case(PRODIGY, {"d0": 1e-2}, lr=1.0),
    Case(PRODIGY, {"d0": 1e-2, "use_bias_correction": True, "weight_decay": 0.1}, lr=1.0),
    Case(PRODIGY, {"weight_decay": 0.1, "decouple": False, "safeguard_warmup": True, "d_coef": 0.5}, lr=1.0),
    Case(PRODIGY, {"betas": (0.8, 0.9), "beta3": 0.9, "growth_rate": 1.1, "slice_p": 2, "eps": 1e-4}, lr=1.0),
    Case(PRODIGY, {"betas": (0.0, 0.99), "use_bias_correction": True}, lr=1.0),
    Case(SOAP),
    Case(SOAP, {"weight_decay": 0.0, "precondition_frequency": 1, "correct_bias": False}),
    Case(SOAP, {"precondition_frequency": 3, "precondition_1d": True, "shampoo_beta": 0.8, "betas": (0.9, 0.99)}),
    Case(SOAP, {"maximize": True, "normalize_gradient": True, "weight_decay": 0.1}, hidden=("maximize",)),
    Case(SOAP, {"max_precondition_dim": 3}),
    Case(SOAP, {"merge_dims": True, "max_precondition_dim": 8}, shapes=((3, 4), (2, 3, 2))),
    Case(SHAMPOO),
    Case(SHAMPOO, {"momentum": 0.9, "weight_decay": 0.1}),
    Case(SHAMPOO, {"weight_decay": 0.1, "weight_decouple": True, "matrix_eps": 1e-2}),
    Case(SHAMPOO, {"weight_decay": 0.01, "weight_decouple": True, "fixed_decay": True, "momentum": 0.5}),
    Case(SHAMPOO, {"preconditioning_compute_steps": 4}, hidden=("preconditioning_compute_steps",)),
    Case(SHAMPOO, {"maximize": True, "momentum": 0.5, "weight_decay": 0.1}, hidden=("maximize",)),
]
PLAIN = [
    Case(ADAMW, lr=0.01),
    Case(SGD, lr=0.1),
    Case(PRODIGY, {"d0": 1e-3}, lr=1.0),
    Case(SOAP, lr=0.003),
    Case(SHAMPOO, lr=0.03),
]


def predict(optimizer: Any, x: nn.Parameter, update: int) -> Tensor:
    """The coming step of a parameter, from its gradient."""
    group = optimizer.param_groups[0]
    grad = x.grad
    assert grad is not None
    state = optimizer.state.get(x, {})
    return preconditioner_of(optimizer).coming_step(group, state, x, grad.clone(), group["lr"], update)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_coming_step_is_the_real_step(case: Case) -> None:
    """From the first step on, with changing gradients and lr, and without touching the optimizer's state.

    Prodigy moves its d inside the step. Where d stands still, the steps are equal; where it moves, only eps, which is
    in units of d, tells them apart (without momentum the whole step is in units of the new d).
    """
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, dtype=torch.float64, generator=generator)) for s in case.shapes]
    pull = [torch.randn(s, dtype=torch.float64, generator=generator) for s in case.shapes]
    optimizer = case.optimizer(params)
    group = optimizer.param_groups[0]
    still = 0
    for update in range(1, 25):
        group["lr"] = case.lr * (1 + update % 3) / update
        for x, constant in zip(params, pull, strict=True):
            x.grad = constant + torch.randn(x.shape, dtype=torch.float64, generator=generator)
        before = copy.deepcopy(optimizer.state_dict())
        predicted = [predict(optimizer, x, update) for x in params]
        torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
        old, d = [x.detach().clone() for x in params], group.get("d")
        optimizer.step()
        if group.get("d") == d:
            still += 1
        elif group["betas"][0] == 0:
            predicted = [step * group["d"] / d for step in predicted]
        for x, start, step in zip(params, old, predicted, strict=True):
            slack = 1e-13
            if group.get("d") != d:
                least = float((optimizer.state[x]["exp_avg_sq"].sqrt() / d).min())
                slack += float(step.abs().max()) * group["eps"] * abs(group["d"] / d - 1) / least
            torch.testing.assert_close(x.detach() - start, step, rtol=1e-9, atol=slack)
    assert still >= 3, "d moved at nearly every step: nothing was tested to rounding"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_root_is_the_root_of_the_real_step(case: Case) -> None:
    """P^-1/2, twice, turns the direction into the step; its eigenvalues are P's entries.

    Schedule-free's step has a pull towards z besides, so it is compared at the first step, where z is y; SOAP's and
    Shampoo's once every direction was met, for the limit sees no smaller P until then. SOAP's basis comes from single
    precision, so it is orthogonal to 1e-7 only.
    """
    rtol = 1e-4 if case.name == SOAP else 1e-8
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(s, dtype=torch.float64, generator=generator)) for s in case.shapes]
    optimizer = case.optimizer(params)
    model, group = preconditioner_of(optimizer), optimizer.param_groups[0]
    for _ in range(0 if "schedulefree" in case.name else 40):
        for x in params:
            x.grad = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        optimizer.step()
    for x in params:
        state, grad = optimizer.state.get(x, {}), torch.randn(x.shape, dtype=torch.float64, generator=generator)
        g = model.descent_gradient(group, x, grad)
        root, entries = model.root(group, state, g, x)
        columns = torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape)
        dense = torch.stack([root(column).reshape(-1) for column in columns])
        torch.testing.assert_close(dense, dense.T, rtol=rtol, atol=rtol)
        spectrum = torch.linalg.eigvalsh(dense) ** -2
        expected = entries.expand(x.shape).reshape(-1).sort(descending=True).values
        torch.testing.assert_close(spectrum, expected, rtol=rtol, atol=0)
        direction = model.direction(group, state, g)
        l2, decoupled = model.decay(group, state)
        if case.name == SHAMPOO:  # it adds L2 decay to the average, not to the gradient
            direction = direction + l2 * model.rule(group, state).from_gradient * x.detach()
        if case.name == ADAMW:
            decoupled *= model.rule(group, state).flip / 2  # beside P, in the gradient's place
        step = root(root(direction)) + decoupled * x.detach()
        real, lr = model.coming_step(group, state, x, grad, 1e-6), 1e-6
        if group.get("fixed_decay"):
            real = real + float(group["weight_decay"]) * x.detach()
        torch.testing.assert_close(real, -lr * step, rtol=1e-5, atol=1e-16)


@pytest.mark.parametrize("b", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("c", [1.0, 0.3, 0.01])
def test_schedule_free_is_the_update_rule_that_the_docstring_says(b: float, c: float) -> None:
    """The eigenvalues of (y, z)'s own transition matrix, at and around the flip."""
    rule = UpdateRule(1 - c, from_average=b, from_gradient=1 - b)
    assert rule.flip == pytest.approx((4 - 2 * c) / (2 * (1 - b) - c * (1 - 2 * b)))
    for h in (0.1, 0.7 * rule.flip, rule.flip):
        own = np.array([[1 - c - h * (1 - b * (1 - c)), c], [-h, 1.0]])
        ours = transition_matrix(rule, h, 1.0)
        assert np.trace(own) == pytest.approx(np.trace(ours))
        assert np.linalg.det(own) == pytest.approx(np.linalg.det(ours))


ALMOST_ONE = 1 - 1e-12
FROZEN = [
    Case(SGD, {"momentum": 0.9, "weight_lr_power": 0.0}),
    Case(SGD, {"momentum": 0.6, "weight_lr_power": 0.0, "weight_decay": 0.5}),
    Case(ADAMW, {"betas": (0.9, ALMOST_ONE), "weight_lr_power": 0.0}),
    Case(ADAMW, {"betas": (0.9, ALMOST_ONE), "weight_lr_power": 0.0, "weight_decay": 0.5}),
    Case(PRODIGY, {"betas": (0.9, ALMOST_ONE)}),
    Case(PRODIGY, {"betas": (0.8, ALMOST_ONE), "weight_decay": 0.5}),
    Case(PRODIGY, {"betas": (0.8, ALMOST_ONE), "weight_decay": 0.5, "decouple": False}),
    Case(SOAP, {"betas": (0.9, ALMOST_ONE), "shampoo_beta": 1.0, "precondition_frequency": 10**9, "weight_decay": 0.0}),
    Case(SHAMPOO),
    Case(SHAMPOO, {"weight_decay": 0.5, "weight_decouple": True, "fixed_decay": True}),
]


def freeze(optimizer: Any, x: Tensor, generator: torch.Generator) -> None:
    """Writes a state that a few hundred small gradients do not move: an old optimizer with P as it may come."""
    group, state = optimizer.param_groups[0], optimizer.state[x]
    x.grad = torch.zeros_like(x)
    optimizer.step()
    for name in ("k", "weight_sum"):
        if name in group:
            group[name] = 10**6
    if "step" in group:
        group["step"] = 10**6
    if "d" in group:
        group |= {"d": 0.5, "d_max": 0.5, "d0": 1e-3, "growth_rate": 1.0}
    if "exp_avg_sq" in state:
        spread = torch.rand(x.shape, dtype=x.dtype, generator=generator) + 0.1
        bias = 1 - ALMOST_ONE**10**6 if "correct_bias" in group or "z" in state else 1.0
        state["exp_avg_sq"].copy_(spread.square() * bias)
    if "Q" in state:
        state["Q"] = [torch.linalg.qr(torch.randn(n, n, dtype=x.dtype, generator=generator))[0] for n in x.shape]
    for dim, n in enumerate(x.shape if "pre_cond_0" in state else ()):
        root = torch.randn(n, n, dtype=x.dtype, generator=generator)
        state[f"pre_cond_{dim}"].copy_((root @ root.T + 0.1 * torch.eye(n, dtype=x.dtype)) * 1e12)


def grows(case: Case, share: float, steps: int = 600) -> bool:
    """Whether a random quadratic grows, or has not come down, under the real optimizer at `share` of the limit."""
    generator = torch.Generator().manual_seed(3)
    x = nn.Parameter(torch.randn(3, 4, dtype=torch.float64, generator=generator) * 1e-3)
    a = torch.randn(12, 12, dtype=torch.float64, generator=generator)
    hessian = a @ a.T / 12 + 0.1 * torch.eye(12, dtype=torch.float64)
    optimizer = case.optimizer([x])
    freeze(optimizer, x, generator)
    found = safe_lr.measure(optimizer, lambda: x.reshape(-1) @ hessian @ x.reshape(-1) / 2, tol=1e-9)
    group = optimizer.param_groups[0]
    group["lr"] = share * found.lr_limit
    sizes = [float(x.detach().norm())]
    for _ in range(steps):
        x.grad = (hessian @ x.detach().reshape(-1)).view(x.shape)
        optimizer.step()
        sizes.append(float(x.detach().norm()))
        if sizes[-1] > 1e3 * sizes[0]:
            return True
    late = max(sizes[-20:])  # far down, schedule-free's average creeps at the pace of c, to and fro
    return late > max(sizes[steps // 2 : steps // 2 + 20]) and late > 1e-3 * sizes[0]


@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_frozen_limit_is_the_edge_of_stability(case: Case) -> None:
    """On a quadratic that commutes with nothing, the real optimizer settles 0.3 % below the limit and grows above."""
    assert not grows(case, 0.997)
    assert grows(case, 1.003)


@pytest.mark.parametrize("r", [0.0, 2.0])
@pytest.mark.parametrize("b", [0.5, 0.9, 0.99])
def test_following_the_limit_from_step_0_amplifies_little(b: float, r: float) -> None:
    """Schedule-free gradient descent at margin 1 on quadratics of every curvature up to the largest."""
    curvatures = torch.linspace(1e-3, 1.0, 300, dtype=torch.float64)
    x = nn.Parameter(torch.ones_like(curvatures))
    optimizer = Case(SGD, {"momentum": b, "r": r, "weight_lr_power": 0.0}).optimizer([x])
    model, group, peak = preconditioner_of(optimizer), optimizer.param_groups[0], 0.0
    for update in range(1, 300):
        group["lr"] = model.rule(group, optimizer.state.get(x, {}), update).flip
        x.grad = curvatures * x.detach()
        optimizer.step()
        peak = max(peak, float(x.detach().abs().max()))
    assert peak < 4


def mlp() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A small network and its full-batch loss."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 6, generator=generator)
    targets = torch.sin(inputs @ torch.randn(6, 3, generator=generator))
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    return model, lambda: (model(inputs) - targets).square().mean()


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_measure_gives_a_limit(case: Case, steps: int) -> None:
    model, closure = mlp()
    optimizer = case.optimizer(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    found = safe_lr.measure(optimizer, closure)
    assert found.failure is None and found.converged
    assert math.isfinite(found.lr_limit) and found.lr_limit > 0
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("case", [c for c in PLAIN if c.name != SHAMPOO], ids=str)  # its first step loses matrix_eps
def test_bfloat16_parameters_are_measured(case: Case) -> None:
    x = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    optimizer = case.optimizer([x])
    for _ in range(3):
        x.grad = torch.ones_like(x)
        optimizer.step()
    found = safe_lr.measure(optimizer, lambda: x.float().square().sum())
    assert found.failure is None and found.lr_limit > 0


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_state_of_another_optimizer_is_a_failed_measurement(case: Case) -> None:
    x = nn.Parameter(torch.ones(3, 2))
    optimizer = case.optimizer([x])
    optimizer.state[x] = {"step": 3}
    found = safe_lr.measure(optimizer, lambda: x.square().sum())
    assert found.failure is not None and "was it loaded from another optimizer" in found.failure


@pytest.mark.parametrize("case", [c for c in PLAIN if c.name != SGD], ids=str)
def test_nan_in_the_state_is_a_failed_measurement(case: Case) -> None:
    x = nn.Parameter(torch.ones(3, 2))
    optimizer = case.optimizer([x])
    for _ in range(2):
        x.grad = torch.ones_like(x)
        optimizer.step()
    state = optimizer.state[x]
    state["exp_avg_sq" if "exp_avg_sq" in state else "pre_cond_0"][0, 0] = math.nan
    found = safe_lr.measure(optimizer, lambda: x.square().sum())
    assert found.failure is not None and "NaN" in found.failure


def final_loss(case: Case, lr: float, steps: int = 80, *, scheduled: bool) -> tuple[float, float]:
    """The loss before and after training, with or without safe_lr."""
    torch.manual_seed(0)
    model, closure = mlp()
    optimizer = case.optimizer(model.parameters(), lr=lr)
    scheduler = CoherenceScheduler(optimizer, loggers=None) if scheduled else None
    start = closure().item()
    for _ in range(steps):
        optimizer.zero_grad()
        closure().backward()
        if scheduler is not None:
            scheduler.observe(closure)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return start, closure().item()


@pytest.mark.parametrize("case", [c for c in PLAIN if c.name != PRODIGY], ids=str)
def test_scheduler_saves_a_run_whose_lr_is_much_too_high(case: Case) -> None:
    start, alone = final_loss(case, lr=1000.0, scheduled=False)
    assert not alone < start
    start, held = final_loss(case, lr=1000.0, scheduled=True)
    assert held < 0.5 * start


def test_prodigy_is_held_too() -> None:
    start, held = final_loss(Case(PRODIGY, {"d0": 1e-2}), lr=1000.0, scheduled=True)
    assert held < start


@pytest.mark.parametrize("name", [SOAP, SHAMPOO])
def test_directions_that_no_gradient_met_do_not_starve_the_limit(name: str) -> None:
    """With P as it is, the limit of SOAP's first steps is 1e-7, and a run that starts there never leaves."""
    model, closure = mlp()
    optimizer = Case(name).optimizer(model.parameters())
    limits = []
    for _ in range(4):
        limits.append(safe_lr.measure(optimizer, closure).lr_limit)
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
    assert min(limits) > 0.01


def test_soap_says_what_it_cannot_turn() -> None:
    x = nn.Parameter(torch.ones(3, 2))
    optimizer = Case(SOAP).optimizer([x])
    x.grad = torch.ones_like(x)
    optimizer.step()
    with pytest.raises(ArithmeticError, match=r"SOAP's basis has the sizes \[3, 2\]"):
        preconditioner_of(optimizer).diagonal(optimizer.param_groups[0], optimizer.state[x], torch.ones(2, 3))


def test_only_what_sums_up_squares_for_ever_is_not_annealed() -> None:
    package = pytest.importorskip("pytorch_optimizer")
    x = torch.ones(2, 2, requires_grad=True)
    makes = {
        0.0: [torch.optim.Adagrad, package.Shampoo],
        1.0: [torch.optim.RMSprop, torch.optim.Adam, package.SOAP],
    }
    assert all(preconditioner_of(make([x])).annealing == power for power, several in makes.items() for make in several)


@pytest.mark.parametrize("name", ["SOAP", "Shampoo"])
def test_what_is_kept_on_the_optimizer_is_found_there(name: str) -> None:
    """`maximize` stands in no group of these: climbing -L is descending L."""
    make, limits = getattr(pytest.importorskip("pytorch_optimizer"), name), []
    for maximize in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        x, sign = torch.randn(16, 4, dtype=torch.float64), -1 if maximize else 1
        optimizer = make(model.parameters(), lr=1e-3, maximize=maximize)

        def loss(model: nn.Module = model, sign: int = sign, x: Tensor = x) -> Tensor:
            return sign * (model(x) - 1).square().mean()

        for _ in range(5):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        optimizer.zero_grad()
        loss().backward()
        limits.append(safe_lr.measure(optimizer, loss).lr_limit)
    assert limits[1] == pytest.approx(limits[0], rel=1e-3)


# ---- wrappers


class Wrapper(torch.optim.Optimizer):
    """What accelerate's `AcceleratedOptimizer` is: a subclass with nothing of its own, not even hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class Lookahead(Wrapper):
    """The same with state, and so with an update, of its own."""

    state = property(lambda self: self.__dict__.setdefault("slow", {}))


def accelerated(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


def halved(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def in_sequence(optimizer: torch.optim.Optimizer) -> Any:
    members = [CoherenceScheduler(optimizer, loggers=None), halved(optimizer)]
    return members[0], torch.optim.lr_scheduler.SequentialLR(optimizer, members, milestones=[5])


MADE = {
    "scheduler": lambda opt, bare: [CoherenceScheduler(opt, halved, loggers=None)] * 2,
    "of a schedule made on it": lambda opt, bare: [CoherenceScheduler(opt, halved(opt), loggers=None)] * 2,
    "of a schedule made on the bare one": lambda opt, bare: [CoherenceScheduler(opt, halved(bare), loggers=None)] * 2,
    "bare, of a schedule made on it": lambda opt, bare: [CoherenceScheduler(bare, halved(opt), loggers=None)] * 2,
    "in a sequence": lambda opt, bare: in_sequence(opt),
    "guard": lambda opt, bare: [safe_lr.CoherenceGuard(opt, loggers=None), halved(opt)],
    "guard of a list": lambda opt, bare: [safe_lr.CoherenceGuard([opt], loggers=None), halved(opt)],
}


@pytest.mark.filterwarnings("default")  # accelerate warns of its own settings
@pytest.mark.parametrize("wrap", [Wrapper, accelerated])
@pytest.mark.parametrize("how", MADE)
def test_a_wrapper_with_nothing_of_its_own_changes_nothing(how: str, wrap: Any) -> None:
    def run(wrap: Any) -> tuple[list[Tensor], list[Any]]:
        x = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        bare = torch.optim.Adam([x], lr=1.0)
        optimizer = wrap(bare)
        safe, schedule = MADE[how](optimizer, bare)

        def loss() -> Tensor:
            return (x**2 * torch.tensor([1.0, 10.0, 0.1])).sum()

        seen = []
        for _ in range(8):
            loss().backward()
            safe.observe(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seen.append(x.detach().clone())
        assert safe.history
        decisions = [(d.step, d.action, d.lr_after) for d in safe.history]
        assert any(lr < 1.0 for _, _, lr in decisions)
        safe.close()
        return seen, decisions

    expected, found = run(lambda bare: bare), run(wrap)
    assert all(map(torch.equal, expected[0], found[0]))
    assert expected[1] == found[1]


def test_a_wrapper_is_measured_as_what_is_inside_and_told_as_what_was_given() -> None:
    x = nn.Parameter(torch.ones(1))
    wrapper = Wrapper(Wrapper(torch.optim.SGD([x], lr=1.0)))
    assert safe_lr.measure(wrapper, lambda: 2 * (x**2).sum()).lr_limit == pytest.approx(0.5)  # 2 / 4
    assert CoherenceScheduler(wrapper, loggers=None).optimizer is wrapper


def test_a_wrapper_with_an_update_of_its_own_is_not_taken_off() -> None:
    wrapper = Lookahead(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0))
    with pytest.raises(TypeError, match="does not know the preconditioner of Lookahead"):
        CoherenceScheduler(wrapper)
