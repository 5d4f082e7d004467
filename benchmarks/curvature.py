r"""What a measurement of curvature costs, how exact it is and what it leaves behind: safe_lr beside its peers.

    python -m benchmarks.curvature --json docs/results/curvature.json [--quick]

Four lightly trained networks (`benchmarks/networks.py`), each from several seeds of weights and batches; one process,
one thread. On the first seed peers are measured too, on the same weights and batch, the tools in turns: PyHessian,
hessian-eigenthings, curvlinops with SciPy's eigsh. One that is not installed is skipped with its reason:

    pip install -c constraints.txt -e '.[bench]'
    pip install -c constraints.txt --no-deps curvlinops-for-pytorch backpack-for-pytorch unfoldNd linear_operator \
        einconv einops opt_einsum

(`--no-deps`: BackPACK declares torchvision, does not import it here, and no torchvision works beside every torch.)

Columns, medians over the seeds of each seed's median over the start vectors (`..._by_seed`); `..._range` is that of all
runs:

* error: against the largest eigenvalue in float64 (a float64 copy, P computed anew, Lanczos to a residual of 1e-5,
  whose square is the value's error).
* products: Hessian-vector products. gradients: processor time over that of one loss and gradient on the same batch,
  timed just before (the median of several); with one thread and an idle machine that is the ratio of wall times, which
  the result holds too. counted: what safe_lr's own account says.
* memory: peak resident memory above that before the call, over the same of one gradient. Each tool runs once more in
  a fresh process, whose allocator returns freed memory; the kernel's high-water mark is reset before.
* leaves behind: what differs, bit for bit, after the call.

"early" is the first measurement of a run, where differences, if taken, are checked by exact products. The others
come 10 updates later, on the same batch, and make products in the way that worked; "warm" starts from its vector too.

"data" measures one network on batches of one size, drawn from data sets of which one is 16 times the other.
`upper >= truth` counts cold and warm measurements at both points, plain and preconditioned.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks.networks import TASKS, Point, Task
from benchmarks.results import save
from safe_lr.closures import leave_no_trace
from safe_lr.ensemble import Ensemble
from safe_lr.lanczos import lanczos, start_vector
from safe_lr.measurement import Measurement, measure_step
from safe_lr.movers import movers, shares
from safe_lr.operators import exact_hessian
from safe_lr.settings import Settings

TOL = 0.1  # the scheduler's
LATER = 10  # updates between the two points
SEEDS = (0, 1, 2)  # of weights and batches
REPEATS = {"mlp": 4, "conv_bn": 2, "gpt_small": 2, "gpt_large": 2}  # start vectors a seed; 4 cold cases each: 120
SECONDS_FOR_PEER = 4  # a peer repeats as often as ours does, or until this is spent
APART = 300  # batches between two seeds, more than one trains on
TIMES_LARGER = (1, 16)  # data sets
EXACTER = (0.1, 0.05, 0.02, 0.01, 0.005)  # tolerances tried for an error of 1 %


@dataclass
class Found:
    """What a tool found.

    Attributes:
        value: The largest eigenvalue.
        products: Hessian-vector products.
        upper, counted, vectors, hvp: safe_lr's upper end, account, eigenvectors, and way of making products.
        note: What had to be done to make it run.
    """

    value: float
    products: int
    upper: float | None = None
    counted: float | None = None
    vectors: dict[str, Tensor] = field(default_factory=dict)
    hvp: str | None = None
    note: str | None = None


Tool = Callable[[Point, int], Found]


def ours(preconditioned: bool, tol: float = TOL, before: dict[int, Found] | None = None, *, warm: bool = False) -> Tool:
    """safe_lr as the scheduler uses it: of H itself (SGD, where P is one), or as the point's Adam sees it.

    Args:
        preconditioned: Whether P is Adam's.
        tol: Relative residual.
        before: What was found at an earlier point by seed; None for the first measurement of a run.
        warm: Whether to start from its eigenvector.
    """

    def run(point: Point, seed: int) -> Found:
        optimizer = point.optimizer if preconditioned else torch.optim.SGD(point.params, lr=0.1)
        settings = Settings("momentum" if preconditioned else "coherence", tol=tol, cautious=True)
        last = before[seed] if before else None
        return found_by(
            measure_step(
                _moving(optimizer),
                point.loss,
                settings,
                seed=seed,
                warm=last.vectors if last is not None and warm else None,
                last_hvp=None if last is None else last.hvp,
            )
        )

    return run


def _moving(optimizer: torch.optim.Optimizer) -> list[Any]:
    ensemble = Ensemble(optimizer)
    moving = movers(ensemble, shares([g["lr"] for g in ensemble.param_groups], [])[1])
    for mover in moving:
        mover.grad = None  # P is that of a step on the measured batch, as in `safe_lr.measure`
    return moving


def found_by(measurement: Measurement) -> Found:
    """Reads a `Measurement`."""
    if measurement.failure or measurement.gamma is None:
        raise ArithmeticError(measurement.failure or "no gamma")
    m = measurement
    return Found(m.gamma, m.num_matvecs, m.upper, m.cost, m.vectors, m.hvp)


def pyhessian(tol: float = 1e-3) -> Tool:
    """Power iteration on a retained graph; the default stops where two values differ by less than 1e-3."""
    package = importlib.import_module("pyhessian.hessian")  # the name is also that of a class

    def run(point: Point, seed: int) -> Found:
        inner, count = package.hessian_vector_product, 0

        def counting(*args: Any) -> Any:
            nonlocal count
            count += 1
            return inner(*args)

        package.hessian_vector_product = counting
        try:
            made = package.hessian(point.model, nn.CrossEntropyLoss(), data=(point.inputs, point.targets), cuda=False)
            values, _ = made.eigenvalues(tol=tol)
        finally:
            package.hessian_vector_product = inner
        return Found(float(values[0]), count)

    return run


def eigenthings(k: int, **options: Any) -> Tool:
    """Lanczos on a graph built anew for each product; 2 k steps unless `max_iter` says otherwise."""
    import hessian_eigenthings as package

    def run(point: Point, seed: int) -> Found:
        operator = package.HessianOperator(
            point.model,
            [(point.inputs, point.targets)],
            lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        )
        result = package.lanczos(operator, k=k, seed=seed, **options)
        return Found(float(result.eigenvalues.max()), int(result.iterations))

    return run


def curvlinops(**options: Any) -> Tool:
    """SciPy's eigsh (ARPACK) on forward-over-reverse products; its default is machine precision."""
    import curvlinops as package
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    def run(point: Point, seed: int) -> Found:
        count, note = 0, None

        def build() -> Any:
            return package.HessianLinearOperator(
                point.model, nn.CrossEntropyLoss(), point.params, [(point.inputs, point.targets)]
            ).to_scipy()

        try:
            made = build()
        except RuntimeError as error:  # batch statistics inside forward-mode differentiation
            note = f"fails in train mode ({str(error).splitlines()[0][:80]}); run in eval mode"
            point.model.eval()
            made = build()

        def matvec(v: Any) -> Any:
            nonlocal count
            count += 1
            return made @ v

        operator = LinearOperator(made.shape, matvec=matvec, dtype=made.dtype)
        try:
            values = eigsh(operator, k=1, which="LA", return_eigenvectors=False, **options)
        except ArpackNoConvergence as error:
            values = error.eigenvalues if len(error.eigenvalues) else [math.nan]
        if note:
            point.model.train()  # that was not its doing
        return Found(float(values[0]), count, note=note)

    return run


PEERS: dict[str, Callable[[], Tool]] = {
    "pyhessian": pyhessian,
    "hessian_eigenthings": lambda: eigenthings(1),
    "hessian_eigenthings_k10": lambda: eigenthings(10),
    "curvlinops": curvlinops,
}

PEERS_TO_ONE_PERCENT: dict[str, Callable[[], list[tuple[str, Tool]]]] = {
    "pyhessian": lambda: [(f"tol={tol}", pyhessian(tol)) for tol in (1e-1, 1e-2, 1e-3)],
    "hessian_eigenthings": lambda: [
        (f"k=1, which='LA', max_iter={m}", eigenthings(1, which="LA", max_iter=m)) for m in (6, 8, 12)
    ],
    "curvlinops": list,  # eigsh makes 20 products before it looks: no tolerance is cheaper than the default
}
"""Cheapest setting first. For the step counts one must know the truth beforehand."""


def available() -> tuple[dict[str, Tool], dict[str, str]]:
    """Returns the peers that can be imported, and why the others cannot."""
    tools, skipped = {}, {}
    for name, make in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # theirs
                tools[name] = make()
        except ImportError as error:
            skipped[name] = str(error)
    return tools, skipped


def truth(point: Point, preconditioned: bool, train: bool = True) -> float:
    """The largest eigenvalue in float64, by products and a P that owe nothing to safe_lr's."""
    copy = point.copy()
    model = copy.model.double().train(train)
    inputs = point.inputs.double() if point.inputs.is_floating_point() else point.inputs
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = nn.functional.cross_entropy(model(inputs), point.targets)
        grads = torch.autograd.grad(loss, params, create_graph=True)
    scale = torch.ones(sum(p.numel() for p in params), dtype=torch.float64)
    if preconditioned:
        scale = torch.cat([
            _adams_p(point.optimizer, p, g.detach()).rsqrt().flatten()
            for p, g in zip(point.params, grads, strict=True)
        ])  # fmt: skip
    sizes = [p.numel() for p in params]

    def matvec(v: Tensor) -> Tensor:
        parts = [part.view(p.shape) for part, p in zip((scale * v).split(sizes), params, strict=True)]
        products = torch.autograd.grad(grads, params, parts, retain_graph=True)
        return scale * torch.cat([h.flatten() for h in products])

    estimate = lanczos(matvec, start_vector(scale, seed=12345), tol=1e-5, max_matvecs=200)  # the error is its square
    if not estimate.converged:
        raise ArithmeticError("the truth has not converged")
    return estimate.value


def _adams_p(optimizer: torch.optim.Optimizer, param: nn.Parameter, grad: Tensor) -> Tensor:
    """sqrt(v' / (1 - b2^t)) + eps with v' = b2 v + (1 - b2) g^2, t the coming update."""
    group, state = optimizer.param_groups[0], optimizer.state[param]
    b2, coming = group["betas"][1], int(state["step"]) + 1
    v = b2 * state["exp_avg_sq"].double() + (1 - b2) * grad.square()
    return (v / (1 - b2**coming)).sqrt() + group["eps"]


def state_of(point: Point) -> dict[str, Any]:
    """Copies everything that a measurement has no business to change."""
    modules = list(point.model.modules())
    return {
        "parameters": [p.detach().clone() for p in point.params],
        "gradients": [None if p.grad is None else p.grad.detach().clone() for p in point.params],
        "gradients' graph": [p.grad is not None and p.grad.requires_grad for p in point.params],
        "buffers": [b.clone() for b in point.model.buffers()],
        "optimizer state": [v.clone() for s in point.optimizer.state.values() for v in s.values()],
        "train/eval mode": [m.training for m in modules],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        "random stream of torch": torch.get_rng_state(),
        "random stream of NumPy": np.random.get_state(),
        "random stream of Python": random.getstate(),
    }


def same(a: Any, b: Any) -> bool:
    """Whether two nests of lists, tensors and arrays are equal to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def side_effects(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names what differs."""
    return [name for name in before if not same(before[name], after[name])]


def gradient(point: Point) -> None:
    """One loss and gradient: the unit of cost."""
    torch.autograd.grad(point.loss(), point.params)


def seconds(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """This process's processor time, wall time, and the result."""
    processor, wall = time.process_time(), time.perf_counter()
    result = run()
    return time.process_time() - processor, time.perf_counter() - wall, result


@contextlib.contextmanager
def helped() -> Iterator[None]:
    """What peers need and cannot know: attention that can be differentiated twice, no warnings."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass
class Row:
    """One tool on one network, run by run."""

    tool: Tool
    point: Point
    truth: float
    peer: bool = False
    eval_truth: float | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    spent: float = 0.0

    def run(self, seed: int) -> Found:
        """Measures once, on a copy that holds a training gradient, and notes the cost and the traces."""
        copy = self.point.copy()
        copy.loss().backward()
        copy.model.load_state_dict(self.point.model.state_dict())  # BatchNorm's statistics as they were
        torch.manual_seed(seed)  # here and not in the tools: whatever moves a stream below is theirs
        np.random.seed(seed)
        before = state_of(copy)
        other = self.point.copy()
        units = [seconds(lambda: gradient(other))[:2] for _ in range(3 if other.numel > 2e5 else 9)]
        unit, unit_wall = (statistics.median(column) for column in zip(*units, strict=True))
        with helped() if self.peer else contextlib.nullcontext():
            spent, wall, found = seconds(lambda: self.tool(copy, seed))
        self.spent += wall
        self.runs.append({
            "value": found.value,
            "error": abs(found.value / self.truth - 1),
            "own_error": min(abs(found.value / t - 1) for t in (self.truth, self.eval_truth) if t is not None),
            "upper": found.upper,
            "num_matvecs": found.products,
            "gradients": spent / unit,
            "wall_gradients": wall / unit_wall,
            "unit_seconds": unit_wall,
            "counted": found.counted,
            "hvp": found.hvp,
            "left_behind": side_effects(before, state_of(copy)),
            "note": found.note,
        })  # fmt: skip
        gc.collect()  # PyHessian's graph refers to itself
        return found


def summary(seeds: Sequence[Row]) -> dict[str, Any]:
    """One tool's figures: medians over the start vectors of each seed, their median, and the range of all runs."""
    out: dict[str, Any] = {}
    runs = [run for row in seeds for run in row.runs]
    for key in ("error", "own_error", "num_matvecs", "gradients", "wall_gradients", "counted"):
        values = [run[key] for run in runs if run[key] is not None]
        if values:
            medians = [statistics.median(run[key] for run in row.runs) for row in seeds]
            out[key] = statistics.median(medians)
            out[f"{key}_by_seed"] = medians
            out[f"{key}_range"] = [min(values), max(values)]
    if ways := {run["hvp"] for run in runs} - {None}:
        out["hvp"] = ", ".join(sorted(ways))
    out["repeats"] = len(runs)
    out["left_behind"] = sorted({name for run in runs for name in run["left_behind"]})
    notes = {run["note"] for run in runs} - {None}
    return out | ({"note": notes.pop()} if notes else {})


def seeded(name: str, quick: bool, seed: int) -> Task:
    """Returns a network with weights from torch's own stream, and batches from later in theirs for each seed."""
    task = TASKS[name](quick)
    for _ in range(APART * seed):
        task.draw()
    if seed:
        task.point.inputs, task.point.targets = task.draw()
    return task


class Trained:
    """One network from one seed, at two points of its training, with the rows of safe_lr.

    Args:
        name: The network's.
        quick: Whether it is a tiny one.
        seed: Of weights and batches.
        say: Told what is being done.
    """

    def __init__(self, name: str, quick: bool, seed: int, say: Callable[[str], None]) -> None:
        self.name, self.seed = f"{name}, seed {seed}", seed
        torch.manual_seed(seed)
        say(f"{self.name}: training")
        task = seeded(name, quick, seed)
        task.train(task.steps)
        early = task.point.copy()
        task.train(LATER)
        self.late = task.point.copy()
        say(f"{self.name}: truth")
        points = {"early": early, "late": self.late}
        self.truths = {(at, p): truth(point, p) for at, point in points.items() for p in (False, True)}
        self.before: dict[bool, dict[int, Found]] = {False: {}, True: {}}
        self.rows = {}
        for p, suffix in ((False, ""), (True, "_preconditioned")):
            self.rows[f"early{suffix}"] = Row(ours(p), early, self.truths["early", p])
            for start in ("cold", "warm"):
                tool = ours(p, before=self.before[p], warm=start == "warm")
                self.rows[start + suffix] = Row(tool, self.late, self.truths["late", p])
        self.rows["cold"].tool(self.late.copy(), 0)  # the libraries load their kernels

    def run(self, seed: int) -> None:
        """Measures once in every way, from one start vector."""
        for label, row in self.rows.items():
            found = row.run(seed)
            if label.startswith("early"):
                self.before[label.endswith("preconditioned")][seed] = found


def compare(
    name: str, quick: bool, peers: dict[str, Tool], *, say: Callable[[str], None], folder: Path
) -> dict[str, Any]:
    """Runs safe_lr on one network from every seed, and every tool on the first one's in turns; returns the figures.

    The first one is left in a folder.
    """
    repeats = 2 if quick else REPEATS[name]
    first = Trained(name, quick, SEEDS[0], say)
    figures = beside_peers(first, peers, repeats, 3 if quick else 9, say)
    torch.save((first.late.model.state_dict(), first.late.optimizer.state_dict()), folder / name)
    rows: dict[str, list[Row]] = {label: [row] for label, row in first.rows.items()}
    for seed in SEEDS[1:]:
        other = Trained(name, quick, seed, say)
        for start in range(repeats):
            say(f"{other.name}: start vector {start}")
            other.run(start)
        for label, row in other.rows.items():
            rows[label].append(row)
    return figures | {
        "safe_lr": {label: summary(seeds) for label, seeds in rows.items()},
        "cases": [
            {"start": label, "seed": seed, "upper_over_truth": run["upper"] / row.truth}
            for label, seeds in rows.items()
            for seed, row in zip(SEEDS, seeds, strict=True)
            for run in row.runs
        ],
    }


def beside_peers(
    trained: Trained, peers: dict[str, Tool], repeats: int, repeats_of_parts: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs safe_lr and its peers in turns, and returns the peers' figures and the network's."""
    late, right = trained.late, trained.truths["late", False]
    has_modes = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in late.model.modules())
    eval_truth = truth(late, False, train=False) if has_modes else None
    others = {n: Row(tool, late, right, True, eval_truth) for n, tool in peers.items()}
    failed: dict[str, str] = {}
    for start in range(repeats):
        say(f"{trained.name}: start vector {start}")
        trained.run(start)
        for label, row in others.items():
            if label in failed or row.spent * (1 + 1 / max(start, 1)) > SECONDS_FOR_PEER:
                continue
            try:
                row.run(start)
            except Exception as error:  # noqa: BLE001  (whatever a peer raises is its result)
                failed[label] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    say(f"{trained.name}: at 1 % error")
    return {
        "parameters": late.numel,
        "unit_seconds": trained.rows["cold"].runs[-1]["unit_seconds"],
        "parts": parts(late, repeats_of_parts),
        "lambda_max": right,
        "gamma": trained.truths["late", True],
        **({"lambda_max_in_eval_mode": eval_truth} if eval_truth is not None else {}),
        **{n: summary([row]) for n, row in others.items() if row.runs},
        "at_one_percent": at_one_percent(late, right, eval_truth, [n for n in peers if n not in failed]),
        "failed": failed,
    }


def parts(point: Point, repeats: int) -> dict[str, float]:
    """What a measurement is made of, in gradients: the graph, a product on it, a forward pass."""
    copy, other = point.copy(), point.copy()
    params = copy.params
    spent: dict[str, list[float]] = {"gradient": [], "graph": [], "product": [], "forward": []}
    with leave_no_trace(params) as untouched:
        untouched.differentiate_twice()
        for _ in range(repeats):
            spent["gradient"].append(seconds(lambda: gradient(other))[0])
            taken, _, curvature = seconds(lambda: exact_hessian(untouched.call(copy.loss), params))
            spent["graph"].append(taken)
            vectors = [torch.randn_like(p) for p in params]
            spent["product"].append(seconds(lambda c=curvature, v=vectors: c.product(v))[0])
            with torch.no_grad():
                spent["forward"].append(seconds(lambda: untouched.call(copy.loss))[0])
    unit = statistics.median(spent.pop("gradient"))
    return {name: statistics.median(values) / unit for name, values in spent.items()}


def at_one_percent(late: Point, right: float, eval_truth: float | None, peers: Sequence[str]) -> dict[str, Any]:
    """The cheapest tried setting of each tool that comes within 1 % on one start vector."""
    ladders: dict[str, list[tuple[str, Tool]]] = {"safe_lr": [(f"tol={tol}", ours(False, tol)) for tol in EXACTER]}
    ladders |= {name: PEERS_TO_ONE_PERCENT[name]() for name in PEERS_TO_ONE_PERCENT if name in peers}
    out = {}
    for name, ladder in ladders.items():
        for setting, tool in ladder:
            row = Row(tool, late, right, name != "safe_lr", None if name == "safe_lr" else eval_truth)
            row.run(0)
            if row.runs[0]["own_error"] <= 0.01:
                chosen = {k: row.runs[0][k] for k in ("error", "own_error", "num_matvecs", "gradients")}
                out[name] = {"setting": setting, **chosen}
                break
    return out


def memory(folder: Path, quick: bool) -> dict[str, dict[str, float | None]]:
    """Peak extra memory of each tool on each network left in a folder, in MiB, measured in another process."""
    command = [sys.executable, "-m", "benchmarks.curvature", "--memory-of", str(folder), *["--quick"] * quick]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if done.returncode:
        raise RuntimeError(f"memory could not be measured:\n{done.stderr[-3000:]}")
    found: dict[str, dict[str, float | None]] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_of(folder: Path, quick: bool) -> dict[str, dict[str, float | None]]:
    """The other side of `memory`. eigsh runs to a loose tolerance here: it holds the same basis."""
    peers, _ = available()
    tools: dict[str, Tool] = {"safe_lr": ours(False), "safe_lr_preconditioned": ours(True)} | peers
    tools |= {"curvlinops": curvlinops(tol=0.1)} if "curvlinops" in peers else {}
    out: dict[str, dict[str, float | None]] = {}
    for name, make in TASKS.items():
        point = make(quick).point
        model_state, optimizer_state = torch.load(folder / name)
        point.model.load_state_dict(model_state)
        point.optimizer.load_state_dict(optimizer_state)
        tools["safe_lr"](point.copy(), 0)  # the libraries load their kernels
        out[name] = {"gradient": peak_mib(lambda point=point: gradient(point))}
        for label, tool in tools.items():
            copy = point.copy()
            with helped() if label in peers else contextlib.nullcontext():
                try:
                    out[name][label] = peak_mib(lambda tool=tool, copy=copy: tool(copy, 0))
                except Exception as error:  # noqa: BLE001  (whatever a peer raises is its result)
                    print(f"{label}: {error}", file=sys.stderr)
            gc.collect()
    return out


def peak_mib(run: Callable[[], Any]) -> float | None:
    """Peak resident memory during a call above that before it, in MiB; None where that is not told (no Linux)."""
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return None
    result = run()
    peak = _status("VmHWM") - before
    del result
    return peak


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def scaling(quick: bool) -> dict[str, Any]:
    """Processor time of a measurement with five products against the number of parameters, on batches of 64."""
    sizes = (1e4, 1e5) if quick else (1e5, 5e5, 2e6, 7e6, 2e7)
    rows = []
    for size in sizes:
        torch.manual_seed(0)
        width = round(math.sqrt(size / 2))
        layers = [nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)]
        model = nn.Sequential(*layers, nn.GELU(), nn.Linear(width, 10))
        inputs, targets = torch.randn(64, 64), torch.randint(10, (64,))
        point = Point(model, torch.optim.Adam(model.parameters()), inputs, targets)
        point.loss().backward()
        point.optimizer.step()

        def one(point: Point = point) -> tuple[float, float]:
            settings = Settings(tol=1e-6, max_matvecs=5, cautious=True)
            before = os.times().system
            taken = seconds(lambda: measure_step(_moving(point.optimizer), point.loss, settings))[0]
            return taken, os.times().system - before

        one()
        taken, kernel = zip(*(one() for _ in range(3 if size > 3e6 else 7)), strict=True)
        unit = statistics.median(seconds(lambda point=point: gradient(point))[0] for _ in range(5))
        rows.append({
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": statistics.median(taken),
            "kernel_seconds": statistics.median(kernel),  # fresh pages, above all
            "gradients": statistics.median(taken) / unit,
        })  # fmt: skip
    logs = np.log([[row["parameters"], row["seconds"]] for row in rows])
    return {"rows": rows, "exponent": float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])}


def data_sets(quick: bool) -> list[dict[str, Any]]:
    """The same network and batch size on data sets of two sizes; medians over batches, processor time and products."""
    batch, size = (16, 64) if quick else (128, 512)
    rows = []
    for times in TIMES_LARGER:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 200), nn.GELU(), nn.Linear(200, 200), nn.GELU(), nn.Linear(200, 10))
        inputs = torch.randn(size * times, 64, generator=generator)
        targets = torch.randint(10, (size * times,), generator=generator)
        optimizer = torch.optim.Adam(model.parameters())
        taken, products = [], []
        for seed in range(3 if quick else 15):
            chosen = torch.randperm(len(inputs), generator=generator)[:batch]
            point = Point(model, optimizer, inputs[chosen], targets[chosen])
            unit = statistics.median(seconds(lambda point=point: gradient(point))[0] for _ in range(9))
            spent, _, found = seconds(lambda point=point, seed=seed: ours(False)(point, seed))
            taken.append(spent / unit)
            products.append(found.products)
        rows.append({
            "examples": size * times,
            "batch": batch,
            "gradients": statistics.median(taken),
            "num_matvecs": statistics.median(products),
        })  # fmt: skip
    return rows


def targets_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each target with what was reached, network by network, and whether it is met."""
    out: dict[str, dict[str, Any]] = {}

    def target(
        name: str, limit: float, reached: dict[str, float], at_least: bool = False, judged: str | None = None
    ) -> None:
        values = reached.values() if judged is None else [reached[judged]]
        good = all((v >= limit) if at_least else (v <= limit) for v in values)
        out[name] = {"limit": limit, "reached": reached, "met": good}

    tasks = result["tasks"]
    for start, error, cost in (
        ("cold", 0.025, 11),
        ("warm", 0.025, 6),
        ("cold_preconditioned", 0.05, 13),
        ("warm_preconditioned", 0.05, 8),
    ):
        # Cold measurements are made at both points: the worse one counts.
        starts = [start, start.replace("cold", "early")] if start.startswith("cold") else [start]
        errors = {n: max(t["safe_lr"][s]["error_range"][1] for s in starts) for n, t in tasks.items()}
        target(f"{start}: worst error", error, errors)
        costs = {n: max(t["safe_lr"][s]["gradients"] for s in starts) for n, t in tasks.items()}
        if start.startswith("warm"):  # the aim is a median
            costs = {"median": statistics.median(costs.values())} | costs
        target(f"{start}: gradients", cost, costs, judged="median" if "median" in costs else None)
    best = {n: best_peer(t) for n, t in tasks.items()}
    same = {n: t["safe_lr"]["cold"]["gradients_by_seed"][0] for n, t in tasks.items()}  # the peers' seed
    ratios = {n: same[n] / b[1] for n, b in best.items() if b is not None}
    target("cold: gradients over the best peer's", 0.8, ratios)
    ups = [case["upper_over_truth"] >= 1 for t in tasks.values() for case in t["cases"] if "warm" not in case["start"]]
    target("upper >= truth, share of the cold cases", 0.99, {"all": sum(ups) / len(ups)}, at_least=True)
    sizes = np.log([[row["parameters"], row["seconds"]] for row in result["scaling"]["rows"]])
    steps = np.diff(sizes, axis=0)
    exponents = {"fit": result["scaling"]["exponent"], "steepest step": float((steps[:, 1] / steps[:, 0]).max())}
    target("exponent of cost in parameters", 1.05, exponents, judged="fit")
    small, large = (row["num_matvecs"] for row in result["data"])
    target("products on 16 times the data over those on the data", 1.25, {"all": large / small})
    traces = {n: len({x for row in t["safe_lr"].values() for x in row["left_behind"]}) for n, t in tasks.items()}
    target("side effects of safe_lr", 0, traces)
    target("seconds", 720, {"all": result["seconds"]})
    return out


def best_peer(task: dict[str, Any]) -> tuple[str, float] | None:
    """The cheapest peer within 2.5 % of the largest eigenvalue of the function that it evaluates."""
    fit = [(task[n]["gradients"], n) for n in PEERS if n in task and task[n]["own_error"] <= 0.025]
    return min((n, g) for g, n in [min(fit)]) if fit else None


def collect(quick: bool) -> dict[str, Any]:
    """Runs everything and returns the result."""
    started = time.perf_counter()
    peers, skipped = available()
    for name, reason in skipped.items():
        print(f"{name} is skipped: {reason}")
    bar = tqdm(TASKS, unit="network", ncols=100)
    with tempfile.TemporaryDirectory() as folder:
        tasks = {name: compare(name, quick, peers, say=bar.set_postfix_str, folder=Path(folder)) for name in bar}
        for name, used in memory(Path(folder), quick).items():
            tasks[name]["memory_mib"] = used
    result: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "tol": TOL}
    result["seeds"] = list(SEEDS)
    result |= {"tasks": tasks, "skipped": skipped, "scaling": scaling(quick), "data": data_sets(quick)}
    result["seconds"] = time.perf_counter() - started
    result["processor_seconds"] = sum(os.times()[:4])
    return result | {"targets": targets_of(result)}


def table(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    lines = []
    for name, task in result["tasks"].items():
        lines += [
            f"{name}: {task['parameters']:,} parameters, lambda_max {task['lambda_max']:.4g}, "
            f"gamma {task['gamma']:.4g}, a gradient {task['unit_seconds']:.3g} s",
            f"  {'':28}{'error (worst)':>18}{'products':>10}{'gradients (range)':>22}{'counted':>9}{'memory':>8}  "
            "leaves behind",
        ]
        lines.append("  in gradients: " + ", ".join(f"{n} {v:.2f}" for n, v in task["parts"].items()))
        shown = {f"safe_lr {n}": row for n, row in task["safe_lr"].items()}
        shown |= {n: task[n] for n in PEERS if n in task}
        lines += [_line(label, row, task["memory_mib"]) for label, row in shown.items()]
        lines += [
            f"  {n} at 1 % ({row['setting']}): {row['own_error']:.2%}, {row['num_matvecs']} products, "
            f"{row['gradients']:.1f} gradients"
            for n, row in task["at_one_percent"].items()
        ]
        lines += [f"  {n} failed: {why}" for n, why in task["failed"].items()]
    for start in ("cold", "warm"):
        cases = [
            c["upper_over_truth"] for t in result["tasks"].values() for c in t["cases"]
            if c["start"].startswith("warm") == (start == "warm")
        ]  # fmt: skip
        lines.append(f"upper >= truth: {sum(c >= 1 for c in cases)} of {len(cases)} {start}, least {min(cases):.4f}")
    for row in result["scaling"]["rows"]:
        lines.append(f"{row['parameters']:>12,} parameters: {row['seconds']:.4f} s, {row['gradients']:.1f} gradients")
    for row in result["data"]:
        lines.append(
            f"{row['examples']:>12,} examples, batches of {row['batch']}: {row['num_matvecs']:g} products, "
            f"{row['gradients']:.1f} gradients"
        )
    for name, target in result["targets"].items():
        reached = ", ".join(f"{n} {v:.4g}" for n, v in target["reached"].items())
        lines.append(f"{'met   ' if target['met'] else 'MISSED'} {name} ({target['limit']:g}): {reached}")
    return "\n".join(lines)


def _line(label: str, row: dict[str, Any], memories: dict[str, Any]) -> str:
    error = f"{row['error']:.2%} ({row['error_range'][1]:.2%})"
    cost = f"{row['gradients']:.1f} ({row['gradients_range'][0]:.1f}-{row['gradients_range'][1]:.1f})"
    key = "safe_lr_preconditioned" if "preconditioned" in label else label.split()[0]
    counted = f"{row['counted']:.1f}" if "counted" in row else ""
    used = memories.get(key)
    ratio = f"{used / memories['gradient']:.1f}x" if used is not None and memories.get("gradient") else "?"
    traces = ", ".join(row["left_behind"]) or "nothing"
    return (
        f"  {label:28}{error:>18}{row['num_matvecs']:>10g}{cost:>22}{counted:>9}{ratio:>8}  {traces}"
        + (f"; {row['note']}" if "note" in row else "")
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="safe_lr's curvature beside its peers'.")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--quick", action="store_true", help="tiny networks, two start vectors: a smoke test")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of, args.quick)))
        return
    result = collect(args.quick)
    print(table(result))
    save(result, args.json)


if __name__ == "__main__":
    main()
