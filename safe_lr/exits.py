"""What was left open when the interpreter exits, by its end or by an error, is closed."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Protocol


class Closable(Protocol):
    """What is closed."""

    def close(self) -> None:
        """Ends it; calling it twice does nothing."""


def close_at_exit(owner: Closable) -> None:
    """Closes `owner` when the interpreter exits, if it is alive then.

    Exit hooks run last in, first out. Called at a run's first record, this one runs before W&B's, which finishes the
    run. A process that was forked off leaves its parent's things alone.

    Args:
        owner: Held weakly.

    Example:
        >>> class Door:
        ...     def close(self): print("closed")
        >>> door = Door()
        >>> close_at_exit(door)  # prints when Python ends
    """
    reference, process = weakref.ref(owner), os.getpid()

    def close() -> None:
        alive = reference()
        if alive is not None and os.getpid() == process:
            alive.close()

    atexit.register(close)
    weakref.finalize(owner, atexit.unregister, close).atexit = False
