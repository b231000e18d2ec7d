"""Images with their labels, for the recipes that classify: handwritten digits, and CIFAR-10."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from natgrad_lab import files
from natgrad_lab.data import download
from natgrad_lab.files import DataError

NAMES = ("mnist", "digits", "cifar10")
DIGITS_TRAIN = 1500


@dataclass(frozen=True)
class Labelled:
    """Images in [0, 1] as rows of pixels, and their classes 0 to 9.

    Attributes:
        name: "mnist", "digits" or "cifar10".
        side: Of the square images, in pixels.
        x_train, x_test: [cases, channels · side²], one channel after the other.
        y_train, y_test: [cases], int64.
        channels: 1, or 3 for red, green and blue.
    """

    name: str
    side: int
    x_train: Tensor = field(repr=False)
    y_train: Tensor = field(repr=False)
    x_test: Tensor = field(repr=False)
    y_test: Tensor = field(repr=False)
    channels: int = 1

    def take(self, train: int | None = None, test: int | None = None) -> "Labelled":
        """At most so many cases: the first ones (the files are in random order)."""
        return replace(
            self,
            x_train=self.x_train[:train],
            y_train=self.y_train[:train],
            x_test=self.x_test[:test],
            y_test=self.y_test[:test],
        )

    def resized(self, side: int) -> "Labelled":
        """Smaller images, by the mean over the area of each new pixel; larger ones repeat."""

        def scaled(x: Tensor) -> Tensor:
            images = x.view(-1, self.channels, self.side, self.side)
            return torch.nn.functional.interpolate(images, size=(side, side), mode="area").flatten(1)

        return replace(self, side=side, x_train=scaled(self.x_train), x_test=scaled(self.x_test))

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Labelled":
        """The same with pixels of another dtype, and all on another device."""
        return replace(
            self,
            x_train=self.x_train.to(device, dtype),
            y_train=self.y_train.to(device),
            x_test=self.x_test.to(device, dtype),
            y_test=self.y_test.to(device),
        )


def load(name: str, folder: str | Path | None = None) -> Labelled:
    """Load MNIST (28 × 28), the digits that come with scikit-learn (8 × 8), or CIFAR-10 (32 × 32 in three colours).

    Args:
        name: "mnist", "digits" or "cifar10".
        folder: Where the four files of MNIST are, directly or in `mnist/`; those of CIFAR-10 (see `files.read_cifar10`)
            directly or in `cifar10/`. If None: the folder that NATGRAD_DATA names, else scikit-learn downloads MNIST.

    Raises:
        DataError: an unknown name, missing or corrupt files, a failed download.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
        pixels, labels = torch.from_numpy(digits.data).float()[order] / 16.0, torch.from_numpy(digits.target)[order]
        side, cut = 8, DIGITS_TRAIN
    elif name == "cifar10":
        x_train, y_train, x_test, y_test = files.read_cifar10(None if folder is None else Path(folder))
        pixels, test_pixels = (torch.from_numpy(x.astype(np.float32)).div_(255.0) for x in (x_train, x_test))
        labels, test_labels = (torch.from_numpy(y.astype(np.int64)) for y in (y_train, y_test))
        return Labelled(name, 32, pixels, labels, test_pixels, test_labels, channels=3)
    elif name == "mnist":
        pixels, labels = _mnist(None if folder is None else Path(folder))
        side, cut = 28, 60_000
    else:
        raise DataError(f"unknown data {name!r}; known: {', '.join(NAMES)}")
    labels = labels.long()
    return Labelled(name, side, pixels[:cut], labels[:cut], pixels[cut:], labels[cut:])


def _mnist(folder: Path | None) -> tuple[Tensor, Tensor]:
    names = [f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1") for part in ("train", "t10k")]
    paths = files.find(names, "mnist", folder)
    if paths is not None:
        found = [files.read_idx(paths[name]) for name in names]
        return torch.cat(found[:2]).flatten(1).float() / 255.0, torch.cat(found[2:])

    def fetch() -> Any:
        from sklearn.datasets import fetch_openml

        return fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff")

    fetched = download("MNIST", fetch, names)
    return torch.from_numpy(fetched.data).float() / 255.0, torch.tensor([int(label) for label in fetched.target])
