"""Labelled arrays: inputs as rows of numbers, each with its class, in a training and a test part.
MNIST, Fashion-MNIST, or any `.npz`.

MNIST is by LeCun, Cortes and Burges; Fashion-MNIST by Xiao, Rasul and Vollgraf (arXiv 1708.07747).
Both have 60,000 training and 10,000 test images of 28x28 grey levels in 10 classes, and are read in
their original order.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bomemeta.data import archives
from bomemeta.errors import DataError
from bomemeta.registry import datasets

Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("train", "test")
GREY_LEVELS = 255  # what uint8 is divided by


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
    def _archive(self) -> _Archive: ...

    @property
    def features(self) -> int:
        return self._archive().parts["train"].inputs.shape[1]

    @property
    def classes(self) -> int:
        return self._archive().classes

    def prepare(self) -> None:
        self._archive()

    def examples(self, part: Part) -> Examples:
        return self._archive().parts[part]


@dataclass(frozen=True, kw_only=True)
class _Prepared(_Arrays):
    """An archive that `bomemeta data prepare` writes into a data folder."""

    name: ClassVar[str]

    root: str | None = None

    def _archive(self) -> _Archive:
        return _read(archives.find(self.name, f"{self.name}.npz", self.root))


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
    divided by 255.
    """

    path: str

    def _archive(self) -> _Archive:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise DataError(
                f"labelled_array: {path} (data.path) does not exist. Point data.path at an .npz file of x_train, y_train, x_test and "
                "y_test, on every machine that has workers"
            )
        return _read(path)


@dataclass(frozen=True)
class _Archive:
    parts: dict[Part, Examples]
    classes: int


@functools.cache
def _read(path: Path) -> _Archive:
    arrays = archives.read(path, [f"{array}_{part}" for part in PARTS for array in "xy"])
    if wrong := _wrong(arrays):
        raise DataError(
            f"{path}: {wrong}. Wanted x_train and x_test as uint8 or floats [n, ...] with rows of one shape, y_train and y_test as "
            "integers [n], the classes counted from 0"
        )
    parts: dict[Part, Examples] = {}
    for part in PARTS:
        inputs, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        parts[part] = Examples(
            torch.from_numpy(inputs.reshape(len(inputs), -1)),
            torch.from_numpy(labels.astype(np.int64)),
        )
    return _Archive(parts, int(parts["train"].labels.max()) + 1)


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
        if labels.dtype.kind not in "iu" or labels.shape != (len(inputs),):
            return f"y_{part} is {labels.dtype} {list(labels.shape)} for {len(inputs)} rows of x_{part}"
        if labels.min() < 0:
            return f"y_{part} has a label {labels.min()}"
        if not np.isfinite(inputs).all():
            return f"x_{part} has numbers that are NaN or infinite"
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        return f"a row of x_train is {list(arrays['x_train'].shape[1:])}, one of x_test {list(arrays['x_test'].shape[1:])}"
    if (known := arrays["y_train"].max()) < 1:
        return "y_train has one class alone"
    if (found := arrays["y_test"].max()) > known:
        return f"y_test has a class {found}, y_train none above {known}"
    return None
