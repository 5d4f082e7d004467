"""What the graph that autograd made of a loss tells: can it be differentiated twice, and may differences be trusted?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

KINKED = (
    *("Relu", "LeakyRelu", "Prelu", "Rrelu", "Elu", "Hard", "Softshrink", "Threshold", "Abs", "Clamp", "Sgn"),
    *("Sign", "Copysign", "Angle", "Max", "Min", "Fmax", "Fmin", "Amax", "Amin", "Aminmax", "AdaptiveMax"),
    *("FractionalMax", "Cummax", "Cummin", "Topk", "Sort", "Kthvalue", "Median", "Nanmedian", "Mode", "Round"),
    *("Floor", "Ceil", "Trunc", "Frac", "Fmod", "Remainder", "NanToNum", "Renorm", "FakeQuantize"),
    *("ScatterReduce", "IndexReduce", "SegmentReduce", "GridSampler", "Dist", "Cdist", "Pdist", "L1Loss"),
    *("MultiMargin", "MultilabelMargin", "NotImplemented"),
)  # fmt: skip
"""How nodes begin in whose derivative there are jumps: differences across them are not derivatives."""

OPENED = "ThresholdBackwardBackward0"
"""The node of what `kinks.Kinks` puts in a ReLU's place. A loss that differentiates inside has it too, beside ReLU's
own."""

FUSED = frozenset({"MkldnnRnnLayerBackward0"})
"""Nodes of kernels that are fused up to the first derivative alone. Through oneDNN's LSTM (torch's on the CPU) the
graph takes 2-4 gradients and a product 4-7."""

CONVERSION = "ToCopyBackward0"
"""A node between two dtypes or devices: under autocast gradients are rounded to half precision."""


def hides_parameters(loss: Tensor) -> bool:
    """Whether a reentrant checkpoint lies in the graph: `autograd.grad` takes the parameters inside for unused."""
    return "CheckpointFunctionBackward" in _kinds(loss)


def smooth(loss: Tensor, since: int = 0) -> bool:
    """Whether differences of the gradient can be trusted, as far as the loss's graph tells.

    It must consist of torch's own operations, without kinks and without conversions of dtype, and be made anew by each
    evaluation: what was computed before the closure was called would not follow the parameters as they are moved.

    Args:
        loss: With its graph.
        since: `graph_time()` before it was evaluated.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> [smooth(f(x).sum()) for f in (torch.tanh, torch.relu)]
        [True, False]
        >>> before, y, now = graph_time(), torch.tanh(x), graph_time()
        >>> smooth(y.sum(), before), smooth(y.sum(), now)
        (True, False)
    """
    for node in _nodes(loss):
        name = type(node).__name__
        if name in ("AccumulateGrad", OPENED):
            continue
        if isinstance(node, BackwardCFunction) or "::" in name or name == CONVERSION or name.startswith(KINKED):
            return False
        if node._sequence_nr() < since:
            return False
    return True


def size(loss: Tensor) -> int:
    """Returns how many numbers a loss's graph hands on: parameters and what is made of them. Work grows with it.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> size((2 * x).sum())                                            # x, 2 x, and the sum
        7
    """
    made = [made.shape for node in _nodes(loss) for made in getattr(node, "_input_metadata", ())]
    return sum(math.prod(n for n in shape if isinstance(n, int)) for shape in made)  # jagged sizes are symbols


def graph_time() -> int:
    """Returns a number that no node made before has reached: nodes are numbered as they are made, thread by thread."""
    probe = torch.zeros((), requires_grad=True)
    return int((probe * 1).grad_fn._sequence_nr()) + 1  # type: ignore[union-attr]


def slow_to_differentiate_twice(loss: Tensor) -> bool:
    """Whether a kernel of FUSED lies in the loss's graph."""
    return not FUSED.isdisjoint(_kinds(loss))


def once_differentiable(gradients: Iterable[Tensor]) -> bool:
    """Whether a function in some gradients' graph is marked so: torch would leave its part of H out, without a word."""
    return "Error" in _kinds(*gradients)


def _kinds(*tensors: Tensor) -> set[str]:
    """The kinds of nodes in some tensors' graph."""
    return {type(node).__name__ for node in _nodes(*tensors)}


def _nodes(*tensors: Tensor) -> Iterator[Any]:
    """The nodes of some tensors' graph."""
    seen, stack = set(), [tensor.grad_fn for tensor in tensors]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [parent for parent, _ in node.next_functions]
