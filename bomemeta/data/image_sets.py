"""Labelled image sets for streams of tasks: scikit-learn's bundled digits, CIFAR-10 (a part of it),
CIFAR-100 and mini-ImageNet.

Rows are flat, channels first; `image_shape` says how to fold them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bomemeta.boundary import refusing
from bomemeta.data import archives
from bomemeta.data.class_labels import numbered
from bomemeta.data.l2l_tasksets import load as load_learn2learn
from bomemeta.data.l2l_tasksets import untrusted
from bomemeta.data.labelled import Examples, Part
from bomemeta.errors import DataError
from bomemeta.registry import datasets

DIGITS_LEVELS = 16  # the largest value of a pixel
DIGITS_TEST_EVERY = 5  # scikit-learn has no test part of its own: every fifth image
MINI_TEST_PER_CLASS = 100  # of 600: the cut of the continual-learning papers


class _Images(NamedTuple):
    train: Examples
    test: Examples
    classes: int
    shape: tuple[int, int, int]  # channels, height, width


class _ImageSet(ABC):
    """What the sets below share once they know how to read their images."""

    @abstractmethod
    def _images(self) -> _Images: ...

    @property
    def features(self) -> int:
        channels, height, width = self.image_shape
        return channels * height * width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._images().shape

    @property
    def classes(self) -> int:
        return self._images().classes

    def prepare(self) -> None:
        self._images()

    def examples(self, part: Part) -> Examples:
        images = self._images()
        return images.train if part == "train" else images.test


@datasets.register("digits")
@dataclass(frozen=True, kw_only=True)
class Digits(_ImageSet):
    """scikit-learn's 1,797 digits of 8x8 pixels (UCI optical recognition, test part): nothing to
    download. Every fifth is for testing.
    """

    def _images(self) -> _Images:
        return _digits()


@datasets.register("cifar10_subset")
@dataclass(frozen=True, kw_only=True)
class Cifar10Subset(_ImageSet):
    """CIFAR-10's first 800 training images per class and first 1,000 test images. `root`: the
    folder of `cifar10_subset.npz`.
    """

    name: ClassVar[str] = "cifar10_subset"

    root: str | None = None

    def _images(self) -> _Images:
        return _cifar10(archives.find(self.name, f"{self.name}.npz", self.root))


@datasets.register("cifar100")
@dataclass(frozen=True, kw_only=True)
class Cifar100(_ImageSet):
    """CIFAR-100 as torchvision keeps it: 50,000 + 10,000 images. `root`: the folder that holds
    `cifar-100-python`.

    Its files are pickles, read by torchvision after it has compared their checksums with its own.
    """

    root: str | None = None

    def _images(self) -> _Images:
        return _cifar100(archives.data_folder("cifar100", self.root))


@datasets.register("mini_imagenet")
@dataclass(frozen=True, kw_only=True)
class MiniImagenet(_ImageSet):
    """All 100 classes of mini-ImageNet for streams: 500 training and 100 test images of each, from
    learn2learn's three files.

    These are pickles, and loading one can run code in it: `trust_pickles: true` says that you know
    where they come from.
    """

    root: str | None = None
    trust_pickles: bool = False

    def _images(self) -> _Images:
        folder = archives.data_folder("mini_imagenet", self.root, "learn2learn/mini-imagenet")
        if not self.trust_pickles:
            raise DataError(
                untrusted("mini_imagenet", folder)
                + ". If you trust where they come from, set data.trust_pickles: true"
            )
        missing = [
            file
            for mode in ("train", "validation", "test")
            if not (folder / (file := _mini_file(mode))).exists()
        ]
        if missing:
            raise DataError(
                f"mini_imagenet: {folder} has no {', '.join(missing)}. Get it with `bomemeta data prepare learn2learn/mini-imagenet "
                f"--root {folder}`, or point data.root or BOMEMETA_DATA at a folder that has it"
            )
        return _mini_imagenet(folder)


@functools.cache
def _digits() -> _Images:
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    inputs, classes = (
        torch.from_numpy(data.astype(np.float32) / DIGITS_LEVELS),
        torch.from_numpy(labels.astype(np.int64)),
    )
    test = torch.arange(len(classes)) % DIGITS_TEST_EVERY == DIGITS_TEST_EVERY - 1
    return _Images(
        Examples(inputs[~test], classes[~test]),
        Examples(inputs[test], classes[test]),
        10,
        (1, 8, 8),
    )


@functools.cache
def _cifar10(path: Path) -> _Images:
    arrays = archives.read(path, ["x_train", "y_train", "x_test", "y_test"])
    check_images(arrays, path)
    classes = numbered(arrays["y_train"], arrays["y_test"], path)
    return _channels_last(arrays["x_train"], classes.train, arrays["x_test"], classes.test)


@functools.cache
def _cifar100(folder: Path) -> _Images:
    import torchvision

    def refused(why: str) -> DataError:
        return DataError(
            f"cifar100: torchvision finds no whole CIFAR-100 in {folder} ({why}). Get it with `bomemeta data prepare cifar100 --root "
            f"{folder}`, or point data.root or BOMEMETA_DATA at a folder that has cifar-100-python"
        )

    with refusing(refused, named=False):
        parts = [
            torchvision.datasets.CIFAR100(str(folder), train=train, download=False)
            for train in (True, False)
        ]
    (x_train, y_train), (x_test, y_test) = (
        (np.asarray(part.data), np.asarray(part.targets)) for part in parts
    )
    return _channels_last(x_train, y_train, x_test, y_test)


@functools.cache
def _mini_imagenet(folder: Path) -> _Images:
    parts = load_learn2learn("mini-imagenet", folder)
    inputs, labels, offset = [], [], 0
    for split in ("train", "validation", "test"):
        source = parts[split].dataset
        numbered = torch.from_numpy(np.unique(np.asarray(source.y), return_inverse=True)[1]).long()
        inputs.append(torch.as_tensor(np.asarray(source.x)).to(torch.uint8).flatten(1))
        labels.append(numbered + offset)
        offset += int(numbered.max()) + 1
    images, classes = torch.cat(inputs), torch.cat(labels)
    # The number of an image within its class, in the order of the files.
    order = torch.argsort(classes, stable=True)
    counts = torch.bincount(classes)
    rank = torch.empty_like(classes)
    rank[order] = torch.arange(len(classes)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    test = rank >= counts[classes] - MINI_TEST_PER_CLASS
    return _Images(
        Examples(images[~test], classes[~test]),
        Examples(images[test], classes[test]),
        offset,
        (3, 84, 84),
    )


def _mini_file(mode: str) -> str:
    return f"mini-imagenet-cache-{mode}.pkl"


def check_images(arrays: dict[str, NDArray[Any]], path: Path) -> None:
    """Raises DataError where x_train and x_test are not uint8 images [n, H, W, 3] of one size, or y_train
    and y_test not a whole number for each.
    """
    size = arrays["x_train"].shape[1:3]
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.dtype != np.uint8 or images.shape != (labels.size, *size, 3) or not labels.size:
            raise DataError(
                f"{path}: x_{part} is {images.dtype} {list(images.shape)}; wanted uint8 [{labels.size}, H, W, 3], of one size in both parts"
            )
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(
                f"{path}: y_{part} is {labels.dtype} {list(labels.shape)}; wanted whole numbers [n]"
            )


def _channels_last(
    x_train: NDArray[Any], y_train: NDArray[Any], x_test: NDArray[Any], y_test: NDArray[Any]
) -> _Images:
    """uint8 images `[n, H, W, C]` as rows with the channels first."""
    height, width, channels = x_train.shape[1:]

    def part(images: NDArray[Any], labels: NDArray[Any]) -> Examples:
        rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
        return Examples(torch.from_numpy(rows), torch.from_numpy(labels.astype(np.int64)))

    return _Images(
        part(x_train, y_train),
        part(x_test, y_test),
        int(y_train.max()) + 1,
        (channels, height, width),
    )
