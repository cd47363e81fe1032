"""An ill-conditioned quadratic of any size, and the solvers with implicit hypergradients that tests
run on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from toy import Bench, attached

from bomemeta.core.problem import LossGradient, Problem, SharedProblem
from bomemeta.distributed.packing import PackedTasks, unpack_tasks
from bomemeta.solvers.lancbio import LancBiO
from bomemeta.solvers.subbio import SubBiO


@dataclass(kw_only=True)
class Synthetic(Problem):
    """g_i = y'A_i y/2 - y'(B_i x + c_i), f_i = |y - t_i|^2/2 + (rho/2)|x|^2, eigenvalues of A_i in
    [1, condition].

    `pull` scales B, and with it d2F/dx2 = mean B'A^-2 B + rho: at the default sizes from 0.25 to
    11.
    """

    tasks: int = 1
    dim_upper: int = 20
    dim_lower: int = 80
    condition: float = 100.0
    rho: float = 0.1
    pull: float = 5.0

    def setup(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(self.tasks, *shape, generator=generator, dtype=torch.float64)

        n = self.dim_lower
        eigenvalues = torch.logspace(0, math.log10(self.condition), n, dtype=torch.float64)
        rotation = torch.linalg.qr(normal(n, n)).Q
        self._data = {
            "A": rotation @ torch.diag(eigenvalues) @ rotation.mT,
            "B": self.pull / n**0.5 * normal(n, self.dim_upper),
            "c": normal(n),
            "t": normal(n),
        }

    @property
    def num_tasks(self) -> int:
        return self.tasks

    def init_upper(self, generator: torch.Generator):
        return {"x": torch.zeros(self.dim_upper, dtype=self.dtype)}

    def load(self, task_ids: Sequence[int], step: int, split: str):
        return {name: tensor[list(task_ids)].to(self.dtype) for name, tensor in self._data.items()}

    def init_lower(self, encoded, batch):
        return {"y": torch.zeros_like(batch["c"])}

    def lower_loss(self, encoded, lower, batch):
        y = lower["y"]
        return y @ batch["A"] @ y / 2 - y @ (batch["B"] @ encoded["x"] + batch["c"])

    def upper_loss(self, encoded, lower, batch):
        return ((lower["y"] - batch["t"]) ** 2).sum() / 2 + self.rho / 2 * (encoded["x"] ** 2).sum()

    def loss_gradient(self, loss, encoded, lower, batch, in_encoded):
        if loss == "upper" or in_encoded:
            return None
        y, right = lower["y"], (batch["B"] @ encoded["x"]) + batch["c"]
        image = (batch["A"] @ y[..., None])[..., 0]
        return LossGradient((y * (image / 2 - right)).sum(1), {"y": image - right}, {})

    def solution(self) -> Tensor:
        a, b, c, t = self._data.values()
        slope = torch.linalg.solve(a, b)
        matrix = (slope.mT @ slope).mean(0) + self.rho * torch.eye(
            self.dim_upper, dtype=torch.float64
        )
        right = (slope.mT @ (t - torch.linalg.solve(a, c))[..., None]).mean(0)
        return torch.linalg.solve(matrix, right)[:, 0]

    def error(self, bench: Bench) -> float:
        """|x - x*| / |x*|."""
        return float((bench.x() - self.solution()).norm() / self.solution().norm())


@dataclass(kw_only=True)
class SharedSynthetic(SharedProblem, Synthetic):
    """The same with one y for all tasks, which are then blocks: f = mean_i f_i, g = mean_i g_i."""

    @property
    def num_blocks(self) -> int:
        return self.tasks

    def loss_gradient(self, loss, encoded, lower, batch, in_encoded):
        return None

    def solution(self) -> Tensor:
        a, b, c, t = (tensor.mean(0) for tensor in self._data.values())
        slope = torch.linalg.solve(a, b)
        matrix = slope.mT @ slope + self.rho * torch.eye(self.dim_upper, dtype=torch.float64)
        return torch.linalg.solve(matrix, slope.mT @ (t - torch.linalg.solve(a, c)))

    def hypergradient(self, x: Tensor) -> Tensor:
        """dF/dx at x, in closed form."""
        a, b, c, t = (tensor.mean(0) for tensor in self._data.values())
        y = torch.linalg.solve(a, b @ x + c)
        return self.rho * x + torch.linalg.solve(a, b).mT @ (y - t)


def lancbio(**changes) -> LancBiO:
    return replace(LancBiO(subspace=10, inner_steps=5, inner_lr=0.01, upper_lr=0.02), **changes)


def small(tasks: int = 1) -> Problem:
    return attached(Synthetic(tasks=tasks, dim_upper=4, dim_lower=12, condition=10.0, pull=2.0))


def shared(blocks: int = 1) -> SharedSynthetic:
    return attached(
        SharedSynthetic(tasks=blocks, dim_upper=4, dim_lower=12, condition=10.0, pull=2.0)
    )


SOLVERS = {
    "lancbio": LancBiO(subspace=4, inner_steps=3, inner_lr=0.1, upper_lr=0.1),
    "lancbio_stagger": LancBiO(subspace=4, inner_steps=3, inner_lr=0.1, upper_lr=0.1, stagger=True),
    "subbio": SubBiO(inner_steps=3, inner_lr=0.1, aux_lr=0.1, upper_lr=0.1),
}


def kept(bench: Bench, task: int = 0):
    """The task's lower groups, stacks of one."""
    return unpack_tasks(
        PackedTasks(bench.lower.layout, torch.tensor(bench.lower.handles[task])[None])
    )
