"""Whose runs decide what an lr range loses: those that are given, those that a config names, those that stand in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from safe_lr.preconditioners.named import named
from safe_lr.sweeps import clip_to_stable, stable_ceiling, violations
from safe_lr.sweeps.runs import Runs

RANGE = {"distribution": "log_uniform_values", "min": 1e-3, "max": 100.0}
NO_LIMIT = {"LBFGS", "Rprop"}
OTHER_GRADIENTS = {"SparseAdam"}
FURTHER = {"Adadelta", "Adafactor"}  # they train beyond what the stand-ins can, as docs/sweeps.md says


def near() -> nn.Module:
    """So near the minimum that an lr in the weights' own units has to be tiny."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1e-3)
    return model


def quadratic(model: nn.Module) -> Callable[[], torch.Tensor]:
    """2 w1^2 + w2^2 / 2: H = diag(4, 1); SGD's limit is 2 (1 + momentum) / 4."""
    return lambda: (torch.tensor([2.0, 0.5]) * model.weight**2).sum()


def steep(model: nn.Module) -> Callable[[], torch.Tensor]:
    """The same, 10^6 times as steep, which SGD's limit feels and AdamW's does not."""
    return lambda: 1e6 * quadratic(model)()


def swept(**parameters: Any) -> dict[str, Any]:
    return {"method": "random", "parameters": {"lr": RANGE, **parameters}}


def highest_after(**parameters: Any) -> float:
    clipped = clip_to_stable(swept(**parameters), near, quadratic)
    assert violations(clipped) == []
    return clipped["parameters"]["lr"]["max"]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)


@pytest.mark.parametrize(
    ("parameters", "limit"),
    [
        ({"optimizer": {"value": "sgd"}}, 0.95),
        ({"optimizer": {"value": "torch.optim.SGD"}, "momentum": {"value": 0.5}}, 0.75),
        ({"optimizer": {"value": "SGD"}, "momentum": {"value": 0}}, 0.5),
        ({"optimizer": {"value": "SGD"}, "momentum": {"values": [0.0, 0.5]}}, 0.75),
        ({"optimizer": {"value": "SGD"}, "momentum": {"min": 0.0, "max": 0.5}}, 0.95),  # a range says nothing
        ({"optimizer": {"values": ["adamw", "sgd"]}}, 0.95),
        ({}, 0.95),
        ({"momentum": {"value": 0.5}}, 0.75),
    ],
)
def test_the_ceiling_of_gradient_descent_is_known(parameters: dict[str, Any], limit: float) -> None:
    """2 (1 + momentum) / 4, and AdamW's is far below it."""
    assert highest_after(**parameters) == pytest.approx(8 * limit, rel=1e-2)


def test_an_adaptive_optimizer_alone_is_cut_at_its_own_ceiling() -> None:
    own = stable_ceiling(near, quadratic, highest=100.0, optimizer_factory=adamw)
    assert highest_after(optimizer={"value": "AdamW"}) == own.lr
    assert own.lr is not None and own.lr < 1.0


def test_of_two_stand_ins_the_larger_ceiling_counts_whosever_it_is() -> None:
    for loss, larger in ((quadratic, sgd), (steep, adamw)):
        ceilings = {make: stable_ceiling(near, loss, highest=100.0, optimizer_factory=make) for make in (sgd, adamw)}
        found = stable_ceiling(near, loss, highest=100.0)
        assert found.lr == ceilings[larger].lr == max(one.lr or 0.0 for one in ceilings.values())
        assert found.lr_limit == max(one.lr_limit for one in ceilings.values())
        assert found.cost == sum(one.cost for one in ceilings.values())


def test_a_list_of_ones_own_counts_like_a_config_that_names_them() -> None:
    several = stable_ceiling(near, quadratic, highest=100.0, optimizer_factory=[adamw, sgd])
    assert several.lr == highest_after(optimizer={"values": ["adamw", "sgd", "SGD"]})
    assert several.reason.startswith("of AdamW, a bare run at lr ")
    assert f"; of SGD, a bare run at lr {several.lr:.3g} fails within 50 updates" in several.reason


def test_the_description_says_who_was_assumed_and_how_to_name_ones_own() -> None:
    clipped = clip_to_stable(swept(), near, quadratic)
    said, lr = clipped["description"], f"{clipped['parameters']['lr']['max']:.3g}"
    assert said.startswith(f"lr cut from 100 to below {lr}: of SGD with momentum 0.9, a bare run at lr {lr} fails")
    assert "The config names no optimizer, so SGD with momentum 0.9 and AdamW at its defaults were assumed" in said
    assert said.endswith("name yours in its parameter optimizer, or pass optimizer_factory=.")
    said = clip_to_stable(swept(optimizer={"value": "adamw"}), near, quadratic)["description"]
    assert "of AdamW at its defaults, a bare run" in said and "SGD" not in said and "assumed" not in said
    found = stable_ceiling(near, quadratic, highest=0.1)
    assert found.lr is None and found.cost == 50
    assert found.reason.startswith(
        "of SGD with momentum 0.9, a bare run at lr 0.1 trains: nothing is cut. No optimizer"
    )
    assert found.reason.endswith("were assumed: pass yours as optimizer_factory=")


def test_nothing_is_cut_where_one_of_several_trains_at_the_upper_end() -> None:
    range_ = {"distribution": "log_uniform_values", "min": 1e-3, "max": 0.9}
    for names, cut in ((["adamw"], True), (["adamw", "sgd"], False), (["sgd", "adamw"], False)):
        config = swept(optimizer={"values": names}, lr=range_)
        assert (clip_to_stable(config, near, quadratic) != config) is cut
    assert clip_to_stable(swept(lr=range_), near, quadratic) == swept(lr=range_)


def test_nor_where_the_range_ends_below_8_times_the_limit_of_one() -> None:
    found = stable_ceiling(near, quadratic, highest=7.0)
    assert found.lr is None and found.lr_limit == pytest.approx(0.95, rel=1e-2)
    assert found.reason.startswith(
        "of SGD with momentum 0.9, a bare run at lr 7 fails within 50 updates, but all of it is below 8 times the "
        "largest limit met in a protected one, 0.9"
    )
    assert "were assumed" in found.reason
    range_ = {"distribution": "log_uniform_values", "min": 1e-3, "max": 7.0}
    config = swept(lr=range_) | {"description": "Mine."}
    clipped = clip_to_stable(config, near, quadratic)
    said = clipped["description"]
    assert said.startswith("Mine. lr: of SGD with momentum 0.9, a bare run at lr 7 fails within 50 updates")
    assert said.endswith("name yours in its parameter optimizer, or pass optimizer_factory=.")
    assert clipped == config | {"description": said}


def test_a_batch_whose_curvature_vanishes_with_its_loss_has_no_endless_limit() -> None:
    """Two separated points, a logistic loss: H = p (1 - p) diag(1, 0) at most 1 / 4 and gone within 50 updates."""

    def logistic(model: nn.Module) -> Callable[[], torch.Tensor]:
        return lambda: nn.functional.softplus(-model.weight[0, 0])

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1.0)

    def start(weight: float) -> Callable[[], nn.Module]:
        def made() -> nn.Module:
            model = nn.Linear(1, 1, bias=False)
            nn.init.constant_(model.weight, weight)
            return model

        return made

    runs = Runs(plain, start(0.0), logistic, 50, 0, spoken_of=False)
    limit, _ = runs.largest_limit(1e9)
    tenth = math.log(2) / 10
    p = 1 - math.exp(-tenth)  # of the wrong class, where the loss has come down to a tenth
    assert 8 <= limit <= 2 / (p * (1 - p)), "between the first curvature's and that at a tenth of the loss"


@pytest.mark.parametrize(
    ("spec", "got"),
    [
        ({"values": ["adam", "lion"]}, "'lion'"),
        ({"value": ""}, "''"),
        ({"value": None}, "None"),
        ({"value": "Optimizer"}, "'Optimizer'"),
        ({"values": [0, 1]}, "0"),
        ({"min": 0, "max": 3}, "{'min': 0, 'max': 3}"),
        ({"parameters": {"name": {"value": "adam"}}}, "{'parameters': {'name': {'value': 'adam'}}}"),
    ],
)
def test_what_names_no_optimizer_of_torch_is_no_case_for_the_stand_ins(spec: dict[str, Any], got: str) -> None:
    """They could cut what its owner can train; with the owner's own factory all is well."""
    with pytest.raises(ValueError) as raised:
        clip_to_stable(swept(optimizer=spec), near, quadratic)
    said = str(raised.value)
    assert said.startswith(f"parameters.optimizer: {got} is no optimizer of torch.optim, which has ASGD, Adadelta")
    assert "pass optimizer_factory=, a function that makes a model's optimizer, or a list of such functions" in said
    clipped = clip_to_stable(swept(optimizer=spec), near, quadratic, optimizer_factory=sgd)
    assert clipped["parameters"]["lr"]["max"] == pytest.approx(7.6, rel=1e-2)


@pytest.mark.parametrize("name", ["Adam", "adam", "ADAM", "optim.Adam", "torch.optim.adam"])
def test_case_and_module_do_not_matter(name: str) -> None:
    (one,) = named(name)
    assert one.cls is torch.optim.Adam and type(one(near())) is torch.optim.Adam


def test_frozen_parameters_are_nobodys() -> None:
    model = nn.Sequential(near(), nn.Linear(1, 1).requires_grad_(False))
    (group,) = named("sgd")[0](model).param_groups
    assert group["params"] == [model[0].weight]


CLASSES = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - NO_LIMIT - OTHER_GRADIENTS))
def test_every_optimizer_of_torch_can_be_named(name: str) -> None:
    config = swept(optimizer={"value": name})
    clipped = clip_to_stable(config, near, quadratic, steps=12)
    assert clipped["parameters"]["lr"]["max"] <= 100.0
    assert clipped == config or f"of {name} " in clipped["description"]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))


def batches(model: nn.Module) -> Iterator[Callable[[], torch.Tensor]]:
    stream = torch.Generator().manual_seed(1)
    mixing = torch.randn(8, 3, generator=stream)
    while True:
        x = torch.randn(32, 8, generator=stream)
        yield lambda x=x: nn.functional.mse_loss(model(x), torch.sin(x @ mixing))


@pytest.fixture(scope="module")
def ceiling() -> float:
    found = stable_ceiling(network, batches, highest=1e5)
    assert found.lr is not None
    return found.lr


@pytest.mark.parametrize("name", sorted(set(CLASSES) - NO_LIMIT - OTHER_GRADIENTS - {"Muon"}))
def test_what_the_stand_ins_cut_hardly_any_other_optimizer_trains(name: str, ceiling: float) -> None:
    beyond = 1.01 * ceiling
    for one in named(name, (0.0, 0.99)):
        found = stable_ceiling(network, batches, highest=beyond, optimizer_factory=one)
        assert (found.trained_at == beyond) is (name in FURTHER)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sparseadam", "SparseAdam at its defaults does not go with this model (SparseAdam does not support dense"),
        ("lbfgs", "LBFGS at its defaults does not go with this model (LBFGS has no stability limit"),
        ("Rprop", "Rprop at its defaults does not go with this model (Rprop has no stability limit"),
        pytest.param(
            "muon",
            "Muon at its defaults does not go with this model (Muon only supports 2D",
            marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9"),
        ),
    ],
)
def test_one_that_does_not_fit_the_model_is_named(name: str, why: str) -> None:
    with pytest.raises(ValueError) as raised:
        clip_to_stable(swept(optimizer={"value": name}), lambda: nn.Linear(2, 1), quadratic)
    assert str(raised.value).startswith(why)
    assert "): leave it out, or pass optimizer_factory=, a function" in str(raised.value)


def test_errors_of_ones_own_code_stay_as_they_are() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$"):
        stable_ceiling(near, quadratic, highest=1.0, optimizer_factory=broken)
    with pytest.raises(RuntimeError, match="^mine$"):
        stable_ceiling(broken, quadratic, highest=1.0)
    with pytest.raises(RuntimeError, match="^mine$"):
        stable_ceiling(near, lambda model: broken, highest=1.0)
    with pytest.raises(ValueError, match="closure_factory gave no closure: its iterable must begin anew"):
        stable_ceiling(near, lambda model: [], highest=1.0)
    give = "give a function that makes a model's optimizer, or a list of such functions"
    mine = type("Mine", (torch.optim.SGD,), {})
    for wrong, said in (
        ("adam", f"optimizer_factory='adam': {give}"),
        ([], f"optimizer_factory=[]: {give}"),
        (["adam"], f"optimizer_factory=['adam']: {give}"),
        (sgd(near()), f"optimizer_factory=<an optimizer SGD>: {give}"),
        ([sgd(near())], f"optimizer_factory=[<an optimizer SGD>]: {give}"),
        (
            torch.optim.Adam,
            "optimizer_factory: torch.optim.Adam is a class, and takes parameters, no model: give lambda model: "
            "torch.optim.Adam(model.parameters())",
        ),
        (
            [sgd, mine],
            "optimizer_factory: Mine is a class, and takes parameters, no model: give lambda model: Mine(model.",
        ),
        (
            [lambda model: "adam"],
            "optimizer_factory has returned 'adam', which is no optimizer of torch's kind: return one",
        ),
    ):
        with pytest.raises(TypeError) as raised:
            stable_ceiling(near, quadratic, highest=1.0, optimizer_factory=wrong)
        assert str(raised.value).startswith(said)


@pytest.mark.parametrize("named_too", [{}, {"optimizer": {"value": "sgd"}}])
@pytest.mark.parametrize("momentum", [1.0, 1.5, -0.1])
def test_a_momentum_that_cannot_be_is_the_configs_fault(momentum: float, named_too: dict[str, Any]) -> None:
    config = swept(momentum={"values": [0.9, momentum]}, **named_too)
    with pytest.raises(ValueError) as raised:
        clip_to_stable(config, near, quadratic)
    assert str(raised.value).startswith(f"parameters.momentum: {momentum:g} is not inside [0, 1), and SGD is to run")
    other = swept(momentum={"values": [0.9, momentum]}, optimizer={"value": "adamw"})
    assert clip_to_stable(other, near, quadratic)["parameters"]["momentum"] == other["parameters"]["momentum"]


def test_who_is_to_blame_where_no_limit_is_found_depends_on_who_made_the_optimizer() -> None:
    def endless(model: nn.Module) -> Callable[[], torch.Tensor]:
        return lambda: (model.weight * math.inf).sum()

    for factory, blame in ((None, "closure_factory"), (sgd, "closure_factory and optimizer_factory")):
        with pytest.raises(ValueError, match=f"could be measured .*: check {blame}$"):
            stable_ceiling(near, endless, highest=1.0, optimizer_factory=factory)


def test_the_callers_streams_and_config_are_left_alone_and_it_repeats() -> None:
    config = swept(optimizer={"values": ["adam", "sgd"]})
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = clip_to_stable(config, lambda: nn.Linear(2, 1), quadratic)
    assert torch.rand(1) == expected
    assert config == swept(optimizer={"values": ["adam", "sgd"]})
    assert clip_to_stable(config, lambda: nn.Linear(2, 1), quadratic) == first
    assert math.isfinite(first["parameters"]["lr"]["max"])
