"""Snapshots against the runs themselves: what goes on after `restore` is what went on after `take`, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, SparseAdam

from safe_lr.snapshots import Buffers, Snapshot, check_room, expected_bytes, free_memory
from tests.cases import CASES, Case


class Run:
    """A network with BatchNorm and dropout on batches from the global streams."""

    def __init__(self, case: Case) -> None:
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.optimizer = case.optimizer(self.model.parameters())

    def step(self) -> None:
        x = torch.randn(16, 6) * (1 + 0.01 * random.random() + 0.01 * np.random.rand())
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), torch.randint(3, (16,))).backward()
        self.optimizer.step()

    def seen(self) -> list[Any]:
        """Everything that a snapshot is to put back, as plain values."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = [plain(self.optimizer.state[p]) if p in self.optimizer.state else None for p in parameters]
        groups = [{k: plain(v) for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        return [plain(self.model.state_dict()), state, groups, plain(torch.get_rng_state()), random.getstate()]


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (str(value.dtype), value.to_dense().tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_restored_run_goes_on_as_the_first_time(case: Case, before: int) -> None:
    run = Run(case)
    for _ in range(before):
        run.step()
    snapshot = Snapshot([run.optimizer])
    snapshot.take([run.model])
    there = run.seen()
    futures = []
    for _ in range(3):
        for _ in range(4):
            run.step()
        futures.append(run.seen())
        assert futures[-1] != there
        snapshot.restore()
        assert run.seen() == there
    assert futures[1] == futures[0] and futures[2] == futures[0]


@pytest.mark.parametrize("case", [Case(SGD, {"momentum": 0.9}), Case(Adam), Case(Adam, {"fused": True})], ids=str)
def test_a_later_take_writes_into_the_same_copies_and_restore_into_the_same_tensors(case: Case) -> None:
    run = Run(case)
    run.step()
    snapshot = Snapshot([run.optimizer])
    snapshot.take([run.model])
    kept = [kept.copy.data_ptr() for kept in snapshot._parameters.values()]
    run.step()
    live = [t for state in run.optimizer.state.values() for t in state.values()]
    there = run.seen()
    snapshot.take([run.model])
    assert [kept.copy.data_ptr() for kept in snapshot._parameters.values()] == kept
    run.step()
    snapshot.restore()
    assert run.seen() == there
    again = [t for state in run.optimizer.state.values() for t in state.values()]
    assert all(a is b for a, b in zip(live, again, strict=True))


def test_nested_states_and_what_is_no_tensor() -> None:
    x = nn.Parameter(torch.ones(2))
    optimizer = SGD([x], lr=0.1)
    buffer, holder = torch.ones(2), {"deep": [torch.zeros(1), (torch.ones(1), 2)]}
    optimizer.state[x] = {"nested": holder, "count": 3, "name": "a", "buffer": buffer, "none": None}
    optimizer.state["global"] = {"k": 1}  # some optimizers keep a count under a name
    snapshot = Snapshot([optimizer])
    snapshot.take()
    holder["deep"][0] += 5
    holder["deep"].append("more")
    optimizer.state[x] |= {"count": 9, "name": "b", "none": torch.ones(1), "late": 1}
    optimizer.state[x]["buffer"] = torch.zeros(2, dtype=torch.float64)  # replaced, and of another kind
    optimizer.state["global"]["k"] = 7
    optimizer.state["late"] = 1
    snapshot.restore()
    assert set(optimizer.state) == {x, "global"} and optimizer.state["global"] == {"k": 1}
    state = optimizer.state[x]
    assert set(state) == {"nested", "count", "name", "buffer", "none"}
    assert state["nested"] is holder and plain(holder) == {"deep": [plain(torch.zeros(1)), [plain(torch.ones(1)), 2]]}
    assert (state["count"], state["name"], state["none"]) == (3, "a", None)
    assert plain(state["buffer"]) == plain(torch.ones(2))


def test_parameters_that_share_storage() -> None:
    base = torch.arange(6.0)
    whole, part = nn.Parameter(base), nn.Parameter(base[2:4])
    optimizer = SGD([whole, part], lr=0.1)
    snapshot = Snapshot([optimizer])
    snapshot.take()
    with torch.no_grad():
        part.add_(100.0)
    assert whole[2] == 102
    snapshot.restore()
    assert whole.tolist() == [0, 1, 2, 3, 4, 5] and part.tolist() == [2, 3]
    assert whole.data_ptr() == base.data_ptr() and part.data_ptr() == base[2:].data_ptr()


def test_a_group_that_was_added_since_is_left_alone() -> None:
    old, new = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = Adam([old], lr=0.1)
    snapshot = Snapshot([optimizer])
    snapshot.take()
    optimizer.add_param_group({"params": [new], "lr": 0.5})
    (old + new).backward()
    optimizer.step()
    moved = new.item()
    snapshot.restore()
    assert old.item() == 1 and old not in optimizer.state
    assert new.item() == moved != 1 and int(optimizer.state[new]["step"]) == 1
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_options_go_back_but_for_those_that_are_somebody_elses(lr: Any) -> None:
    optimizer = AdamW([nn.Parameter(torch.ones(1))], lr=lr, betas=(0.9, 0.99))
    group = optimizer.param_groups[0]
    snapshot = Snapshot([optimizer])
    snapshot.take()
    for leave, expected in ((("lr",), 0.7), ((), 0.1)):
        group["betas"] = (0.5, 0.5)
        if isinstance(lr, Tensor):
            group["lr"].fill_(0.7)
        else:
            group["lr"] = 0.7
        snapshot.restore(leave=leave)
        assert float(group["lr"]) == pytest.approx(expected) and group["betas"] == (0.9, 0.99)
        assert not isinstance(lr, Tensor) or group["lr"] is lr


def test_random_streams_may_stay() -> None:
    snapshot = Snapshot([SGD([nn.Parameter(torch.ones(1))], lr=0.1)])
    snapshot.take()
    drawn = (torch.rand(()), random.random(), np.random.rand())
    snapshot.restore(random_streams=False)
    assert (torch.rand(()), random.random(), np.random.rand()) != drawn
    snapshot.restore()
    assert (torch.rand(()), random.random(), np.random.rand()) == drawn


def test_buffers_that_a_module_replaces_are_put_back() -> None:
    class Averages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(2))
            self.register_buffer("nothing", None)

    module = nn.Sequential(Averages())
    original = module[0].mean
    buffers = Buffers()
    buffers.take([module])
    module[0].mean = torch.ones(2)
    buffers.restore()
    assert module[0].mean is original and original.tolist() == [0, 0] and buffers.nbytes == 8
    original.fill_(float("nan"))
    buffers.restore()
    assert original.tolist() == [0, 0]
    original.fill_(3.0)
    buffers.take()  # of what is known
    original.fill_(4.0)
    buffers.restore()
    assert original.tolist() == [3, 3]


def test_a_graph_that_the_user_holds_stays_usable() -> None:
    x = nn.Parameter(torch.tensor([3.0]))
    snapshot = Snapshot([SGD([x], lr=0.1)])
    snapshot.take()
    loss = (x**2).sum()
    snapshot.restore()
    loss.backward()
    assert x.grad is not None and x.grad.item() == 6


def test_half_precision_and_elsewhere() -> None:
    """bfloat16 parameters, copies kept on a named device: the same bits come back to where they were."""
    x = nn.Parameter(torch.randn(7).bfloat16())
    optimizer = Adam([x], lr=0.1)
    x.grad = torch.randn(7).bfloat16()
    optimizer.step()
    there = plain([x, optimizer.state[x]])
    snapshot = Snapshot([optimizer], device="cpu")
    snapshot.take()
    optimizer.step()
    assert plain([x, optimizer.state[x]]) != there
    snapshot.restore()
    assert plain([x, optimizer.state[x]]) == there and x.dtype == torch.bfloat16


def test_nothing_taken_is_nothing_to_restore() -> None:
    snapshot = Snapshot([SGD([nn.Parameter(torch.ones(1))], lr=0.1)])
    assert snapshot.nbytes == 0
    with pytest.raises(RuntimeError, match="call take"):
        snapshot.restore()


# ---- memory


@pytest.mark.parametrize("case", [case for case in CASES if case.make is not SparseAdam], ids=str)
def test_the_bytes_are_known_before_the_first_update(case: Case) -> None:
    """Oracle: the snapshot after it, buffers apart; and that is parameters + optimizer state, counted by hand."""
    run = Run(case)
    expected = expected_bytes(run.optimizer)
    run.step()
    snapshot = Snapshot([run.optimizer])
    snapshot.take()
    tensors = [*run.model.parameters()]
    tensors += [t for state in run.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert expected == snapshot.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    assert expected_bytes(run.optimizer) == expected
    snapshot.take([run.model])
    assert snapshot.nbytes == expected + 2 * 8 * 4 + 8  # running mean and variance of 8 features, and a count


def test_where_the_state_cannot_be_rehearsed_twice_the_parameters_are_reckoned_with() -> None:
    x = nn.Parameter(torch.ones(5, 2))
    assert expected_bytes(SparseAdam([x])) == 3 * 40  # it refuses dense gradients


def test_no_room_is_refused_with_both_figures() -> None:
    optimizer = Adam([nn.Parameter(torch.ones(1000))])
    assert check_room([optimizer], free=lambda device: 12_004) == 12_004
    assert check_room([optimizer], free=lambda device: None) == 12_004  # nobody can tell
    with pytest.raises(MemoryError, match="12 kB on cpu .*, 9.5 kB are free: .*rewind_device.*rewind=False"):
        check_room([optimizer], free=lambda device: 9_500)
    asked = []
    check_room([optimizer], "meta", free=lambda device: asked.append(device))
    assert asked == [torch.device("meta")]


def test_free_memory_is_a_figure_or_unknown() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None
