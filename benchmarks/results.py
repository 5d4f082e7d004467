"""Writing a benchmark's result where `--json` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save(result: Any, path: Path | None) -> None:
    """Writes the result as JSON and makes the folders on the way; does nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
