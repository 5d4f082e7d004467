"""The demo's task: a small residual network with BatchNorm on Fashion-MNIST, pooled to 14 x 14 pixels.

Everything random comes from a seed, so two runs with one seed see the same initial weights and the same batches; only
what is done to the learning rate tells them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fashion_mnist import FashionMNIST, load
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Residual(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), `width` channels throughout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(inner)))


def make_model(seed: int, width: int = 16) -> nn.Module:
    """Returns the network, 10.9 thousand parameters at the default width, initialised from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Residual(width),
            nn.MaxPool2d(2),
            Residual(width),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(9 * width, 10),
        )


@dataclass(frozen=True)
class Task:
    """Data and length of a run.

    Attributes:
        name: `full` or `subset`.
        where: A sentence that says which data this is.
        train: Pooled images (N, 1, 14, 14) and labels (N,) to train on.
        val: The same, held out.
        batch_size: Examples a batch.
        steps: Optimizer steps of a run.
    """

    name: str
    where: str
    train: Batch
    val: Batch
    batch_size: int
    steps: int

    @property
    def epochs(self) -> float:
        """Passes over the data that a run makes."""
        return self.steps * self.batch_size / len(self.train[0])

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yields batches without end: every epoch a new permutation, the incomplete last batch left out."""
        images, labels = self.train
        generator = torch.Generator().manual_seed(seed)
        while True:
            for index in torch.randperm(len(images), generator=generator).split(self.batch_size):
                if len(index) == self.batch_size:
                    yield images[index], labels[index]

    @torch.no_grad()
    def validate(self, model: nn.Module) -> tuple[float, float]:
        """Returns mean loss and accuracy on the held-out images, in eval mode; the model's mode is put back."""
        was_training = model.training
        model.eval()
        images, labels = self.val
        logits = torch.cat([model(part) for part in images.split(1000)])
        model.train(was_training)
        return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def make_task(source: str = "auto") -> Task:
    """Returns the task on the full set where it is installed (1.9 epochs), else on the committed subset (16 epochs)."""
    data: FashionMNIST = load(source)
    batch_size, steps = (128, 820) if data.source == "full" else (64, 200)
    train = F.avg_pool2d(data.train_images, 2), data.train_labels
    val = F.avg_pool2d(data.val_images, 2), data.val_labels
    return Task(data.source, data.where, train, val, batch_size, steps)
