"""Quadratics on which a real optimizer's P stands still, and the optimizer's own transition matrix on them.

P can be held in two ways, both used here. On a quadratic the curvature is the same everywhere, so parameters may be so
small (1e-12) that their gradients' squares are lost in the rounding of a second moment of ordinary size; and `freeze`
writes the second moment before each step so that the coming one is made with the P that is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    SparseAdam,
)

TINY = 1e-12
LINEAR = ("exp_avg", "momentum_buffer")
"""State that the step is linear in: with the parameters, all that a transition matrix is about."""

Options = dict[str, Any]


def random_hessian(size: int, generator: torch.Generator) -> Tensor:
    """A random positive definite Hessian that commutes with nothing."""
    a = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return a @ a.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


@dataclass(frozen=True)
class SetUp:
    """An optimizer with the hyper-parameters of each of its groups.

    Attributes:
        make: The optimizer class.
        groups: Options of each group; `share` is its lr in units of the largest.
        common: Options of the optimizer as a whole: sign and implementation.
        step: Number of updates that it has made.
    """

    make: type[Optimizer]
    groups: tuple[Options, ...]
    common: Options
    step: int = 10**6

    def __str__(self) -> str:
        groups = " | ".join(", ".join(f"{k}={v}" for k, v in group.items()) for group in self.groups)
        common = ", ".join(f"{k}={v}" for k, v in self.common.items())
        return f"{self.make.__name__}({groups}){f' {common}' if common else ''} t={self.step}"

    @property
    def sign(self) -> float:
        return -1.0 if self.common.get("maximize") else 1.0


class Quadratic:
    """A set-up's real optimizer on 1/2 x'Hx, once or in many copies side by side, its P random and held.

    Every optimizer here works entry by entry, so that the columns of its parameters are independent copies of one
    problem: a single real step from unit states gives the whole transition matrix.

    Args:
        setup: Optimizer and hyper-parameters.
        sizes: Number of coordinates of each group.
        seed: Of the Hessian and of P.
        copies: Number of columns.
        settled: Whether the optimizer has made `setup.step` updates, with random second moments; else it is fresh.
    """

    def __init__(self, setup: SetUp, sizes: Sequence[int], seed: int, copies: int = 1, *, settled: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.setup, self.sizes = setup, list(sizes)
        self.size = sum(sizes)
        self.hessian = random_hessian(self.size, generator)
        self.parts = [torch.zeros(size, copies, dtype=torch.float64, requires_grad=True) for size in sizes]
        groups = [
            {"params": [p], **{k: v for k, v in options.items() if k != "share"}}
            for p, options in zip(self.parts, setup.groups, strict=True)
        ]
        self.shares = [options["share"] for options in setup.groups]
        self.optimizer = setup.make(groups, lr=1.0, **setup.common)  # type: ignore[call-arg]
        self.held: list[Options] = []
        if settled:
            self.step(torch.zeros(self.size, copies, dtype=torch.float64))  # the optimizer makes its state itself
            self.held = [self._settle(p, generator) for p in self.parts]
            self.hold()

    def _settle(self, p: Tensor, generator: torch.Generator) -> Options:
        """Random second moments, alike in all copies, and what else does not move in a step; by name."""
        held: Options = {}
        for name, value in self.optimizer.state[p].items():
            if name == "step":
                held[name] = self.setup.step
            elif name == "mu_product":
                held[name] = 0.0
            elif name in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta"):
                spread = torch.rand(p.shape[0], 1, dtype=torch.float64, generator=generator)
                held[name] = (10 ** (2 * spread - 1)).expand(p.shape)
            elif name == "grad_avg":
                held[name] = held["square_avg"].sqrt() * 0.7
            elif name not in (*LINEAR, "eta", "mu", "ax"):
                raise ValueError(f"{self.setup}: do not know what {name} ({value}) is")
        return held

    def hold(self) -> None:
        """Puts counts and second moments back."""
        for p, held in zip(self.parts, self.held, strict=True):
            state = self.optimizer.state[p]
            for name, value in held.items():
                if isinstance(state[name], Tensor):
                    state[name].copy_(torch.as_tensor(value))
                else:
                    state[name] = value

    def set_lr(self, lr: float) -> None:
        """Sets every group's lr, `lr` times its share; where the last update made the coming one's step (ASGD), too."""
        for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
            group["lr"] = lr * share
        if self.held and self.setup.make is ASGD:
            for p, held in zip(self.parts, self.held, strict=True):
                self.optimizer.state[p]["step"].fill_(held["step"] - 1)
            self.step(torch.zeros_like(torch.cat(self.parts)))
            self.hold()

    def step(self, x: Tensor) -> Tensor:
        """Makes a real step from x (size, copies) and returns where it leads."""
        gradient = self.setup.sign * (self.hessian @ x)
        for p, part, g in zip(self.parts, x.split(self.sizes), gradient.split(self.sizes), strict=True):
            p.data.copy_(part)
            p.grad = dense_as_sparse(g) if self.setup.make is SparseAdam else g.clone()
        self.optimizer.step()
        return torch.cat([p.detach() for p in self.parts])

    def loss(self) -> Tensor:
        """The loss, for a measurement."""
        x = torch.cat(self.parts)
        return self.setup.sign * 0.5 * (x * (self.hessian @ x)).sum()

    def momenta(self) -> list[Tensor]:
        """The state that the step is linear in."""
        return [self.optimizer.state[p][name] for p in self.parts for name in LINEAR if self._moves(p, name)]

    def _moves(self, p: Tensor, name: str) -> bool:
        return isinstance(self.optimizer.state[p].get(name), Tensor)

    @property
    def dimension(self) -> int:
        """Number of coordinates and momenta of one copy."""
        return self.size + sum(m.shape[0] for m in self.momenta())

    def transition_matrix(self, lr: float) -> Tensor:
        """Returns the matrix of one real step on (x, momenta); made for `dimension` copies.

        Each copy starts at one unit vector, times 1e-12.
        """
        self.set_lr(lr)
        self.hold()
        unit = TINY * torch.eye(self.dimension, dtype=torch.float64)
        row = self.size
        for m in self.momenta():
            m.copy_(unit[row : row + m.shape[0]])
            row += m.shape[0]
        x = self.step(unit[: self.size])
        return torch.cat([x, *self.momenta()]) / TINY

    def radius(self, lr: float) -> float:
        """The spectral radius of the real step; stable below 1."""
        return float(torch.linalg.eigvals(self.transition_matrix(lr)).abs().max())

    def growth(self, lr: float, updates: int) -> float:
        """Log growth of parameters and momenta over the second half of a run, rescaled all along."""
        self.set_lr(lr)
        total, x = 0.0, torch.full_like(torch.cat(self.parts).detach(), TINY)
        for update in range(updates):
            self.hold()
            x = self.step(x)
            scale = float(torch.stack([v.norm() for v in (x, *self.momenta())]).max()) / TINY
            for v in (x, *self.momenta()):
                v.div_(scale)
            total += math.log(scale) if 2 * update >= updates else 0.0
        return total


def dense_as_sparse(g: Tensor) -> Tensor:
    """A gradient in which every row was touched."""
    return torch.sparse_coo_tensor(torch.arange(len(g))[None], g, g.shape, check_invariants=True)


def first_unstable_lr(unstable: Callable[[float], bool], low: float, rtol: float) -> float:
    """Returns where instability sets in: a scan upwards in steps of 7 %, then bisection.

    Args:
        unstable: Whether an lr is unstable.
        low: A stable lr to scan from.
        rtol: Relative width at which the bisection stops.

    Raises:
        ArithmeticError: `low` is unstable itself, or nothing below ten thousand times `low` is.
    """
    if unstable(low):
        raise ArithmeticError(f"unstable at {low:g} already")
    last, high = 1e4 * low, low * 1.07
    while not unstable(high):
        low, high = high, high * 1.07
        if high > last:
            raise ArithmeticError(f"stable up to {last:g}")
    while high > low * (1 + rtol):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if unstable(middle) else (middle, high)
    return math.sqrt(low * high)


def freeze(optimizer: Optimizer, x: Tensor, p: Tensor, past: int) -> None:
    """Writes the second moment so that the coming step, number past + 1, is made with the preconditioner p.

    Where the optimizer has no state yet, one of `past` updates with zero gradients is made up. Gradients must be too
    small to move the second moment, or its decay too close to 1.
    """
    hold = _FREEZERS.get(type(optimizer))
    if hold is not None:
        (group,) = [group for group in optimizer.param_groups if any(x is q for q in group["params"])]
        hold(group, optimizer.state[x], x, p, past)


def _freeze_adam(group: Options, state: Options, x: Tensor, p: Tensor, past: int) -> None:
    """P = sqrt(v' / (1 - b2^t)) + eps."""
    b2 = group["betas"][1]
    names = ("exp_avg_sq", "max_exp_avg_sq") if group.get("amsgrad") else ("exp_avg_sq",)
    _begin(state, x, past, "exp_avg", *names)
    for name in names:
        state[name].copy_(_square(p - group["eps"]) * (1 - b2 ** (past + 1)) / b2)


def _freeze_nadam(group: Options, state: Options, x: Tensor, p: Tensor, past: int) -> None:
    if not state:
        mus = (group["betas"][0] * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"])) for t in range(1, past + 1)[:9999])
        state["mu_product"] = torch.tensor(math.prod(mus, start=1.0))
        _begin(state, x, past, "exp_avg", "exp_avg_sq")
    _freeze_adam(group, state, x, p, past)


def _freeze_sparse_adam(group: Options, state: Options, x: Tensor, p: Tensor, past: int) -> None:
    """P = (sqrt(v') + eps) / sqrt(1 - b2^t), and the count is a plain number."""
    b2 = group["betas"][1]
    _begin(state, x, past, "exp_avg", "exp_avg_sq")
    state["step"] = int(state["step"])
    state["exp_avg_sq"].copy_(_square(p * math.sqrt(1 - b2 ** (past + 1)) - group["eps"]) / b2)


def _freeze_adamax(group: Options, state: Options, x: Tensor, p: Tensor, past: int) -> None:
    """P = b2 u, as long as no gradient is larger."""
    _begin(state, x, past, "exp_avg", "exp_inf")
    state["exp_inf"].copy_(p / group["betas"][1])


def _freeze_radam(group: Options, state: Options, x: Tensor, p: Tensor, past: int) -> None:
    """P = (sqrt(v') + eps) / (r_t sqrt(1 - b2^t)) past rectification; before it P is 1, which p must be then."""
    _begin(state, x, past, "exp_avg", "exp_avg_sq")
    b2, t = group["betas"][1], past + 1
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * t * b2**t / (1 - b2**t)
    if length > 5:
        r = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        state["exp_avg_sq"].copy_(_square(p * r * math.sqrt(1 - b2**t) - group["eps"]) / b2)


def _freeze_rmsprop(group: Options, state: Options, x: Tensor, p: Tensor, past: int) -> None:
    """P = sqrt(v' - mean^2) + eps, the mean zero."""
    momenta = ("momentum_buffer",) if group["momentum"] > 0 else ()
    _begin(state, x, past, "square_avg", *momenta, *["grad_avg"] * group["centered"])
    state["square_avg"].copy_(_square(p - group["eps"]) / group["alpha"])


def _freeze_adagrad(group: Options, state: Options, x: Tensor, p: Tensor, past: int) -> None:
    """P = sqrt(sum + g^2) + eps; frozen where it is huge."""
    state["sum"].copy_(_square(p - group["eps"]))


def _freeze_adadelta(group: Options, state: Options, x: Tensor, p: Tensor, past: int) -> None:
    """P = sqrt(v' + eps) / sqrt(u + eps), u = 1 - eps."""
    _begin(state, x, past, "square_avg", "acc_delta")
    state["acc_delta"].fill_(1.0 - group["eps"])
    if group["rho"] > 0:
        state["square_avg"].copy_((p**2 - group["eps"]) / group["rho"])


def _freeze_asgd(group: Options, state: Options, x: Tensor, p: Tensor, past: int) -> None:
    """P is a function of lr and count: the step that the last update made for this one is that of the present lr."""
    _begin(state, x, past, "ax")
    shrunk = (1 + group["lambd"] * group["lr"] * float(state["step"])) ** group["alpha"]
    state["eta"], state["mu"] = torch.tensor(group["lr"] / shrunk, dtype=torch.float64), torch.ones(())


def _square(root: Tensor) -> Tensor:
    if bool((root < 0).any()):
        raise ValueError("P cannot be frozen that low: eps alone is more")
    return root.square()


def _begin(state: Options, x: Tensor, past: int, *names: str) -> None:
    """Makes up the state of an optimizer that has made `past` updates, all with zero gradients."""
    if "step" not in state:
        state["step"] = torch.tensor(float(past))
        state.update({name: torch.zeros_like(x) for name in names})


_FREEZERS: dict[type[Optimizer], Callable[[Options, Options, Tensor, Tensor, int], None]] = {
    Adam: _freeze_adam,
    AdamW: _freeze_adam,
    NAdam: _freeze_nadam,
    SparseAdam: _freeze_sparse_adam,
    Adamax: _freeze_adamax,
    RAdam: _freeze_radam,
    RMSprop: _freeze_rmsprop,
    Adagrad: _freeze_adagrad,
    Adadelta: _freeze_adadelta,
    ASGD: _freeze_asgd,
}

EXACT: tuple[type[Optimizer], ...] = (SGD, ASGD, *(make for make in _FREEZERS if make is not ASGD))
"""The optimizers whose limit is exact."""
