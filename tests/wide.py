"""A user's file for the tests on several nodes: x and the lower variables are so large that they
live in the object store.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bomemeta.core.problem import Batch, Encoded, Problem, Split
from bomemeta.core.tree import Params
from bomemeta.registry import problems


@problems.register("wide")
@dataclass(kw_only=True)
class Wide(Problem):
    """f_i = |y_i - t_i|^2 / 2, g_i = a_i'y_i^2 / 2 - x'y_i, all of `size` numbers."""

    tasks: int = 4
    size: int = 40_000
    load_s: float = 0.0  # what a step's data takes to load
    hurry: str = ""  # once this file is there, it takes no time

    @property
    def num_tasks(self) -> int:
        return self.tasks

    def setup(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self._data = {
            "t": torch.randn(self.tasks, self.size, generator=generator).to(self.dtype),
            "a": (0.5 + torch.rand(self.tasks, self.size, generator=generator)).to(self.dtype),
        }

    def init_upper(self, generator: torch.Generator) -> Params:
        return {"x": torch.randn(self.size, generator=generator).to(self.dtype)}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        return {"y": torch.zeros_like(batch["t"])}

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        if split == "train" and self.load_s and not (self.hurry and Path(self.hurry).exists()):
            time.sleep(self.load_s)
        return {name: tensor[list(task_ids)] for name, tensor in self._data.items()}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return (lower["y"] - batch["t"]).square().sum() / 2

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return (batch["a"] * lower["y"].square()).sum() / 2 - (encoded["x"] * lower["y"]).sum()
