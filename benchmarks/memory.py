"""Peak extra memory of a Hessian product beside that of a gradient, counted, not sampled.

    python -m benchmarks.memory --json docs/results/memory.json [--quick]

torch's profiler reports every block that the CPU allocator hands out or takes back; the running sum of their bytes has
one largest value, the same in every run. Counted is what a call takes above that before it: activations, what the
backward passes save and pass on, and the result; parameters and the vector multiplied are there before.

gradient            one loss and its gradient, as in training (attention on its fused kernel)
retained            exact: a graph kept, then one product on it
lean                exact: the graph built for the product and freed as it goes
finite-difference   one product by central differences
one-sided           one product by a one-sided difference as "auto" makes it: the gradient that it starts from and what
                    ReLUs do count in; the parameters' own values are kept by whoever measures

saved               what the graph of the gradient holds before the second backward pass: no double backward that
                    recomputes nothing has a lower peak
elsewhere           lean, with all that the graph saves in memory that is not counted: what offloading or recomputing
                    everything would leave, the second pass's own buffers

`at` is the operation that runs at the peak.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.networks import TASKS, Point
from benchmarks.results import command_line, markdown, save
from safe_lr.closures import leave_no_trace
from safe_lr.kinks import Kinks
from safe_lr.operators import exact_hessian, finite_difference_hessian, lean_hessian

AIM = 1.6  # of a gradient's, for the lean product
MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """What a call took.

    Attributes:
        mib: Largest sum of live bytes during the call, above that before it.
        left: What is still alive when it has returned, its result.
        at: The innermost operation that ran at the peak.
    """

    mib: float
    left: float
    at: str


def peak_of(call: Callable[[], Any]) -> Peak:
    """Counts the bytes that a call makes torch's CPU allocator hand out.

    Example:
        >>> peak = peak_of(lambda: torch.ones(2**20) + torch.ones(2**20))       # two terms and their sum, 4 MiB each
        >>> peak.mib, peak.left
        (12.0, 4.0)
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result  # outside the profile: what the call leaves counts as live
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = highest = when = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        if live > highest:
            highest, when = live, event.start_ns()
    running = [e for e in events if e.start_ns() <= when <= e.start_ns() + e.duration_ns() and "::" not in e.name()]
    at = max((e for e in running if e.name() != "[memory]"), key=lambda e: e.start_ns(), default=None)
    return Peak(highest / MIB, live / MIB, "" if at is None else at.name())


def of_products(point: Point) -> dict[str, Peak]:
    """The peaks of one network, by what is done."""
    params = point.params
    vectors = [torch.randn_like(p) for p in params]
    found = {"gradient": peak_of(lambda: torch.autograd.grad(point.loss(), params))}
    with leave_no_trace(params) as untouched:

        def loss() -> Tensor:
            return untouched.call(point.loss)

        loss()  # the buffers are remembered at the first call, outside the account
        kinks = Kinks()

        def smooth() -> Tensor:
            with kinks:
                return loss()

        made = {
            "finite-difference": lambda: finite_difference_hessian(loss, params, moved=untouched.moved),
            "one-sided": lambda: finite_difference_hessian(smooth, params, one_sided=True, moved=untouched.moved),
            "retained": lambda: exact_hessian(loss(), params),
            "lean": lambda: lean_hessian(loss, params),
        }
        for name, make in made.items():
            if name in ("one-sided", "retained"):  # the gradient it starts from, the kinks, or its graph are part of it
                if name == "retained":
                    untouched.differentiate_twice()
                found[name] = peak_of(lambda: make().product(vectors))  # noqa: B023 (called at once)
            else:
                product = make().product
                found[name] = peak_of(lambda: product(vectors))  # noqa: B023
        saved = peak_of(lambda: _graph(loss(), params))
        found["saved"] = Peak(saved.left, saved.left, "")
        found["elsewhere"] = peak_of(lambda: _elsewhere(loss, params, vectors))
    return found


def _graph(loss: Tensor, params: Sequence[Tensor]) -> list[GradientEdge]:
    return [get_gradient_edge(g) for g in torch.autograd.grad(loss, params, create_graph=True)]


def _elsewhere(loss: Callable[[], Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    """A product with every saved activation kept by NumPy, whose memory torch does not count."""
    there = {p.untyped_storage().data_ptr() for p in params}

    def pack(saved: Tensor) -> Any:
        own = saved.untyped_storage().data_ptr() in there or not saved.is_floating_point() or saved.ndim == 0
        return saved if own else saved.detach().contiguous().numpy().copy()

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else torch.from_numpy(packed.copy())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        edges = _graph(loss(), params)
    return torch.autograd.grad(edges, params, vectors)


def of_task(name: str, quick: bool) -> dict[str, Any]:
    """One network's row, in MiB and in gradients."""
    torch.manual_seed(0)
    task = TASKS[name](quick)
    task.train(min(task.steps, 10))
    peaks = of_products(task.point)
    unit = peaks["gradient"].mib
    return {
        "parameters": task.point.numel,
        "parameters_mib": sum(p.numel() * p.element_size() for p in task.point.params) / MIB,
        "mib": {kind: peak.mib for kind, peak in peaks.items()},
        "gradients": {kind: peak.mib / unit for kind, peak in peaks.items()},
        "at": {kind: peak.at for kind, peak in peaks.items() if peak.at},
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: gradients, but for the first column."""
    kinds = ("lean", "saved", "elsewhere", "retained", "finite-difference", "one-sided")
    rows = []
    for name, row in result["tasks"].items():
        figures = [f"{row['gradients'][kind]:.2f}" for kind in kinds]
        rows.append([name, f"{row['mib']['gradient']:.1f} MiB", *figures])
    return markdown(["", "a gradient", *kinds], rows)


def main() -> None:
    """Counts, prints and saves."""
    args = command_line(__doc__.splitlines()[0], "tiny networks").parse_args()
    torch.set_num_threads(1)
    tasks = {name: of_task(name, args.quick) for name in tqdm(TASKS, unit="network", ncols=100)}
    worst = max(row["gradients"]["lean"] for row in tasks.values())
    result = {
        "torch": torch.__version__,
        "quick": args.quick,
        "aim": {"lean product, gradients": AIM, "worst": worst, "met": worst <= AIM},
        "tasks": tasks,
    }
    save(result, args.json)
    print(table(result))


if __name__ == "__main__":
    main()
