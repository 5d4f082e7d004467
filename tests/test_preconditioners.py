"""Every optimizer's coming step against the real one, and its registry."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    SparseAdam,
)

import safe_lr.preconditioners as models
from safe_lr.ensemble import Ensemble
from safe_lr.movers import coming_steps, movers
from safe_lr.preconditioners import Preconditioner, known, preconditioner_of, register
from tests.cases import CASES, Case

LOCAL = [
    Case(Adafactor),
    Case(Adafactor, {"weight_decay": 0.1, "d": 2.0, "eps": (1e-4, 0.5), "beta2_decay": -0.5, "maximize": True}),
    Case(Muon, {"weight_decay": 0.0}),
    Case(Muon, {"momentum": 0.8, "nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}),
]

EXACT = [SGD, ASGD, Adagrad, RMSprop, Adadelta, Adam, AdamW, Adamax, NAdam, RAdam, SparseAdam]

FLAGS: dict[type[Optimizer], list[dict[str, Any]]] = {
    SGD: [{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True}],
    ASGD: [{}, {"lambd": 0.1, "alpha": 1.0, "t0": 3}],
    Adagrad: [{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-3}],
    RMSprop: [{"momentum": m, "centered": c, "eps": 1e-3} for m in (0.0, 0.9) for c in (False, True)],
    Adadelta: [{}, {"rho": 0.5, "eps": 1e-3}],
    Adam: [
        {"amsgrad": a, "betas": (0.8, 0.9), "decoupled_weight_decay": d} for a in (False, True) for d in (False, True)
    ],
    AdamW: [{}, {"amsgrad": True, "betas": (0.0, 0.9), "eps": 1e-3}],
    Adamax: [{}, {"betas": (0.8, 0.9), "eps": 1e-3}],
    NAdam: [{"momentum_decay": m, "decoupled_weight_decay": d} for m in (0.0, 4e-3, 0.5) for d in (False, True)],
    RAdam: [{"betas": (0.9, b2), "decoupled_weight_decay": d} for b2 in (0.5, 0.9, 0.999) for d in (False, True)],
    SparseAdam: [{}, {"betas": (0.8, 0.9), "eps": 1e-3}],
    Adafactor: [{}, {"d": 2.0, "eps": (1e-4, 0.5), "beta2_decay": -0.5}],
    Muon: [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}],
}
"""Everything of its own that an optimizer can be told, beside what most of them share."""

SHARED: list[dict[str, Any]] = [{}, {"maximize": True}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}]

IMPLEMENTATIONS: list[dict[str, Any]] = [
    {"foreach": False},
    {"foreach": True},
    {"fused": True},
    {"capturable": True},
    {"capturable": True, "foreach": True},
    {"differentiable": True},
    {"lr": torch.tensor(0.05, dtype=torch.float64)},
    {"lr": torch.tensor([0.05], dtype=torch.float64)},
]

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]  # capturable works on GPUs only


def same(make: type[Optimizer], options: dict[str, Any]) -> dict[str, float]:
    """Tolerances: rounding in float64, but where the optimizer itself computes in less."""
    if make is Muon:  # Newton-Schulz in bfloat16
        return {"rtol": 1e-3, "atol": 1e-3}
    if options.get("differentiable") or options.get("capturable"):  # bias corrections from a float32 tensor of steps
        return {"rtol": 1e-5, "atol": 1e-6}
    return {"rtol": 1e-12, "atol": 1e-14}


def rows_only(make: type[Optimizer], grad: Tensor) -> Tensor:
    """The gradient, sparse where the optimizer takes no other."""
    return grad.to_sparse(1) if make is SparseAdam else grad


@pytest.mark.parametrize("case", [*CASES, *LOCAL], ids=str)
def test_coming_step_is_the_real_step(case: Case) -> None:
    """From the first step on, with changing gradients and lr, and without touching the optimizer's state."""
    generator = torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.randn(2, 3, dtype=torch.float64, generator=generator))
    optimizer = case.optimizer([x])
    model, group = preconditioner_of(optimizer), optimizer.param_groups[0]
    for update in range(1, 30):
        group["lr"] = 0.05 / update
        x.grad = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        before = copy.deepcopy(optimizer.state_dict()["state"])
        predicted = model.coming_step(group, optimizer.state.get(x, {}), x, x.grad, group["lr"], update)
        torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)
        old = x.detach().clone()
        optimizer.step()
        torch.testing.assert_close(old + predicted, x.detach(), **same(case.make, case.options))


@pytest.mark.parametrize("case", [*CASES, *LOCAL], ids=str)
def test_a_step_made_once_and_scaled_is_the_step_of_that_length(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    x, still = (nn.Parameter(torch.randn(2, 3, dtype=torch.float64, generator=generator)) for _ in range(2))
    optimizer = case.optimizer([x, still])
    for _ in range(3):
        x.grad = rows_only(case.make, torch.randn(x.shape, dtype=torch.float64, generator=generator))
        optimizer.step()
    ensemble = Ensemble(optimizer)
    moving = movers(ensemble, [1.0], updates=4)
    steps = coming_steps(moving, [m.grad for m in moving])
    for lr in (0.08, 0.02, 0.01, 0.03):
        made, none = steps(lr)
        assert made is not None and none is None
        torch.testing.assert_close(made, moving[0].coming_step(moving[0].grad, lr), **same(case.make, case.options))


def test_every_optimizer_of_torch_is_known_or_refused_with_a_reason() -> None:
    for name in torch.optim.__all__ if hasattr(torch.optim, "__all__") else dir(torch.optim):
        make = getattr(torch.optim, name)
        if not (isinstance(make, type) and issubclass(make, Optimizer)) or make is Optimizer:
            continue
        x = nn.Parameter(torch.ones(2, 2))
        if make in (torch.optim.Rprop, torch.optim.LBFGS):
            with pytest.raises(TypeError, match=rf"{name} has no stability limit .*Use "):
                preconditioner_of(make([x]))
        else:
            assert preconditioner_of(make([x])).kind == ("exact" if make in EXACT else "local scale"), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("make", "how"),
    [
        pytest.param(make, how, id=f"{make.__name__}-{how}")
        for make in FLAGS
        for how in IMPLEMENTATIONS
        if how.keys() <= inspect.signature(make).parameters.keys()
    ],
)
def test_coming_step_over_all_flags_and_implementations(
    make: type[Optimizer], how: dict[str, Any], device: str
) -> None:
    for own in FLAGS[make]:
        for shared in SHARED:
            if shared.keys() <= inspect.signature(make).parameters.keys():
                _check_steps(make, own | shared | how, device)


def _check_steps(make: type[Optimizer], options: dict[str, Any], device: str) -> None:
    """Eight real steps on two parameters, each predicted from the state before it."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.randn(shape, dtype=torch.float64, generator=generator).to(device).requires_grad_()
        for shape in ((4, 3), (2, 5) if make is Muon else (5,))
    ]
    if options.get("differentiable"):
        parameters = [p.clone() for p in parameters]  # it writes into them while autograd looks on
        for p in parameters:
            p.retain_grad()
    try:
        optimizer = make(parameters, **{"lr": 0.05} | options)
        for _ in range(8):
            for p in parameters:
                p.grad = rows_only(make, torch.randn(p.shape, dtype=p.dtype, generator=generator).to(device))
            before = [p.detach().clone() for p in parameters]
            predicted = [
                m.coming_step(m.grad, float(optimizer.param_groups[0]["lr"]))
                for m in movers(Ensemble(optimizer), [1.0])
            ]
            optimizer.step()
            for p, old, step in zip(parameters, before, predicted, strict=True):
                torch.testing.assert_close(old + step, p.detach(), **same(make, options))
    except AssertionError as refusal:
        if not re.search("capturable=True, .* supported devices", str(refusal)):
            raise
        pytest.skip(f"torch: {refusal}")


@pytest.mark.parametrize("make", [make for make in FLAGS if make not in (SparseAdam, Adafactor, Muon)])
def test_coming_step_of_complex_parameters(make: type[Optimizer]) -> None:
    """They are pairs of reals to an optimizer."""
    accepted = inspect.signature(make).parameters
    for own in FLAGS[make]:
        for shared in SHARED:
            if not shared.keys() <= accepted.keys():
                continue
            generator = torch.Generator().manual_seed(0)
            x = nn.Parameter(torch.randn(2, 3, dtype=torch.complex128, generator=generator))
            optimizer = make([x], lr=0.05, **own, **shared)
            for _ in range(8):
                x.grad = torch.randn(x.shape, dtype=x.dtype, generator=generator)
                old, (mover,) = x.detach().clone(), movers(Ensemble(optimizer), [1.0])
                predicted = mover.coming_step(mover.grad, 0.05)
                optimizer.step()
                torch.testing.assert_close(old + predicted, x.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("make", [make for make in FLAGS if make is not SparseAdam], ids=lambda make: make.__name__)
def test_coming_step_of_bfloat16_parameters(make: type[Optimizer], scale: float) -> None:
    """To the rounding of bfloat16 in parameters, in moments and in the update."""
    accepted = inspect.signature(make).parameters
    for own in FLAGS[make]:
        for shared in SHARED:
            if not shared.keys() <= accepted.keys():
                continue
            generator = torch.Generator().manual_seed(0)
            x = nn.Parameter(torch.randn(2, 3, generator=generator).bfloat16())
            optimizer = make([x], lr=0.05, **own, **shared)
            for _ in range(8):
                x.grad = (torch.randn(x.shape, generator=generator) * scale).bfloat16()
                old, (mover,) = x.detach().clone(), movers(Ensemble(optimizer), [1.0])
                predicted = mover.coming_step(mover.grad, 0.05)
                assert predicted.dtype == torch.bfloat16
                optimizer.step()
                torch.testing.assert_close(old + predicted, x.detach(), rtol=2**-7, atol=4e-3)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # Adagrad makes its own sparse tensors
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SparseAdam, {}),
        (SparseAdam, {"betas": (0.5, 0.9), "maximize": True}),
        (SGD, {}),
        (SGD, {"maximize": True}),
        (SGD, {"momentum": 0.9, "foreach": False}),
        (SGD, {"momentum": 0.9, "nesterov": True, "foreach": False}),
        (Adagrad, {}),
        (Adagrad, {"lr_decay": 0.1, "maximize": True}),
    ],
)
def test_coming_step_of_sparse_gradients(make: type[Optimizer], options: dict[str, Any]) -> None:
    """An embedding's: rows of the batch only, some of them twice."""
    generator = torch.Generator().manual_seed(0)
    x = nn.Parameter(torch.randn(6, 3, dtype=torch.float64, generator=generator))
    optimizer = make([x], lr=0.05, **options)
    for update in range(1, 9):
        rows = torch.randint(6, (4,), generator=generator)
        values = torch.randn(4, 3, dtype=torch.float64, generator=generator)
        x.grad = torch.sparse_coo_tensor(rows[None], values, (6, 3), check_invariants=True)
        old, (mover,) = x.detach().clone(), movers(Ensemble(optimizer), [1.0], update)
        predicted = mover.coming_step(mover.grad, 0.05)
        optimizer.step()
        torch.testing.assert_close(old + predicted, x.detach(), rtol=1e-12, atol=1e-14)


def test_asgd_makes_its_step_one_update_ahead() -> None:
    """A new lr acts one update late, in the real optimizer and in the coming step alike."""
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = ASGD([x], lr=0.1, lambd=0.0)
    x.grad = torch.ones_like(x)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    (mover,) = movers(Ensemble(optimizer), [1.0])
    assert float(mover.coming_step(x.grad, 0.5)) == pytest.approx(-0.1)
    optimizer.step()
    assert float(movers(Ensemble(optimizer), [1.0])[0].coming_step(x.grad, 0.5)) == pytest.approx(-0.5)


def test_momentum_buffer_of_an_uncounted_run_counts_as_settled() -> None:
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=1e-3, momentum=0.9)
    for _ in range(400):
        x.grad = torch.ones_like(x)
        optimizer.step()
    model, group, state = preconditioner_of(optimizer), optimizer.param_groups[0], optimizer.state[x]
    torch.testing.assert_close(
        model.coming_step(group, state, x, x.grad, 1e-3, None), model.coming_step(group, state, x, x.grad, 1e-3, 401)
    )
    assert model.rule(group, state, None).flip == pytest.approx(3.8)
    assert model.rule(group, {}, 1).flip == 2.0


def test_unknown_optimizer_names_the_known_ones_and_the_way() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            return None

    with pytest.raises(TypeError, match=r"Odd; known: .*Adagrad, Adam, AdamW, .*safe_lr.register\(Odd, "):
        preconditioner_of(Odd([torch.zeros(1)], lr=0.1))
    register(Odd, models.SGD())
    assert isinstance(preconditioner_of(Odd([torch.zeros(1)], lr=0.1)), models.SGD)


def test_subclass_that_keeps_step_is_known() -> None:
    class Renamed(torch.optim.AdamW): ...

    assert preconditioner_of(Renamed([torch.zeros(1)])).decay({"weight_decay": 0.1}) == (0.0, 0.1)


@pytest.mark.parametrize("arguments", [(nn.Linear, models.SGD()), (SGD, models.SGD), (SGD, None)])
def test_register_refuses_other_things(arguments: tuple[type, Preconditioner]) -> None:
    with pytest.raises(TypeError, match=r"register\(\) takes"):
        register(*arguments)


def test_momentum_that_never_forgets_has_no_settled_limit() -> None:
    x = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([x], lr=0.1, momentum=1.0)
    x.grad = torch.ones(1)
    optimizer.step()
    with pytest.raises(ValueError, match="momentum 1 never forgets"):
        preconditioner_of(optimizer).rule(optimizer.param_groups[0], optimizer.state[x])


@pytest.mark.parametrize("name", sorted(known()))
def test_every_docstring_names_its_class(name: str) -> None:
    model = known()[name]
    assert f"Class: {model.kind}." in (type(model).__doc__ or "")
