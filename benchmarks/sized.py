"""What benchmarks/growth.py varies the sizes of: a problem with any number of numbers in x and y,
and a data set that costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bomemeta.core.problem import Batch, Encoded, Problem, Split
from bomemeta.core.tree import Params
from bomemeta.data.episodes import Episode, EpisodeSpec
from bomemeta.data.episodes import Split as EpisodeSplit
from bomemeta.errors import ConfigError
from bomemeta.registry import datasets, problems

Size = Annotated[int, Field(ge=1)]


@problems.register("sized")
@dataclass(kw_only=True)
class Sized(Problem):
    """f = |y - t|^2/2, g = y'(a*y)/2 - y'z, z = x folded or spread to y's size; a from 0.5 to 1.
    All tasks are alike.
    """

    upper_size: Size = 1000
    lower_size: Size = 1000
    fixed_tasks: Size | None = None  # so many tasks whose y persists; none: fresh ones

    def __post_init__(self) -> None:
        if max(self.upper_size, self.lower_size) % min(self.upper_size, self.lower_size):
            raise ConfigError(
                f"problem.upper_size and lower_size: got {self.upper_size} and {self.lower_size}; one must divide the other"
            )

    def setup(self) -> None:
        self._t = torch.linspace(-1, 1, self.lower_size, dtype=self.dtype)
        self._a = torch.linspace(0.5, 1, self.lower_size, dtype=self.dtype)

    @property
    def num_tasks(self) -> int | None:
        return self.fixed_tasks

    def init_upper(self, generator: torch.Generator) -> Params:
        return {"x": torch.zeros(self.upper_size, dtype=self.dtype)}

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        return {"t": self._t.expand(len(task_ids), -1), "a": self._a.expand(len(task_ids), -1)}

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        x, each = upper["x"], self.upper_size // self.lower_size
        if each >= 1:
            return {"z": x.reshape(self.lower_size, each).sum(1)}
        return {"z": x[:, None].expand(-1, self.lower_size // self.upper_size).reshape(-1)}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        return {"y": torch.zeros_like(encoded["z"])}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return ((lower["y"] - batch["t"]) ** 2).sum() / 2

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return (batch["a"] * lower["y"] ** 2).sum() / 2 - (lower["y"] * encoded["z"]).sum()


@datasets.register("noise")
@dataclass(kw_only=True)
class Noise:
    """Few-shot episodes of noise of Omniglot's size: the same for every key, so that drawing costs
    nothing.
    """

    def prepare(self) -> None:
        self._images = torch.rand(
            512, *self.image_shape, generator=torch.Generator().manual_seed(0)
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 28, 28

    def check(self, split: EpisodeSplit, spec: EpisodeSpec) -> None:
        pass

    def episode(self, split: EpisodeSplit, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        labels = [
            torch.arange(spec.ways).repeat_interleave(each) for each in (spec.shots, spec.queries)
        ]
        images = self._images[: sum(map(len, labels))].split([len(each) for each in labels])
        return Episode(images[0], labels[0], images[1], labels[1])
