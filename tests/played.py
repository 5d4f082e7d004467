"""A made-up run for the tests of loggers, and what goes with it."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from safe_lr.decisions import Decision
from safe_lr.loggers import *  # noqa: F403 (for `in_another_process`)
from safe_lr.loggers import Logger


class Quiet:
    """The smallest Logger."""

    def start(self, config: Any) -> None: ...
    def decide(self, decision: Any) -> None: ...
    def step(self, row: Any) -> None: ...
    def close(self, summary: Any) -> None: ...


def play(loggers: list[Logger], steps: int, *, seed: int = 0, first: int = 0, end: bool = True) -> dict[str, Any]:
    """Tells `loggers` of a made-up run: warm-up and cosine, a limit that sinks and swings, a learned margin, failures.

    Returns what it did: `decisions`, `rows`, `capped` (steps), `failures`.
    """
    told: dict[str, Any] = {"decisions": [], "rows": [], "capped": [], "failures": 0}
    rng, margin, cap, limit, gamma, cost = random.Random(seed), 0.5, None, None, None, 0.0
    for logger in loggers:
        logger.start({"bound": "momentum", "margin": "auto", "schedule": "CosineAnnealingLR", "seed": seed})
    lr = 0.0
    for step in range(first, first + steps):
        position = step / (first + steps)
        desired = 3e-3 * min(1.0, position / 0.05) * (0.5 + 0.5 * math.cos(math.pi * position))
        before, action, failure, reason = lr, None, None, ""
        if step % 25 == 0:
            cost += 6.5
            if step % 1000 == 475:
                action, failure = "hold", "loss is nan on the measured batch"
                reason = f"The measurement failed; the last cap {cap or math.nan:.3g} stays."
                told["failures"] += 1
            else:
                gamma = 3e4 * (1 + 9 * position) * math.exp(rng.gauss(0, 0.15)) * (8 if step == 1500 else 1)
                limit = 38.0 / gamma
                learned = min(1.6, margin * 1.05) if rng.random() < 0.6 else max(0.1, margin * 0.8)
                action = "margin" if step % 100 == 0 else "keep"
                margin, cap = learned, learned * limit
                reason = f"Trial loss fell: the margin moves to {margin:.3g} of the limit {limit:.3g}."
        lr = desired if cap is None else min(desired, cap)
        if action in ("keep", "margin") and lr < desired and lr < before:
            action, reason = "cap", f"lr {desired:.3g} is above the cap {cap:.3g} = {margin:.3g} * limit {limit:.3g}."
        elif action == "keep" and lr > before:
            action, reason = "raise", f"The cap rose to {cap:.3g}, and lr with it."
        figures = {
            "lr_limit": limit,
            "cap": cap,
            "margin": margin,
            "utilisation": lr / limit if limit else None,
            "gamma": gamma,
            "beta1": 0.9 + 0.05 * position,
            "beta2": 0.999,
        }
        sharpness = gamma / 2000 if gamma and step % 100 == 0 else None
        if action is not None:
            decision = Decision(
                step, 0, action, reason, desired, before, lr, **figures, lambda_max=sharpness, num_matvecs=5, cost=6.5,
                seconds=0.02, beyond_linear_limit=margin > 1, failure=failure,
            )  # fmt: skip
            told["decisions"].append(decision)
            for logger in loggers:
                logger.decide(decision)
        row = {"step": step, "lr": lr, "lr_desired": desired, "capped": int(lr < desired), "cost": cost, **figures}
        row |= {"lambda_max": sharpness, "p_min": None, "p_eff": None, "lr/g1": lr / 10, "lr_desired/g1": desired / 10}
        told["rows"].append(row)
        told["capped"] += [step] if lr < desired else []
        for logger in loggers:
            logger.step(row)
    summary = {
        "steps": first + steps,
        "capped_steps": len(told["capped"]),
        "first_capped_step": told["capped"][0] if told["capped"] else None,
        "failures": told["failures"],
        "cost": cost,
    }
    for logger in loggers if end else []:
        logger.close(summary)
    return told


def cap_at(step: int, **changes: Any) -> Decision:
    figures = {"utilisation": 0.5, "cap": 0.1, "lr_limit": 0.2, "gamma": 10.0, "num_matvecs": 4, "cost": 5.0} | changes
    return Decision(step, 0, "cap", "lr 1 is above the cap 0.1", 1.0, 1.0, 0.1, 0.5, **figures)


def in_another_process(code: str, *arguments: Any) -> int:
    """Runs code that may use this module's names; returns the exit status."""
    place = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", f"from tests.played import *; {code}", *map(str, arguments)]
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([place, os.environ.get("PYTHONPATH", "")])},
        check=False,
    ).returncode


def lines(path: Path) -> list[dict[str, Any]]:
    """The file's objects; anything that is not JSON, such as NaN, is an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
