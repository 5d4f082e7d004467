"""A `Rewinder`: keeps a snapshot, watches every update before it is made, drops it or goes back where need be."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from safe_lr import processes
from safe_lr.closures import Closure, Untouched, leave_no_trace, modules_in
from safe_lr.controller import Controller
from safe_lr.cuts import cut, go_back
from safe_lr.drift import Drift, Seen
from safe_lr.ensemble import Ensemble
from safe_lr.norms import ALARM_AFTER
from safe_lr.rates import Rates
from safe_lr.rewind import (
    DROPS,
    EVERY,
    MOST,
    OUTLIER,
    REFILL,
    Losses,
    RewindsExhausted,
    Signs,
    Trouble,
    judge,
    outlying,
)
from safe_lr.settings import COST_OF_LOSS
from safe_lr.snapshots import Buffers, Snapshot, check_room, free_memory
from safe_lr.tuner import Tuner


@dataclass(frozen=True)
class _Beside:
    """What goes with a snapshot: the states of the run, schedule and tuner, and each optimizer's count of updates."""

    state: dict[str, Any]
    schedule: dict[str, Any] | None
    tuner: dict[str, Any] | None
    counts: list[int | None]


class Rewinder:
    """Keeps a snapshot, watches every update before it is made, and drops it or goes back where need be.

    Args:
        ensemble: The optimizers.
        most: Rewinds without healthy progress between them, before it gives up.
        device: Where the snapshot lies; None for where the parameters do.
        free: Tells the free bytes of a device; None for `free_memory`.
        tuner: Moves betas and eps, if anything does: what it knows of them goes back with them.
        process_group: Whose ranks decide together, where torch.distributed is initialised; None for the default group.

    Attributes:
        snapshot: The snapshot.
        schedule: The schedule that writes the optimizer's lr, if it is known: it goes back too.
        tries: Troubles without healthy progress between them.
        rewinds: How often it went back, in all.
        drops: How many updates were dropped, in all.
        drifted: Why the margin was cut at this update, if it was: the loss had risen since the snapshot, with no jump.

    Raises:
        MemoryError: There is no room for the snapshot.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        most: int = MOST,
        device: torch.device | str | None = None,
        *,
        free: Callable[[torch.device], int | None] | None = None,
        tuner: Tuner | None = None,
        process_group: Any = None,
    ) -> None:
        self._expected = check_room(ensemble.members, device, free=free or free_memory)
        self.ensemble, self.most = ensemble, most
        self.schedule: LRScheduler | None = None
        self.snapshot, self._recent = Snapshot(ensemble.members, device), Buffers(device)
        self.tries: list[Trouble] = []
        self.rewinds = self.drops = 0
        self._tuner, self._group = tuner, process_group
        self._in_a_row = self._healthy_at = self._at = 0
        self._droppable = float(DROPS)  # batches far out that may still be dropped
        self._watching = self._held_back = False
        self._drift = Drift()
        self.drifted: str | None = None
        self._losses = Losses()
        self._beside = _Beside({}, None, None, [])
        self._held: list[tuple[Tensor, Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshot; what is expected before the first one with all of the optimizer's state."""
        return max(self._expected, self.snapshot.nbytes) + self._recent.nbytes

    # ---- before an update

    def inspect(
        self,
        norm: float,
        loss: Tensor | float | None,
        closures: Sequence[Closure] | None,
        control: Controller,
        rates: Rates,
    ) -> Trouble | None:
        """Looks at the coming update; where it is not to be made, takes its gradients away until `finish`.

        Args:
            norm: Its gradient's norm.
            loss: Its loss, where that is known.
            closures: Return it.
            control: Has the run's state, which goes back with the rest, and the margin, which is cut.
            rates: Desired and applied lrs.

        Returns:
            What was done, None where the update is to be made.

        Raises:
            RewindsExhausted: Going back does not help.
        """
        self.finish()
        self.drifted = None
        trend, own = control.state.trend, None if loss is None else self._sign() * float(loss)
        strayed = self._recent.stray(OUTLIER if trend.count >= ALARM_AFTER else math.inf)
        known, broken, alarm, outlier, watching, self._held_back = self._agreed(
            own,
            not math.isfinite(norm),
            trend.alarming(norm),
            outlying(norm, trend, own, self._losses) or strayed,
            self._watching,
            control.held_back(rates.wanted),
        )
        suspicious = broken or alarm or outlier or (known is not None and self._losses.suspicious(known))
        if not self.snapshot.taken:
            self._take(closures, control, rates)
        if not (suspicious or watching):
            self._go_on(known, closures, control, rates)
            return None
        signs, cost = self._looked_at(broken, outlier, closures)
        control.state.looked(cost)
        action = judge(signs, self._losses)
        if action == "apply":
            self._watching = suspicious  # what this update does shows at the next one
            self._count_in(known)
            self._take(closures, control, rates)  # these parameters were just found to be sound
            return None
        seen = self._trouble(action, norm, signs, cost, control, rates)
        return self._drop(seen) if action == "drop" else self._go_back(seen, control, rates)

    def finish(self) -> bool:
        """After an update: gives the gradients back that were taken away; returns whether there were any."""
        held, self._held = self._held, []
        for parameter, grad in held:
            if parameter.grad is None:
                parameter.grad = grad
        return bool(held)

    def heard(self, loss: float | None) -> None:
        """Takes in a loss that was evaluated anyway, by a measurement or a trial step."""
        if loss is not None and self._losses.suspicious(self._sign() * loss):
            self._watching = True

    @property
    def dropping(self) -> bool:
        """Whether the update under way is not being made."""
        return bool(self._held)

    # ---- the three ways on

    def _go_on(self, loss: float | None, closures: Sequence[Closure] | None, control: Controller, rates: Rates) -> None:
        self._count_in(loss)
        if control.state.updates - self._at < EVERY:
            self._recent.take()
            return
        if self._held_back:  # else there is nothing to cut
            self._heed_drift(loss, closures, control)
        self._take(closures, control, rates)

    def _heed_drift(self, loss: float | None, closures: Sequence[Closure] | None, control: Controller) -> None:
        """Before a new snapshot: cuts where the loss has drifted up since the last."""
        seen = self._look_back(loss, closures, control)
        if seen is None or not self._drift.seen_in(seen, self._losses):
            return
        done, (now, then) = cut(control), (self._sign() * each for each in seen)
        if done is not None:
            self.drifted = f"{done}: the batch's loss is {now:.4g}, under the last snapshot it is {then:.4g}"

    def _look_back(self, told: float | None, closures: Sequence[Closure] | None, control: Controller) -> Seen | None:
        """The batch's losses under both parameters, the present one as it was told where that can be believed."""
        known = self._drift.expected(told)
        seen, cost = self._compare(closures, known)
        if known is not None and seen is not None and not self._drift.believes(seen, self._losses):
            known = self._drift.unit = None
            seen, more = self._compare(closures)
            cost += more
        if known is None and seen is not None:
            self._drift.learn(told, seen[0])
        control.state.looked(cost)
        return seen

    def _count_in(self, loss: float | None) -> None:
        self._in_a_row, self._droppable = 0, min(DROPS, self._droppable + 1 / REFILL)
        if loss is not None:
            self._losses = self._losses.after(loss)

    def _drop(self, seen: Trouble) -> Trouble:
        self.drops += 1
        self._in_a_row += 1
        self._droppable -= math.isfinite(seen.norm)
        self._hold_gradients()
        self._recent.restore(only_moving=True)  # the batch went through BatchNorm
        return self._tell(seen)

    def _go_back(self, seen: Trouble, control: Controller, rates: Rates) -> Trouble:
        updates = control.state.updates
        if updates >= self._healthy_at:
            self.tries = [t for t in self.tries if t.step == updates]
        tried = sum(t.action == "rewind" for t in self.tries)
        wanted = rates.wanted
        self._restore(rates, random_streams=tried == 0)
        go_back(control, self._beside.state, wanted)
        self._healthy_at = updates + (updates - self._at) + EVERY
        self._watching = False
        told = self._tell(replace(seen, margin=control.state.margin, cap=control.state.cap))
        self.rewinds += 1
        if tried >= self.most:
            raise RewindsExhausted(self.tries)
        self._hold_gradients()
        return told

    def _tell(self, trouble: Trouble) -> Trouble:
        self.tries = [*self.tries, trouble][-100:]
        return trouble

    def _hold_gradients(self) -> None:
        # Without gradients an optimizer moves nothing: no parameter, no average, no count of its own, no weight decay.
        for group in self.ensemble.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._held.append((parameter, parameter.grad))
                    parameter.grad = None

    # ---- the snapshot

    def _take(self, closures: Sequence[Closure] | None, control: Controller, rates: Rates) -> None:
        rates.give_back()  # the groups then show the desired lrs
        modules = None if closures is None else [module for closure in closures for module in modules_in(closure)]
        self.snapshot.take(modules)
        self._recent.take(modules)
        schedule = None if self.schedule is None else copy.deepcopy(self.schedule.state_dict())
        tuner = None if self._tuner is None else self._tuner.state_dict()
        self._beside = _Beside(control.state.state_dict(), schedule, tuner, list(self.ensemble.counts))
        self._at = control.state.updates
        rates.apply(control.state.cap)

    def _restore(self, rates: Rates, *, random_streams: bool) -> None:
        rates.give_back()
        ours = self.schedule is not None and self._beside.schedule is not None
        self.snapshot.restore(leave=() if ours else ("lr",), random_streams=random_streams)
        if self.schedule is not None and self._beside.schedule is not None:
            self.schedule.load_state_dict(copy.deepcopy(self._beside.schedule))
        if self._tuner is not None and self._beside.tuner is not None:
            self._tuner.load_state_dict(self._beside.tuner)
        self.ensemble.counts = list(self._beside.counts)
        rates.read()

    # ---- looking closer

    def _looked_at(self, broken: bool, outlier: bool, closures: Sequence[Closure] | None) -> tuple[Signs, float]:
        """What is seen of a suspicious update, and what looking cost."""
        signs = Signs(not broken, not broken or self._intact(), outlier and self._droppable >= 1, drops=self._in_a_row)
        found, cost = self._compare(closures) if signs.intact else (None, 0.0)
        return (signs if found is None else replace(signs, now=found[0], then=found[1])), cost

    def _trouble(
        self,
        action: Literal["drop", "rewind"],
        norm: float,
        signs: Signs,
        cost: float,
        control: Controller,
        rates: Rates,
    ) -> Trouble:
        state, sign = control.state, self._sign()
        return Trouble(
            step=state.updates,
            action=action,
            back_to=self._at,
            norm=norm,
            usual_norm=math.exp(state.trend.mean),
            loss_now=None if signs.now is None else sign * signs.now,
            loss_then=None if signs.then is None else sign * signs.then,
            lr=rates.applied[rates.reference],
            margin=state.margin,
            cap=state.cap,
            cost=cost,
        )

    def _sign(self) -> float:
        return -1.0 if all(group.get("maximize", False) for group in self.ensemble.param_groups) else 1.0

    def _intact(self) -> bool:
        finite = [torch.isfinite(p.detach()).all() for group in self.ensemble.param_groups for p in group["params"]]
        return self._summed(float(not all(map(bool, finite))))[0] == 0

    def _compare(self, closures: Sequence[Closure] | None, known: float | None = None) -> tuple[Seen | None, float]:
        """The batch's signed loss under the present and under the snapshot's parameters, and what that cost.

        The first is not evaluated where it is known.
        """
        if self._summed(float(not closures))[0] or not closures:
            return None, 0.0
        now = then = failed = 0.0
        try:
            params = [p for group in self.ensemble.param_groups for p in group["params"]]
            with leave_no_trace(params) as untouched:
                for module in self.snapshot.buffers.modules:  # of earlier closures: these may call others
                    untouched.remember(module)
                if known is None:
                    now = _mean_loss(untouched, closures)
                self.snapshot.write_model()
                then = _mean_loss(untouched, closures)
        except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError):
            failed = 1.0  # a closure that cannot be evaluated tells nothing: the gradient alone has to do
        now, then, failed = self._summed(now, then, failed)
        sign = self._sign() / processes.count(self._group)
        seen = sign * now if known is None else known, sign * then
        return None if failed else seen, COST_OF_LOSS * (1 + (known is None))

    # ---- several processes: all of them must come to one decision

    def _agreed(self, loss: float | None, *flags: bool) -> tuple[Any, ...]:
        """The mean loss, None where a rank knows none, and which flags are up on any rank. One not finite is broken."""
        total, unknown, *up = self._summed(loss or 0.0, float(loss is None), *map(float, flags))
        broken = bool(up[0]) or not math.isfinite(total)
        return (None if unknown else total / processes.count(self._group), broken, *map(bool, up[1:]))

    def _summed(self, *numbers: float) -> list[float]:
        if processes.count(self._group) == 1:
            return list(numbers)
        on_gpu = dist.get_backend(self._group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, group=self._group)
        return [float(x) for x in tensor.tolist()]

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts and what led to them: plain numbers and words. The snapshot is not saved."""
        return {
            "rewinds": self.rewinds,
            "drops": self.drops,
            "in_a_row": self._in_a_row,
            "droppable": self._droppable,
            "healthy_at": self._healthy_at,
            "losses": list(self._losses.last),
            "tries": [asdict(trouble) for trouble in self.tries],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; the next update takes a new snapshot."""
        self.rewinds, self.drops = state["rewinds"], state["drops"]
        self._in_a_row, self._healthy_at = state["in_a_row"], state["healthy_at"]
        self._droppable, self._losses = state["droppable"], Losses(tuple(state["losses"]))
        self.tries = [Trouble(**trouble) for trouble in state["tries"]]
        self.snapshot.taken = False


def _mean_loss(untouched: Untouched, closures: Sequence[Closure]) -> float:
    return sum(_loss(untouched, closure) for closure in closures) / len(closures)


def _loss(untouched: Untouched, closure: Closure) -> float:
    # Without a graph: cheaper, and DistributedDataParallel then waits for no backward pass. A loss that differentiates
    # inside (a physics-informed one) needs it.
    try:
        with torch.no_grad():
            return _value(untouched.call(closure))
    except RuntimeError:
        return _value(untouched.call(closure))


def _value(returned: Any) -> float:
    if isinstance(returned, tuple):  # gauss-newton and fisher: (outputs, loss_of_outputs)
        outputs, loss_of = returned
        returned = loss_of(outputs)
    return float(returned.detach().mean())
