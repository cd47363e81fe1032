"""Labels of any kind as classes 0..C-1, with the names that they had."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bomemeta.errors import DataError

Name = bool | int | str
Unknown = Literal["refuse", "drop"]
SHOWN = 5  # classes that a message names
KINDS = {"b": "truth values", "i": "numbers", "u": "numbers", "f": "numbers", "U": "texts", "S": "texts"}  # fmt: skip


class Classes(NamedTuple):
    """The labels of both parts, and which rows of the test part are left."""

    names: tuple[Name, ...]  # class c was called names[c]: sorted, those of the training part
    train: NDArray[np.int64]  # [n], 0..C-1
    test: NDArray[np.int64]  # [m]
    test_rows: NDArray[np.bool_] | None  # of the file's test rows; None: all


def numbered(
    train: NDArray[Any], test: NDArray[Any], where: Path | str, unknown: Unknown = "refuse"
) -> Classes:
    """Classes by their sorted names. Whole numbers of any type and size, truth values and texts are
    names; classes without a training row are refused, or their test rows left out (`drop`).

    Raises DataError that names the label.
    """
    mine, theirs = _plain(train, "y_train", where), _plain(test, "y_test", where)
    if KINDS[train.dtype.kind] != KINDS[test.dtype.kind] and "texts" in (
        KINDS[train.dtype.kind],
        KINDS[test.dtype.kind],
    ):
        raise DataError(
            f"{where}: y_train has {KINDS[train.dtype.kind]} ({_shown(mine[:1].tolist())} ...) and y_test {KINDS[test.dtype.kind]} "
            f"({_shown(theirs[:1].tolist())} ...). Wanted labels of one kind"
        )
    found, labels = np.unique(mine, return_inverse=True)
    names: list[Name] = found.tolist()
    if len(names) < 2:
        raise DataError(
            f"{where}: y_train has one class alone, {_shown(names)}; wanted two or more"
        )
    # As Python's numbers: numpy would compare int64 with uint64 as floats.
    number = {name: c for c, name in enumerate(names)}
    tested, inverse = np.unique(theirs, return_inverse=True)
    positions = np.array([number.get(name, -1) for name in tested.tolist()], np.int64)
    codes = positions[inverse]
    known = codes >= 0
    if known.all():
        return Classes(tuple(names), labels.astype(np.int64), codes, None)
    counts = np.bincount(inverse)
    missing = [
        f"{_shown([name])} ({count} rows)"
        for name, position, count in zip(tested.tolist(), positions, counts, strict=True)
        if position < 0
    ]
    text = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
    if unknown == "refuse" or not known.any():
        rest = "" if known.any() else ", and no row of another class"
        raise DataError(
            f"{where}: y_test has {len(missing)} class{'es' if len(missing) > 1 else ''} that y_train has not: {text}{rest}. y_train has "
            f"{_shown(names)}. Add training rows of them, or leave their test rows out with data.test_only_classes=drop"
        )
    return Classes(tuple(names), labels.astype(np.int64), codes[known], known)


def _plain(labels: NDArray[Any], name: str, where: Path | str) -> NDArray[Any]:
    """Labels as integers, truth values or texts."""
    if labels.dtype.kind not in KINDS:
        raise DataError(
            f"{where}: {name} is {labels.dtype}; wanted labels as whole numbers, truth values or texts"
        )
    if labels.dtype.kind == "f":
        # Beyond this neighbouring whole numbers are one and the same float.
        exact = 2.0 ** (np.finfo(labels.dtype).nmant + 1)
        whole = np.isfinite(labels) & (np.abs(labels) <= min(exact, 2.0**62))
        whole[whole] = labels[whole] == np.floor(labels[whole])
        if not whole.all():
            row = int(np.flatnonzero(~whole)[0])
            raise DataError(
                f"{where}: {name} has a label {labels[row]} in row {row} ({labels.dtype}); wanted whole numbers, truth values or texts, a "
                "class each"
            )
        return labels.astype(np.int64)
    if labels.dtype.kind == "S":
        try:
            return np.char.decode(labels, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: {name} has a text that is no UTF-8: {error}") from error
    return labels


def _shown(names: list[Name]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
