"""Images grouped by class, and the draw of classes and images that every episode starts with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.errors import DataError


def generator(key: tuple[int, ...]) -> np.random.Generator:
    """The one source of randomness of an episode: equal keys give equal draws in every process.
    `key`: integers >= 0.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


class Draw(NamedTuple):
    """Rows of an image array. No row is both support and query; support rows are distinct."""

    support: NDArray[np.int64]  # [ways, shots]
    query: NDArray[np.int64]  # [ways, queries]
    classes: NDArray[np.int64]  # [ways], distinct


@dataclass(frozen=True)
class ClassRows:
    """Which rows of an image array belong to which class: class c has rows `start[c]` up to
    `start[c] + count[c]`.
    """

    start: NDArray[np.int64]  # [classes]
    count: NDArray[np.int64]  # [classes]
    names: Sequence[str]  # [classes], what messages call them

    def draw(self, spec: EpisodeSpec, rng: np.random.Generator) -> Draw:
        """Draws classes without replacement, then images of each without replacement, the support
        first.

        A class with too few images left for the queries gives them in turn again: what `check_size`
        keeps from happening, and what a data set that perturbs every draw allows. Needs more than
        `shots` images in each class.
        """
        support = np.empty((spec.ways, spec.shots), np.int64)
        query = np.empty((spec.ways, spec.queries), np.int64)
        classes = rng.choice(len(self.start), spec.ways, replace=False)
        for way, c in enumerate(classes):
            rows = self.start[c] + rng.permutation(self.count[c])
            support[way] = rows[: spec.shots]
            left = rows[spec.shots :]
            query[way] = left[np.arange(spec.queries) % len(left)]
        return Draw(support, query, classes)

    def numbers_of(self, spec: EpisodeSpec, key: tuple[int, ...]) -> NDArray[np.int64]:
        """The classes `[ways]` that `draw` with the generator of this key draws first."""
        return self.draw(spec, generator(key)).classes

    def names_of(self, spec: EpisodeSpec, key: tuple[int, ...]) -> list[str]:
        """Their names."""
        return [str(self.names[c]) for c in self.numbers_of(spec, key)]


def check_spec(dataset: str, spec: EpisodeSpec) -> None:
    """Raises DataError where an episode would have no classes, no support or no query."""
    for field, value in zip(spec._fields, spec, strict=True):
        if value < 1:
            raise DataError(f"{dataset}: problem.{field} is {value}; an episode needs at least 1")


def check_ways(
    dataset: str, split: Split, spec: EpisodeSpec, classes: int, advice: str = "lower it"
) -> None:
    """Raises DataError where the split has fewer classes than an episode asks for."""
    if classes < spec.ways:
        also = "" if split == "train" else ". problem.test_ways is of validation and test alone"
        raise DataError(
            f"{dataset}: the {split} split has {classes} classes; problem.ways is {spec.ways}: {advice}{also}"
        )


def check_size(
    dataset: str, split: Split, spec: EpisodeSpec, names: Sequence[str], counts: NDArray[np.int64]
) -> None:
    """Raises DataError where the split cannot give episodes of distinct images. `names`, `counts`
    [classes]: images of each.
    """
    check_spec(dataset, spec)
    check_ways(dataset, split, spec, len(counts))
    smallest = int(np.argmin(counts))
    wanted = spec.shots + spec.queries
    if counts[smallest] < wanted:
        raise DataError(
            f"{dataset}: class {names[smallest]} ({split}) has {counts[smallest]} images; shots + queries needs {wanted}: "
            f"lower problem.queries or problem.shots"
        )


def episode_of(support: Tensor, query: Tensor, spec: EpisodeSpec) -> Episode:
    """Images that lie class after class, `[ways * shots, C, H, W]` and `[ways * queries, C, H, W]`,
    with their labels.
    """
    ways = torch.arange(spec.ways)
    return Episode(
        support, ways.repeat_interleave(spec.shots), query, ways.repeat_interleave(spec.queries)
    )
