"""What measuring costs on a GPU: a GPT of 124 M parameters in bf16 autocast, on whatever CUDA device is there.

    python -m benchmarks.gpu --json docs/results/gpu.json [--batch 8] [--steps 1000]
    python -m benchmarks.gpu --device cpu --quick          the same code on a tiny GPT: a smoke test

* product, graph: measurements of 4 and of 8 products are timed in turns; the difference per product, and what is left
  of the first without its 4, both over the time of one loss and gradient of the same batch.
* synchronisations: what `torch.cuda.set_sync_debug_mode` warns of during a measurement. Not known on other devices.
* memory: peak of what torch allocated above that before the call.
* overhead: two copies of one run, bare and with a `CoherenceScheduler`, advance in turns of some steps.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

from benchmarks.networks import GPT, Batch, windows
from benchmarks.results import save
from safe_lr import CoherenceScheduler
from safe_lr.ensemble import Ensemble
from safe_lr.measurement import Measurement, measure_step
from safe_lr.movers import movers, shares
from safe_lr.settings import Settings

FEW, MANY = 4, 8  # products of the two measurements that are compared


@dataclass(frozen=True)
class Shape:
    """Sizes of a run."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    length: int = 1024
    vocabulary: int = 50_304
    batch: int = 8
    steps: int = 1000
    turn: int = 50  # steps of one run before the other's turn
    repeats: int = 5


QUICK = Shape(width=32, depth=2, heads=2, length=32, vocabulary=128, batch=4, steps=20, turn=5, repeats=2)


class Run:
    """A GPT with AdamW, linear warm-up and cosine decay, protected or not."""

    def __init__(self, shape: Shape, device: torch.device, *, protected: bool) -> None:
        torch.manual_seed(0)
        model = GPT(
            width=shape.width, depth=shape.depth, heads=shape.heads, length=shape.length,
            vocabulary=shape.vocabulary, tied=True,
        )  # fmt: skip
        self.model, self.device = model.to(device), device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
        warm = max(1, shape.steps // 10)

        def schedule(optimizer: torch.optim.Optimizer) -> SequentialLR:
            up = LinearLR(optimizer, 0.01, total_iters=warm)
            return SequentialLR(optimizer, [up, CosineAnnealingLR(optimizer, shape.steps - warm)], [warm])

        self.scheduler: Any = (
            CoherenceScheduler(self.optimizer, schedule, loggers=None) if protected else schedule(self.optimizer)
        )
        self.protected = protected

    def loss(self, batch: Batch) -> Tensor:
        """The loss in bf16 autocast, with its graph."""
        inputs, targets = batch
        with torch.autocast(self.device.type, torch.bfloat16):
            return nn.functional.cross_entropy(self.model(inputs), targets)

    def step(self, batch: Batch) -> None:
        """One update."""
        self.loss(batch).backward()
        if self.protected:
            self.scheduler.observe(lambda: self.loss(batch))
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def measure(self, batch: Batch, products: int) -> Measurement:
        """A measurement of exactly so many products."""
        ensemble = Ensemble(self.optimizer)
        lrs, initial = ([float(g[key]) for g in ensemble.param_groups] for key in ("lr", "initial_lr"))
        moving = movers(ensemble, shares(lrs, initial)[1])
        found = measure_step(moving, lambda: self.loss(batch), Settings(tol=1e-12, max_matvecs=products, cautious=True))
        if found.failure:
            raise RuntimeError(f"the measurement failed: {found.failure}")
        return found


def wait(device: torch.device) -> None:
    """Returns when the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, call: Callable[[], Any]) -> float:
    """Wall time of a call, the device's work included."""
    wait(device)
    started = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - started


@contextlib.contextmanager
def synchronisations(device: torch.device) -> Iterator[list[str]]:
    """Collects where the host waits for a CUDA device; stays empty on other devices."""
    seen: list[str] = []
    if device.type != "cuda":
        yield seen
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seen += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]


def peak_mib(device: torch.device, call: Callable[[], Any]) -> float | None:
    """Peak memory during a call above that before it; None but on CUDA."""
    if device.type != "cuda":
        call()
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def one_measurement(run: Run, batch: Batch, shape: Shape) -> dict[str, Any]:
    """Cost, synchronisations and memory of a single measurement."""
    device = run.device

    def gradient() -> None:
        torch.autograd.grad(run.loss(batch), list(run.model.parameters()))

    gradient()
    found = run.measure(batch, FEW)
    units, few, many = [], [], []
    for _ in range(shape.repeats):
        units.append(seconds(device, gradient))
        few.append(seconds(device, lambda: run.measure(batch, FEW)))
        many.append(seconds(device, lambda: run.measure(batch, MANY)))
    unit = statistics.median(units)
    product = (statistics.median(many) - statistics.median(few)) / (MANY - FEW)
    with synchronisations(device) as in_few:
        run.measure(batch, FEW)
    with synchronisations(device) as in_many:
        run.measure(batch, MANY)
    on_cuda = device.type == "cuda"
    return {
        "hvp": found.hvp,
        "gradient_seconds": unit,
        "measurement_gradients": statistics.median(few) / unit,
        "product_gradients": product / unit,
        "rest_gradients": (statistics.median(few) - FEW * product) / unit,
        "synchronisations": {
            "per_measurement": len(in_few) if on_cuda else None,
            "per_product": (len(in_many) - len(in_few)) / (MANY - FEW) if on_cuda else None,
            "where": {place: in_few.count(place) for place in sorted(set(in_few))},
        },
        "memory_mib": {
            "gradient": peak_mib(device, gradient),
            "measurement": peak_mib(device, lambda: run.measure(batch, FEW)),
            "parameters": sum(p.numel() * p.element_size() for p in run.model.parameters()) / 2**20,
        },
    }


def overhead(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Time of a protected run over that of the same run bare, in turns."""
    runs = {"bare": Run(shape, device, protected=False), "protected": Run(shape, device, protected=True)}
    draws = {name: _draw(shape, device) for name in runs}
    spent, last = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0.0)
    for run in runs.values():  # kernels are chosen and memory is reserved outside the account
        torch.autograd.grad(run.loss(_draw(shape, device)()), list(run.model.parameters()))
    for _ in tqdm(range(shape.steps // shape.turn), unit="turn", ncols=100):
        for name, run in runs.items():
            batches = [draws[name]() for _ in range(shape.turn)]
            spent[name] += seconds(device, lambda run=run, batches=batches: [run.step(b) for b in batches])
            with torch.no_grad():
                last[name] = float(run.loss(batches[-1]))
    summary = runs["protected"].scheduler.summary()
    return {
        "steps": shape.steps,
        "seconds": spent,
        "overhead": spent["protected"] / spent["bare"] - 1,
        "measurements": summary.measurements,
        "num_matvecs": summary.num_matvecs,
        "final_loss": last,
    }


def _draw(shape: Shape, device: torch.device) -> Callable[[], Batch]:
    draw = windows(shape.batch, shape.length)

    def moved() -> Batch:
        inputs, targets = draw()
        return inputs.to(device), targets.to(device)

    return moved


def collect(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Runs everything and returns the result."""
    run = Run(shape, device, protected=False)
    draw = _draw(shape, device)
    for _ in range(min(20, shape.steps)):
        run.step(draw())
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens": shape.batch * shape.length,
        **one_measurement(run, draw(), shape),
    }
    del run
    return result | {"run": overhead(shape, device)}


def table(result: dict[str, Any]) -> str:
    """Returns the result as text."""
    waits, used, run = result["synchronisations"], result["memory_mib"], result["run"]

    def mib(name: str) -> str:
        return "not known" if used[name] is None else f"{used[name]:,.0f} MiB"

    known = waits["per_measurement"] is not None
    return "\n".join([
        f"{result['device']}, torch {result['torch']}: GPT of {result['parameters']:,} parameters, bf16 autocast, "
        f"{result['tokens']:,} tokens a batch, hvp {result['hvp']}",
        f"one loss and gradient          {result['gradient_seconds'] * 1e3:.1f} ms",
        f"a product                      {result['product_gradients']:.2f} gradients",
        f"a measurement of {FEW} products    {result['measurement_gradients']:.2f} gradients "
        f"({result['rest_gradients']:.2f} beside the products)",
        "synchronisations               "
        + (f"{waits['per_measurement']}, {waits['per_product']:.2f} a product" if known else "not known here"),
        f"peak memory of a gradient      {mib('gradient')}; of a measurement {mib('measurement')}; "
        f"the parameters take {mib('parameters')}",
        f"overhead of {run['steps']:,} steps       {run['overhead']:+.1%} ({run['measurements']} measurements, "
        f"{run['num_matvecs']} products; {run['seconds']['bare']:.1f} s bare)",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="What measuring costs on a GPU.")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--device", default="cuda", help="cuda (the default), cuda:1, or cpu with --quick")
    parser.add_argument("--batch", type=int, default=Shape.batch, help="sequences of 1,024 tokens in a batch")
    parser.add_argument("--steps", type=int, default=Shape.steps)
    parser.add_argument("--quick", action="store_true", help="a tiny GPT, 20 steps: a smoke test")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there; `--device cpu --quick` runs the same code on a tiny GPT")
    shape = QUICK if args.quick else Shape(batch=args.batch, steps=args.steps)
    result = collect(shape, device)
    print(table(result))
    save(result, args.json)


if __name__ == "__main__":
    main()
