"""A `Snapshot`: what an update changes, kept in memory, and put back bit for bit."""

from __future__ import annotations

import copy
import inspect
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from safe_lr.closures import RandomState

STATES = 2
"""Parameter-sized tensors to reckon with as optimizer state where a rehearsal cannot tell: the two averages of the
most common optimizers."""

Place = torch.device | str | None


class Buffers:
    """Copies of some modules' buffers (BatchNorm's statistics), each module's children included.

    Args:
        device: Where the copies lie; None for where the buffers do.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> buffers = Buffers()
        >>> buffers.take([norm])
        >>> _ = norm(torch.tensor([[1.0], [float("nan")]]))
        >>> buffers.restore()
        >>> float(norm.running_mean), int(norm.num_batches_tracked), buffers.nbytes       # 4 + 4 + 8
        (0.0, 0, 16)
    """

    def __init__(self, device: Place = None) -> None:
        self.device = device
        self._kept: dict[tuple[nn.Module, str], tuple[Tensor, _Kept]] = {}
        self._norms: dict[tuple[nn.Module, str], float] = {}  # when they were taken
        self._now: dict[tuple[nn.Module, str], float] = {}
        self._still: set[tuple[nn.Module, str]] = set()

    @property
    def modules(self) -> list[nn.Module]:
        """Whose buffers they are."""
        return list(dict.fromkeys(module for module, _ in self._kept))

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(kept.nbytes for _, kept in self._kept.values())

    def take(self, modules: Iterable[nn.Module] | None = None) -> None:
        """Copies the buffers of `modules`, or anew those of the modules that are known."""
        self._still = {key for key, norm in self._now.items() if norm == self._norms.get(key)}
        self._norms = self._now
        known = [module for module, _ in self._kept] if modules is None else _tree(modules)
        before, self._kept = self._kept, {}
        for module in dict.fromkeys(known):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    _, old = before.get((module, name), (None, None))
                    self._kept[module, name] = buffer, _Kept.of(buffer, self.device, old)

    def restore(self, *, only_moving: bool = False) -> None:
        """Puts the values back, into the very tensors; one that a module has replaced since is put in its place.

        Args:
            only_moving: Leaves those alone that had not changed from one `take` to the next (as `stray` saw them):
                whoever wrote one since was the user.
        """
        for (module, name), (buffer, kept) in self._kept.items():
            if only_moving and (module, name) in self._still:
                continue
            back = kept.into(buffer)
            if module._buffers.get(name) is not back:
                module._buffers[name] = back

    def stray(self, factor: float) -> bool:
        """Whether one has grown by more than `factor` since it was taken, or is no longer finite.

        Asked at each update it sees what no gradient shows: behind a BatchNorm inputs of any size give the same
        gradient, but its running variance takes them in. Those that had not moved before do not count.
        """
        floats = {key: buffer for key, (buffer, _) in self._kept.items() if buffer.is_floating_point()}
        self._now = dict(zip(floats, _norms(floats.values()), strict=True))
        return any(
            math.isfinite(then) and then > 0 and not self._now[key] <= factor * then
            for key, then in self._norms.items()
            if key in self._now and key not in self._still
        )


class Snapshot:
    """Optimizers at one moment: parameters, state, options of the groups, buffers of modules, random streams.

    `restore` puts all of it back bit for bit, into the very tensors where they are still there, as often as needed.
    Groups, and parameters' states, that did not exist at that moment: a group added since is left alone; the state of a
    parameter that had none is dropped. Tensors that share storage each have their own copy. Gradients, the data
    loader's position and whatever else lives outside are not part of it.

    Costs memory: parameters + optimizer state + buffers, see `nbytes` (with Adam about three times the parameters), and
    one copy of that at each `take`. A later `take` writes into the same copies.

    Args:
        optimizers: Whose parameters.
        device: Where the copies lie; None for where the tensors do.

    Example:
        >>> x = nn.Parameter(torch.ones(1000))
        >>> optimizer = torch.optim.Adam([x], lr=0.1)
        >>> snapshot = Snapshot([optimizer])
        >>> snapshot.take()
        >>> x.grad = torch.ones(1000)
        >>> _ = optimizer.step()
        >>> snapshot.restore()
        >>> bool((x == 1).all()), len(optimizer.state), snapshot.nbytes
        (True, 0, 4000)
    """

    def __init__(self, optimizers: Sequence[Optimizer], device: Place = None) -> None:
        self.optimizers, self.device = list(optimizers), device
        self.buffers = Buffers(device)
        self.taken = False
        self._parameters: dict[Tensor, _Kept] = {}
        self._states: list[dict[Any, Any]] = [{} for _ in self.optimizers]
        self._groups: list[list[dict[str, Any]]] = [[] for _ in self.optimizers]
        self._random: RandomState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all copies: parameters + optimizer state + buffers; 0 before the first `take`."""
        return _nbytes([list(self._parameters.values()), self._states, self._groups]) + self.buffers.nbytes

    def take(self, modules: Iterable[nn.Module] | None = None) -> None:
        """Copies everything as it stands, with the buffers of `modules` and of their children; None for those of the
        modules that are known.
        """
        parameters = _parameters(self.optimizers)
        self._parameters = {p: _Kept.of(p, self.device, self._parameters.get(p)) for p in parameters}
        for index, optimizer in enumerate(self.optimizers):
            before = self._states[index]
            self._states[index] = {
                key: _copied(state, self.device, before.get(key)) for key, state in optimizer.state.items()
            }
            self._groups[index] = [
                {name: _copied(value, None) for name, value in group.items() if name != "params"}
                for group in optimizer.param_groups
            ]
        self.buffers.take(modules)
        self._random = RandomState.capture([p.device for p in parameters])
        self.taken = True

    def write_model(self) -> None:
        """Puts parameters and buffers back, nothing else."""
        for parameter, kept in self._parameters.items():
            kept.into(parameter)
        self.buffers.restore()

    def restore(self, *, leave: Collection[str] = (), random_streams: bool = True) -> None:
        """Puts everything back.

        Args:
            leave: Options of the groups that stay as they are now ("lr", where somebody else's schedule writes it).
            random_streams: Whether the random streams go back too: what is drawn next, dropout masks and batches that
                come from a global stream, is then drawn again.

        Raises:
            RuntimeError: Nothing was taken yet.
        """
        if self._random is None:
            raise RuntimeError("there is nothing to restore: call take() first")
        self.write_model()
        for optimizer, states, groups in zip(self.optimizers, self._states, self._groups, strict=True):
            for key in [key for key in optimizer.state if key not in states]:
                if key in self._parameters or not isinstance(key, Tensor):
                    del optimizer.state[key]
            for key, state in states.items():
                optimizer.state[key] = _put_back(state, optimizer.state.get(key))
            for group, options in zip(optimizer.param_groups, groups, strict=False):
                for name, value in options.items():
                    if name not in leave:
                        group[name] = _put_back(value, group.get(name))
        if random_streams:
            self._random.restore()


@dataclass(frozen=True)
class _Kept:
    """A tensor's copy."""

    copy: Tensor
    device: torch.device  # the original's

    @classmethod
    def of(cls, tensor: Tensor, device: Place, old: Any = None) -> _Kept:
        """Copies a tensor, into an older copy where that fits."""
        value = tensor.detach()
        if isinstance(old, _Kept) and old.device == value.device and _fits(old.copy, value):
            old.copy.copy_(value)
            return old
        return cls(value.clone() if device is None else value.to(device, copy=True), value.device)

    @property
    def nbytes(self) -> int:
        if self.copy.layout == torch.strided:
            return self.copy.nbytes
        sparse = self.copy.coalesce()
        return int(sparse.indices().nbytes + sparse.values().nbytes)

    def into(self, live: Any) -> Tensor:
        """Returns `live` with the copy's value where it fits, else a tensor of its own."""
        if isinstance(live, Tensor) and live.device == self.device and _fits(live, self.copy):
            live.data.copy_(self.copy)  # through .data: a graph that the user holds sees no new version
            return live
        value = self.copy.to(self.device, copy=True)
        if isinstance(live, nn.Parameter):
            live.data = value
            return live
        return value


def _fits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.layout == b.layout == torch.strided


def _copied(value: Any, device: Place, old: Any = None) -> Any:
    """Copies nested dicts, lists and tuples down to their tensors."""
    if isinstance(value, Tensor):
        return _Kept.of(value, device, old)
    if isinstance(value, dict):
        known = old if isinstance(old, dict) else {}
        return {key: _copied(item, device, known.get(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        known_items = old if type(old) is type(value) and len(old) == len(value) else [None] * len(value)
        return type(value)(_copied(item, device, was) for item, was in zip(value, known_items, strict=True))
    return copy.deepcopy(value)


def _put_back(saved: Any, live: Any) -> Any:
    """Returns what `saved` stands for, in the containers and tensors of `live` where these are still the same kind."""
    if isinstance(saved, _Kept):
        return saved.into(live)
    if isinstance(saved, dict):
        target = live if isinstance(live, dict) else {}
        for key in [key for key in target if key not in saved]:
            del target[key]
        for key, item in saved.items():
            target[key] = _put_back(item, target.get(key))
        return target
    if type(saved) in (list, tuple):
        fits = isinstance(live, (list, tuple)) and len(live) == len(saved)
        items = [_put_back(item, was) for item, was in zip(saved, live if fits else [None] * len(saved), strict=True)]
        if type(saved) is list and type(live) is list:
            live[:] = items
            return live
        return type(saved)(items)
    return copy.deepcopy(saved)


def _nbytes(saved: Any) -> int:
    if isinstance(saved, _Kept):
        return saved.nbytes
    items = saved.values() if isinstance(saved, dict) else saved if isinstance(saved, (list, tuple)) else ()
    return sum(_nbytes(item) for item in items)


def _parameters(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def _norms(tensors: Iterable[Tensor]) -> list[float]:
    """The norms of some tensors, fetched at once."""
    norms = [torch.linalg.vector_norm(t.detach(), dtype=torch.float32) for t in tensors]
    return [float(x) for x in torch.stack([n.to(norms[0].device) for n in norms]).tolist()] if norms else []


def _tree(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [child for module in modules for child in module.modules()]


# ---- whether there is room


def expected_bytes(optimizer: Optimizer) -> int:
    """Returns what a snapshot of an optimizer will take once its state exists, without buffers.

    An optimizer makes its state in its first update. Before that, the update is rehearsed on tensors without data (the
    meta device); where that cannot be done, STATES times the parameters are reckoned with.

    Example:
        >>> x = nn.Parameter(torch.ones(1000))
        >>> expected_bytes(torch.optim.SGD([x], lr=0.1)), expected_bytes(torch.optim.Adam([x]))   # Adam's step: 4 bytes
        (4000, 12004)
    """
    parameters = sum(p.nbytes for p in _parameters([optimizer]))
    if any(optimizer.state.values()):
        return parameters + _tensor_bytes(optimizer.state)
    groups = []
    for group in optimizer.param_groups:
        rehearsed = [nn.Parameter(torch.empty_like(p, device="meta")) for p in group["params"] if p.requires_grad]
        for p in rehearsed:
            p.grad = torch.empty_like(p)
        if rehearsed:
            groups.append({**group, "params": rehearsed})
    kind, actor = type(optimizer), None
    options = {k: v for k, v in optimizer.defaults.items() if k in inspect.signature(kind).parameters}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            actor = kind(groups, **options)
            actor.step()
    except Exception:  # noqa: BLE001 (some read their numbers, which are not there; the state is made by then, or not)
        if actor is None or any(not actor.state.get(p) for group in groups for p in group["params"]):
            return (1 + STATES) * parameters
    return parameters + _tensor_bytes(actor.state)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes if value.layout == torch.strided else int(value._values().nbytes + value._indices().nbytes)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(_tensor_bytes(item) for item in items)


def free_memory(device: torch.device) -> int | None:
    """Returns the bytes that can still be allocated on a device, None where nobody can tell.

    CUDA: what the driver has and what torch's allocator holds in reserve. CPU: what the system calls available; a
    container's own limit is not looked at.
    """
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None


def check_room(
    optimizers: Sequence[Optimizer],
    device: Place = None,
    *,
    free: Callable[[torch.device], int | None] = free_memory,
) -> int:
    """Returns the bytes that a snapshot will take, if there is room for them.

    Args:
        optimizers: Of what.
        device: Where; None for where each optimizer's first parameter lies.
        free: Tells the free bytes of a device.

    Raises:
        MemoryError: There is not enough; the message has both figures.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1000))], lr=0.1)
        >>> check_room([optimizer], free=lambda device: 3999)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        MemoryError: a snapshot takes 4 kB on cpu (parameters + optimizer state, buffers not counted), 4 kB are free...
    """
    wanted: dict[torch.device, int] = {}
    for optimizer in optimizers:
        place = torch.device(device) if device is not None else _parameters([optimizer])[0].device
        wanted[place] = wanted.get(place, 0) + expected_bytes(optimizer)
    for place, size in wanted.items():
        room = free(place)
        if room is not None and size > room:
            raise MemoryError(
                f"a snapshot takes {_human(size)} on {place} (parameters + optimizer state, buffers not counted), "
                f'{_human(room)} are free: keep it elsewhere, rewind_device="cpu", or go without, rewind=False'
            )
    return sum(wanted.values())


def _human(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"
