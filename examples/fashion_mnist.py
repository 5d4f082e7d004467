"""Fashion-MNIST: all of it where it is installed, else the 1,000 images that come with this repository.

The full set is looked for in the folder that `SAFE_LR_FASHION_MNIST` names, then where Debian's package
`dataset-fashion-mnist` puts it. Both hold the four gzip IDX files under their original names.

Fashion-MNIST is Copyright (c) 2017 Zalando SE, MIT licence (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747).
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SUBSET = Path(__file__).parent / "data" / "fashion_mnist_1000.npz"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

# The last 5,000 images of the training file are held out. The test file is never read: nothing is tuned on it.
NUM_VALIDATION = 5_000
MEAN, STD = 0.286, 0.353  # of all pixels of the training file, scaled to [0, 1]


@dataclass(frozen=True)
class FashionMNIST:
    """Normalised images (N, 1, 28, 28) in float32 and labels (N,) in int64, split once and for all.

    Attributes:
        source: `full` or `subset`.
        where: A sentence for the user: which data this is and where it lies.
    """

    source: str
    where: str
    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor


def full_folder() -> Path | None:
    """Returns the folder with the full set's IDX files, or None where there is none."""
    named = os.environ.get("SAFE_LR_FASHION_MNIST")
    folder = Path(named) if named else DEBIAN
    if (folder / "train-images-idx3-ubyte.gz").is_file():
        return folder
    if named:
        raise FileNotFoundError(
            f"SAFE_LR_FASHION_MNIST names {folder}, which holds no train-images-idx3-ubyte.gz: point it at the folder "
            "with Fashion-MNIST's gzip IDX files, or unset it"
        )
    return None


def read_full(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Returns the 60,000 images (N, 28, 28) and labels (N,) of the training file, as bytes."""
    images = _read_idx(folder / "train-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
    return images, _read_idx(folder / "train-labels-idx1-ubyte.gz", header=8)


def load(source: str = "auto") -> FashionMNIST:
    """Loads Fashion-MNIST.

    Args:
        source: `auto` (full where it is installed), `full` or `subset`.

    Returns:
        The data, with `where` saying which it is.

    Raises:
        FileNotFoundError: `full` was asked for and is not installed.
        ValueError: `source` is none of the three.
    """
    if source not in ("auto", "full", "subset"):
        raise ValueError(f"source is {source!r}: use 'auto', 'full' or 'subset'")
    folder = None if source == "subset" else full_folder()
    if folder is not None:
        images, labels = read_full(folder)
        cut = len(images) - NUM_VALIDATION
        where = f"Fashion-MNIST, the full training file ({cut:,} images to train on, {NUM_VALIDATION:,} held out)"
        return _normalised("full", where, images[:cut], labels[:cut], images[cut:], labels[cut:])
    if source == "full":
        raise FileNotFoundError(
            "the full Fashion-MNIST is not installed: `apt-get install dataset-fashion-mnist` on Debian or Ubuntu, or "
            "point SAFE_LR_FASHION_MNIST at a folder with its gzip IDX files"
        )
    with np.load(SUBSET) as data:
        where = (
            "Fashion-MNIST, the 1,000-image subset that comes with safe_lr (800 to train on, 200 held out); for the "
            "full set: `apt-get install dataset-fashion-mnist`, or SAFE_LR_FASHION_MNIST=FOLDER"
        )
        parts = (data["train_images"], data["train_labels"], data["val_images"], data["val_labels"])
        return _normalised("subset", where, *parts)


def _read_idx(path: Path, header: int) -> NDArray[np.uint8]:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), dtype=np.uint8, offset=header)


def _normalised(source: str, where: str, *parts: NDArray[np.uint8]) -> FashionMNIST:
    train_images, train_labels, val_images, val_labels = parts
    return FashionMNIST(
        source, where, _images(train_images), _labels(train_labels), _images(val_images), _labels(val_labels)
    )


def _images(raw: NDArray[np.uint8]) -> Tensor:
    return ((torch.tensor(raw, dtype=torch.float32) / 255 - MEAN) / STD).unsqueeze(1)


def _labels(raw: NDArray[np.uint8]) -> Tensor:
    return torch.tensor(raw, dtype=torch.int64)
