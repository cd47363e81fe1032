"""20 Newsgroups "bydate" (Lang, ICML 1995; scikit-learn's cut): word counts of 11,314 training and
7,532 later test posts, 20 classes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bomemeta.data import archives
from bomemeta.data.class_images import generator
from bomemeta.errors import DataError
from bomemeta.registry import datasets

FILE = "twenty_newsgroups_counts.npz"
Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("train", "test")


class Documents(NamedTuple):
    """Labelled sparse rows: row i has `value[k]` in column `column[k]` for k from `row_start[i]` up
    to `row_start[i + 1]`.
    """

    row_start: Tensor  # int64 [rows + 1]
    column: Tensor  # int64 [entries]
    value: Tensor  # float32 [entries]
    label: Tensor  # int64 [rows]


@runtime_checkable
class DocumentSource(Protocol):
    """A data set of sparse labelled rows, in the two parts that its authors cut it into."""

    @property
    def features(self) -> int: ...

    @property
    def classes(self) -> int: ...

    def prepare(self) -> None: ...

    def documents(self, part: Part) -> Documents: ...


@datasets.register("twenty_newsgroups")
@dataclass(frozen=True, kw_only=True)
class TwentyNewsgroups:
    """Word counts of Usenet posts, 130,107 columns, each row divided by its length.

    `root`: the folder that holds `twenty_newsgroups_counts.npz`; by default `BOMEMETA_DATA`.
    """

    root: str | None = None

    @property
    def features(self) -> int:
        return self._read().features

    @property
    def classes(self) -> int:
        return self._read().classes

    def prepare(self) -> None:
        """Reads the archive. Raises DataError where it is missing or damaged."""
        self._read()

    def documents(self, part: Part) -> Documents:
        """Rows of L2 norm 1 (0 where a post has no known word), sorted by class as in the archive."""
        return self._read().parts[part]

    def _read(self) -> _Archive:
        return _read(archives.find("twenty_newsgroups", FILE, self.root))


@dataclass(frozen=True)
class _Archive:
    parts: dict[Part, Documents]
    features: int
    classes: int


@functools.cache
def _read(path: Path) -> _Archive:
    names = [f"{part}_{array}" for part in PARTS for array in ("indptr", "indices", "counts")]
    arrays = archives.read(path, [*names, "y_train", "y_test", "label_name", "vocabulary_utf8"])
    named, vocabulary = arrays["label_name"], arrays["vocabulary_utf8"]
    if named.ndim != 1 or vocabulary.ndim != 1 or vocabulary.dtype != np.uint8:
        raise DataError(
            f"{path}: wanted label_name [classes] and vocabulary_utf8 as uint8 [bytes]; got {list(named.shape)} and {vocabulary.dtype} "
            f"{list(vocabulary.shape)}. Delete it and run `bomemeta data prepare twenty_newsgroups`"
        )
    classes = len(named)
    features = int(np.count_nonzero(vocabulary == ord("\n"))) + 1
    parts: dict[Part, Documents] = {}
    for part in PARTS:
        start, column, count = (
            arrays[f"{part}_{array}"] for array in ("indptr", "indices", "counts")
        )
        label = arrays[f"y_{part}"]
        if wrong := _wrong(start, column, count, label, features, classes):
            raise DataError(
                f"{path}, part {part}: {wrong}. Delete it and run `bomemeta data prepare twenty_newsgroups`"
            )
        parts[part] = _normalised(start, column, count, label)
    return _Archive(parts, features, classes)


def _wrong(
    start: NDArray[Any],
    column: NDArray[Any],
    count: NDArray[Any],
    label: NDArray[Any],
    features: int,
    classes: int,
) -> str | None:
    """What keeps the arrays from being labelled rows of counts; products with them do not look at
    bounds.
    """
    if any(
        array.ndim != 1 or array.dtype.kind not in "iu" for array in (start, column, count, label)
    ):
        return "wanted vectors of integers"
    if len(start) != len(label) + 1 or len(label) == 0:
        return f"got {len(start)} row starts for {len(label)} labels; wanted one more than labels, and at least one label"
    # Not np.diff: unsigned numbers would wrap around.
    if (
        start[0] != 0
        or start[-1] != len(column)
        or len(column) != len(count)
        or np.any(start[1:] < start[:-1])
    ):
        return f"wanted row starts that rise from 0 to the number of entries; got {len(column)} columns and {len(count)} counts"
    if len(column) and (column.min() < 0 or column.max() >= features):
        return f"wanted columns below {features}, the size of the vocabulary; got {column.min()} to {column.max()}"
    if label.min() < 0 or label.max() >= classes:
        return f"wanted labels below {classes}; got {label.min()} to {label.max()}"
    return None


def _normalised(
    start: NDArray[Any], column: NDArray[Any], count: NDArray[Any], label: NDArray[Any]
) -> Documents:
    row_start = torch.from_numpy(start.astype(np.int64))
    value = torch.from_numpy(count.astype(np.float64))
    row = torch.repeat_interleave(torch.arange(len(label)), row_start.diff())
    length = torch.zeros(len(label), dtype=torch.float64).index_add_(0, row, value**2).sqrt()
    value = (
        value / length.clamp_min(torch.finfo(torch.float64).tiny)[row]
    )  # counts of 0 alone: the row stays 0
    return Documents(
        row_start,
        torch.from_numpy(column.astype(np.int64)),
        value.float(),
        torch.from_numpy(label.astype(np.int64)),
    )


def stratified_halves(label: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Row numbers of two halves, each sorted, drawn by `key`: sizes differ by at most one row, as
    do each class's shares.
    """
    drawn = generator(key).permutation(len(label))
    by_class = torch.from_numpy(drawn[np.argsort(label.numpy()[drawn], kind="stable")])
    return by_class[::2].sort().values, by_class[1::2].sort().values


def chosen(documents: Documents, rows: Tensor) -> Documents:
    """These rows, in this order."""
    size = documents.row_start.diff()[rows]
    row_start = torch.cat([size.new_zeros(1), size.cumsum(0)])
    entry = torch.arange(int(row_start[-1])) + torch.repeat_interleave(
        documents.row_start[rows] - row_start[:-1], size
    )
    return Documents(
        row_start, documents.column[entry], documents.value[entry], documents.label[rows]
    )
