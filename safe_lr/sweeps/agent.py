"""W&B's command-line agent, with an exit status that tells how its runs went.

    python -m safe_lr.sweeps.agent [--count N] [ENTITY/PROJECT/]ID

`wandb agent` ends with 0 though every run failed. Here that is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def work(arguments: Sequence[str]) -> int:
    """Runs `wandb agent`, and notes the exit status of each program that it starts.

    Args:
        arguments: Those of `wandb agent`.

    Returns:
        1 where runs were made and all failed, 2 where W&B's command fails (it has said why), else 0.
    """
    from wandb import wandb_agent
    from wandb.cli.cli import cli

    ends: dict[Any, int] = {}
    processes: Any = wandb_agent.AgentProcess
    poll = processes.poll

    def noted(process: Any) -> int | None:
        status: int | None = poll(process)
        if status is not None:
            ends[process] = status
        return status

    processes.poll = noted
    try:
        cli(["agent", *arguments], prog_name="wandb")
    except SystemExit as end:
        if end.code:
            return 2
    finally:
        processes.poll = poll
    # As W&B counts: a negative status is a run that the sweep has stopped.
    return int(bool(ends) and all(status > 0 for status in ends.values()))


if __name__ == "__main__":
    sys.exit(work(sys.argv[1:]))
