"""The tuner on real optimizers, with gammas and pressures that a test makes up."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from safe_lr.ensemble import Ensemble
from safe_lr.preconditioners.moves import movable_decays
from safe_lr.tuner import LOWEST, Tuner
from safe_lr.tuning import SETTLING, STEP, Tuning, decay_at

FAR = (0.95, 0.99)

BINDS, FITS, SLACK = (8.0, "the cap binds"), (1.0, "it fits"), (0.2, "there is slack")


class Tuned:
    """A tuner on an optimizer whose gammas and pressures the test makes up."""

    def __init__(self, optimizer: Any, **options: Any) -> None:
        self.optimizer = optimizer
        self.tuner = Tuner(Ensemble(optimizer), Tuning(**{"tune_betas": True, **options}))
        self.members = optimizer if isinstance(optimizer, list) else [optimizer]
        self.updates = 0
        self.train(20)

    def train(self, updates: int) -> None:
        for _ in range(updates):
            for member in self.members:
                for group in member.param_groups:
                    for p in group["params"]:
                        p.grad = torch.randn_like(p)
                member.step()
        self.updates += updates

    def measure(self, gamma: float | None, press: Any = BINDS) -> list[tuple[str, str]]:
        self.tuner.before_measuring(press, self.updates)
        return self.tuner.settle(gamma, press, self.updates)

    def later(self, gamma: float | None, press: Any = BINDS) -> list[tuple[str, str]]:
        """A measurement after the moments' memory has lasted."""
        self.train(60)
        self.updates += 10_000
        return self.measure(gamma, press)

    @property
    def betas(self) -> list[tuple[float | None, float | None]]:
        return [movable_decays(part[1], part[3]) for part in self.tuner.ensemble.owned()]


def parameter(size: int = 4) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))


def at(position: float, own: tuple[float, float] = (0.9, 0.999), end: tuple[float, float] = FAR) -> Any:
    return pytest.approx(tuple(decay_at(position, b, e) for b, e in zip(own, end, strict=True)))


def test_betas_go_as_far_as_gamma_falls_and_no_farther() -> None:
    tuned = Tuned(Adam([parameter()]))
    assert tuned.measure(10.0) == [("betas", "beta1 0.9 -> 0.9083, beta2 0.999 -> 0.99867: the cap binds")]
    tuned.train(5)
    assert tuned.measure(9.0) == [] and tuned.betas == [at(STEP)]  # the moments have not forgotten yet
    ((action, reason),) = tuned.later(8.0)
    assert action == "betas" and "gamma 10 -> 8.49 since the last move; the cap binds" in reason
    assert tuned.betas == [at(2 * STEP)]
    ((action, reason),) = tuned.later(20.0)
    assert "gamma 8.49 -> 20 since the last move, which did not help and is taken back" in reason
    assert tuned.betas == [at(STEP)]
    assert tuned.later(20.0, SLACK)[0][0] == "betas"
    assert tuned.betas == [(0.9, 0.999)]  # exactly
    assert tuned.later(20.0, SLACK) == [("betas", "betas stay: gamma 20 -> 20 since the last move")]


def test_betas_that_are_tensors_are_tuned_and_given_back() -> None:
    betas = (torch.tensor(0.9), torch.tensor(0.999))
    tuned = Tuned(Adam([parameter()], betas=betas, foreach=False))
    assert tuned.measure(10.0) == [("betas", "beta1 0.9 -> 0.9083, beta2 0.999 -> 0.99867: the cap binds")]
    assert tuned.later(9.0)[0][0] == "betas"  # what it wrote, rounded, is not someone else's
    assert tuned.optimizer.param_groups[0]["betas"][1] is betas[1] and float(betas[1]) < 0.9985
    tuned.tuner.give_back()
    assert [float(b) for b in betas] == [float(torch.tensor(b)) for b in (0.9, 0.999)]


def test_the_end_of_the_ranges_is_the_end() -> None:
    tuned = Tuned(Adam([parameter()]))
    for gamma in range(30, 10, -1):
        tuned.later(float(gamma))
    assert tuned.betas == [FAR]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda x: SGD([x], momentum=0.9), "the optimizer has no betas that tune_betas could move"),
        (lambda x: Adagrad([x]), "the optimizer has no betas that tune_betas could move"),
        (
            lambda x: Adam([x], betas=(0.95, 0.95)),
            "beta1 0.95 stays, for it lies outside of beta1_range (0.9, 0.95), or",
        ),
        (
            lambda x: RMSprop([x], alpha=0.99),
            "beta2 0.99 stays, for it lies outside of beta2_range (0.99, 0.999), or at",
        ),
    ],
)
def test_what_cannot_move_is_said_once(make: Any, reason: str) -> None:
    tuned = Tuned(make(parameter()))
    before = tuned.betas
    told = tuned.measure(10.0)
    assert {action for action, _ in told} == {"hold"}
    assert told[0][1].startswith(f"parameter group 0: {reason}")
    assert tuned.later(10.0) == [] and tuned.betas == before


def test_a_beta_outside_of_its_range_stays_while_the_other_moves() -> None:
    tuned = Tuned(AdamW([parameter()], betas=(0.9, 0.95)))
    (held, moved) = tuned.measure(10.0)
    assert held[0] == "hold" and "beta2 0.95 stays" in held[1]
    assert moved == ("betas", "beta1 0.9 -> 0.9083: the cap binds")
    assert tuned.betas == [(pytest.approx(0.9083, abs=1e-4), 0.95)]


def test_groups_move_from_values_of_their_own_and_a_new_one_by_the_same_step() -> None:
    x, y, z = (parameter() for _ in range(3))
    optimizer = Adam([{"params": [x]}, {"params": [y], "betas": (0.92, 0.995)}])
    tuned = Tuned(optimizer)
    ((_, reason),) = tuned.measure(10.0)
    assert reason.count("beta2") == 2
    assert tuned.betas == [at(STEP), at(STEP, (0.92, 0.995))]
    optimizer.add_param_group({"params": [z]})
    tuned.train(20)
    tuned.later(9.0)
    assert tuned.betas == [at(2 * STEP), at(2 * STEP, (0.92, 0.995)), at(STEP)]
    tuned.later(99.0)
    assert tuned.betas == [at(STEP), at(STEP, (0.92, 0.995)), (0.9, 0.999)]


def test_of_several_optimizers_those_move_that_can() -> None:
    sgd, adam = SGD([parameter()], lr=0.1), Adam([parameter()])
    tuned = Tuned([sgd, adam])
    held, moved = tuned.measure(10.0)
    assert held == ("hold", "parameter group 0: the optimizer has no betas that tune_betas could move")
    assert moved[0] == "betas" and tuned.betas == [(None, None), at(STEP)]


def test_groups_of_one_fate_share_a_sentence() -> None:
    tuned = Tuned(SGD([{"params": [parameter()]} for _ in range(3)]))
    assert tuned.measure(10.0) == [
        ("hold", "parameter group 0, 1, 2: the optimizer has no betas that tune_betas could move")
    ]


def test_what_someone_else_writes_is_left_alone_from_then_on() -> None:
    optimizer = Adam([{"params": [parameter()]}, {"params": [parameter()]}])
    tuned = Tuned(optimizer)
    tuned.measure(10.0)
    optimizer.param_groups[0]["betas"] = (0.8, 0.999)
    held, moved = tuned.later(9.0)
    assert held == ("hold", "parameter group 0: someone else writes betas: they are left alone from now on")
    assert moved[0] == "betas" and tuned.betas == [(0.8, 0.999), at(2 * STEP)]
    assert [action for action, _ in tuned.later(8.0)] == ["betas"]
    tuned.tuner.give_back()
    assert tuned.betas == [(0.8, 0.999), (0.9, 0.999)]


def test_giving_back_rescales_the_moments_and_takes_no_second_time() -> None:
    tuned = Tuned(Adam([parameter()]))
    for gamma in (10.0, 9.0, 8.0):
        tuned.later(gamma)
    ((state),) = tuned.optimizer.state.values()
    (b1, b2), t = tuned.betas[0], int(state["step"])
    seen = [state["exp_avg"] / (1 - b1**t), state["exp_avg_sq"] / (1 - b2**t)]
    for _ in range(2):
        tuned.tuner.give_back()
        assert tuned.betas == [(0.9, 0.999)]
        torch.testing.assert_close([state["exp_avg"] / (1 - 0.9**t), state["exp_avg_sq"] / (1 - 0.999**t)], seen)


@pytest.mark.parametrize("gamma", [None, 10.0])
def test_a_young_run_and_a_failed_measurement_move_nothing(gamma: float | None) -> None:
    tuned = Tuned(Adam([parameter()]), tune_eps=True)
    tuned.updates = SETTLING - 1 if gamma else 500
    assert tuned.measure(gamma) == [] and tuned.betas == [(0.9, 0.999)]


@pytest.mark.parametrize("spoil", [{"step": "three"}, {"exp_avg_sq": None}, {"exp_avg": None}])
def test_a_state_that_cannot_be_read_moves_nothing(spoil: dict[str, Any]) -> None:
    tuned = Tuned(Adam([parameter()]), tune_eps="exp_avg" not in spoil)
    (state,) = tuned.optimizer.state.values()
    state.update(spoil)
    for name in [name for name, value in spoil.items() if value is None]:
        state[name] = "not a tensor"
    assert tuned.measure(10.0) == [] and tuned.betas == [(0.9, 0.999)]
    assert tuned.measure(10.0) == []


def test_an_average_that_is_too_young_waits() -> None:
    tuned = Tuned(RMSprop([parameter()], alpha=0.995))
    assert tuned.measure(10.0) == [] and tuned.tuner.betas.dial.position == 0
    tuned.train(200)
    ((action, reason),) = tuned.measure(10.0)
    assert (action, reason) == ("betas", "beta2 0.995 -> 0.99455: the cap binds")


# ---- eps


def spread(**options: Any) -> Tuned:
    """Adam on gradients of sizes 1e-6 to 1e-2."""
    x = parameter(400)
    optimizer = Adam([x])
    size = torch.logspace(-6, -2, 400)

    def scale(*_: Any) -> None:
        x.grad.mul_(size)

    optimizer.register_step_pre_hook(scale)
    return Tuned(optimizer, **{"tune_betas": False, "tune_eps": True, **options})


def eps_of(tuned: Tuned) -> float:
    return float(tuned.optimizer.param_groups[0]["eps"])


def root_of(tuned: Tuned) -> float:
    (state,) = tuned.optimizer.state.values()
    t = int(state["step"])
    return float((0.999 * state["exp_avg_sq"] / (1 - 0.999 ** (t + 1))).sqrt().quantile(LOWEST))


def test_eps_rises_towards_the_lowest_tenth_of_the_roots_and_lifts_p_min() -> None:
    tuned = spread()
    assert tuned.measure(10.0) == []  # it moves before a measurement, on what earlier ones have found
    ((action, reason),) = tuned.later(9.0)
    top = root_of(tuned)
    assert action == "eps" and reason.startswith("eps 1e-08 -> ") and top < 1e-5
    assert eps_of(tuned) == pytest.approx(1e-8 + STEP * (top - 1e-8), rel=1e-4)
    for gamma in range(30):
        tuned.later(8.0 - gamma / 10)
    assert eps_of(tuned) == pytest.approx(root_of(tuned), rel=0.5)


def test_the_range_bounds_eps_where_gradients_are_large() -> None:
    tuned = Tuned(Adam([parameter(100)]), tune_betas=False, tune_eps=True, eps_range=(1e-9, 1e-6))
    for gamma in range(40):
        tuned.later(50.0 - gamma)
    assert eps_of(tuned) == pytest.approx(1e-6)


def test_eps_goes_back_under_slack_and_where_the_gradients_shrink() -> None:
    tuned = spread()
    for gamma in range(6):
        tuned.later(10.0 - gamma)
    before = eps_of(tuned)
    (state,) = tuned.optimizer.state.values()
    state["exp_avg_sq"].mul_(1e-6)
    ((_, reason),) = tuned.later(3.0)
    assert "above the second moment's root of more than 10% of the coordinates" in reason and eps_of(tuned) < before
    for _ in range(9):
        tuned.later(3.0, SLACK)
    assert eps_of(tuned) == 1e-8


def test_eps_is_undone_where_the_measurement_failed() -> None:
    tuned = spread()
    tuned.measure(10.0)
    tuned.updates += 10_000
    tuned.tuner.before_measuring(BINDS, tuned.updates)
    assert eps_of(tuned) > 1e-8
    assert tuned.tuner.settle(None, BINDS, tuned.updates) == []
    assert eps_of(tuned) == 1e-8
    tuned.tuner.before_measuring(BINDS, tuned.updates)
    assert eps_of(tuned) > 1e-8  # and tried again; this time the measurement raises
    tuned.tuner.before_measuring(None, tuned.updates)
    assert eps_of(tuned) == 1e-8


def test_eps_outside_of_its_range_stays() -> None:
    tuned = Tuned(Adam([parameter()], eps=1e-2), tune_betas=False, tune_eps=True)
    assert tuned.measure(10.0) == [
        ("hold", "parameter group 0: eps 0.01 stays, for it lies outside of eps_range (0.0, 0.001)")
    ]


def test_betas_and_eps_take_turns() -> None:
    tuned = spread(tune_betas=True)
    moves = [
        action for gamma in range(12) for action, reason in tuned.later(30.0 - gamma) if "->" in reason.split(":")[0]
    ]
    assert moves[:6] == ["betas", "eps"] * 3
    assert all(a != b for a, b in pairwise(moves))


def test_one_waits_for_the_verdict_on_the_other() -> None:
    tuned = spread(tune_betas=True)
    assert [action for action, _ in tuned.measure(10.0)] == ["betas"]
    for _ in range(3):
        tuned.updates += 1  # the moments remember still
        assert tuned.measure(10.0) == [] and eps_of(tuned) == 1e-8
    assert [action for action, _ in tuned.later(9.0)] == ["betas"]  # the verdict
    assert [action for action, _ in tuned.later(9.0)] == ["eps"]


@pytest.mark.parametrize("taken", ["betas", "eps"])
def test_the_other_goes_on_where_someone_takes_what_moved_last(taken: str) -> None:
    tuned = spread(tune_betas=True)
    (group,) = tuned.optimizer.param_groups
    assert [action for action, _ in tuned.measure(10.0)] == ["betas"]
    if taken == "eps":
        assert [[action for action, _ in tuned.later(9.0)] for _ in range(2)] == [["betas"], ["eps"]]
    group[taken] = {"betas": (0.8, 0.999), "eps": 1e-7}[taken]  # before the verdict
    assert ("hold", f"parameter group 0: someone else writes {taken}: they are left alone from now on") in tuned.later(
        8.0
    )
    other = "eps" if taken == "betas" else "betas"
    actions = [action for gamma in (7.0, 6.0) for action, reason in tuned.later(gamma) if "->" in reason.split(":")[0]]
    assert other in actions and group[taken] == {"betas": (0.8, 0.999), "eps": 1e-7}[taken]


def test_a_tuners_state_goes_on() -> None:
    tuned = spread(tune_betas=True)
    for gamma in range(5):
        tuned.later(30.0 - gamma)
    twin = copy.deepcopy(tuned.optimizer)
    other = Tuner(Ensemble(twin), Tuning(tune_betas=True, tune_eps=True))
    other.load_state_dict(copy.deepcopy(tuned.tuner.state_dict()))
    for gamma in (20.0, 19.0, 30.0):
        tuned.updates += 10_000
        told = []
        for tuner in (tuned.tuner, other):
            tuner.before_measuring(BINDS, tuned.updates)
            told.append(tuner.settle(gamma, BINDS, tuned.updates))
        assert told[0] == told[1] and told[0]
    assert other.state_dict() == tuned.tuner.state_dict()
