"""A module with a problem of a user's own, which can be imported where this file is."""

from __future__ import annotations

from typing import Any

import torch

import bomemeta as bm


class Heated(bm.Problem):
    """f_i = |y - i|^2, g_i = curvature |y - x|^2, of a fixed number of tasks."""

    def __init__(self, rooms: int, curvature: float = 1.0) -> None:
        self._rooms, self._curvature = rooms, curvature

    @property
    def num_tasks(self) -> int:
        return self._rooms

    def init_upper(self, generator: torch.Generator) -> Any:
        return {"x": torch.randn(3, generator=generator)}

    def load(self, task_ids: Any, step: int, split: str) -> Any:
        return {"goal": torch.stack([torch.full((3,), float(task)) for task in task_ids])}

    def init_lower(self, encoded: Any, batch: Any) -> Any:
        return {"y": torch.zeros(3)}

    def upper_loss(self, encoded: Any, lower: Any, batch: Any) -> Any:
        return ((lower["y"] - batch["goal"]) ** 2).sum()

    def lower_loss(self, encoded: Any, lower: Any, batch: Any) -> Any:
        return self._curvature * ((lower["y"] - encoded["x"]) ** 2).sum()
