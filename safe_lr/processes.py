"""How many processes train together."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def count(group: Any = None) -> int:
    """Returns the processes of a group of torch.distributed, 1 where it is not in use.

    Args:
        group: A process group; None for the default one, all processes.

    Example:
        >>> count()  # a plain Python process
        1
    """
    return int(dist.get_world_size(group)) if dist.is_available() and dist.is_initialized() else 1
