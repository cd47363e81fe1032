"""Which samples problem `reweighting` has, and with which labels."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bomemeta.data.labelled import LabelledArrays
from bomemeta.errors import ConfigError, DataError

# Second numbers of the keys of what is drawn from the config's seed.
ORDER, NOISE = range(2)


@runtime_checkable
class HumanLabels(Protocol):
    """A data set that also has labels that people gave."""

    def given_labels(self, name: str) -> Tensor:
        """int64, one for each training row. Raises DataError where there are none of that name."""
        ...


class Samples(NamedTuple):
    """Rows of the data set's training part."""

    train: NDArray[np.int64]
    given: NDArray[np.int64]  # [train], the labels that g has
    wrong: NDArray[np.bool_]  # [train], whether they differ from the true ones
    clean: NDArray[np.int64]


class Selection(NamedTuple):
    """How they are chosen."""

    train: int | None  # None: all that are left
    clean: int
    labels: str
    noise: float
    imbalance: float
    seed: int


def samples(data: LabelledArrays, selection: Selection) -> Samples:
    """The clean samples are drawn first, as many of each class as can be; then the training ones from
    the rest, cut to a long tail where `imbalance` is above 1: class c of C keeps its first
    imbalance^(-c / (C - 1)). Then the share `noise` of the labels is changed to another class.
    """
    true = data.examples("train").labels.numpy()
    classes = data.classes
    order = np.random.default_rng((selection.seed, ORDER)).permutation(len(true))
    each = selection.clean // classes
    clean = np.sort(np.concatenate([order[true[order] == c][:each] for c in range(classes)]))
    if len(clean) < each * classes or each < 1:
        raise DataError(
            f"problem.clean: got {selection.clean}; it wants {max(each, 1)} samples of each of the {classes} classes, which the data set "
            "does not have. Give a multiple of the number of classes that each has samples for"
        )
    rest = order[~np.isin(order, clean)]
    kept = [_tail(rest[true[rest] == c], c, classes, selection.imbalance) for c in range(classes)]
    rest = rest[np.isin(rest, np.concatenate(kept))]
    if selection.train is not None and selection.train > len(rest):
        raise DataError(
            f"problem.train: got {selection.train}; {len(rest)} samples are left beside the clean ones and after the cut to "
            f"imbalance {selection.imbalance:g}: make it smaller"
        )
    train = rest[: selection.train]
    given = _labels(data, selection.labels)[train].copy()
    draw = np.random.default_rng((selection.seed, NOISE))
    changed = draw.permutation(len(train))[: round(selection.noise * len(train))]
    shift = draw.integers(1, classes, len(changed))
    given[changed] = (given[changed] + shift) % classes
    return Samples(train, given, given != true[train], clean)


def _tail(rows: NDArray[np.int64], c: int, classes: int, imbalance: float) -> NDArray[np.int64]:
    return rows[: max(1, round(len(rows) * imbalance ** (-c / (classes - 1))))]


def _labels(data: LabelledArrays, name: str) -> NDArray[np.int64]:
    if name == "own":
        found: Tensor = data.examples("train").labels
    elif isinstance(data, HumanLabels):
        found = data.given_labels(name)
    else:
        raise ConfigError(
            f"problem.labels: got {name!r}; {type(data).__name__} has its own labels alone: set it to own, or take data set cifar10n"
        )
    return torch.as_tensor(found).numpy().astype(np.int64)
