"""Optional packages: imported where they are used, and missed with a line that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType


def extra(module: str, name: str) -> ModuleType:
    """Returns an optional module.

    Args:
        module: Its dotted name.
        name: The extra of safe_lr that brings it.

    Raises:
        ImportError: It is not installed.

    Example:
        >>> extra("no_such_module", "console")
        Traceback (most recent call last):
        ImportError: no_such_module is not installed: pip install 'safe_lr[console]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise ImportError(f"{missing} is not installed: pip install 'safe_lr[{name}]'", name=missing) from error
