"""Images and labels as users have them, as the arrays that a classifier computes with."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bomemeta.data.image_files import SUFFIXES
from bomemeta.data.preprocessing import Preprocessing
from bomemeta.errors import DataError


class ClassExamples(NamedTuple):
    """Labelled images, sorted by class: `pixels` uint8, or float32 in [0, 1], `[n, C, H, W]`;
    `labels` int64 `[n]` in 0..len(classes)-1.
    """

    pixels: Tensor
    labels: Tensor
    classes: NDArray[Any]  # of any hashable kind, sorted where they can be

    def names(self) -> list[Any]:
        """Each image's class."""
        found: list[Any] = self.classes[self.labels.numpy()].tolist()
        return found


def pixels_of(images: Any, preprocessing: Preprocessing) -> Tensor:
    """Pixels `[n, C, H, W]` of paths, Pillow images, arrays `[n, H, W, C]` or `[n, H, W]`, tensors
    `[n, C, H, W]`, or a list of single ones; uint8, or floats in [0, 1]. What comes back is uint8;
    float tensors of the network's own size stay float32, as they are.

    Raises DataError that names the image that cannot be used.
    """
    if isinstance(images, str | os.PathLike):
        images = [path for path, _ in labelled_files(images)] if Path(images).is_dir() else [images]
    if hasattr(images, "ndim") and images.ndim in (0, 1, 2) and not _names(images):
        raise DataError(
            f"X: got an array of shape {tuple(images.shape)}; wanted images [n, H, W, C] or [n, H, W], "
            "or a list of images"
        )
    shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    if isinstance(images, Tensor) and images.is_floating_point() and images.shape[1:] == shape:
        if not bool(((images >= 0) & (images <= 1)).all()):  # NaN is neither
            raise DataError(
                "X: got floats outside [0, 1] or NaN; wanted pixels in [0, 1], or uint8"
            )
        return images.float()
    each = [preprocessing.pixels(image, number) for number, image in enumerate(images)]
    return torch.from_numpy(np.stack(each) if each else np.empty((0, *shape), np.uint8))


def _names(images: Any) -> bool:
    return (
        images.ndim == 1
        and getattr(images, "dtype", None) is not None
        and images.dtype.kind in "OUS"
    )


def labelled_files(folder: str | os.PathLike[str]) -> list[tuple[Path, str]]:
    """The images in a folder of class folders, with their classes' names; sorted. Hidden files are
    not looked at. Raises DataError where there are none.
    """
    root = Path(folder).expanduser()
    found = [
        (file, file.parent.name if file.parent != root else "")
        for file in sorted([*root.glob("*"), *root.glob("*/*")])
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]
    if not found:
        raise DataError(f"{root.absolute()}: no images; wanted {root.name}/CLASS/*.jpg, .png, ...")
    return found


def examples_of(images: Any, labels: Any, preprocessing: Preprocessing) -> ClassExamples:
    """Images with their labels, sorted by class; the order within a class is kept.

    `images` may be a folder of class folders, with `labels` None. Raises DataError where the numbers
    of images and labels differ, and where a label is missing.
    """
    if labels is None:
        if not isinstance(images, str | os.PathLike):
            raise DataError("y: missing; only a folder of class folders has its own labels")
        pairs = labelled_files(images)
        loose = [str(path) for path, label in pairs if not label]
        if loose:
            raise DataError(f"{loose[0]}: is in no class folder; wanted {images}/CLASS/IMAGE")
        images, labels = [path for path, _ in pairs], [label for _, label in pairs]
    given = _listed(labels)
    pixels = pixels_of(images, preprocessing)
    if len(pixels) != len(given):
        raise DataError(
            f"X has {len(pixels)} images and y {len(given)} labels; wanted one for each"
        )
    return sorted_by_class(pixels, given)


def sorted_by_class(pixels: Tensor, labels: Sequence[Hashable]) -> ClassExamples:
    """The same images, class after class. Raises DataError where there is no image or a label is
    None or NaN.
    """
    for number, label in enumerate(labels):
        if label is None or label != label:  # NaN is not itself
            raise DataError(f"y: label {number} is {label}; every image needs a class")
    if not labels:
        raise DataError("X has no images; a class needs at least one")
    known = dict.fromkeys(labels)
    try:
        names = sorted(known)  # type: ignore[type-var]
    except TypeError:  # of several kinds
        names = sorted(known, key=lambda label: (type(label).__name__, str(label)))
    number_of = {name: number for number, name in enumerate(names)}
    numbers = torch.tensor([number_of[label] for label in labels])
    order = torch.argsort(numbers, stable=True)
    return ClassExamples(pixels[order], numbers[order], class_array(names))


def class_array(names: Sequence[Hashable]) -> NDArray[Any]:
    """Class names as a NumPy array, of their own kind where they are all numbers or all texts."""
    kinds = {type(name) for name in names}
    if len(kinds) == 1 and issubclass(next(iter(kinds)), str | int | float | bool | np.generic):
        return np.array(names)
    array = np.empty(len(names), object)
    array[:] = names
    return array


def _listed(labels: Any) -> list[Hashable]:
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    for number, value in enumerate(values):
        if not isinstance(value, Hashable):
            raise DataError(
                f"y: label {number} is a {type(value).__name__}; wanted a number or a text"
            )
    return values
