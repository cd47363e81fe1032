"""Families of regression tasks: the sinusoids of MAML's paper, and arrays of a user's own."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bomemeta.data import archives
from bomemeta.data.class_images import generator
from bomemeta.data.episodes import Split
from bomemeta.errors import DataError
from bomemeta.registry import datasets

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

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

    @property
    def inputs(self) -> int:
        return int(self._arrays()["inputs"].shape[2])

    @property
    def outputs(self) -> int:
        return int(self._arrays()["targets"].shape[2])

    def prepare(self) -> None:
        """Reads the file. Raises DataError."""
        self._arrays()

    def check_task(self, split: Split, rows: int) -> None:
        arrays = self._arrays()
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
        rng, arrays = generator(key), self._arrays()
        number = rng.choice(self._of(split))
        rows = rng.permutation(arrays["inputs"].shape[1])[: shots + queries]
        return _cut(arrays["inputs"][number][rows], arrays["targets"][number][rows], shots)

    def _of(self, split: Split) -> NDArray[np.int64]:
        return np.flatnonzero(self._arrays()["split"] == SPLITS.index(split))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return _read(self.path)


@functools.cache
def _read(path: str) -> dict[str, NDArray[Any]]:
    arrays = archives.read(Path(path).expanduser(), ("inputs", "targets", "split"))
    if arrays["targets"].ndim == 2:
        arrays["targets"] = arrays["targets"][:, :, None]
    shapes = {name: array.shape for name, array in arrays.items()}
    inputs, targets = arrays["inputs"], arrays["targets"]
    if (
        inputs.ndim != 3
        or targets.ndim != 3
        or inputs.shape[:2] != targets.shape[:2]
        or arrays["split"].shape != inputs.shape[:1]
    ):
        raise DataError(
            f"{path}: wanted inputs [tasks, rows, d], targets [tasks, rows] or [tasks, rows, outputs] and split "
            f"[tasks]; got {shapes}"
        )
    if not (np.isfinite(inputs).all() and np.isfinite(targets).all()):
        raise DataError(f"{path}: inputs or targets are not finite")
    return arrays


def _cut(inputs: NDArray[Any], targets: NDArray[Any], shots: int) -> RegressionTask:
    x, y = (torch.from_numpy(np.asarray(part, np.float64)).float() for part in (inputs, targets))
    return RegressionTask(x[:shots], y[:shots], x[shots:], y[shots:])
