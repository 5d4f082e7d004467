"""Loss spikes of Adam on a stream that shifts: bare, with safe_lr, with safe_lr and rewind.

    python -m benchmarks.spikes --json docs/results/spikes.json [--seeds 0 1 2] [--lr 0.01 0.03] [--quick]

The task is small, in the style of "Adaptive preconditioners trigger loss spikes in Adam" (arXiv 2506.04805): with
b2 = .999 the second moment forgets slowly, and where gradients have become small it decays for long, until steps are
too large for the curvature. A Zipf-distributed token is embedded; an MLP regresses a random teacher's output. Rare
tokens meet a second moment that has decayed since they were last seen; at half time the tokens' frequencies are
permuted, so that rare ones become common all at once. Batches hold 16 examples, fresh ones each time.

Every run is watched on a fixed probe of 512 examples of the present phase, before each update. A spike begins where
that loss is more than twice its running median (the last 50 updates of the phase; the phase's first 20 are not judged)
and ends when it is below 1.5 times it. Reported beside: the share of updates spent in a spike, the final loss (the
probe's mean over the last 50 updates), and what was dropped and rewound. `--poison` scales the loss of one batch in 400
by 1e4.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import save
from safe_lr import CoherenceGuard, RewindsExhausted

TOKENS, CONTEXT, WIDTH, OUTPUTS = 64, 1, 16, 4
METHODS = ("bare", "safe_lr", "rewind")
WINDOW, UNJUDGED = 50, 20
POISON_EVERY, POISON = 400, 1e4


class Stream:
    """Batches of (tokens, targets), everything from the seed; `phase` 0 before the shift, 1 after it."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.table = torch.randn(TOKENS, WIDTH, generator=generator)
        self.teacher = torch.randn(CONTEXT * WIDTH, OUTPUTS, generator=generator) / (CONTEXT * WIDTH) ** 0.5
        zipf = 1.0 / torch.arange(1, TOKENS + 1)
        self.frequencies = [zipf, zipf[torch.randperm(TOKENS, generator=generator)]]

    def batch(self, index: int, size: int, phase: int) -> tuple[Tensor, Tensor]:
        """Returns batch number `index`, the same for every method."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + index)
        draws = torch.multinomial(self.frequencies[phase], size * CONTEXT, replacement=True, generator=generator)
        tokens = draws.view(size, CONTEXT)
        return tokens, torch.tanh(self.table[tokens].flatten(1) @ self.teacher)


def network(seed: int) -> nn.Module:
    """Returns an embedding under a three-layer MLP."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(TOKENS, WIDTH), nn.Flatten(), nn.Linear(CONTEXT * WIDTH, 64), nn.Tanh(), nn.Linear(64, 64),
        nn.Tanh(), nn.Linear(64, OUTPUTS),
    )  # fmt: skip


@dataclass
class Result:
    """One run.

    Attributes:
        spikes: How often a spike began.
        in_spike: Share of judged updates spent in one.
        final: The probe's mean loss over the last updates; NaN if the run broke down.
        worst: The largest probe loss in units of its running median.
        drops, rewinds: Updates dropped, and times gone back.
        overhead: Gradient evaluations spent on measuring and checking, per update.
        seconds: Wall time of the updates, probing apart.
    """

    method: str
    lr: float
    seed: int
    spikes: int = 0
    in_spike: float = 0.0
    final: float = math.nan
    worst: float = 1.0
    drops: int = 0
    rewinds: int = 0
    overhead: float = 0.0
    seconds: float = 0.0
    gave_up: bool = False


def count_spikes(losses: list[float]) -> tuple[int, int, float]:
    """Returns how many spikes begin, the updates spent in one, and the largest loss in units of the running median.

    Example:
        >>> count_spikes([1.0] * 30 + [3.0, 1.8, 1.2] + [1.0] * 10)
        (1, 2, 3.0)
    """
    begun = inside = 0
    worst, spiking = 1.0, False
    for k in range(UNJUDGED, len(losses)):
        ratio = losses[k] / statistics.median(losses[max(0, k - WINDOW) : k])
        ratio = ratio if math.isfinite(ratio) else math.inf
        now = ratio > (1.5 if spiking else 2.0)
        begun, inside, spiking, worst = begun + (now and not spiking), inside + now, now, max(worst, ratio)
    return begun, inside, worst


def run(method: str, lr: float, seed: int, steps: int, *, poison: bool = False) -> Result:
    """Trains once.

    Args:
        method: "bare", "safe_lr" or "rewind".
        lr: Adam's.
        seed: Of everything.
        steps: Updates; the shift comes after half of them.
        poison: Whether one batch in POISON_EVERY has its loss scaled by POISON.
    """
    torch.set_num_threads(1)
    stream, model, result = Stream(seed), network(seed), Result(method, lr, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.999))
    guard = None if method == "bare" else CoherenceGuard(optimizer, loggers=None, rewind=method == "rewind")
    probes = [stream.batch(-1 - phase, 512, phase) for phase in (0, 1)]
    losses: list[list[float]] = [[], []]
    for step in range(steps):
        phase = int(step >= steps // 2)
        with torch.no_grad():
            losses[phase].append(float(nn.functional.mse_loss(model(probes[phase][0]), probes[phase][1])))
        started = time.perf_counter()
        tokens, targets = stream.batch(step, 16, phase)
        scale = POISON if poison and step % POISON_EVERY == POISON_EVERY // 2 else 1.0

        def loss_of(tokens: Tensor = tokens, targets: Tensor = targets, scale: float = scale) -> Tensor:
            return scale * nn.functional.mse_loss(model(tokens), targets)

        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        if guard is not None:
            guard.observe(loss_of, loss=loss)
        try:
            optimizer.step()
        except RewindsExhausted:
            result.gave_up = True
            break
        result.seconds += time.perf_counter() - started
    judged = sum(max(0, len(part) - UNJUDGED) for part in losses)
    counted = [count_spikes(part) for part in losses]
    result.spikes = sum(begun for begun, _, _ in counted)
    result.in_spike = sum(inside for _, inside, _ in counted) / max(1, judged)
    result.worst = max(worst for _, _, worst in counted)
    result.final = statistics.fmean((losses[1] or losses[0])[-WINDOW:])
    if guard is not None:
        result.overhead = guard.summary().overhead
        if guard.rewinder is not None:
            result.drops, result.rewinds = guard.rewinder.drops, guard.rewinder.rewinds
        guard.close()
    return result


def collect(seeds: list[int], lrs: list[float], steps: int, *, poison: bool) -> dict[str, Any]:
    """Runs everything, the methods in turns on each seed, and prints a line a run."""
    print(f"{'lr':>7}{'seed':>5} {'method':<9}{'spikes':>7}{'in spike':>10}{'worst':>9}{'final':>11}"
          f"{'drops':>7}{'rewinds':>8}{'overhead':>10}{'s':>7}")  # fmt: skip
    rows = []
    for lr in lrs:
        for seed in seeds:
            for method in METHODS:
                r = run(method, lr, seed, steps, poison=poison)
                rows.append(r)
                print(f"{lr:>7.3g}{seed:>5} {method:<9}{r.spikes:>7}{r.in_spike:>10.1%}{r.worst:>9.3g}{r.final:>11.4g}"
                      f"{r.drops:>7}{r.rewinds:>8}{r.overhead:>10.1%}{r.seconds:>7.1f}", flush=True)  # fmt: skip
    means = [_mean([r for r in rows if (r.method, r.lr) == (m, lr)]) for lr in lrs for m in METHODS]
    for mean in means:
        print(f"{mean['lr']:>7.3g} mean {mean['method']:<9}{mean['spikes']:>7.1f}{mean['in_spike']:>10.1%}"
              f"{'':>9}{mean['final']:>11.4g}")  # fmt: skip
    return {"steps": steps, "poison": poison, "runs": [asdict(r) for r in rows], "means": means}


def _mean(rows: list[Result]) -> dict[str, Any]:
    names = ("spikes", "in_spike", "final", "drops", "rewinds", "overhead")
    return {"method": rows[0].method, "lr": rows[0].lr} | {
        name: statistics.fmean(getattr(r, name) for r in rows) for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss spikes on a stream that shifts.")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--poison", action="store_true", help="scale the loss of one batch in 400 by 1e4")
    parser.add_argument("--quick", action="store_true", help="one seed, one lr, 120 steps: a smoke test")
    args = parser.parse_args()
    seeds, lrs, steps = (args.seeds[:1], args.lr[:1], 120) if args.quick else (args.seeds, args.lr, args.steps)
    save(collect(seeds, lrs, steps, poison=args.poison), args.json)


if __name__ == "__main__":
    main()
