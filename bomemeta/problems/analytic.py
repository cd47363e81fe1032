"""Small problems whose solutions are known in closed form: what a solver is checked against, and a
first thing to run.

Sources: coreset, minimax and degenerate are the toys of the BOME paper (Liu et al., NeurIPS 2022);
bamm_convex is the merely convex lower level of the sl-BAMM paper (Liu et al., ICML 2023), and
bamm_sensitive that problem with a solution that moves with mu; lancbio_synthetic is an
ill-conditioned quadratic, as LancBiO (Gao et al., ICLR 2025) is made for; quadratic is a family of
N separable quadratics of any size.
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
from bomemeta.errors import ConfigError
from bomemeta.problems.analytic_cases import CASES, BammConvex, CaseName, Quadratic, Sizes
from bomemeta.registry import problems

Size = Annotated[int, Field(ge=1)]


@problems.register("analytic")
@dataclass(kw_only=True)
class Analytic(Problem):
    """Problems with known solutions; x and y are single vectors `x` and `y`.

    coreset            f = 0.1 |y - (3,-2)|^2, g = |y - sum_i softmax(x)_i p_i|^2           y* =
    (1.8, 0.4), f* = 0.72 minimax            f = x y, g = -x y, y in [-10, 10]
    (0, 0) degenerate         f = (x - y_2)^2/2 + (y_1 - 1)^2/2, g = y_1^2/2 - x y_1
    (1; 1, 1) quadratic          f_i = |y_i - t_i|^2/2 + (ridge/2)|x|^2, g_i = y_i'A_i y_i/2 - x'B_i
    y_i, eigenvalues of A_i in [1/condition, 1] bamm_convex        degenerate with x, y_1 and y_2 of
    `dim_upper` numbers each, from 0.01 bamm_sensitive     bamm_convex with |x|^2/2 added to f
    x* = e/2 lancbio_synthetic  f = |y - t|^2/2 + (ridge/2)|x|^2, g = y'A y/2 - y'(B x + c),
    eigenvalues of A in [1, condition]
    """

    case: CaseName
    start: list[float] | None = None  # y at step 0; none: the paper's
    tasks: Size = 1  # quadratic: N
    dim_upper: Size = 3  # quadratic, lancbio_synthetic; bamm_*: half of y's numbers too
    dim_lower: Size = 4  # quadratic, lancbio_synthetic
    condition: Annotated[float, Field(ge=1)] = 10.0  # quadratic, lancbio_synthetic
    ridge: Annotated[float, Field(ge=0)] = 0.1  # quadratic, lancbio_synthetic

    def __post_init__(self) -> None:
        self._case = CASES[self.case](
            Sizes(self.tasks, self.dim_upper, self.dim_lower, self.condition, self.ridge)
        )
        if self.case != "quadratic" and self.tasks != 1:
            raise ConfigError(
                f"problem.tasks: got {self.tasks}; {self.case} is one task, only quadratic has several"
            )
        if self.start is not None and len(self.start) != self._case.lower_size:
            raise ConfigError(
                f"problem.start: got {len(self.start)} numbers; y of {self.case} has {self._case.lower_size}"
            )

    @property
    def num_tasks(self) -> int | None:
        return self.tasks

    def setup(self) -> None:
        drawn = self._case.draw(torch.Generator().manual_seed(self.seed))
        self._data: Batch = {"task": torch.arange(self.tasks)} | {
            name: tensor.to(self.dtype) for name, tensor in drawn.items()
        }

    def init_upper(self, generator: torch.Generator) -> Params:
        return {"x": self._case.start_upper(generator).to(self.dtype)}

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        return {name: tensor[list(task_ids)] for name, tensor in self._data.items()}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        start = self.start if self.start is not None else self._case.start_lower()
        return {"y": torch.tensor(start, dtype=self.dtype, device=batch["task"].device)}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return self._case.upper_loss(encoded["x"], lower["y"], batch)

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return self._case.lower_loss(encoded["x"], lower["y"], batch)

    def project_lower(self, lower: Params) -> Params:
        box = self._case.box
        return lower if box is None else {"y": lower["y"].clamp(-box, box)}

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """`upper_loss`, `lower_loss` at the task's own y, and where x* is known and unique
        `upper_error` = |x - x*|; where it is not 0 also `upper_relative_error` = |x - x*| / |x*|.
        """
        metrics = {
            "upper_loss": self.upper_loss(encoded, lower, batch),
            "lower_loss": self.lower_loss(encoded, lower, batch),
        }
        solution = self._case.solution(self._data)
        if solution is not None:
            metrics["upper_error"] = (encoded["x"] - solution.to(encoded["x"])).norm()
            if (scale := float(solution.norm())) > 0:
                metrics["upper_relative_error"] = metrics["upper_error"] / scale
        return metrics

    def solution(self, truncation: tuple[int, float] | None = None) -> Tensor:
        """x*, float64 [dim x]; not for coreset. With `truncation` = (T, alpha), for quadratic: the
        point that BOME with T inner steps of size alpha tends to.
        """
        if truncation is not None and isinstance(self._case, Quadratic):
            return self._case.solution(self._data, truncation)
        solution = self._case.solution(self._data)
        if solution is None or truncation is not None:
            raise ValueError(
                f"{self.case} has no {'unique' if solution is None else 'truncated'} solution in closed form"
            )
        return solution

    def averaged_solution(self, mu: float) -> Tensor:
        """bamm_*: x_mu, float64 [dim x], the solution with mu f + (1 - mu) g in place of g; x* is
        its limit for mu -> 0.
        """
        if not isinstance(self._case, BammConvex):
            raise ValueError(f"{self.case} has no closed form at mu > 0")
        return self._case.averaged_solution(mu)
