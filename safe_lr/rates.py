"""Desired and applied learning rates: who wrote what into `param_groups`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from safe_lr.ensemble import Ensemble
from safe_lr.movers import shares

DRIFT = 1.1
"""A group's share of lr_ref may grow by this factor before the measured limit counts as outdated."""

ROUNDING, NEARLY = 1e-6, 0.99
"""LinearLR ends an ulp or two below the lr that it goes up to, OneCycleLR some tenths of a per cent."""


class Rates:
    """The lr that each group should have (`desired`) and the one it has.

    A cap that is written into `group["lr"]` leaks into every schedule that computes the next lr from the present one.
    So what we wrote is remembered: a group that still holds it gets its desired lr back before anyone reads it; a group
    that holds something else was written by someone else, and that is the new desired lr. A group that was never capped
    is never written.

    Args:
        optimizer: Whatever has `param_groups`, an optimizer or an `Ensemble`. Groups may be added later.
        follow: Whether lr is the cap itself, times `shape`, instead of at most the cap.

    Attributes:
        desired: The lr of each group that the schedule, or the user, asks for.
        shares: Each group's desired lr in units of the largest, as of the last good measurement.

    Raises:
        ValueError: A group's lr is no finite number, or negative; found when it is made or at any later reading.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> rates = Rates(optimizer)
        >>> rates.shares = rates.present_shares()
        >>> rates.apply(0.25)
        >>> optimizer.param_groups[0]["lr"]
        0.25
        >>> rates.give_back()
        >>> optimizer.param_groups[0]["lr"]
        1.0
    """

    def __init__(self, optimizer: Optimizer | Ensemble, *, follow: bool = False) -> None:
        self.optimizer, self.follow = optimizer, follow
        self.desired = self.applied
        self.shares: list[float] = []
        self._written: list[float | None] = [None] * len(self.desired)
        self._top = 0.0  # the largest lr_ref that an update was asked to make
        self._known: list[float] | None = None  # what the groups held when all the above was brought up to date

    @property
    def reference(self) -> int:
        """The group with the largest desired lr, which decisions speak of."""
        return max(range(len(self.desired)), key=self.desired.__getitem__)

    @property
    def lr_ref(self) -> float:
        """The largest desired lr, the unit of limits and caps."""
        return max(self.desired)

    @property
    def wanted(self) -> float:
        """The lr_ref to aim at: `lr_ref`, or as much as is safe."""
        return math.inf if self.follow else self.lr_ref

    @property
    def asked_of_cap(self) -> float:
        """What tells whether the cap holds lr back: `wanted`, but 0 where lr follows the cap and a schedule is still
        warming up: nowhere below its highest lr so far, which is not yet the largest."""
        if not self.follow:
            return self.lr_ref
        warming = self._top * (1 - ROUNDING) <= self.lr_ref < self._named_top * NEARLY
        return 0.0 if warming else math.inf

    def rescaled(self, shares: Sequence[float]) -> float:
        """Returns by what to multiply an lr_ref of the last measurement where these shares are those of the next: the
        group that was the unit may have become a part of it.

        Example:
            >>> import torch
            >>> rates = Rates(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
            >>> rates.rescaled([1.0])
            1.0
            >>> rates.shares = [1.0]
            >>> rates.rescaled([0.25, 1.0])                               # a group of four times that lr was added
            4.0
        """
        if not self.shares:
            return 1.0
        share = shares[max(range(len(self.shares)), key=self.shares.__getitem__)]
        return 1 / share if share > 0 else 1.0

    @property
    def shape(self) -> float:
        """Where lr follows the cap, what part of it the schedule lets through: its lr in units of its largest one.

        That is `max_lr` where a group has it (OneCycleLR), else `initial_lr`, or the largest so far where that is
        larger (CyclicLR) or nobody wrote it (ReduceLROnPlateau, a loop by hand).
        """
        top = max(self.lr_ref, self._top, self._named_top)
        return self.lr_ref / top if self.follow and top > 0 else 1.0

    @property
    def _named_top(self) -> float:
        """The largest lr that the groups say their schedule goes up to."""
        groups = self.optimizer.param_groups
        return max(float(group.get("max_lr", group.get("initial_lr", 0.0))) for group in groups)

    @property
    def asked(self) -> list[float]:
        """The desired lr of each group; where lr follows the cap there is none, and this is the applied one."""
        return self.applied if self.follow else self.desired

    @property
    def applied(self) -> list[float]:
        """The lr that each group holds now."""
        return [_number(index, group["lr"]) for index, group in enumerate(self.optimizer.param_groups)]

    @property
    def capped(self) -> bool:
        """Whether some group holds an lr below its desired one; never where lr follows the cap."""
        return not self.follow and any(
            w is not None and w < d for w, d in zip(self._written, self.desired, strict=True)
        )

    def present(self) -> list[float]:
        """Returns the desired lrs as they stand now: someone else's write wins, what we wrote does not count."""
        return self._present(self.applied)

    def read(self) -> None:
        """Takes over lrs that someone else wrote, and groups that were added."""
        applied = self.applied
        if applied == self._known:
            return  # nobody has written any since
        present = self._present(applied)
        self._written += [None] * (len(present) - len(self._written))
        self._written = [w if w == lr else None for w, lr in zip(self._written, applied, strict=True)]
        self.desired, self._known = present, applied

    def _present(self, applied: list[float]) -> list[float]:
        known = len(self.desired)
        return [
            self.desired[i] if i < known and self._written[i] is not None and lr == self._written[i] else lr
            for i, lr in enumerate(applied)
        ]

    def give_back(self) -> None:
        """Puts the desired lr back wherever a group still holds what we wrote."""
        self.read()
        for index, group in enumerate(self.optimizer.param_groups):
            if self._written[index] is not None:
                _write(group, self.desired[index])
                self._written[index] = None
        self._known = self.applied

    def drifted(self) -> bool:
        """Whether groups or their shares have changed so much since the measurement that a new one is due."""
        if len(self.desired) == len(self.shares) == 1:
            return False  # a single group's is 1
        now = self.present_shares()
        grown = any(new > DRIFT * old for new, old in zip(now, self.shares, strict=False))
        return bool(self.shares) and (len(now) != len(self.shares) or grown)

    def capped_at(self, cap: float | None) -> list[float]:
        """Returns `desired * scale`, one scale for all groups: the lrs to apply under a cap.

        No group's lr comes above the share of the cap that was measured for it. That stays safe where shares have
        changed since, because lambda_max of D^1/2 H D^1/2 only grows with D. A group that had no share is not held to a
        limit that did not count it.

        Args:
            cap: Largest allowed lr_ref, None for no cap.
        """
        scale = self._scale(cap)
        return [lr * scale for lr in self.desired]

    def apply(self, cap: float | None) -> None:
        """Writes `capped_at(cap)`; writes nothing where the cap does not bind."""
        self._top = max(self._top, self.lr_ref)
        scale, nobody_wrote = self._scale(cap), self._known == self.applied
        for index, group in enumerate(self.optimizer.param_groups):
            if scale != 1:
                _write(group, self.desired[index] * scale)
                self._written[index] = float(group["lr"])
            elif self._written[index] is not None:
                _write(group, self.desired[index])
                self._written[index] = None
        self._known = self.applied if nobody_wrote else None

    def _scale(self, cap: float | None) -> float:
        known = [(lr, share) for lr, share in zip(self.desired, self.shares, strict=False) if lr > 0 and share > 0]
        if cap is None or not known:
            return 1.0
        scale = min(cap * share / lr for lr, share in known)
        return self.shape * scale if self.follow else min(1.0, scale)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers and lists of them."""
        lists = {"desired": list(self.desired), "shares": list(self.shares), "written": list(self._written)}
        return {**lists, "top": self._top}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`.

        Raises:
            ValueError: The optimizer has fewer or more groups than were saved.
        """
        groups = len(self.optimizer.param_groups)
        if len(state["desired"]) != groups:
            raise ValueError(
                f"this state was saved with {len(state['desired'])} parameter groups, the optimizer has {groups}; add "
                "the missing groups before load_state_dict()"
            )
        self.desired, self.shares = list(state["desired"]), list(state["shares"])
        self._written, self._known = list(state["written"]), None
        self._top = state.get("top", 0.0)  # not in states of the first versions

    def present_shares(self) -> list[float]:
        """Returns each group's desired lr in units of the largest, as they stand now."""
        groups = self.optimizer.param_groups
        return shares(self.desired, [float(group.get("initial_lr", group["lr"])) for group in groups])[1]


def _number(index: int, lr: Any) -> float:
    value = float(lr) if isinstance(lr, (int, float, Tensor)) else math.nan
    if not 0 <= value < math.inf:
        raise ValueError(
            f"param_groups[{index}]['lr'] is {lr!r}: a learning rate must be a finite number, at least 0. Mend whoever "
            "wrote it; no stability limit can be applied to it."
        )
    return value


def _write(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)  # compiled and captured optimizers hold on to this very tensor
    else:
        group["lr"] = lr
