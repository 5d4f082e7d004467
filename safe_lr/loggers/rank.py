"""Which process writes: one answer for every logger."""

from __future__ import annotations

import os

import torch.distributed


def is_rank_zero() -> bool:
    """Whether this process is the one that keeps records: rank 0 of the job, or the only process there is.

    An initialised `torch.distributed` is asked first. Before that, the variables that launchers set count: `RANK`
    (torchrun), else `SLURM_PROCID` (srun).

    Returns:
        True on rank 0 and outside distributed jobs.

    Example:
        >>> is_rank_zero()  # a plain Python process
        True
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return rank.strip() == "0"
