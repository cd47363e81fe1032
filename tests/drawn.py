"""A shared problem whose batches are known for every step and inner step, and the same as plain
functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bomemeta.core.problem import Batch, Encoded, SharedProblem, Split
from bomemeta.core.tree import Params

SAMPLES, DIM = 4, 3


@dataclass(kw_only=True)
class Drawn(SharedProblem):
    """f = mean_j |y - t_j|^2 / 2, g = mean_j a_j |y - B_j x|^2 / 2 + y_1^4 / 10 over the samples j of a
    batch, which `chosen` names for every (step, inner step, block); inner None: the step's own.
    """

    inner_batches: bool = False
    blocks: int = 2
    size: int = 2

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        self.asked: list[int | None] = []
        self.a = 0.5 + torch.rand(self.blocks, SAMPLES, generator=draw, dtype=torch.float64)
        self.b = torch.randn(self.blocks, SAMPLES, DIM, DIM, generator=draw, dtype=torch.float64)
        self.t = torch.randn(self.blocks, SAMPLES, DIM, generator=draw, dtype=torch.float64)
        self.dtype = torch.float64

    @property
    def num_blocks(self) -> int:
        return self.blocks

    def chosen(self, step: int, inner: int | None, block: int) -> list[int]:
        key = 97 * step + 31 * block + (0 if inner is None else 7 * (inner + 1))
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(key))
        return sorted(order[: self.size].tolist())

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        return self._batch(task_ids, step, None)

    def load_inner(self, task_ids: Sequence[int], step: int, inner: int) -> Batch:
        return self._batch(task_ids, step, inner)

    def _batch(self, blocks: Sequence[int], step: int, inner: int | None) -> Batch:
        self.asked.append(inner)
        rows = [self.chosen(step, inner, block) for block in blocks]
        parts = {"a": self.a, "b": self.b, "t": self.t}
        return {
            name: torch.stack([all_[i][own] for i, own in zip(blocks, rows, strict=True)])
            for name, all_ in parts.items()
        }

    def init_upper(self, generator: torch.Generator) -> Params:
        return {"x": torch.linspace(-1, 1, DIM, dtype=torch.float64)}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        return {"y": torch.full((DIM,), 0.5, dtype=torch.float64)}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return ((lower["y"] - batch["t"]) ** 2).sum(1).mean() / 2

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        square = ((lower["y"] - batch["b"] @ encoded["x"]) ** 2).sum(1)
        return (batch["a"] * square).mean() / 2 + lower["y"][0] ** 4 / 10


class Plain:
    """f and g of a `Drawn` on the samples of (step, inner), as plain functions of x and y."""

    def __init__(self, problem: Drawn, step: int) -> None:
        self.problem, self.step = problem, step

    def f(self, x: Tensor, y: Tensor) -> Tensor:
        return self._mean("upper", x, y, None)

    def g(self, x: Tensor, y: Tensor, inner: int | None = None) -> Tensor:
        return self._mean("lower", x, y, inner)

    def _mean(self, loss: str, x: Tensor, y: Tensor, inner: int | None) -> Tensor:
        problem, values = self.problem, []
        for block in range(problem.blocks):
            own = problem.chosen(self.step, inner, block)
            a, b, t = (every[block][own] for every in (problem.a, problem.b, problem.t))
            if loss == "upper":
                values.append(((y - t) ** 2).sum(1).mean() / 2)
            else:
                square = ((y - b @ x) ** 2).sum(1)
                values.append((a * square).mean() / 2 + y[0] ** 4 / 10)
        return torch.stack(values).mean()


def grad(value: Tensor, *at: Tensor, graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, at, create_graph=graph)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()
