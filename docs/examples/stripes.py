"""A data set of one's own: striped 16x16 images, a class being a direction and a width of stripes.
Nothing to download.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.errors import DataError
from bomemeta.registry import datasets

SIZE = 16
FIRST_CLASS = {
    "train": 0,
    "validation": 1,
    "test": 2,
}  # every third class: no class is in two splits


@datasets.register("stripes")
@dataclass(frozen=True, kw_only=True)
class Stripes:
    """Stripes at a random phase, with noise. The fields are the keys of the config's `data:`
    section.
    """

    classes: Annotated[int, Field(ge=3)] = 90
    noise: Annotated[float, Field(ge=0)] = 0.2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, SIZE, SIZE

    def prepare(self) -> None:
        """Here a data set reads its files, or says with a DataError how to get them. There is
        nothing to read.
        """

    def check(self, split: Split, spec: EpisodeSpec) -> None:
        there = len(self._classes(split))
        if there < spec.ways:
            raise DataError(
                f"stripes: the {split} split has {there} classes; problem.ways is {spec.ways}: raise data.classes"
            )

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        # `key` is all the randomness there is: the same key must give the same bits in every
        # process.
        rng = np.random.default_rng(key)
        classes = rng.choice(self._classes(split), spec.ways, replace=False)
        support, query = (
            self._draw(np.repeat(classes, each), rng) for each in (spec.shots, spec.queries)
        )
        labels = torch.arange(spec.ways)
        return Episode(
            support,
            labels.repeat_interleave(spec.shots),
            query,
            labels.repeat_interleave(spec.queries),
        )

    def _classes(self, split: Split) -> NDArray[np.int64]:
        return np.arange(FIRST_CLASS[split], self.classes, len(FIRST_CLASS))

    def _draw(self, classes: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        angle = math.pi * classes / self.classes
        frequency = 0.6 + 0.3 * (classes % 4)  # radians per pixel
        across, down = (
            (frequency * np.cos(angle))[:, None, None],
            (frequency * np.sin(angle))[:, None, None],
        )
        row, column = np.mgrid[0:SIZE, 0:SIZE]
        phase = rng.uniform(0, 2 * math.pi, (len(classes), 1, 1))
        waves = 0.5 + 0.5 * np.sin(across * column + down * row + phase)
        noisy = waves + self.noise * rng.standard_normal(waves.shape)
        return torch.from_numpy(noisy.clip(0, 1).astype(np.float32))[
            :, None
        ]  # [n, 1, 16, 16] in [0, 1]
