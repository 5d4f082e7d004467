"""Optimizers that divide by a running measure of each gradient entry: P is diagonal."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from safe_lr.preconditioners.base import Group, Preconditioner, State, coming, decayed, second_moment
from safe_lr.stability import UpdateRule, warm_decay


class Adagrad(Preconditioner):
    """Sum of squares, no momentum: P = sqrt(sum + g^2) + eps, lr shrunk by 1 / (1 + (t - 1) lr_decay).

    Class: exact.
    """

    second_moments: ClassVar[tuple[str, ...]] = ("sum",)
    movable: ClassVar[tuple[str, ...]] = ("eps",)
    annealing = 0.0
    unaveraged = 3 / 2
    """Its P grows for ever, so that steps shrink by themselves. On the LSTM of benchmarks/lr_robustness.py, 100 times
    above the tuned lr (six seeds), 12 % behind with 1, 5 % with 4/3 to 2; on the teacher 0 to 2 % ahead."""

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        return second_moment(state, "sum", 1.0, 1.0, g).sqrt().add_(group["eps"])

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        return g / (1 + (coming(state) - 1) * float(group["lr_decay"]))

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        return UpdateRule(from_gradient=1 / (1 + (coming(state) - 1) * float(group["lr_decay"])))

    def floor(self, group: Group, state: State) -> float | None:
        # Exactly zero so far only if the accumulator started at zero.
        return float(group["eps"]) if not group["initial_accumulator_value"] else None

    def keys(self, group: Group) -> tuple[str, ...]:
        return "step", "sum"


class RMSprop(Preconditioner):
    """Running mean of squares: P = sqrt(v') + eps with v' = alpha v + (1 - alpha) g^2, centered: v' - mean(g)^2.

    With momentum, buf' = mu buf + g / P: heavy ball on the preconditioned gradient.

    Class: exact.
    """

    second_moments: ClassVar[tuple[str, ...]] = ("square_avg",)
    movable: ClassVar[tuple[str, ...]] = ("alpha", "eps")
    unaveraged = 2 / 3
    """Its P forgets within a hundred updates. On the GPT of benchmarks/lr_robustness.py, 100 times above the tuned lr
    (six seeds), 8 % behind with 4/3, 5 % with 1, 3 % with 2/3, 7 % with 1/2; on the teacher 2, 3, 3 and 2 % ahead."""

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        alpha = float(group["alpha"])
        v = second_moment(state, "square_avg", alpha, 1 - alpha, g)
        if group["centered"]:
            mean = decayed(state, "grad_avg", alpha, g).add_(g, alpha=1 - alpha)
            v = v.addcmul(mean, mean, value=-1).clamp_(min=0)
        return v.sqrt_().add_(group["eps"])

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        mu, buffer = float(group["momentum"]), state.get("momentum_buffer")
        if mu == 0 or buffer is None:
            return g
        return g.addcmul(buffer, self.diagonal(group, state, g), value=mu)  # the buffer holds preconditioned gradients

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        mu, t = float(group["momentum"]), coming(state)
        if mu == 0:
            return UpdateRule()
        return UpdateRule(warm_decay(mu, t), from_average=(1 - mu**t) / (1 - mu), from_gradient=0.0)

    def corrections(self, group: Group, state: State) -> dict[str, float] | None:
        # Nothing is corrected. In an average that has not filled up yet the fresh square would count too much more.
        return {} if int(state["step"]) * (1 - float(group["alpha"])) >= 1 else None

    def floor(self, group: Group, state: State) -> float | None:
        return float(group["eps"])

    def keys(self, group: Group) -> tuple[str, ...]:
        return (
            "step",
            "square_avg",
            *["momentum_buffer"] * (group["momentum"] > 0),
            *["grad_avg"] * bool(group["centered"]),
        )


class Adadelta(Preconditioner):
    """Squares of gradients over squares of steps: P = sqrt(v' + eps) / sqrt(u + eps), u the mean square of past steps.

    Exact while the accumulators stand still.

    Class: exact.
    """

    second_moments: ClassVar[tuple[str, ...]] = ("square_avg", "acc_delta")

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        rho, eps = float(group["rho"]), float(group["eps"])
        v = second_moment(state, "square_avg", rho, 1 - rho, g)
        return v.add_(eps).div_(decayed(state, "acc_delta", 1.0, g).add_(eps)).sqrt_()

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        return g

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        return UpdateRule()

    def floor(self, group: Group, state: State) -> float | None:
        return 1.0  # no gradient, no steps: sqrt(eps) / sqrt(eps)

    def keys(self, group: Group) -> tuple[str, ...]:
        return self.second_moments


class Adam(Preconditioner):
    """Adam and AdamW: P = sqrt(v' / (1 - b2^t)) + eps with v' = b2 v + (1 - b2) g^2 (amsgrad: the maximum so far).

    The direction is the bias-corrected average of gradients, so the limit is 2 (1 + b1 - 2 b1^t) / (1 - b1) in lr *
    gamma: 2 at the first update, 2 (1 + b1) / (1 - b1) in the end.

    Class: exact.
    """

    second_moments: ClassVar[tuple[str, ...]] = ("exp_avg_sq", "max_exp_avg_sq")
    movable: ClassVar[tuple[str, ...]] = ("betas", "eps")

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        b2 = float(group["betas"][1])
        v = second_moment(state, "exp_avg_sq", b2, 1 - b2, g)
        if group.get("amsgrad") and state:
            v = torch.maximum(v, state["max_exp_avg_sq"])
        return v.sqrt_().div_(math.sqrt(1 - b2 ** coming(state))).add_(group["eps"])

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        return UpdateRule(warm_decay(float(group["betas"][0]), coming(state)), from_average=1.0, from_gradient=0.0)

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        b1 = float(group["betas"][0])
        return decayed(state, "exp_avg", b1, g).add_(g, alpha=1 - b1).div_(1 - b1 ** coming(state))

    def corrections(self, group: Group, state: State) -> dict[str, float] | None:
        (b1, b2), t = group["betas"], int(state["step"])
        second = 1 - float(b2) ** t  # amsgrad's maximum is that of uncorrected averages, and is corrected with them
        return {"exp_avg": 1 - float(b1) ** t, "exp_avg_sq": second, "max_exp_avg_sq": second}

    def floor(self, group: Group, state: State) -> float | None:
        return float(group["eps"])

    def keys(self, group: Group) -> tuple[str, ...]:
        return "step", "exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(group["amsgrad"])


class AdamW(Adam):
    """Adam with decoupled weight decay; current torch marks its groups so, older ones do not.

    Class: exact.
    """

    decoupled = True


class Adamax(Adam):
    """Adam with the infinity norm: P = max(b2 u, |g| + eps), which needs no bias correction.

    Class: exact.
    """

    second_moments: ClassVar[tuple[str, ...]] = ("exp_inf",)

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        past = decayed(state, "exp_inf", float(group["betas"][1]), g)
        return torch.maximum(past, g.abs().add_(float(group["eps"])))

    def corrections(self, group: Group, state: State) -> dict[str, float] | None:
        return {"exp_avg": 1 - float(group["betas"][0]) ** int(state["step"])}

    def keys(self, group: Group) -> tuple[str, ...]:
        return "step", "exp_avg", "exp_inf"


class NAdam(Adam):
    """Nesterov's Adam: Adam's P, and a direction of the fresh gradient and the average, each with a weight that grows.

    direction = (1 - mu_t) / (1 - M_t) g + mu_{t+1} / (1 - M_{t+1}) m',      M_t = mu_1 ... mu_t
    mu_t      = b1 (1 - .96^(t momentum_decay) / 2)

    Class: exact.
    """

    weighs_fresh = True

    def _weights(self, group: Group, state: State) -> tuple[float, float]:
        t, b1, psi = coming(state), float(group["betas"][0]), float(group["momentum_decay"])
        mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (s * psi)) for s in (t, t + 1))
        product = float(state.get("mu_product", torch.ones(())) * mu)  # a tensor, rounded as the optimizer rounds it
        return (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        b1, (fresh, average) = float(group["betas"][0]), self._weights(group, state)
        return decayed(state, "exp_avg", b1, g).add_(g, alpha=1 - b1).mul_(average).add_(g, alpha=fresh)

    def rule(self, group: Group, state: State, updates: int | None = None) -> UpdateRule:
        t, b1, (fresh, average) = coming(state), float(group["betas"][0]), self._weights(group, state)
        return UpdateRule(warm_decay(b1, t), from_average=average * (1 - b1**t), from_gradient=fresh)

    def corrections(self, group: Group, state: State) -> dict[str, float] | None:
        # exp_avg is corrected by a product of the decays as they were, `mu_product`: that goes on by itself.
        return {"exp_avg_sq": 1 - float(group["betas"][1]) ** int(state["step"])}

    def keys(self, group: Group) -> tuple[str, ...]:
        return "step", "mu_product", "exp_avg", "exp_avg_sq"


class RAdam(Adam):
    """Rectified Adam: P = (sqrt(v') + eps) / (r_t sqrt(1 - b2^t)), r_t the rectification; 1 before it sets in.

    Exact past rectification (from the sixth update on at b2 = .999), while r_t stands still.

    Class: exact.
    """

    def _gain(self, group: Group, t: int) -> float | None:
        b2 = float(group["betas"][1])
        longest = 2 / (1 - b2) - 1
        length = longest - 2 * t * b2**t / (1 - b2**t)
        if length <= 5:
            return None
        rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return math.sqrt(rectified * (1 - b2**t))

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        b2, gain = float(group["betas"][1]), self._gain(group, coming(state))
        if gain is None:
            return torch.ones_like(g)
        return second_moment(state, "exp_avg_sq", b2, 1 - b2, g).sqrt_().add_(group["eps"]).div_(gain)

    def floor(self, group: Group, state: State) -> float | None:
        gain = self._gain(group, coming(state))
        return None if gain is None else float(group["eps"]) / gain

    def corrections(self, group: Group, state: State) -> dict[str, float] | None:
        # The rectification depends on b2 too: a move from .999 to .99 triples it at t = 100, and every step with it.
        t = int(state["step"])
        gain = self._gain(group, t)
        return None if gain is None else {"exp_avg": 1 - float(group["betas"][0]) ** t, "exp_avg_sq": gain**2}

    def keys(self, group: Group) -> tuple[str, ...]:
        return "step", "exp_avg", "exp_avg_sq"


class SparseAdam(Adam):
    """Adam on the rows that a batch touches; the others stand still, their moments too. A zero row counts as untouched.

    P = (sqrt(v') + eps) / sqrt(1 - b2^t)

    Class: exact.
    """

    def diagonal(self, group: Group, state: State, g: Tensor) -> Tensor:
        b2 = float(group["betas"][1])
        v = second_moment(state, "exp_avg_sq", b2, 1 - b2, g)
        return v.sqrt_().add_(group["eps"]).div_(math.sqrt(1 - b2 ** coming(state)))

    def direction(self, group: Group, state: State, g: Tensor, updates: int | None = None) -> Tensor:
        touched = g.flatten(1).any(1) if g.ndim > 1 else g != 0
        return super().direction(group, state, g) * touched.reshape(-1, *[1] * (g.ndim - 1))

    def floor(self, group: Group, state: State) -> float | None:
        return float(group["eps"]) / math.sqrt(1 - float(group["betas"][1]) ** coming(state))

    def keys(self, group: Group) -> tuple[str, ...]:
        return "step", "exp_avg", "exp_avg_sq"
