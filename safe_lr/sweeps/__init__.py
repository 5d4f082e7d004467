"""Sweeps: configs for W&B, lr ranges without what cannot train, and a search that needs no server."""

from safe_lr.sweeps.ceiling import Ceiling, clip_to_stable, stable_ceiling
from safe_lr.sweeps.checks import check, violations
from safe_lr.sweeps.config import arguments, dump_config, load_config, sweep_config
from safe_lr.sweeps.programs import command_line, load_function, program_of
from safe_lr.sweeps.pruning import prune, unsafe
from safe_lr.sweeps.search import ENGINES, Trial, best, search

__all__ = [
    "ENGINES",
    "Ceiling",
    "Trial",
    "arguments",
    "best",
    "check",
    "clip_to_stable",
    "command_line",
    "dump_config",
    "load_config",
    "load_function",
    "program_of",
    "prune",
    "search",
    "stable_ceiling",
    "sweep_config",
    "unsafe",
    "violations",
]
