"""What logging costs, and what a failing W&B server does to a run.

    python -m benchmarks.logging --json docs/results/logging.json

**Cost.** Two runs of one small network, one with a logger and one without, take turns in blocks of ten steps. A block's
cost is the difference of their times; the median over the blocks is what a step costs in the long run. The first
blocks, in which some loggers send every step, are told apart. Work that a logger leaves to other threads falls on both
runs.

**Failures.** A W&B server on loopback fails in each way and at each point of a run of the logger's own, and of one that
the user has opened and logs to (whose opening is the user's affair); the run is compared with one that has no W&B: how
much later it ends, whether its weights are the same to the bit, whether its JSONL record is complete. `later` is the
time until `scheduler.close()`, and the user's own `finish()` after it, have returned, `exit` until the process is gone.
A user's `finish()` waits as long as W&B's `finish_timeout` says, in a run without safe_lr too: a second here.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.results import save
from safe_lr import (
    CoherenceScheduler,
    ConsoleLogger,
    JsonlLogger,
    Logger,
    TensorBoardLogger,
    TrackioLogger,
    WandbLogger,
)
from safe_lr.loggers import read_jsonl
from tests.wandb_server import FAILURES, WandbServer

AIM_MS, AIM_DELAY = 0.3, 5.0
BLOCK, FIRST = 10, 10  # steps a block; blocks counted as the beginning
WHENS = {"logger": ("init", "mid-run", "finish"), "user": ("mid-run", "finish")}  # by who has opened the run
FINISH = 1.0  # the user's finish_timeout, seconds
_SETTINGS = {"console": "off", "disable_git": True, "x_disable_stats": True, "silent": True}


class Training:
    """A small network that trains under a scheduler, the same every time."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10))
        self.inputs, self.targets = torch.randn(64, 32), torch.randint(10, (64,))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.scheduler = CoherenceScheduler(self.optimizer, **options)

    def loss(self) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(self.inputs), self.targets)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.scheduler.observe(self.loss)
        self.optimizer.step()
        self.scheduler.step()

    def digest(self) -> str:
        """A hash of the weights' bits."""
        bits = b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())
        return hashlib.sha256(bits).hexdigest()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# ---- cost


@contextmanager
def _wandb(folder: Path) -> Iterator[Logger]:
    import wandb

    with WandbServer() as server:
        os.environ.update(server.environment())
        run = wandb.init(project="cost", dir=folder, settings=wandb.Settings(**_SETTINGS))
        yield WandbLogger(run)
        run.finish()
        wandb.teardown()


@contextmanager
def _plain(logger: Logger) -> Iterator[Logger]:
    yield logger


def _trackio(folder: Path) -> TrackioLogger:
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when trackio is imported
    return TrackioLogger()


LOGGERS: dict[str, Callable[[Path], Any]] = {
    "none": lambda folder: _plain(None),  # type: ignore[arg-type] (the pairs' own noise)
    "jsonl": lambda folder: _plain(JsonlLogger(folder / "cost.jsonl")),
    "console": lambda folder: _plain(ConsoleLogger(stream=_Terminal())),
    "tensorboard": lambda folder: _plain(TensorBoardLogger(folder / "tensorboard")),
    "trackio": lambda folder: _plain(_trackio(folder)),
    "wandb": _wandb,
}


def cost(name: str, blocks: int, folder: Path) -> dict[str, Any]:
    """Returns one logger's cost in milliseconds a step, or why it could not be had."""
    try:
        with redirect_stdout(io.StringIO()), LOGGERS[name](folder) as logger:
            return _paired(logger, blocks)
    except ImportError as error:
        return {"missing": str(error)}


def _paired(logger: Logger | None, blocks: int) -> dict[str, Any]:
    trained = [Training(loggers=logger), Training(loggers=None)]
    differences = []
    for block in range(blocks):
        times = {}
        for index in (0, 1) if block % 2 else (1, 0):
            begun = time.perf_counter()
            for _ in range(BLOCK):
                trained[index].step()
            times[index] = time.perf_counter() - begun
        differences.append(1e3 * (times[0] - times[1]) / BLOCK)
    begun = time.perf_counter()
    for training in trained:
        training.scheduler.close()
    assert trained[0].digest() == trained[1].digest(), "a logger has changed the weights"
    low, median, high = statistics.quantiles(differences[FIRST:], n=4)
    first = statistics.median(differences[:FIRST])
    return {"ms": median, "quartiles": [low, high], "first_ms": first, "close_s": time.perf_counter() - begun}


# ---- failures


def child(folder: Path, steps: int, url: str | None, owner: str, when: str, mode: str) -> dict[str, Any]:
    """Trains once in this process; the server at `url` is told to fail at that point."""

    def fail_at(point: str) -> None:
        if url is not None and when == point and mode != "none":
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/_fail/{mode}").read()

    torch.set_num_threads(1)
    path = folder / "run.jsonl"
    run = _users_run() if url is not None and owner == "user" else None
    fail_at("init")
    begun = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loggers: list[Logger] = [JsonlLogger(path, every=1)]
        loggers += [] if url is None else [WandbLogger(init=run is None, jsonl=path)]
        training = Training(loggers=loggers)
        for step in range(steps):
            if step == steps // 2:
                fail_at("mid-run")
            training.step()
            if run is not None:
                run.log({"loss": float(step)}, step=step)
        fail_at("finish")
        training.scheduler.close()
        if run is not None:
            run.finish()
    ended = {"seconds": time.perf_counter() - begun, "ended": time.time(), "weights": training.digest()}
    ours = [str(item.message) for item in caught if "W&B" in str(item.message)]  # the client's libraries warn too
    return {**ended, "warnings": ours}


def _users_run() -> Any:
    import wandb

    return wandb.init(project="theirs", settings=wandb.Settings(**_SETTINGS, finish_timeout=FINISH))


def spawn(
    folder: Path,
    steps: int,
    server: WandbServer | None = None,
    *,
    owner: str = "",
    when: str = "",
    mode: str = "none",
) -> dict[str, Any]:
    """Runs `child` in a process of its own; adds how long the process took to be gone, and what its record holds."""
    folder.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    places = ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR")
    environment |= {f"WANDB_{place}": str(folder) for place in places} | (server.environment() if server else {})
    arguments = [str(folder), str(steps), server.url if server else "", owner, when, mode]
    command = [sys.executable, "-m", "benchmarks.logging", "--child", *arguments]
    with (folder / "printed").open("w+") as printed:  # no pipe: W&B's service would hold it open after the process
        done = subprocess.run(
            command, env=environment, cwd=Path(__file__).parents[1], stdout=printed, stderr=printed, timeout=170
        )
        gone = time.time()
        printed.seek(0)
        text = printed.read()
    if done.returncode:
        raise RuntimeError(f"{owner}, {when}, {mode}: {text[-2000:]}")
    found: dict[str, Any] = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    records = read_jsonl(folder / "run.jsonl")
    # What a decision took of the clock differs from run to run; all else must not.
    decisions = [{**d.to_dict(), "seconds": 0.0} for d in records.decisions]
    whole = len(records.rows) == steps and records.summary is not None and not records.unreadable
    return {**found, "exit": gone - found["ended"], "whole": whole, "decisions": decisions}


def failure(owner: str, when: str, mode: str, steps: int, folder: Path, plain: dict[str, Any]) -> dict[str, Any]:
    """Returns how a run under a failing server differs from one without W&B."""
    with WandbServer() as server:
        run = spawn(folder / f"{owner}-{when}-{mode}", steps, server, owner=owner, when=when, mode=mode)
    return {
        "owner": owner,
        "when": when,
        "mode": mode,
        "later_s": run["seconds"] - plain["seconds"],
        "exit_s": run["exit"] - plain["exit"],
        "same_weights": run["weights"] == plain["weights"],
        "whole_record": run["whole"] and run["decisions"] == plain["decisions"],
        "warnings": len(run["warnings"]),
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| logger | ms a step | quartiles | first 100 steps | close, s |", "| --- " * 5 + "|"]
    for name, row in result["cost"].items():
        figures = row.get("missing") or (
            f"{row['ms']:.3f} | {row['quartiles'][0]:.3f} .. {row['quartiles'][1]:.3f} | {row['first_ms']:.3f} | "
            f"{row['close_s']:.2f}"
        )
        lines.append(f"| {name} | {figures} |")
    lines += [
        "",
        "| run of the | W&B fails | with | ends later, s | gone later, s | same weights | whole record | warnings |",
    ]
    lines.append("| --- " * 8 + "|")
    for row in result["failures"]:
        same, whole = ("yes" if row[name] else "NO" for name in ("same_weights", "whole_record"))
        delays = f"{row['later_s']:.2f} | {row['exit_s']:.2f}"
        lines.append(
            f"| {row['owner']} | {row['when']} | {row['mode']} | {delays} | {same} | {whole} | {row['warnings']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--quick", action="store_true", help="few steps, one failure: a smoke test")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, steps, url, owner, when, mode = options.child
        print(json.dumps(child(Path(folder), int(steps), url or None, owner, when, mode)))
        return
    torch.set_num_threads(1)
    steps, blocks = (60, 20) if options.quick else (300, 150)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ |= {"WANDB_SILENT": "true", **{f"WANDB_{kind}_DIR": name for kind in ("CONFIG", "CACHE", "DATA")}}
        costs = {logger: cost(logger, blocks, folder) for logger in LOGGERS}
        plain = spawn(folder / "plain", steps)
        points = [(owner, when, mode) for owner, whens in WHENS.items() for when in whens for mode in FAILURES]
        well = [(owner, "never", "none") for owner in WHENS]
        points = [("logger", "finish", "500")] if options.quick else [*well, *points]
        failures = [failure(*point, steps, folder, plain) for point in points]  # one at a time: it is timed
    worst = max(row.get("ms", 0.0) for row in costs.values())
    sick = [row for row in failures if row["mode"] != "none"]
    latest = max(row["later_s"] + row["exit_s"] for row in sick)
    sound = all(row["same_weights"] and row["whole_record"] for row in sick)
    aims = {"ms a step": AIM_MS, "worst": worst, "delay, s": AIM_DELAY, "latest": latest, "nothing changed": sound}
    met = worst <= AIM_MS and latest <= AIM_DELAY and sound
    result = {"quick": options.quick, "aim": {**aims, "met": met}, "cost": costs, "failures": failures}
    save(result, options.json)
    print(table(result))


if __name__ == "__main__":
    main()
