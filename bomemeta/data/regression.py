"""Families of regression tasks: the sinusoids of MAML's paper, and arrays of a user's own."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bomemeta.boundary import refusing
from bomemeta.data import archives
from bomemeta.data.class_images import generator
from bomemeta.data.episodes import Split
from bomemeta.errors import DataError
from bomemeta.paths import absolute
from bomemeta.registry import datasets

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LOOKED_AT = 2  # tasks of each split

# Finn et al., ICML 2017, section 5.1
AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
INPUT = (-5.0, 5.0)


class RegressionTask(NamedTuple):
    """Inputs `[n, inputs]` and targets `[n, outputs]`, float32; no row is both support and query."""

    support: Tensor
    support_targets: Tensor
    query: Tensor
    query_targets: Tensor


class RegressionSource(Protocol):
    """A data set for problem `few_shot_regression`."""

    @property
    def inputs(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    def prepare(self) -> None: ...

    def check_task(self, split: Split, rows: int) -> None:
        """Raises DataError where the split has no task of so many rows."""
        ...

    def task(self, split: Split, shots: int, queries: int, key: tuple[int, ...]) -> RegressionTask:
        """The task of this key: the same key gives the same bits in every process."""
        ...


@datasets.register("sinusoid")
@dataclass(frozen=True, kw_only=True)
class Sinusoid:
    """Sine waves of random amplitude and phase on [-5, 5] (Finn et al., ICML 2017, 5.1): nothing to
    download. `noise`: deviation of what is added to the targets of the support set.
    """

    noise: float = 0.0

    inputs = 1
    outputs = 1

    def prepare(self) -> None:
        """There is nothing to read."""

    def check_task(self, split: Split, rows: int) -> None:
        """Every task has as many rows as are asked for."""

    def task(self, split: Split, shots: int, queries: int, key: tuple[int, ...]) -> RegressionTask:
        rng = generator(key)
        amplitude, phase = rng.uniform(*AMPLITUDE), rng.uniform(*PHASE)
        at = rng.uniform(*INPUT, (shots + queries, 1))
        targets = amplitude * np.sin(at - phase)
        targets[:shots] += self.noise * rng.standard_normal((shots, 1))
        return _cut(at, targets, shots)


@datasets.register("regression_arrays")
@dataclass(frozen=True)
class RegressionArrays:
    """Tasks of a user's own in an .npz file: `inputs` [tasks, rows, d], `targets` [tasks, rows] or
    [tasks, rows, outputs], and `split` [tasks] of 0 train, 1 validation, 2 test. A task draws its
    support and query rows anew each time.
    """

    path: str

    def digest(self) -> str:
        """A hash of the three arrays."""
        found = hashlib.sha256()
        for array in self._arrays.values():
            found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        return found.hexdigest()

    @property
    def inputs(self) -> int:
        return int(self._arrays["inputs"].shape[2])

    @property
    def outputs(self) -> int:
        return int(self._arrays["targets"].shape[2])

    def prepare(self) -> None:
        """Reads the file. Raises DataError."""
        _ = self._arrays

    def check_task(self, split: Split, rows: int) -> None:
        arrays = self._arrays
        if not len(self._of(split)):
            raise DataError(
                f"{self.path}: split has no task of {split}; wanted 0, 1 and 2 for the three"
            )
        if arrays["inputs"].shape[1] < rows:
            raise DataError(
                f"{self.path}: tasks have {arrays['inputs'].shape[1]} rows; shots + queries needs {rows}: lower "
                "problem.shots or problem.queries"
            )

    def task(self, split: Split, shots: int, queries: int, key: tuple[int, ...]) -> RegressionTask:
        rng, arrays = generator(key), self._arrays
        number = rng.choice(self._of(split))
        rows = rng.permutation(arrays["inputs"].shape[1])[: shots + queries]
        return _cut(arrays["inputs"][number][rows], arrays["targets"][number][rows], shots)

    def _of(self, split: Split) -> NDArray[np.int64]:
        return np.flatnonzero(self._arrays["split"] == SPLITS.index(split))

    @functools.cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        # Kept by the instance: a file that is replaced under a run does not change the run's data.
        return _read(absolute(self.path, what="data.path"))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_arrays"}


def _read(path: Path) -> dict[str, NDArray[Any]]:
    arrays = archives.read(path, ("inputs", "targets", "split"))
    if arrays["targets"].ndim == 2:
        arrays["targets"] = arrays["targets"][:, :, None]
    inputs, targets, split = arrays["inputs"], arrays["targets"], arrays["split"]
    if (
        inputs.ndim != 3
        or targets.ndim != 3
        or inputs.size == 0
        or targets.size == 0
        or inputs.shape[:2] != targets.shape[:2]
        or split.shape != inputs.shape[:1]
    ):
        got = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise DataError(
            f"{path}: wanted inputs [tasks, rows, d], targets [tasks, rows] or [tasks, rows, outputs] and split "
            f"[tasks]; got {got}"
        )
    for name in ("inputs", "targets"):
        if arrays[name].dtype.kind not in "fiu":
            raise DataError(f"{path}: {name} are {arrays[name].dtype}; wanted floats or integers")
        with np.errstate(over="ignore"):
            finite = np.isfinite(arrays[name].astype(np.float32))  # what a run computes with
        if not finite.all():
            task, row = np.argwhere(~finite)[0][:2]
            raise DataError(
                f"{path}: {name} have NaN, infinite or, in float32, too large numbers, the first in task {task}, row "
                f"{row}; wanted finite numbers"
            )
    if split.dtype.kind not in "iu" or not np.isin(split, range(len(SPLITS))).all():
        raise DataError(
            f"{path}: split is {split.dtype} with {', '.join(map(str, np.unique(split)[:5]))}; wanted whole numbers, 0 "
            "train, 1 validation, 2 test"
        )
    return arrays


def _cut(inputs: NDArray[Any], targets: NDArray[Any], shots: int) -> RegressionTask:
    x, y = (torch.from_numpy(np.asarray(part, np.float64)).float() for part in (inputs, targets))
    return RegressionTask(x[:shots], y[:shots], x[shots:], y[shots:])


def check_tasks(
    source: RegressionSource, sizes: Mapping[Split, tuple[int, int]], seed: int
) -> dict[str, Any]:
    """Draws the first tasks of each split, of (shots, queries) rows, each twice. Returns a digest of
    them, as JSON values.

    Raises DataError that names the data set's class, the split, what was got and what was wanted:
    where a draw fails, has other shapes, numbers that are not finite, or other bits for the same
    key.
    """
    name, width = type(source).__name__, (source.inputs, source.outputs)
    content: dict[str, Any] = {"data set": name, "inputs and outputs": list(width)}
    for number, (split, (shots, queries)) in enumerate(sizes.items()):
        bits = hashlib.sha256()
        shapes = [(n, d) for n in (shots, queries) for d in width]
        for task in range(LOOKED_AT):
            where = f"{name}, split {split}, task {task}"
            with refusing(functools.partial(_refused, f"{where}: task() failed")):
                drawn, again = (
                    source.task(split, shots, queries, (seed, number, task)) for _ in range(2)
                )
                for part, one, other, shape in zip(
                    RegressionTask._fields, drawn, again, shapes, strict=True
                ):
                    location = f"{where}: {part.replace('_', ' ')}"
                    got = f"{one.dtype} {list(one.shape)}"
                    if tuple(one.shape) != shape or not one.is_floating_point():
                        raise _refused(location, f"got {got}; wanted floats {list(shape)}")
                    if not one.isfinite().all():
                        raise _refused(location, "NaN or infinite numbers; wanted finite ones")
                    if not torch.equal(one, other):
                        raise _refused(
                            location, "two draws with one key differ; wanted the same bits for it"
                        )
                    bits.update(one.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        content[f"first {split} tasks"] = bits.hexdigest()
    return content


def _refused(where: str, why: str) -> DataError:
    return DataError(f"{where}: {why}")
