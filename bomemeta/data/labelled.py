"""Labelled arrays: inputs as rows of numbers, each with its class, in a training and a test part.
MNIST, Fashion-MNIST, or any `.npz`.

MNIST is by LeCun, Cortes and Burges; Fashion-MNIST by Xiao, Rasul and Vollgraf (arXiv 1708.07747).
Both have 60,000 training and 10,000 test images of 28x28 grey levels in 10 classes, and are read in
their original order.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from bomemeta.data import archives
from bomemeta.data.class_labels import Name, Unknown, numbered
from bomemeta.data.pictures import Channels, Picture, picture_of_row
from bomemeta.errors import DataError
from bomemeta.paths import absolute
from bomemeta.registry import datasets

Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("train", "test")
GREY_LEVELS = 255  # what uint8 is divided by

_Side = Annotated[int, Field(ge=1)]


class Moments(NamedTuple):
    mean: float
    deviation: float


class Examples(NamedTuple):
    """One part of a data set, as stored: `rows` makes numbers of it."""

    inputs: Tensor  # [n, d], uint8 or floats
    labels: Tensor  # int64 [n], from 0

    def rows(self, chosen: Tensor, dtype: torch.dtype) -> Tensor:
        """The inputs of these rows (int64, any shape), `[..., d]`; uint8 as [0, 1]."""
        inputs = self.inputs[chosen].to(dtype)
        return inputs.div_(GREY_LEVELS) if self.inputs.dtype == torch.uint8 else inputs

    def moments(self) -> Moments:
        """Over all numbers of all rows, with uint8 as [0, 1]."""
        if self.inputs.dtype != torch.uint8:
            inputs = self.inputs.double()
            return Moments(float(inputs.mean()), float(inputs.std(correction=0)))
        # By counting levels: 47 million pixels as doubles would be 376 MB.
        count = torch.bincount(self.inputs.flatten(), minlength=GREY_LEVELS + 1).double()
        share, level = (
            count / count.sum(),
            torch.arange(GREY_LEVELS + 1, dtype=torch.float64) / GREY_LEVELS,
        )
        mean = (share * level).sum()
        return Moments(float(mean), float((share * (level - mean) ** 2).sum().sqrt()))


@runtime_checkable
class LabelledArrays(Protocol):
    """A data set of labelled rows, in the two parts that its authors cut it into."""

    @property
    def features(self) -> int:
        """d, numbers in a row."""
        ...

    @property
    def classes(self) -> int: ...

    def prepare(self) -> None:
        """Reads the data. Raises DataError where it is missing or damaged. Cheap the second time."""
        ...

    def examples(self, part: Part) -> Examples:
        """All rows of the part, in their order; the same tensors each time, not to be written into."""
        ...


class _Arrays(ABC):
    """What the data sets below share once they know where their archive lies."""

    @abstractmethod
    def _read(self) -> _Archive: ...

    @functools.cached_property
    def _archive(self) -> _Archive:
        # Kept by the instance: a file that is replaced under a run does not change the run's data.
        return self._read()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_archive"}

    @property
    def features(self) -> int:
        return self._archive.parts["train"].inputs.shape[1]

    @property
    def classes(self) -> int:
        return len(self._archive.names)

    @property
    def class_names(self) -> tuple[Name, ...]:
        """What class c is called in the file."""
        return self._archive.names

    def picture(self) -> Picture | str:
        """How a row is folded to a picture; where that is not known, why."""
        return picture_of_row(self._archive.row, None)

    def prepare(self) -> None:
        _ = self._archive

    def examples(self, part: Part) -> Examples:
        return self._archive.parts[part]


@dataclass(frozen=True, kw_only=True)
class _Prepared(_Arrays):
    """An archive that `bomemeta data prepare` writes into a data folder."""

    name: ClassVar[str]

    root: str | None = None

    def _read(self) -> _Archive:
        return _file(archives.find(self.name, f"{self.name}.npz", self.root), "refuse")


@datasets.register("mnist")
@dataclass(frozen=True, kw_only=True)
class Mnist(_Prepared):
    """MNIST, 60,000 + 10,000 hand-written digits. `root`: the folder that holds `mnist.npz`; by
    default `BOMEMETA_DATA`.
    """

    name = "mnist"


@datasets.register("fashion_mnist")
@dataclass(frozen=True, kw_only=True)
class FashionMnist(_Prepared):
    """Fashion-MNIST, 60,000 + 10,000 pictures of clothes. `root`: the folder that holds
    `fashion_mnist.npz`; by default `BOMEMETA_DATA`.
    """

    name = "fashion_mnist"


@datasets.register("labelled_array")
@dataclass(frozen=True, kw_only=True)
class LabelledArray(_Arrays):
    """Any archive of x_train [n, ...], y_train [n], x_test and y_test. Rows are flattened, uint8 is
    divided by 255; labels of any kind become classes 0..C-1, in the order of their names.

    Pictures are [n, H, W], [n, H, W, C] or [n, C, H, W]; of rows that are stored flat `image_shape`
    says which of these a row is.
    """

    path: str
    image_shape: tuple[_Side, _Side] | tuple[_Side, _Side, _Side] | None = (
        None  # of a row: [H, W], [H, W, C] or [C, H, W]
    )
    channels: Channels | None = None  # first or last; None: the one axis of 1 to 4
    test_only_classes: Unknown = "refuse"  # test rows of classes without training rows

    def _read(self) -> _Archive:
        path = absolute(self.path, what="data.path")
        if not path.is_file():
            why = "is a folder, a pipe or a device" if path.exists() else "does not exist"
            raise DataError(
                f"labelled_array: {path} (data.path) {why}. Point data.path at an .npz file of x_train, y_train, x_test and "
                "y_test, on every machine that has workers"
            )
        archive = _file(path, self.test_only_classes)
        if self.image_shape is None:
            return archive
        features = archive.parts["train"].inputs.shape[1]
        flat = len(archive.row) == 1
        if math.prod(self.image_shape) != features or not (flat or self.image_shape == archive.row):
            raise DataError(
                f"data.image_shape: got {list(self.image_shape)}; a row of x_train in {path} is {list(archive.row)}, wanted "
                + (f"a shape of {features} numbers" if flat else "that shape, or none")
            )
        return archive

    def picture(self) -> Picture | str:
        """As of the stored rows, or of `image_shape`."""
        row = self.image_shape or self._archive.row
        found = picture_of_row(row, self.channels)
        if isinstance(found, Picture):
            return found
        do = (
            "data.channels=first or last says it"
            if len(row) == 3
            else "Set data.image_shape to that of a row, as [H, W], [H, W, C] or [C, H, W], or store x_train and x_test as [n, H, W, C]"
        )
        return f"{found}. {do}"


@dataclass(frozen=True)
class _Archive:
    parts: dict[Part, Examples]
    names: tuple[Name, ...]  # of the classes
    row: tuple[int, ...]  # the shape of a row, as stored


def _file(path: Path, unknown: Unknown) -> _Archive:
    state = path.stat()
    return _read(path, unknown, (state.st_mtime_ns, state.st_size, state.st_ino))


@functools.lru_cache(maxsize=8)
def _read(path: Path, unknown: Unknown, state: tuple[int, ...]) -> _Archive:
    """`state` tells a file from one that has replaced it."""
    arrays = archives.read(path, [f"{array}_{part}" for part in PARTS for array in "xy"])
    if wrong := _wrong(arrays):
        raise DataError(
            f"{path}: {wrong}. Wanted x_train and x_test as uint8, float32 or float64 [n, ...] with rows of one shape, y_train and "
            "y_test [n] as whole numbers, truth values or texts"
        )
    classes = numbered(arrays["y_train"], arrays["y_test"], path, unknown)
    parts: dict[Part, Examples] = {}
    for part in PARTS:
        inputs, labels = arrays[f"x_{part}"], classes.train if part == "train" else classes.test
        if part == "test" and classes.test_rows is not None:
            inputs = inputs[classes.test_rows]
        parts[part] = Examples(
            torch.from_numpy(inputs.reshape(len(inputs), -1)), torch.from_numpy(labels)
        )
    return _Archive(parts, classes.names, arrays["x_train"].shape[1:])


def _wrong(arrays: dict[str, NDArray[Any]]) -> str | None:
    """What keeps the four arrays from being labelled rows."""
    for part in PARTS:
        inputs, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if not (
            inputs.dtype in (np.uint8, np.float32, np.float64)
            and inputs.ndim >= 2
            and inputs.size > 0
        ):
            return f"x_{part} is {inputs.dtype} {list(inputs.shape)}"
        if labels.shape != (len(inputs),):
            return f"y_{part} is {labels.dtype} {list(labels.shape)} for {len(inputs)} rows of x_{part}"
        if inputs.dtype != np.uint8 and not (finite := np.isfinite(inputs)).all():
            rows = np.flatnonzero(~finite.reshape(len(inputs), -1).all(1))
            return f"x_{part} has numbers that are NaN or infinite in {len(rows)} of {len(inputs)} rows, first in row {rows[0]}"
    kinds = [arrays[f"x_{part}"].dtype == np.uint8 for part in PARTS]
    floats = arrays[f"x_{PARTS[kinds.index(False)]}"] if False in kinds else None
    # uint8 is read as 0 to 1, so floats in that range go with it.
    if True in kinds and floats is not None and not (floats.min() >= 0 and floats.max() <= 1):
        return (
            f"x_train is {arrays['x_train'].dtype} and x_test {arrays['x_test'].dtype}, with floats from {floats.min():.3g} to "
            f"{floats.max():.3g}: uint8 is read as 0 to 1, floats as they are"
        )
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        return f"a row of x_train is {list(arrays['x_train'].shape[1:])}, one of x_test {list(arrays['x_test'].shape[1:])}"
    return None
