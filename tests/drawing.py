"""Problems whose functions draw random numbers, for tests that name them in `imports:`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from bomemeta.core.problem import Batch, Encoded, Problem, Split
from bomemeta.core.tree import Params
from bomemeta.registry import problems


@problems.register("drawing")
@dataclass(kw_only=True)
class Drawing(Problem):
    """Regressions with one layer for all tasks, whose functions draw from the process's generators
    where `where` says so.
    """

    tasks: int = 4
    fixed: bool = True
    where: str = "losses"

    def setup(self) -> None:
        g = torch.Generator().manual_seed(7)
        self.a = torch.randn(self.tasks, 12, 5, generator=g).to(self.dtype)
        self.t = torch.randn(self.tasks, 12, generator=g).to(self.dtype)
        if self.where == "setup":  # as a layer that is made without a generator
            self.a = self.a + 0.1 * torch.randn(self.a.shape).to(self.dtype)
            self.t = self.t + torch.from_numpy(np.random.rand(*self.t.shape)).to(self.dtype)

    @property
    def num_tasks(self) -> int | None:
        return self.tasks if self.fixed else None

    def init_upper(self, generator: torch.Generator) -> Params:
        w = torch.eye(5, dtype=self.dtype)
        return {"w": w + 0.1 * torch.randn(5, 5).to(w) if self.where == "init_upper" else w}

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        ids = [task % self.tasks for task in task_ids]
        return {"a": self.a[ids], "t": self.t[ids]}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        zeros = torch.zeros(5, dtype=self.dtype)
        return {
            "v": zeros + 0.1 * torch.randn(5).to(zeros) if self.where == "init_lower" else zeros
        }

    def _loss(self, encoded: Encoded, lower: Params, batch: Batch, rows: slice) -> torch.Tensor:
        hidden = batch["a"][rows] @ encoded["w"]
        if self.where == "losses":
            hidden = functional.dropout(hidden, 0.5)
        if self.where == "numpy":
            hidden = hidden * (1 + 0.1 * float(np.random.rand()) + 0.1 * random.random())
        return ((hidden @ lower["v"] - batch["t"][rows]) ** 2).mean()

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> torch.Tensor:
        penalty = (lower["v"] ** 2).sum()
        return self._loss(encoded, lower, batch, slice(6)) + 0.05 * penalty

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> torch.Tensor:
        return self._loss(encoded, lower, batch, slice(6, 12))


@problems.register("drawing_encoder")
@dataclass(kw_only=True)
class DrawingEncoder(Drawing):
    """The same with a dropped-out encoding: the losses themselves draw nothing."""

    where: str = "encode"

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        return {"h": functional.dropout(batch["a"] @ upper["w"], 0.5)}

    def _loss(self, encoded: Encoded, lower: Params, batch: Batch, rows: slice) -> torch.Tensor:
        return ((encoded["h"][rows] @ lower["v"] - batch["t"][rows]) ** 2).mean()
