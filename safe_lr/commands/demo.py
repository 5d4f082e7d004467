"""`safe-lr demo`: what the package does, in seconds and without data."""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safe_lr.commands.parsers import add_command, add_json, as_json, positive

_SCAN = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_TOO_HIGH = 100.0


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "demo",
        _run,
        brief="see it at work, in seconds",
        about="Trains a small network on what another one puts out: at the best of five lrs, at 100 times that, and\n"
        "the same with safe_lr. Prints the three losses, and writes the record and its report. Needs no data, no\n"
        "account and no GPU. The demo on real images is `make demo`.",
        examples=("demo --out runs/small_demo",),
    )
    parser.add_argument("--out", type=Path, default=Path("runs/small_demo"), help="folder (default runs/small_demo)")
    parser.add_argument("--steps", type=positive, default=300, help="updates in each run (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)


def _run(args: argparse.Namespace) -> None:
    from safe_lr.report import write_report

    record = args.out / "decisions.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)  # a record is continued, a demo begins anew
    scan = {lr: _train(lr, args.steps, args.seed)[0] for lr in _SCAN}
    tuned = min(scan, key=lambda lr: scan[lr])
    high = _TOO_HIGH * tuned
    bare, _ = _train(high, args.steps, args.seed)
    protected, summary = _train(high, args.steps, args.seed, record)
    page = write_report(record, args.out / "report.html")
    if args.json:
        runs = {"tuned": scan[tuned], "unprotected": bare, "protected": protected}
        print(as_json({"lr_tuned": tuned, "lr": high, "losses": runs, "summary": asdict(summary), "report": page}))
        return
    for name, lr, loss in (("tuned", tuned, scan[tuned]), ("unprotected", high, bare), ("protected", high, protected)):
        print(f"{name:<12} lr {lr:<8.3g} loss {loss:.4g}")
    print(summary)
    print(f"The record is in {record}, the report in {page}")


def _train(lr: float, steps: int, seed: int, record: Path | None = None) -> tuple[float, Any]:
    """Returns the loss on fresh samples after a run, and its summary where it is protected (and recorded)."""
    import torch
    from torch import nn

    from safe_lr.scheduler import CoherenceScheduler

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher, model = (nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 4)) for width in (8, 32))
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        scheduler = CoherenceScheduler(optimizer, loggers=None, log_path=record) if record is not None else None

        def loss_on(x: Any) -> Any:
            with torch.no_grad():
                y = teacher(x)
            return nn.functional.mse_loss(model(x), y)

        for _ in range(steps):
            x = torch.randn(64, 16)
            optimizer.zero_grad()
            loss_on(x).backward()
            if scheduler is not None:
                scheduler.observe(functools.partial(loss_on, x))
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        with torch.no_grad():
            loss = float(loss_on(torch.randn(2048, 16)))
    if scheduler is None:
        return loss, None
    scheduler.close()
    return loss, scheduler.summary()
