"""Makes `fashion_mnist_1000.npz`, the subset of Fashion-MNIST that comes with this repository.

    python examples/data/make_subset.py [--out FILE]

The first 80 images of each class among the images to train on, the first 20 of each class among those held out, in
the order of the original file. Needs the full set, see `examples/fashion_mnist.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))
from fashion_mnist import NUM_VALIDATION, SUBSET, full_folder, read_full

PER_CLASS_TRAIN, PER_CLASS_VAL = 80, 20


def balanced(labels: NDArray[np.uint8], per_class: int) -> NDArray[np.int64]:
    """Returns the indices of the first `per_class` examples of each class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == k)[:per_class] for k in range(10)]))


def make_subset() -> dict[str, NDArray[np.uint8]]:
    """Returns the subset's four arrays: images (N, 28, 28) and labels (N,), bytes, to train on and held out."""
    folder = full_folder()
    if folder is None:
        raise FileNotFoundError("the full Fashion-MNIST is needed: `apt-get install dataset-fashion-mnist`")
    images, labels = read_full(folder)
    cut = len(images) - NUM_VALIDATION
    train, val = balanced(labels[:cut], PER_CLASS_TRAIN), cut + balanced(labels[cut:], PER_CLASS_VAL)
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "val_images": images[val],
        "val_labels": labels[val],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the 1,000-image subset of Fashion-MNIST.")
    parser.add_argument("--out", type=Path, default=SUBSET)
    out = parser.parse_args().out
    np.savez_compressed(out, **make_subset())
    print(f"wrote {out}, {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
