"""Moving betas and eps in the parameter groups: whose they are, what was moved, and how they are given back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from safe_lr.decisions import Action
from safe_lr.ensemble import Ensemble
from safe_lr.movers import real_state
from safe_lr.preconditioners import Preconditioner
from safe_lr.preconditioners.moves import age, movable_decays, move_decays, move_eps, typical_root
from safe_lr.tuning import SETTLING, STEP, STEP_FRESH, Dial, Tuning, clipped, decay_at, eps_at, memory

LOWEST = 0.1
"""eps stays below the root of the second moment of all but this part of the coordinates: it lifts P's smallest entries,
which Lemma 1 hangs on, and leaves the others as adaptive as they are."""

Values = list[float | None]

Told = tuple[Action, str]

UNREADABLE = (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError, RuntimeError)
"""What a state that does not fit makes of the formulas; the next measurement will say what is wrong with it."""


@dataclass
class Account:
    """What is remembered of one parameter group.

    Attributes:
        own: The user's values; None for one that stays as it is.
        written: All that the group held when we last wrote; anything else is someone else's.
        position: How far it was moved, see `Dial`.
        left: Whether it is left alone for good.
    """

    own: Values
    written: Values
    position: float = 0.0
    left: bool = False


@dataclass
class Part:
    """A parameter group, the very dict that its optimizer reads, with what that is and remembers."""

    index: int
    group: dict[str, Any]
    model: Preconditioner
    states: list[dict[str, Any]]


def parts(ensemble: Ensemble) -> Iterator[Part]:
    """Yields each group."""
    groups = ensemble.param_groups
    for optimizer, model, index, _ in ensemble.owned():
        group = groups[index]
        yield Part(index, group, model, [optimizer.state[p] for p in group["params"] if p in optimizer.state])


class Setting(ABC):
    """What one dial moves, in all groups."""

    action: ClassVar[Action]

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self.dial = Dial()
        self.accounts: list[Account] = []

    @abstractmethod
    def read(self, part: Part) -> Values:
        """Returns what a group holds now; None for what cannot be moved."""

    @abstractmethod
    def movable(self, values: Values) -> tuple[list[bool], list[str]]:
        """Returns which of a group's own values may move, and why the others stay."""

    @abstractmethod
    def at(self, part: Part, own: Values, position: float) -> Values:
        """Returns what a group's own values become at a position; None for what stays."""

    @abstractmethod
    def write(self, part: Part, values: Values) -> bool:
        """Writes a group's values; returns whether that was possible."""

    @abstractmethod
    def words(self, before: Values, after: Values) -> str:
        """Says a move."""

    def largest_move(self, free: Sequence[Part]) -> float:
        """The largest move of the dial, with these groups on it."""
        return STEP

    def look(self, ensemble: Ensemble) -> list[Told]:
        """Takes in groups that are new, or that someone else has written; returns what is to be said of them."""
        said: dict[str, list[int]] = {}
        for part in parts(ensemble):
            values = self.read(part)
            if part.index == len(self.accounts):
                may, whys = self.movable(values)
                own = [value if yes else None for value, yes in zip(values, may, strict=True)]
                self.accounts.append(Account(own, values, left=not any(may)))
                for why in whys:
                    said.setdefault(why, []).append(part.index)
            account = self.accounts[part.index]
            if not account.left and values != account.written:
                account.left = True
                why = f"someone else writes {self.action}: they are left alone from now on"
                said.setdefault(why, []).append(part.index)
        return [("hold", f"parameter group {', '.join(map(str, which))}: {why}") for why, which in said.items()]

    def ready(self, updates: int) -> bool:
        """Whether it could move forward now, if the cap binds."""
        room = self.dial.position < 1 and any(not account.left for account in self.accounts)
        return room and updates >= self.dial.free_at

    def turn(self, ensemble: Ensemble, press: float, why: str, *, updates: int, held: bool) -> Told | None:
        """Turns the dial and moves every group that can follow; returns what is to be said of it."""
        free = [part for part in parts(ensemble) if not self.accounts[part.index].left]
        if not free:
            self.dial = replace(self.dial, moved=0.0, before=None)  # no verdict comes any more: nobody waits for it
            return None
        try:
            decays = [(b, age(part.states)) for part in free for b in movable_decays(part.model, part.group)]
        except UNREADABLE:
            return None
        wait = max((memory(b, seen) for b, seen in decays if b is not None), default=0.0)
        dial, reason = self.dial.turned(press, why, updates=updates, wait=wait, held=held, step=self.largest_move(free))
        by = dial.position - self.dial.position
        if by:
            moves = dict.fromkeys(said for part in free if (said := self._moved(part, by)) is not None)
            if not moves:  # none can follow now: the dial stays where it is
                self.dial = replace(self.dial, free_at=updates + math.ceil(max(SETTLING, wait)))
                return None
            reason = f"{', '.join(moves)}: {reason}"
        self.dial = dial
        return None if reason is None else (self.action, reason if by else f"{self.action} stay: {reason}")

    def _moved(self, part: Part, by: float) -> str | None:
        """Moves one group by so much; returns what that was, None where it cannot follow."""
        account = self.accounts[part.index]
        before, position = account.written, clipped(account.position + by)
        try:
            values = [
                now if new is None else new
                for now, new in zip(before, self.at(part, account.own, position), strict=True)
            ]
            if values == before or not self.write(part, values):
                return None
        except UNREADABLE:
            return None
        account.position, account.written = position, self.read(part)  # as rounded, where it is a tensor
        return self.words(before, account.written)

    def give_back(self, ensemble: Ensemble) -> None:
        """Gives the groups that still hold what we wrote the user's own values back, and starts anew."""
        for part, account in zip(parts(ensemble), self.accounts, strict=False):
            if account.position and not account.left and self.read(part) == account.written:
                self._moved(part, -account.position)
        self.dial = Dial()

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers, lists and dicts."""
        return {"dial": asdict(self.dial), "accounts": [asdict(account) for account in self.accounts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.dial = Dial(**state["dial"])
        self.accounts = [Account(**account) for account in state["accounts"]]


class Betas(Setting):
    """The decays of the first and the second moment, on one dial."""

    action = "betas"

    def read(self, part: Part) -> Values:
        return [*movable_decays(part.model, part.group)]

    def movable(self, values: Values) -> tuple[list[bool], list[str]]:
        if values == [None, None]:
            return [False, False], ["the optimizer has no betas that tune_betas could move"]
        first, second = values
        ends, ranges = self.tuning.ends(first, second), (self.tuning.beta1_range, self.tuning.beta2_range)
        whys = [
            f"beta{i} {value:g} stays, for it lies outside of beta{i}_range {allowed}, or at the end to move to"
            for i, (value, end, allowed) in enumerate(zip(values, ends, ranges, strict=True), start=1)
            if value is not None and end is None
        ]
        return [end is not None for end in ends], whys

    def at(self, part: Part, own: Values, position: float) -> Values:
        ends = self.tuning.ends(own[0], own[1])
        return [None if b is None else decay_at(position, b, end) for b, end in zip(own, ends, strict=True)]

    def largest_move(self, free: Sequence[Part]) -> float:
        fresh = any(p.model.weighs_fresh and self.accounts[p.index].own[0] is not None for p in free)
        return STEP_FRESH if fresh else STEP

    def write(self, part: Part, values: Values) -> bool:
        first, second = values
        return move_decays(part.model, part.group, part.states, (first, second))

    def words(self, before: Values, after: Values) -> str:
        moves = zip(("beta1", "beta2"), before, after, strict=True)
        return ", ".join(f"{name} {old:.5g} -> {new:.5g}" for name, old, new in moves if new != old)


class Eps(Setting):
    """The constant that the root of the second moment has added to it."""

    action = "eps"

    def read(self, part: Part) -> Values:
        return [float(part.group["eps"]) if "eps" in part.model.movable else None]

    def movable(self, values: Values) -> tuple[list[bool], list[str]]:
        (eps,), (low, high) = values, self.tuning.eps_range
        if eps is None:
            return [False], ["the optimizer has no eps that tune_eps could move"]
        may = low <= eps < high
        return [may], [] if may else [f"eps {eps:g} stays, for it lies outside of eps_range {self.tuning.eps_range}"]

    def at(self, part: Part, own: Values, position: float) -> Values:
        (eps,) = own
        if eps is None or not position:
            return own
        return [eps_at(position, eps, min(self.tuning.eps_range[1], self._typical(part)))]

    def write(self, part: Part, values: Values) -> bool:
        if values[0] is not None:
            move_eps(part.group, values[0])
        return True

    def words(self, before: Values, after: Values) -> str:
        return f"eps {before[0]:.3g} -> {after[0]:.3g}"

    def above_most(self, ensemble: Ensemble) -> bool:
        """Whether some eps that was raised has come to lie above the second moment of too many coordinates."""
        try:
            return any(
                account.position and not account.left and (account.written[0] or 0.0) > self._typical(part)
                for part, account in zip(parts(ensemble), self.accounts, strict=False)
            )
        except UNREADABLE:
            return False

    @staticmethod
    def _typical(part: Part) -> float:
        """What eps may rise to; 0 where nothing is known, which leaves it at the user's own."""
        return typical_root(part.model, part.group, [real_state(state) for state in part.states], LOWEST) or 0.0


class Tuner:
    """Moves the betas and eps of some optimizers, one of them at a measurement.

    eps moves just before a measurement, which then finds the limit with it. Betas move just after one: the moments go
    on unchanged, so P does too, and what b1 does to the limit is known.

    Args:
        ensemble: The optimizers.
        tuning: What to move, and inside which ranges.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.Adam([x])
        >>> tuner = Tuner(Ensemble(optimizer), Tuning(tune_betas=True))
        >>> for _ in range(20):
        ...     x.grad = torch.ones(1)
        ...     optimizer.step()
        >>> tuner.settle(3.0, (8.0, "the desired lr is 8 times the cap"), updates=20)
        [('betas', 'beta1 0.9 -> 0.9083, beta2 0.999 -> 0.99867: the desired lr is 8 times the cap')]
        >>> tuner.give_back()
        >>> optimizer.param_groups[0]["betas"]
        (0.9, 0.999)
    """

    def __init__(self, ensemble: Ensemble, tuning: Tuning) -> None:
        self.ensemble, self.tuning = ensemble, tuning
        self.betas, self.eps = Betas(tuning), Eps(tuning)
        self.last: Action | None = None  # what moved last
        self._told: list[Told] = []
        self._earlier: dict[str, Any] | None = None  # eps as it was before the move that awaits its measurement

    def before_measuring(self, press: tuple[float, str] | None, updates: int) -> None:
        """Moves eps, if it is time; `settle` tells.

        Args:
            press: How hard the cap binds, with the words for it (`pressure`); None where there is no cap yet.
            updates: Updates made so far.
        """
        if self._earlier is not None:
            self._undo_eps(self._earlier)  # the measurement raised
        self._told, self._earlier = [], None
        if not self.tuning.tune_eps:
            return
        self._told = self.eps.look(self.ensemble)
        if press is None:
            return
        if self.eps.above_most(self.ensemble):
            press = 0.0, f"eps lies above the second moment's root of more than {LOWEST:.0%} of the coordinates"
        earlier = self.eps.state_dict()
        told = self._turn(self.eps, self.betas, press, updates)
        if told is not None:
            self._told.append(told)
        if self.eps.dial.position != earlier["dial"]["position"]:
            self._earlier = earlier

    def settle(self, gamma: float | None, press: tuple[float, str] | None, updates: int) -> list[Told]:
        """Takes a measurement in and moves betas, if it is time.

        Args:
            gamma: The measured coherence; None where the measurement failed, or was no usual one.
            press: See `before_measuring`.
            updates: Updates made so far.

        Returns:
            What was done, as actions with their reasons; what has to be said of groups that are left alone too.
        """
        told, earlier = self._told, self._earlier
        if gamma is None and earlier is not None:
            self._undo_eps(earlier)
            told, earlier = [said for said in told if said[0] == "hold"], None
        if self.tuning.tune_betas:
            told = [*told, *self.betas.look(self.ensemble)]
        if gamma is not None and updates >= SETTLING:
            self.betas.dial, self.eps.dial = self.betas.dial.saw(gamma), self.eps.dial.saw(gamma)
            if self.tuning.tune_betas and press is not None and earlier is None:
                moved = self._turn(self.betas, self.eps, press, updates)
                told = told if moved is None else [*told, moved]
        self._told, self._earlier = [], None
        return told

    def _turn(self, one: Setting, other: Setting, press: tuple[float, str], updates: int) -> Told | None:
        """Turns one of both, by turns: what gamma does after a move must be that move's doing alone."""
        position = one.dial.position
        held = other.dial.moved > 0 or (self.last == one.action and other.ready(updates))
        told = one.turn(self.ensemble, *press, updates=updates, held=held)
        if one.dial.position != position:
            self.last = one.action
        return told

    def _undo_eps(self, earlier: dict[str, Any]) -> None:
        """The cap in force is that of eps as it was."""
        self.eps.load_state_dict(earlier)
        for part, account in zip(parts(self.ensemble), self.eps.accounts, strict=False):
            if not account.left:
                self.eps.write(part, account.written)

    def give_back(self) -> None:
        """Gives the user's own betas and eps back, the moments rescaled; leaves alone what someone else has written."""
        self.betas.give_back(self.ensemble)
        self.eps.give_back(self.ensemble)

    def state_dict(self) -> dict[str, Any]:
        """Returns plain numbers, lists and dicts."""
        return {"betas": self.betas.state_dict(), "eps": self.eps.state_dict(), "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""
        self.betas.load_state_dict(state["betas"])
        self.eps.load_state_dict(state["eps"])
        self.last = state["last"]
        self._told, self._earlier = [], None
