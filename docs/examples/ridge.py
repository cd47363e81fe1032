"""A problem of one's own: learn the prior mean of a family of ridge regressions. Named in a
config's `imports:`.
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
from bomemeta.registry import problems

Size = Annotated[int, Field(ge=1)]


@problems.register("prior_mean")
@dataclass(kw_only=True)
class PriorMean(Problem):
    """x is a mean that all tasks share, y_i are task i's regression weights, drawn towards x:

    g_i = |Z_i y - t_i|^2 / 2n + (ridge/2) |y - x|^2 on the task's training rows,  f_i = |Z_i y -
    t_i|^2 / 2n on its other rows.
    """

    # The fields are the keys of the config's `problem:` section; what pydantic can check is checked
    # with the config.
    tasks: Size = 16
    features: Size = 6
    # for training, fewer than the features: without x the weights are undetermined; as many again
    # for f
    rows: Size = 4
    ridge: Annotated[float, Field(gt=0)] = 0.5

    def setup(self) -> None:
        # In every process alike: all that is random follows from the config's seed.
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weights = normal(self.features) + 0.3 * normal(
            self.tasks, self.features
        )  # the tasks' true weights, around one mean
        inputs = normal(self.tasks, 2 * self.rows, self.features)
        targets = (inputs @ weights[:, :, None])[:, :, 0] + 0.1 * normal(self.tasks, 2 * self.rows)
        self._inputs, self._targets = inputs.to(self.dtype), targets.to(self.dtype)

    @property
    def num_tasks(self) -> int:
        # a fixed set of tasks, whose y_i live on from step to step; None would mean fresh tasks for
        # ever
        return self.tasks

    def init_upper(self, generator: torch.Generator) -> Params:
        return {"mean": torch.zeros(self.features, dtype=self.dtype)}

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        ids = list(task_ids)
        return {"inputs": self._inputs[ids], "targets": self._targets[ids]}  # every tensor [B, ...]

    # From here on everything is about ONE task, in plain PyTorch. `encoded` is what `encode`
    # returns: without one, x itself.

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        return {"weights": torch.zeros_like(encoded["mean"])}

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        train = _half_mean_square(
            lower["weights"], batch["inputs"][: self.rows], batch["targets"][: self.rows]
        )
        return train + self.ridge / 2 * ((lower["weights"] - encoded["mean"]) ** 2).sum()

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return _half_mean_square(
            lower["weights"], batch["inputs"][self.rows :], batch["targets"][self.rows :]
        )

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        return {
            "loss": self.upper_loss(encoded, lower, batch),
            "upper_error": (encoded["mean"] - self.solution().to(self.dtype)).norm(),
        }

    def solution(self) -> Tensor:
        """x* in closed form, float64: y_i*(x) = C_i (b_i + ridge x) is affine in x, and the mean of
        the f_i is then a quadratic.
        """
        inputs, targets = self._inputs.double(), self._targets.double()
        (z, t), (z_new, t_new) = (
            (inputs[:, part], targets[:, part, None]) for part in _halves(self.rows)
        )
        eye = torch.eye(self.features, dtype=torch.float64)
        inverse = torch.linalg.inv(z.mT @ z / self.rows + self.ridge * eye)
        offset, slope = z_new @ inverse @ (z.mT @ t / self.rows), z_new @ inverse * self.ridge
        matrix, right = (slope.mT @ slope).sum(0), (slope.mT @ (t_new - offset)).sum(0)
        return torch.linalg.solve(matrix, right)[:, 0]


def _half_mean_square(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    return ((inputs @ weights - targets) ** 2).mean() / 2


def _halves(rows: int) -> tuple[slice, slice]:
    return slice(rows), slice(rows, 2 * rows)
