"""A small network on scikit-learn's digits, as a sweep wants it: settings in, one validation loss out.

    safe-lr sweep run --local examples/sweep.yaml        # no server, no account
    wandb sweep examples/sweep.yaml                      # prints the sweep's id, then:
    wandb agent ENTITY/PROJECT/ID                        # or: safe-lr sweep agent ENTITY/PROJECT/ID
    python examples/sweep.py --safe_lr.margin=0.5 --safe_lr.follow_limit

Under an agent the figures go to W&B; always they are printed as one line of JSON, which a local search reads.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from safe_lr import CoherenceScheduler
from safe_lr.sweeps import arguments, prune

STEPS, BATCH = 300, 64


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns training images and labels, validation images and labels: 1,200 and 597 of 64 pixels."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(digits.target)[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def batches(x: Tensor, y: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches without end, in an order of their own."""
    stream = torch.Generator().manual_seed(seed)
    while True:
        for batch in torch.randperm(len(x), generator=stream).split(BATCH):
            yield x[batch], y[batch]


def train(config: dict[str, Any], *, steps: int = STEPS, run: Any = None) -> dict[str, Any]:
    """Trains once and returns the figures; `run` is a W&B run, if there is one."""
    seed = int(config.get("seed") or 0)
    torch.manual_seed(seed)
    x, y, val_x, val_y = data()
    model, criterion = make_model(), nn.CrossEntropyLoss()
    betas = (config.get("beta1") or 0.9, config.get("beta2") or 0.999)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.get("lr") or 1e-3, betas=betas)
    schedule = None
    if config.get("schedule") == "cosine":
        schedule = CosineAnnealingLR(optimizer, T_max=steps)
    scheduler = CoherenceScheduler(optimizer, schedule, **arguments(config))

    def validate() -> Tensor:
        with torch.no_grad():
            return criterion(model(val_x), val_y)

    for step, (bx, by) in enumerate(batches(x, y, seed)):
        if step == steps:
            break
        loss = criterion(model(bx), by)
        loss.backward()
        scheduler.observe(lambda bx=bx, by=by: criterion(model(bx), by))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if run is not None and step % 50 == 49:
            run.log({"loss": loss.item(), "val_loss": validate().item()})
        if reason := prune(run, scheduler):
            return {"safe_lr_pruned": reason}
    scheduler.close()
    with torch.no_grad():
        accuracy = (model(val_x).argmax(1) == val_y).float().mean().item()
    figures = {"val_loss": validate().item(), "val_accuracy": accuracy}
    if run is not None:
        run.summary.update(figures)
    return figures


def under_wandb() -> None:
    """What a W&B agent calls for each run: `wandb.agent(id, function=under_wandb)`."""
    import wandb

    with wandb.init() as run:
        print(json.dumps(train(dict(run.config), run=run)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("lr", "beta1", "beta2"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--schedule", choices=("constant", "cosine"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--safe_lr.margin", type=float)
    parser.add_argument("--safe_lr.bound", choices=("momentum", "coherence", "lemma1"))
    parser.add_argument("--safe_lr.follow_limit", action="store_true", default=None)  # a switch: present is True
    config = vars(parser.parse_args())
    torch.set_num_threads(1)
    steps = config.pop("steps")
    if "WANDB_SWEEP_ID" in os.environ:  # started by an agent
        import wandb

        with wandb.init(config=config) as run:
            print(json.dumps(train({**config, **dict(run.config)}, steps=steps, run=run)))
    else:
        print(json.dumps(train(config, steps=steps)))


if __name__ == "__main__":
    main()
