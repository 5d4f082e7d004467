"""Optimizers of other packages that choose their own lr, or need none that falls.

All of other packages are of the class `local scale`. What is equal to the real optimizer, and what is not:

| optimizer | coming step | limit: exact while | approximated |
|---|---|---|---|
| schedulefree `AdamWScheduleFree` | equal | v and the averaging weight c stand still | c moves, also with lr |
| schedulefree `SGDScheduleFree` | equal | c stands still | the same |
| prodigyopt `Prodigy` | equal while d stands still | d and v stand still | d moves inside `step()` |
| pytorch_optimizer `SOAP` | equal | the basis and v stand still | decay multiplies the step too: a factor 1 - lr wd |
| pytorch_optimizer `Shampoo` | equal | the factors stand still, no momentum | momentum: a lower bound of the limit |

SOAP's and Shampoo's limit takes directions that no gradient met for met, in the first ten updates or so: see `_met`.

References:
    Defazio et al. 2024, "The road less scheduled", arXiv:2405.15682. Mishchenko & Defazio 2023, "Prodigy",
    arXiv:2306.06101. Gupta et al. 2018, "Shampoo", arXiv:1802.09568. Vyas et al. 2024, "SOAP", arXiv:2409.11321.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from safe_lr.preconditioners.base import Group, Preconditioner, State, decayed, second_moment
from safe_lr.stability import UpdateRule, warm_decay

CAUTION = 0.8
"""Fraction of a schedule-free average's age that counts. At 1, following the limit of the first steps amplifies a
quadratic 5-fold for b = .9 and 600-fold for .99, at .9 twice and 4.5-fold, at .8 at most 2.1-fold for every b."""


class _ScheduleFree(Preconditioner):
    """Steps of z, gradients at y between z and its running average x; the parameter is y (`optimizer.train()`).

        z' = z - eta u            u = g / P~ (+ wd y for AdamW)           eta = lr min(1, (k + 1) / warmup_steps)
        x' = (1 - c) x + c z'     c = w / (sum of all w, this included)   w   = (k + 1)^r max(eta)^weight_lr_power
        y' = (1 - b) z' + b x'    that is    y' = y + c (z - y) - eta (1 - b (1 - c)) u

    With c held at its value, the transition matrix of (y, z) has the trace and determinant of an update rule with

        decay = 1 - c,   from_average = b,   from_gradient = 1 - b:      lr gamma < (4 - 2c) / (2 (1 - b) - c (1 - 2b))

    2 at the first update, where c = 1, and 2 / (1 - b) in the end. c falls as 1 / k, so the rule takes it at a younger
    age (`CAUTION`).

    lr is not only a factor: one above every lr so far makes the coming step's w larger, and c with it. In the rule, c
    is that of the group's lr as it stands; in the coming step, that of the step's own. The warm-up is folded into P.
    """

    kind = "local scale"

    @abstractmethod
    def _inertia(self, group: Group) -> float:
        """b, the weight of the average x in y."""

    def _warmup(self, group: Group) -> float:
        k, steps = int(group["k"]), int(group["warmup_steps"])
        return (k + 1) / steps if k < steps else 1.0

    def _share(self, group: Group, lr: float) -> float:
        """c, the coming z's share in the average x."""
        highest = max(lr * self._warmup(group), float(group["lr_max"]))
        weight = (int(group["k"]) + 1) ** float(group["r"]) * highest ** float(group["weight_lr_power"])
        total = float(group["weight_sum"]) + weight
        return float(weight / total) if total else 0.0

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        b, c = self._inertia(group), self._share(group, float(group["lr"]))
        age = 1 + CAUTION * (1 / c - 1) if c > 0 else math.inf
        return UpdateRule(1 - 1 / age, from_average=b, from_gradient=1 - b)

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        """What of the coming step is made of this gradient; the pull of y towards z comes on top."""
        return g * (1 - self._inertia(group) * (1 - self._share(group, float(group["lr"]))))

    def coming_step(
        self, group: Group, state: State, param: Tensor, grad: Tensor, lr: float, updates: int | None = None
    ) -> Tensor:
        y, c = param.detach(), self._share(group, lr)
        g = self.descent_gradient(group, y, grad)
        step = self._update(group, g / self.diagonal(group, state, g), y)
        step = step * (-lr * (1 - self._inertia(group) * (1 - c)))
        return step.add_(state["z"] - y, alpha=c) if state else step

    def _update(self, group: Group, scaled: Tensor, y: Tensor) -> Tensor:
        """u, times the warm-up, from the preconditioned gradient."""
        return scaled


class SGDScheduleFree(_ScheduleFree):
    """Schedule-free gradient descent: P = 1 (over the warm-up's factor), b = momentum, weight decay in the gradient.

    Class: local scale.
    """

    def _inertia(self, group: Group) -> float:
        return float(group["momentum"])

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        return torch.full((), 1 / self._warmup(group), dtype=g.dtype, device=g.device)

    def keys(self, group: Group) -> tuple[str, ...]:
        return ("z",)


class AdamWScheduleFree(_ScheduleFree):
    """Schedule-free Adam: P = (sqrt(v' / (1 - b2^(k+1))) + eps) / warm-up's factor, b = b1.

    Weight decay acts where the gradient does, at y, and beside P: it adds to each preconditioned eigenvalue, so the
    limit is flip / (gamma + wd). Decoupled decay elsewhere lies beside the whole direction, hence its factor 2 / flip.

    Class: local scale.
    """

    decoupled = True
    second_moments: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def _inertia(self, group: Group) -> float:
        return float(group["betas"][0])

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        b2, t = float(group["betas"][1]), int(group["k"]) + 1
        v = second_moment(state, "exp_avg_sq", b2, 1 - b2, g)
        return v.div_(1 - b2**t).sqrt_().add_(float(group["eps"])).div_(self._warmup(group))

    def decay(self, group: Group, state: State | None = None) -> tuple[float, float]:
        weight_decay = float(group["weight_decay"])
        if not weight_decay:
            return 0.0, 0.0
        return 0.0, 2 / self.rule(group, state or {}).flip * weight_decay * self._warmup(group)

    def floor(self, group: Group, state: State) -> float | None:
        return float(group["eps"]) / self._warmup(group)

    def keys(self, group: Group) -> tuple[str, ...]:
        return "z", "exp_avg_sq"

    def _update(self, group: Group, scaled: Tensor, y: Tensor) -> Tensor:
        return scaled.add(y, alpha=float(group["weight_decay"]) * self._warmup(group))


class Prodigy(Preconditioner):
    """Adam whose step is lr times an estimate d of the distance to the solution, both moments in units of d:

        m' = b1 m + (1 - b1) d g,    v' = b2 v + (1 - b2) d^2 g^2
        x' = x - lr d B (m' / (sqrt(v') + d eps) + wd x),    B = sqrt(1 - b2^t) / (1 - b1^t) or 1 (use_bias_correction)
        P  = (sqrt(v') + d eps) / (d^2 B2),                  B = B2 / (1 - b1^t)

    d is the group's as it stands. `step()` updates it between the moments and the step, from sums over all parameters
    that no single one shows. This touches eps only, so the coming step is equal where d stands still, and else right
    to eps |d' - d| / sqrt(v'); with b1 = 0 the whole step is in units of the new d. The limit is that of lr at this d:
    once d has grown it shrinks in proportion. The rule's average is that of a d that stood still.

    lr is a factor of the step, but also of what d is estimated from (unless `safeguard_warmup`), so a cut changes how
    fast d grows. The package takes betas, d and the form of decay from the first group for all, refuses different lrs,
    and makes no step at all where every gradient so far was zero.

    Class: local scale.
    """

    kind = "local scale"
    second_moments: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        b2, d = float(group["betas"][1]), float(group["d"])
        v = second_moment(state, "exp_avg_sq", b2, d * d * (1 - b2), g)
        return v.sqrt_().add_(d * float(group["eps"])).div_(d * d * self._corrections(group)[1])

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        b1, d = float(group["betas"][0]), float(group["d"])
        return decayed(state, "exp_avg", b1 / d, g).add_(g, alpha=1 - b1).div_(self._corrections(group)[0])

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        b1, t = float(group["betas"][0]), int(group["k"]) + 1
        weight = (1 - b1**t) / self._corrections(group)[0]
        return UpdateRule(warm_decay(b1, t), from_average=weight, from_gradient=0.0)

    def decay(self, group: Group, state: State | None = None) -> tuple[float, float]:
        weight_decay = float(group["weight_decay"])
        if not group["decouple"]:
            return weight_decay, 0.0
        first, second = self._corrections(group)
        return 0.0, weight_decay * float(group["d"]) * second / first

    def floor(self, group: Group, state: State) -> float | None:
        return float(group["eps"]) / (float(group["d"]) * self._corrections(group)[1])

    def keys(self, group: Group) -> tuple[str, ...]:
        return "step", "s", "exp_avg_sq", *["exp_avg"] * (group["betas"][0] > 0)

    def _corrections(self, group: Group) -> tuple[float, float]:
        """1 - b1^t and sqrt(1 - b2^t), or ones."""
        if not group["use_bias_correction"]:
            return 1.0, 1.0
        (b1, b2), t = group["betas"], int(group["k"]) + 1
        return 1 - float(b1) ** t, math.sqrt(1 - float(b2) ** t)
