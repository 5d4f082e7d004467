"""The networks and data that the curvature benchmarks measure on. All of it installs with the extra `bench`.

mlp         100 k parameters, ReLU          the digits of scikit-learn (8 x 8)
conv_bn     285 k, BatchNorm and ReLU       Fashion-MNIST: all of it where installed, else the subset in `examples/data`
gpt_small   0.8 M, GELU and attention       the standard library's source, byte by byte
gpt_large   5 M, the same                   the same
"""

from __future__ import annotations

import copy
import itertools
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

VOCABULARY = 128  # ASCII; what lies beyond becomes 127
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    causal = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer. Returns logits of shape (batch * length, vocabulary), as `CrossEntropyLoss` takes."""

    def __init__(
        self, *, width: int, depth: int, heads: int, length: int, vocabulary: int = VOCABULARY, tied: bool = False
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():  # GPT-2's
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


@dataclass
class Point:
    """A network in the middle of its training, with the batch that it is measured on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor

    def loss(self) -> Tensor:
        """The loss of the measured batch, with its graph."""
        return nn.functional.cross_entropy(self.model(self.inputs), self.targets)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters."""
        return list(self.model.parameters())

    @property
    def numel(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.params)

    def copy(self) -> Point:
        """A copy that shares nothing but the batch."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        return Point(model, optimizer, self.inputs, self.targets)


@dataclass
class Task:
    """A network to be trained lightly.

    Attributes:
        point: The network, its Adam, and the batch to measure on.
        draw: Draws a batch to train on.
        steps: Updates that "lightly" means.
    """

    point: Point
    draw: Callable[[], Batch]
    steps: int

    def train(self, steps: int) -> None:
        """Makes so many updates."""
        for _ in range(steps):
            inputs, targets = self.draw()
            self.point.optimizer.zero_grad()
            nn.functional.cross_entropy(self.point.model(inputs), targets).backward()
            self.point.optimizer.step()


def mlp(quick: bool = False) -> Task:
    """Digits, batches of 512."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    width = 32 if quick else 280
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return _task(nn.Sequential(*layers), _pick(images, labels, 64 if quick else 512), 20 if quick else 100)


def conv_bn(quick: bool = False) -> Task:
    """Fashion-MNIST, batches of 32, train-mode BatchNorm."""
    from fashion_mnist import load

    data = load()
    widths = (1, 4, 8, 8, 8) if quick else (1, 32, 64, 128, 165)
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        stride = 2 if i in (1, 2) else 1
        layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)]
    return _task(
        nn.Sequential(*layers), _pick(data.train_images, data.train_labels, 16 if quick else 32), 10 if quick else 60
    )


def gpt_small(quick: bool = False) -> Task:
    """8 sequences of 64 bytes."""
    model = GPT(width=16, depth=1, heads=2, length=16) if quick else GPT(width=128, depth=4, heads=4, length=64)
    return _task(model, windows(*((4, 16) if quick else (8, 64))), 10 if quick else 100)


def gpt_large(quick: bool = False) -> Task:
    """4 sequences of 64 bytes."""
    model = GPT(width=24, depth=2, heads=2, length=16) if quick else GPT(width=256, depth=6, heads=8, length=64)
    return _task(model, windows(*((4, 16) if quick else (4, 64))), 10 if quick else 60)


TASKS: dict[str, Callable[[bool], Task]] = {
    "mlp": mlp,
    "conv_bn": conv_bn,
    "gpt_small": gpt_small,
    "gpt_large": gpt_large,
}


def windows(batch: int, length: int, seed: int = 1) -> Callable[[], Batch]:
    """Draws windows of the standard library's source and, as targets, the byte after each."""
    library = Path(sysconfig.get_paths()["stdlib"])
    source = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8).clamp(max=VOCABULARY - 1).long()
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Batch:
        starts = torch.randint(len(text) - length - 1, (batch,), generator=generator)
        drawn = torch.stack([text[s : s + length + 1] for s in starts.tolist()])
        return drawn[:, :-1].contiguous(), drawn[:, 1:].flatten()

    return draw


def _pick(images: Tensor, labels: Tensor, batch: int) -> Callable[[], Batch]:
    generator = torch.Generator().manual_seed(1)

    def draw() -> Batch:
        chosen = torch.randperm(len(images), generator=generator)[:batch]
        return images[chosen], labels[chosen]

    return draw


def _task(model: nn.Module, draw: Callable[[], Batch], steps: int) -> Task:
    return Task(Point(model, torch.optim.Adam(model.parameters(), lr=1e-3), *draw()), draw, steps)
