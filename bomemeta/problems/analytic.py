"""Small problems whose solutions are known in closed form: what a solver is checked against, and a first thing to run.

coreset, minimax and degenerate are the toy problems of the BOME paper (Liu et al., NeurIPS 2022); quadratic is a family of N
separable quadratics of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from bomemeta.core.problem import Batch, BilevelProblem, Encoded, Split
from bomemeta.core.tree import Params
from bomemeta.errors import ConfigError
from bomemeta.registry import problems

Size = Annotated[int, Field(ge=1)]
POINTS = ((1.0, 3.0), (3.0, 1.0), (-2.0, 2.0), (-3.0, -2.0))  # coreset: the points that the lower level averages
TARGET = (3.0, -2.0)  # coreset: where the upper level wants that average
BOX = 10.0  # minimax: |y| <= 10


class Start(NamedTuple):
    upper: tuple[float, ...]
    lower: tuple[float, ...]


STARTS = {
    "coreset": Start((0.0, 0.0, 0.0, 0.0), (0.0, 3.0)),
    "minimax": Start((4.0,), (4.0,)),
    "degenerate": Start((0.0,), (0.0, 0.0)),
}


@problems.register("analytic")
@dataclass(kw_only=True)
class Analytic(BilevelProblem):
    """Problems with known solutions; x and y are single vectors `x` and `y`.

    coreset     f = 0.1 |y - (3,-2)|^2, g = |y - sum_i softmax(x)_i p_i|^2           y* = (1.8, 0.4), f* = 0.72
    minimax     f = x y, g = -x y, y in [-10, 10]                                    (0, 0)
    degenerate  f = (x - y_2)^2/2 + (y_1 - 1)^2/2, g = y_1^2/2 - x y_1               (1; 1, 1)
    quadratic   f_i = |y_i - t_i|^2/2 + (ridge/2)|x|^2, g_i = y_i'A_i y_i/2 - x'B_i y_i, eigenvalues of A_i in [1/condition, 1]
    """

    case: Literal["coreset", "minimax", "degenerate", "quadratic"]
    start: list[float] | None = None  # y at step 0; none: the paper's
    tasks: Size = 1  # quadratic: N
    dim_upper: Size = 3  # quadratic
    dim_lower: Size = 4  # quadratic
    condition: Annotated[float, Field(ge=1)] = 10.0  # quadratic
    ridge: Annotated[float, Field(ge=0)] = 0.1  # quadratic

    def __post_init__(self) -> None:
        if self.case != "quadratic" and self.tasks != 1:
            raise ConfigError(f"problem.tasks: got {self.tasks}; {self.case} is one task, only quadratic has several")
        if self.start is not None and len(self.start) != self._lower_size:
            raise ConfigError(f"problem.start: got {len(self.start)} numbers; y of {self.case} has {self._lower_size}")

    @property
    def _lower_size(self) -> int:
        return self.dim_lower if self.case == "quadratic" else len(STARTS[self.case].lower)

    @property
    def pool(self) -> int | None:
        return self.tasks

    def setup(self) -> None:
        self._data: Batch = {"task": torch.arange(self.tasks)}
        if self.case == "quadratic":
            self._data |= self._draw_quadratics()

    def _draw_quadratics(self) -> Batch:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(self.tasks, *shape, generator=generator, dtype=torch.float64)

        eigenvalues = torch.logspace(0, -1, self.dim_lower, base=self.condition, dtype=torch.float64)
        rotation = torch.linalg.qr(normal(self.dim_lower, self.dim_lower)).Q
        drawn = {
            "A": rotation @ torch.diag(eigenvalues) @ rotation.mT,
            "B": normal(self.dim_upper, self.dim_lower) / self.dim_lower**0.5,
            "t": normal(self.dim_lower),
        }
        return {name: tensor.to(self.dtype) for name, tensor in drawn.items()}

    def init_upper(self, generator: torch.Generator) -> Params:
        if self.case == "quadratic":
            return {"x": torch.randn(self.dim_upper, generator=generator, dtype=torch.float64).to(self.dtype)}
        return {"x": torch.tensor(STARTS[self.case].upper, dtype=self.dtype)}

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        return {name: tensor[list(task_ids)] for name, tensor in self._data.items()}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        start = self.start if self.start is not None else STARTS[self.case].lower if self.case != "quadratic" else None
        if start is None:
            return {"y": torch.zeros_like(batch["t"])}
        return {"y": torch.tensor(start, dtype=self.dtype, device=batch["task"].device)}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        x, y = encoded["x"], lower["y"]
        if self.case == "coreset":
            return 0.1 * ((y - y.new_tensor(TARGET)) ** 2).sum()
        if self.case == "minimax":
            return (x * y).sum()
        if self.case == "degenerate":
            return (x[0] - y[1]) ** 2 / 2 + (y[0] - 1) ** 2 / 2
        return ((y - batch["t"]) ** 2).sum() / 2 + self.ridge / 2 * (x**2).sum()

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        x, y = encoded["x"], lower["y"]
        if self.case == "coreset":
            return ((y - torch.softmax(x, 0) @ y.new_tensor(POINTS)) ** 2).sum()
        if self.case == "minimax":
            return -(x * y).sum()
        if self.case == "degenerate":
            return y[0] ** 2 / 2 - x[0] * y[0]
        return y @ batch["A"] @ y / 2 - x @ batch["B"] @ y

    def project_lower(self, lower: Params) -> Params:
        return {"y": lower["y"].clamp(-BOX, BOX)} if self.case == "minimax" else lower

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """`upper_loss`, `lower_loss` at the task's own y, and `upper_error` = |x - x*| where x* is known and unique."""
        figures = {
            "upper_loss": self.upper_loss(encoded, lower, batch),
            "lower_loss": self.lower_loss(encoded, lower, batch),
        }
        if self.case != "coreset":  # many x have the same softmax weights
            figures["upper_error"] = (encoded["x"] - self.solution().to(encoded["x"])).norm()
        return figures

    def solution(self, truncation: tuple[int, float] | None = None) -> Tensor:
        """x*, float64 [dim x]. With `truncation` = (T, alpha) the point that BOME with T inner steps of size alpha tends to.

        There the inverse Hessian of the hypergradient is cut to (I - (I - alpha A)^T) A^-1, the T-term Neumann series: a bias that
        more outer steps do not cure.
        """
        if self.case != "quadratic":
            return torch.tensor({"minimax": [0.0], "degenerate": [1.0]}[self.case], dtype=torch.float64)
        a, b, t = (self._data[name].to(torch.float64) for name in ("A", "B", "t"))
        eye = torch.eye(self.dim_lower, dtype=torch.float64)
        inverse = torch.linalg.inv(a)
        kept = eye if truncation is None else eye - torch.linalg.matrix_power(eye - truncation[1] * a, truncation[0])
        # d/dx of mean_i f_i(x, A_i^-1 B_i' x) = 0, with the (cut) inverse in front
        pull = b @ kept @ inverse
        matrix = (pull @ inverse @ b.mT).mean(0) + self.ridge * torch.eye(self.dim_upper, dtype=torch.float64)
        solution: Tensor = torch.linalg.solve(matrix, (pull @ t[:, :, None]).mean(0))[:, 0]
        return solution
