"""How a lower variable that persists is moved along its direction: SGD, momentum, Adam or AdamW, with
weight decay and a clipped norm, on a stack of tasks. What an optimiser keeps of a task stays with it,
as its y does; a task that is met for the first time has zeros.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.optimizer import BETA1, BETA2, EPSILON
from bomemeta.core.solver import LowerGroups
from bomemeta.core.tree import Params

LowerOptimizer = Literal["sgd", "momentum", "adam", "adamw"]


class LowerRule(NamedTuple):
    optimizer: LowerOptimizer = "sgd"
    momentum: float = 0.0
    decay: float = 0.0
    clip_norm: float | None = None

    @property
    def plain(self) -> bool:
        """Whether it is SGD and nothing else."""
        return self.optimizer == "sgd" and self.decay == 0 and self.clip_norm is None

    def state(self, lower: LowerGroups | None, at: Params) -> LowerGroups:
        """What the optimiser keeps, taken from `lower`, or zeros like y where there is none yet."""
        if self.optimizer == "sgd":
            return {}
        names = ["velocity"] if self.optimizer == "momentum" else ["mean", "square", "adam"]
        if lower is not None:
            return {name: lower[name] for name in names}
        tasks = len(next(iter(at.values())))
        like = next(iter(at.values()))
        zeros: LowerGroups = {name: tree.zeros_like(at) for name in names if name != "adam"}
        return zeros | ({"adam": {"steps": like.new_zeros(tasks, 1)}} if "adam" in names else {})

    def move(
        self, y: Params, direction: Params, lr: float, state: LowerGroups
    ) -> tuple[Params, LowerGroups]:
        """y after one step of size `lr`, not yet projected, and what is kept then."""
        if self.clip_norm is not None:
            norm = tree.dot_tasks(direction, direction).sqrt()
            tiny = torch.finfo(norm.dtype).tiny
            direction = tree.scaled((self.clip_norm / norm.clamp_min(tiny)).clamp_max(1), direction)
        if self.optimizer == "adamw":
            y = tree.scaled(1 - lr * self.decay, y)
        elif self.decay > 0:
            direction = tree.axpy(self.decay, y, direction)
        if self.optimizer == "sgd":
            return tree.axpy(-lr, direction, y), {}
        if self.optimizer == "momentum":
            velocity = tree.axpy(self.momentum, state["velocity"], direction)
            return tree.axpy(-lr, velocity, y), {"velocity": velocity}
        return _adam(y, direction, lr, state)


def _adam(
    y: Params, direction: Params, lr: float, state: LowerGroups
) -> tuple[Params, LowerGroups]:
    """Kingma & Ba (ICLR 2015), every task with its own number of steps."""
    steps = state["adam"]["steps"] + 1
    mean = tree.axpy(1 - BETA1, direction, tree.scaled(BETA1, state["mean"]))
    square = tree.axpy(
        1 - BETA2,
        {name: tensor**2 for name, tensor in direction.items()},
        tree.scaled(BETA2, state["square"]),
    )
    moved = {
        name: tensor
        - lr
        * (mean[name] / _over(1 - BETA1**steps, tensor))
        / ((square[name] / _over(1 - BETA2**steps, tensor)).sqrt() + EPSILON)
        for name, tensor in y.items()
    }
    return moved, {"mean": mean, "square": square, "adam": {"steps": steps}}


def _over(numbers: Tensor, like: Tensor) -> Tensor:
    """[B, 1] for a stack `[B, ...]`."""
    return numbers.view(-1, *[1] * (like.ndim - 1))
