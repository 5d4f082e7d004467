"""What every test runs under: one thread, a fixed seed, no display, and W&B offline in a folder of its own."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_scratch = tempfile.TemporaryDirectory(prefix="safe_lr-tests-", ignore_cleanup_errors=True)

# Set before matplotlib or wandb can be imported. Subprocesses inherit them.
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
os.environ |= {f"WANDB_{kind}_DIR": str(Path(_scratch.name, kind.lower())) for kind in ("CONFIG", "CACHE", "DATA")}
os.environ["WANDB_DIR"] = _scratch.name

import torch  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seeds torch's global stream before each test, and puts its thread count and default dtype back after it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the problems are small; two threads only get into each other's way
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT
