"""What `benchmarks/lr_robustness.py` trains: seven small tasks and seven optimizers, everything from seeds.

Each run sees each example at most once (text: a random window each time), so the loss on a training batch, taken
before the update, is a loss on fresh data. One step takes 3-25 ms on one core.

cnn         residual CNN with BatchNorm and ReLU      Fashion-MNIST, pooled to 14 x 14
resnet      residual CNN with GroupNorm and SiLU      the same
vit         transformer on 49 patches                 the same
gpt         decoder-only transformer                  the standard library's source, byte by byte
lstm        two-layer LSTM                            the same
teacher     MLP, squared error                        a random teacher network with unlimited samples
lora        rank 4 beside a frozen MLP                that MLP was trained upright, the images here lie on their side
"""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from benchmarks.networks import GPT, Block

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One training problem.

    Attributes:
        name: Its key.
        make_model: seed -> initialised model.
        batches: (seed, batch size) -> endless fresh batches.
        loss: (outputs, targets) -> scalar.
        held_out: A batch that is never trained on.
        batch_size: Examples a step.
        optimizers: Those that the matrix runs on it.
    """

    name: str
    make_model: Callable[[int], nn.Module]
    batches: Callable[[int, int], Iterator[Batch]]
    loss: Callable[[Tensor, Tensor], Tensor]
    held_out: Callable[[], Batch]
    batch_size: int
    optimizers: tuple[str, ...]


# ---- data


@functools.cache
def images() -> tuple[Batch, Batch]:
    """Returns Fashion-MNIST for training and held out, pooled to 14 x 14; the committed subset where that is all."""
    from fashion_mnist import load

    data = load("auto")
    return (_pooled(data.train_images), data.train_labels), (_pooled(data.val_images), data.val_labels)


def _pooled(pictures: Tensor) -> Tensor:
    return F.avg_pool2d(pictures, 2) if pictures.shape[-1] == 28 else pictures


def image_batches(seed: int, size: int, *, turned: bool = False) -> Iterator[Batch]:
    """Yields images and labels, every epoch in a new order; `turned` by a quarter."""
    (x, y), _ = images()
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        for chosen in torch.randperm(len(x), generator=generator).split(size):
            if len(chosen) == size:
                yield (x[chosen].rot90(1, (2, 3)) if turned else x[chosen]), y[chosen]


def held_out_images(*, turned: bool = False) -> Batch:
    """Returns 1,000 images that are never trained on."""
    x, y = images()[1]
    return (x[:1000].rot90(1, (2, 3)) if turned else x[:1000]), y[:1000]


@functools.cache
def text() -> tuple[Tensor, Tensor]:
    """Returns two stretches of the standard library's source as ASCII codes; the second is never trained on."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise SystemExit("the standard library's source is not installed: gpt and lstm cannot run")
    codes = (
        torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long().clamp(max=127)
    )
    cut = int(0.9 * len(codes))
    return codes[:cut], codes[cut:]


def text_batches(seed: int, size: int, *, length: int) -> Iterator[Batch]:
    """Yields random windows and what comes next."""
    codes, _ = text()
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        starts = torch.randint(len(codes) - length - 1, (size,), generator=generator)
        windows = torch.stack([codes[s : s + length + 1] for s in starts])
        yield windows[:, :-1], windows[:, 1:].reshape(-1)


def held_out_text(*, length: int) -> Batch:
    """Returns 64 windows that are never trained on."""
    codes = text()[1]
    starts = torch.randint(len(codes) - length - 1, (64,), generator=torch.Generator().manual_seed(77))
    windows = torch.stack([codes[s : s + length + 1] for s in starts])
    return windows[:, :-1], windows[:, 1:].reshape(-1)


TEACHER_INPUTS = 32


@functools.cache
def teacher() -> nn.Module:
    """Returns the network to be imitated: outputs of about unit variance, inputs of unequal scale."""
    net = _seeded(lambda: nn.Sequential(nn.Linear(TEACHER_INPUTS, 64), nn.Tanh(), nn.Linear(64, 4)), 4242)
    with torch.no_grad():
        net[0].weight.mul_(3.0)
        net[2].weight.mul_(3.0)
    return net.requires_grad_(False)


def teacher_batches(seed: int, size: int) -> Iterator[Batch]:
    """Yields normal inputs and the teacher's noisy answers, without end."""
    generator = torch.Generator().manual_seed(1000 + seed)
    scales = torch.logspace(0, -1, TEACHER_INPUTS)
    while True:
        x = torch.randn(size, TEACHER_INPUTS, generator=generator) * scales
        y = teacher()(x)
        yield x, y + 0.1 * torch.randn(y.shape, generator=generator)


# ---- models


class Residual(nn.Module):
    """act(x + norm(conv(act(norm(conv(x))))))."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module], act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2, self.act = norm(width), norm(width), act

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.norm1(self.conv1(x)))
        return self.act(x + self.norm2(self.conv2(inner)))


def convolutional(norm: Callable[[int], nn.Module], act: type[nn.Module], width: int = 8) -> nn.Module:
    """Returns two residual blocks with pooling between them."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        norm(width),
        act(),
        Residual(width, norm, act()),
        nn.MaxPool2d(2),
        Residual(width, norm, act()),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(9 * width, 10),
    )


class ViT(nn.Module):
    """A transformer encoder on patches of 2 x 2 of a 14 x 14 image; the mean token is classified."""

    def __init__(self, width: int = 32, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(49, width))
        self.blocks = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens).mean(1)))


class Encoder(Block):
    """A transformer block whose attention looks both ways."""

    causal = False


class CharLSTM(nn.Module):
    """Embedding, two LSTM layers, head; logits of shape (batch * length, 128)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(128, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(x))[0]).flatten(0, 1)


class LoRA(nn.Module):
    """frozen(x) + B A x, A random and B zero at first (Hu et al. 2021)."""

    def __init__(self, frozen: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.frozen = frozen
        self.a = nn.Parameter(torch.randn(rank, frozen.in_features) / frozen.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + x @ self.a.T @ self.b.T


def perceptron() -> nn.Sequential:
    """Returns the MLP that LoRA is put beside."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(196, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    )


@functools.cache
def pretrained() -> dict[str, Tensor]:
    """Returns the weights of that MLP after 300 steps of Adam on upright images."""
    net = _seeded(perceptron, 7)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _, (x, y) in zip(range(300), image_batches(7, 128), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.state_dict()


def adapted() -> nn.Module:
    """Returns the pretrained MLP, frozen, with an adapter beside each layer."""
    net = perceptron()
    net.load_state_dict(pretrained())
    net.requires_grad_(False)
    return nn.Sequential(*(LoRA(layer) if isinstance(layer, nn.Linear) else layer for layer in net))


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _maker(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    return functools.partial(_seeded, make)


def _student() -> nn.Module:
    return nn.Sequential(nn.Linear(TEACHER_INPUTS, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 4))


_images = {"batches": image_batches, "loss": F.cross_entropy, "held_out": held_out_images}
_turned = {
    "batches": functools.partial(image_batches, turned=True),
    "held_out": functools.partial(held_out_images, turned=True),
    "loss": F.cross_entropy,
}


def _text(length: int) -> dict[str, Callable[..., object]]:
    return {
        "batches": functools.partial(text_batches, length=length),
        "held_out": functools.partial(held_out_text, length=length),
        "loss": F.cross_entropy,
    }


TASKS = {
    task.name: task
    for task in (
        Task("cnn", _maker(lambda: convolutional(nn.BatchNorm2d, nn.ReLU)), **_images, batch_size=128,
             optimizers=("adam", "sgd")),
        Task("resnet", _maker(lambda: convolutional(lambda width: nn.GroupNorm(4, width), nn.SiLU)), **_images,
             batch_size=64, optimizers=("sgd", "nadam")),
        Task("vit", _maker(ViT), **_images, batch_size=32, optimizers=("adamw", "muon")),
        Task("gpt", _maker(lambda: GPT(width=32, depth=2, heads=4, length=64)), **_text(64), batch_size=16,
             optimizers=("adam", "rmsprop", "muon")),
        Task("lstm", _maker(CharLSTM), **_text(32), batch_size=16, optimizers=("nadam", "adagrad")),
        Task("teacher", _maker(_student), batches=teacher_batches, loss=F.mse_loss,
             held_out=lambda: next(teacher_batches(-900, 1000)), batch_size=128, optimizers=("rmsprop", "adagrad")),
        Task("lora", _maker(adapted), **_turned, batch_size=128, optimizers=("adam", "adamw")),
    )
}  # fmt: skip


# ---- optimizers


def _muon(model: nn.Module, lr: float) -> list[Optimizer]:
    """Muon on the blocks' matrices, AdamW on the rest, one lr: that is what match_rms_adamw is for."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks")]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    return [torch.optim.Muon(hidden, lr=lr, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(others, lr=lr)]


def _one(make: Callable[..., Optimizer], **options: float) -> Callable[[nn.Module, float], list[Optimizer]]:
    return lambda model, lr: [make([p for p in model.parameters() if p.requires_grad], lr=lr, **options)]


OPTIMIZERS: dict[str, Callable[[nn.Module, float], list[Optimizer]]] = {
    "sgd": _one(torch.optim.SGD, momentum=0.9),
    "adam": _one(torch.optim.Adam),
    "adamw": _one(torch.optim.AdamW),
    "rmsprop": _one(torch.optim.RMSprop),
    "adagrad": _one(torch.optim.Adagrad),
    "nadam": _one(torch.optim.NAdam),
    "muon": _muon,
}
"""Name -> the optimizers of one run, all at that lr."""

USUAL = {"sgd": -2, "adam": -5, "adamw": -5, "rmsprop": -6, "adagrad": -3, "nadam": -5, "muon": -4}
"""Where the search for the best lr begins, in half decades: lr = 10 ** (k / 2)."""
