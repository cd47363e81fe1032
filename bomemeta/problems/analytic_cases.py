"""The equations of problem `analytic`, one class per case: losses, start, constants and solution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bomemeta.core.problem import Batch

CaseName = Literal[
    "coreset",
    "minimax",
    "degenerate",
    "quadratic",
    "bamm_convex",
    "bamm_sensitive",
    "lancbio_synthetic",
]


class Sizes(NamedTuple):
    """The config's fields that a case may follow."""

    tasks: int
    dim_upper: int
    dim_lower: int
    condition: float
    ridge: float


class Case(ABC):
    """One problem in the equations' letters: x and y are ONE task's vectors, `data` its constants.
    `of` is what the config says of it.
    """

    box: float | None = None  # |y_j| <= box

    def __init__(self, of: Sizes) -> None:
        self.of = of

    @property
    def lower_size(self) -> int:
        return len(self.start_lower())

    def start_upper(self, generator: torch.Generator) -> Tensor:
        """x at step 0, float64."""
        return torch.randn(self.of.dim_upper, generator=generator, dtype=torch.float64)

    def start_lower(self) -> list[float]:
        """y at step 0."""
        return [0.0] * self.of.dim_lower

    def draw(self, generator: torch.Generator) -> Batch:
        """The tasks' constants, float64 [N, ...]."""
        return {}

    @abstractmethod
    def upper_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        """f of one task, shape []."""

    @abstractmethod
    def lower_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        """g of one task, shape []."""

    @abstractmethod
    def solution(self, data: Batch) -> Tensor | None:
        """x*, float64, from the constants of all tasks; None where many x are solutions."""


class Coreset(Case):
    POINTS = ((1.0, 3.0), (3.0, 1.0), (-2.0, 2.0), (-3.0, -2.0))  # that the lower level averages
    TARGET = (3.0, -2.0)  # where the upper level wants that average

    def start_upper(self, generator: torch.Generator) -> Tensor:
        return torch.zeros(len(self.POINTS), dtype=torch.float64)

    def start_lower(self) -> list[float]:
        return [0.0, 3.0]

    def upper_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        return 0.1 * ((y - y.new_tensor(self.TARGET)) ** 2).sum()

    def lower_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        return ((y - torch.softmax(x, 0) @ y.new_tensor(self.POINTS)) ** 2).sum()

    def solution(self, data: Batch) -> Tensor | None:
        return None  # many x have the same softmax weights


class Minimax(Case):
    box = 10.0

    def start_upper(self, generator: torch.Generator) -> Tensor:
        return torch.tensor([4.0], dtype=torch.float64)

    def start_lower(self) -> list[float]:
        return [4.0]

    def upper_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        return (x * y).sum()

    def lower_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        return -(x * y).sum()

    def solution(self, data: Batch) -> Tensor | None:
        return torch.zeros(1, dtype=torch.float64)


class BammConvex(Case):
    """y = (y_1, y_2), each of x's size n. g does not contain y_2: its minimisers are a whole space,
    from which f chooses.
    """

    START = 0.01  # of every number of x and y, as in the sl-BAMM paper's code

    @property
    def n(self) -> int:
        return self.of.dim_upper

    def start_upper(self, generator: torch.Generator) -> Tensor:
        return torch.full((self.n,), self.START, dtype=torch.float64)

    def start_lower(self) -> list[float]:
        return [self.START] * (2 * self.n)

    def upper_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        return ((x - y[self.n :]) ** 2).sum() / 2 + ((y[: self.n] - 1) ** 2).sum() / 2

    def lower_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        first = y[: self.n]
        return (first**2).sum() / 2 - (x * first).sum()

    def solution(self, data: Batch) -> Tensor | None:
        return self.averaged_solution(0.0)

    def averaged_solution(self, mu: float) -> Tensor:
        """With y_1 = mu e + (1 - mu) x and y_2 = x, f is (1 - mu)^2 |x - e|^2 / 2, whose minimiser
        does not move with mu.
        """
        return torch.ones(self.n, dtype=torch.float64)


class Degenerate(BammConvex):
    """The same in one dimension, from 0."""

    START = 0.0

    @property
    def n(self) -> int:
        return 1


class BammSensitive(BammConvex):
    """Its solution moves with mu: what a wrong mu, or one that falls too slowly, can be seen by."""

    def upper_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        return super().upper_loss(x, y, data) + (x**2).sum() / 2

    def averaged_solution(self, mu: float) -> Tensor:
        # the minimiser of (1 - mu)^2 |x - e|^2 / 2 + |x|^2 / 2
        return torch.full((self.n,), (1 - mu) ** 2 / (1 + (1 - mu) ** 2), dtype=torch.float64)


class Quadratic(Case):
    def draw(self, generator: torch.Generator) -> Batch:
        dim_upper, dim_lower = self.of.dim_upper, self.of.dim_lower

        def normal(*shape: int) -> Tensor:
            return torch.randn(self.of.tasks, *shape, generator=generator, dtype=torch.float64)

        return {
            "A": _symmetric(
                torch.logspace(0, -1, dim_lower, base=self.of.condition, dtype=torch.float64),
                normal,
            ),
            "B": normal(dim_upper, dim_lower) / dim_lower**0.5,
            "t": normal(dim_lower),
        }

    def upper_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        return ((y - data["t"]) ** 2).sum() / 2 + self.of.ridge / 2 * (x**2).sum()

    def lower_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        return y @ data["A"] @ y / 2 - x @ data["B"] @ y

    def solution(self, data: Batch, truncation: tuple[int, float] | None = None) -> Tensor:
        """With `truncation` = (T, alpha) the inverse Hessian of the hypergradient is cut to (I - (I
        - alpha A)^T) A^-1, the T-term Neumann series: a bias that more outer steps do not cure.
        """
        a, b, t = (data[name].to(torch.float64) for name in ("A", "B", "t"))
        eye = torch.eye(self.of.dim_lower, dtype=torch.float64)
        inverse = torch.linalg.inv(a)
        kept = (
            eye
            if truncation is None
            else eye - torch.linalg.matrix_power(eye - truncation[1] * a, truncation[0])
        )
        # d/dx of mean_i f_i(x, A_i^-1 B_i' x) = 0, with the (cut) inverse in front
        pull = b @ kept @ inverse
        matrix = (pull @ inverse @ b.mT).mean(0) + self.of.ridge * torch.eye(
            self.of.dim_upper, dtype=torch.float64
        )
        solution: Tensor = torch.linalg.solve(matrix, (pull @ t[:, :, None]).mean(0))[:, 0]
        return solution


class LancbioSynthetic(Case):
    def draw(self, generator: torch.Generator) -> Batch:
        dim_upper, dim_lower = self.of.dim_upper, self.of.dim_lower

        def normal(*shape: int) -> Tensor:
            return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

        # The source gives sizes (20, 80), condition 100 and x's step 0.02, but neither A's scale
        # nor B's. With these two d2F/dx2 = B'A^-2 B + ridge lies in [0.2, 9]: that step is stable,
        # and 4,000 of them are enough. With B twice as large LancBiO diverges.
        return {
            "A": _symmetric(
                torch.logspace(0, 1, dim_lower, base=self.of.condition, dtype=torch.float64), normal
            ),
            "B": normal(dim_lower, dim_upper) / 2,
            "c": normal(dim_lower),
            "t": normal(dim_lower),
        }

    def upper_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        return ((y - data["t"]) ** 2).sum() / 2 + self.of.ridge / 2 * (x**2).sum()

    def lower_loss(self, x: Tensor, y: Tensor, data: Batch) -> Tensor:
        loss: Tensor = y @ data["A"] @ y / 2 - y @ (data["B"] @ x + data["c"])
        return loss

    def solution(self, data: Batch) -> Tensor | None:
        a, b, c, t = (data[name][0].to(torch.float64) for name in ("A", "B", "c", "t"))
        slope = torch.linalg.solve(a, b)  # y*(x) = slope x + A^-1 c
        matrix = slope.mT @ slope + self.of.ridge * torch.eye(b.shape[1], dtype=torch.float64)
        solution: Tensor = torch.linalg.solve(matrix, slope.mT @ (t - torch.linalg.solve(a, c)))
        return solution


CASES: dict[CaseName, type[Case]] = {
    "coreset": Coreset,
    "minimax": Minimax,
    "degenerate": Degenerate,
    "quadratic": Quadratic,
    "bamm_convex": BammConvex,
    "bamm_sensitive": BammSensitive,
    "lancbio_synthetic": LancbioSynthetic,
}


def _symmetric(eigenvalues: Tensor, normal: Callable[..., Tensor]) -> Tensor:
    """Matrices with these eigenvalues and random eigenvectors, [N, n, n]."""
    rotation: Tensor = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues))).Q
    return rotation @ torch.diag(eigenvalues) @ rotation.mT
