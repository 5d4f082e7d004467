"""Moving betas and eps on real optimizers: nothing jumps, the limit follows, and what is not ours is left alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from safe_lr.preconditioners import preconditioner_of
from safe_lr.preconditioners.moves import age, movable_decays, move_decays, typical_root
from safe_lr.tuning import STEP, Tuning, decay_at
from tests.cases import Case

MOVED = [
    Case(Adam),
    Case(Adam, {"amsgrad": True}),
    Case(Adam, {"foreach": True}),
    Case(Adam, {"fused": True}),
    Case(Adam, {"betas": (torch.tensor(0.9), torch.tensor(0.999)), "foreach": False}),
    Case(Adam, {"maximize": True, "weight_decay": 0.1}),
    Case(AdamW, {"weight_decay": 0.1, "amsgrad": True, "foreach": True}),
    Case(NAdam),
    Case(NAdam, {"momentum_decay": 0.1, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    Case(RAdam),
    Case(RAdam, {"weight_decay": 0.1, "foreach": True}),
    Case(Adamax),
    Case(Adamax, {"weight_decay": 0.1, "foreach": True}),
    Case(RMSprop, {"alpha": 0.999}),
    Case(RMSprop, {"alpha": 0.999, "momentum": 0.9, "centered": True}),
]

FAR = (0.95, 0.99)

OLD, OLD_AVERAGE = 200, 1000  # updates; the second for an average that nothing corrects, of decay .999


class Stream:
    """An optimizer on a stream of gradients of its own."""

    def __init__(self, case: Case, noise: float = 1.0, dtype: torch.dtype = torch.float64) -> None:
        self.x = torch.nn.Parameter(torch.linspace(-1, 1, 3000, dtype=dtype))
        self.optimizer = Case(case.make, copy.deepcopy(case.options)).optimizer([self.x], 1e-3)  # betas as tensors
        self.noise, self.generator = noise, torch.Generator().manual_seed(3)

    def step(self, steps: int = 1) -> torch.Tensor:
        """Makes updates; returns the last one."""
        before = self.x.detach().clone()
        for _ in range(OLD_AVERAGE if steps == OLD and "alpha" in self.optimizer.defaults else steps):
            size = torch.linspace(0.5, 2, len(self.x), dtype=self.x.dtype)
            random = torch.randn(len(self.x), dtype=self.x.dtype, generator=self.generator)
            self.x.grad = size * (1 - self.noise + self.noise * random)
            before = self.x.detach().clone()
            self.optimizer.step()
        return self.x.detach() - before

    def twin(self) -> Stream:
        """The same, from here on, as another optimizer."""
        return copy.deepcopy(self)

    @property
    def decays(self) -> tuple[float | None, float | None]:
        return movable_decays(preconditioner_of(self.optimizer), self.optimizer.param_groups[0])

    def move(self, beta1: float | None, beta2: float | None) -> bool:
        optimizer = self.optimizer
        now = self.decays
        to = (beta1 if now[0] is not None else None), beta2
        return move_decays(preconditioner_of(optimizer), optimizer.param_groups[0], [*optimizer.state.values()], to)

    def move_one_step(self) -> bool:
        first, second = self.decays
        return self.move(None if first is None else decay_at(STEP, first, FAR[0]), decay_at(STEP, second, FAR[1]))


# ---- the averages


@pytest.mark.parametrize("updates", [0, 12, OLD])
@pytest.mark.parametrize("case", MOVED, ids=str)
def test_there_and_back_again_is_nothing(case: Case, updates: int) -> None:
    stream = Stream(case)
    stream.step(updates)
    still, (first, second) = stream.twin(), stream.decays
    if case.make is RMSprop and updates == 12:
        assert not stream.move(*FAR)  # too young
        return
    assert stream.move(*FAR)
    assert stream.decays == pytest.approx((FAR[0] if first is not None else None, FAR[1]))
    assert stream.move(first, second) and stream.decays == (first, second)
    for _ in range(5):
        torch.testing.assert_close(stream.step(), still.step(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("updates", [20, 60, OLD])
@pytest.mark.parametrize("case", MOVED, ids=str)
def test_after_a_move_the_first_update_changes_by_less_than_a_hundredth(
    case: Case, updates: int, noise: float
) -> None:
    stream = Stream(case, noise)
    stream.step(updates)
    still = stream.twin()
    assert stream.move_one_step() == (case.make is not RMSprop or updates == OLD)
    # Where there is nothing but noise, the weight 1 - mu of Nesterov's fresh gradient is all that NAdam's step is made of.
    within = 0.04 if case.make is NAdam and noise == 1 else 0.01
    assert float(stream.step().norm() / still.step().norm()) == pytest.approx(1, abs=within)


@pytest.mark.parametrize("case", [Case(Adam), Case(Adam, {"amsgrad": True}), Case(AdamW), Case(Adamax), Case(NAdam)],
                         ids=str)  # fmt: skip
def test_under_steady_gradients_the_averages_become_those_of_the_new_betas_all_along(case: Case) -> None:
    stream, other = Stream(case, noise=0.0), Stream(Case(case.make, {**case.options, "betas": FAR}), noise=0.0)
    stream.step(30), other.step(30)
    assert stream.move(*FAR)
    ((state,), (expected,)) = stream.optimizer.state.values(), other.optimizer.state.values()
    names = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} - ({"exp_avg"} if case.make is NAdam else set())
    for name in names & set(state):
        torch.testing.assert_close(state[name], expected[name], rtol=1e-9, atol=0)
    if case.make is not NAdam:  # it corrects by the product of its decays as they were: another road to the same place
        torch.testing.assert_close(stream.step(), other.step(), rtol=1e-9, atol=0)


def test_left_as_they_were_the_averages_would_make_a_step_three_times_too_large() -> None:
    stream = Stream(Case(Adam), noise=0.0)
    stream.step(50)
    careless, careful, still = stream.twin(), stream.twin(), stream.twin()
    careless.optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    assert careful.move(0.9, 0.95)
    usual = still.step().norm()
    second = (0.95 * (1 - 0.999**50) + 0.05) / (1 - 0.95**51)  # of g^2, which is 1
    assert float(careless.step().norm() / usual) == pytest.approx(second**-0.5, rel=1e-6) and second**-0.5 > 3
    assert float(careful.step().norm() / usual) == pytest.approx(1, rel=1e-6)


def test_amsgrads_maximum_goes_on_with_its_correction() -> None:
    stream = Stream(Case(Adam, {"amsgrad": True}))
    stream.step(20)
    ((before,),) = (copy.deepcopy([*stream.optimizer.state.values()]),)
    assert stream.move(*FAR)
    (after,) = stream.optimizer.state.values()
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        torch.testing.assert_close(after[name] / (1 - 0.99**20), before[name] / (1 - 0.999**20))
    torch.testing.assert_close(after["exp_avg"] / (1 - 0.95**20), before["exp_avg"] / (1 - 0.9**20))


def test_across_the_onset_of_rectification_nothing_can_go_on() -> None:
    stream = Stream(Case(RAdam))
    stream.step(3)  # not rectified yet
    before = copy.deepcopy([*stream.optimizer.state.values()])
    assert not stream.move(*FAR) and stream.decays == (0.9, 0.999)
    stream.step(9)
    assert not stream.move(0.9, 0.5)  # would never be rectified again
    assert stream.move(*FAR)
    (state,) = before
    assert int(state["step"]) == 3


def test_options_that_are_tensors_are_written_in_place() -> None:
    stream = Stream(Case(Adam, {"betas": (torch.tensor(0.9), torch.tensor(0.999)), "foreach": False}))
    betas = stream.optimizer.param_groups[0]["betas"]
    stream.step(20)
    assert stream.move(*FAR)
    assert all(ours is theirs for ours, theirs in zip(stream.optimizer.param_groups[0]["betas"], betas, strict=True))
    assert [float(b) for b in betas] == pytest.approx(FAR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_half_precision_and_complex_moments_move_too(dtype: torch.dtype) -> None:
    x = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = Adam([x], lr=1e-3)
    for _ in range(20):
        x.grad = torch.ones_like(x)
        optimizer.step()
    before = optimizer.state[x]["exp_avg_sq"].clone()
    assert move_decays(preconditioner_of(optimizer), optimizer.param_groups[0], [optimizer.state[x]], FAR)
    factor = (1 - 0.99**20) / (1 - 0.999**20)
    torch.testing.assert_close(optimizer.state[x]["exp_avg_sq"], before * factor)


def test_each_parameter_has_an_age_of_its_own() -> None:
    x, y = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = Adam([x, y])
    for update in range(20):
        x.grad, y.grad = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        if update < 15:
            y.grad = None
        optimizer.step()
    states = [optimizer.state[p] for p in (x, y)]
    assert age(states) == 20 and int(states[1]["step"]) == 5
    assert move_decays(preconditioner_of(optimizer), optimizer.param_groups[0], states, FAR)
    for state, t in zip(states, (20, 5), strict=True):
        assert float(state["exp_avg_sq"]) == pytest.approx(1 - 0.99**t)


@pytest.mark.parametrize("case", [Case(Adam), Case(RMSprop), Case(Adagrad), Case(RAdam), Case(Adamax)], ids=str)
def test_the_typical_root_is_a_quantile_of_what_eps_is_added_to(case: Case) -> None:
    stream = Stream(case)
    stream.step(20)
    (state,), (group,) = stream.optimizer.state.values(), stream.optimizer.param_groups
    root = {
        Adam: lambda: (0.999 * state["exp_avg_sq"] / (1 - 0.999**21)).sqrt(),
        RMSprop: lambda: (0.99 * state["square_avg"]).sqrt(),
        Adagrad: lambda: state["sum"].sqrt(),
        RAdam: lambda: (0.999 * state["exp_avg_sq"]).sqrt(),
        Adamax: lambda: 0.999 * state["exp_inf"],
    }[case.make]()
    found = typical_root(preconditioner_of(stream.optimizer), group, [state], 0.1)
    assert found == pytest.approx(float(root.quantile(0.1)), rel=1e-5)


def test_nothing_is_typical_before_the_first_gradient() -> None:
    x = torch.zeros(3, requires_grad=True)
    optimizer = Adam([x])
    model, (group,) = preconditioner_of(optimizer), optimizer.param_groups
    assert typical_root(model, group, [], 0.1) is None
    x.grad = torch.zeros(3)
    optimizer.step()
    assert typical_root(model, group, [optimizer.state[x]], 0.1) is None
