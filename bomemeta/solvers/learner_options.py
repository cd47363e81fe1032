"""What MAML and its kin share: every task's y starts from x, takes a few gradient steps, and x
moves by what came of it.

    y_i = y_0 after `inner_steps` gradient steps of size `inner_lr` on g_i,      y_0 = init_lower, made of x
    x  <- x - upper_lr mean_i d_i,    d_i = d f_i(x, y_i(x)) / dx or what the algorithm puts in its place

Differentiation is `torch.func`'s. What a problem descends may leave out what only holds y near x,
and may be computed once where the head alone adapts: `Problem.adaptation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.implicit import move_upper
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Oracle
from bomemeta.core.problem import Batch, Encoded, Problem, SharedProblem
from bomemeta.core.solver import KernelResult, LowerGroups, LowerStates, Run, StepResult
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.errors import ConfigError
from bomemeta.solvers.upper_options import UpperOptions

Positive = Annotated[float, Field(gt=0)]
Steps = Annotated[int, Field(ge=1)]


class AdaptedTree(NamedTuple):
    """One task's y after its steps."""

    lower: Params
    loss: Callable[[], Tensor]  # what was descended, at y, [], without a graph


class Direction(NamedTuple):
    """One task's part of a step."""

    in_encoded: Encoded  # d_i, up to the pull-back through `encode`
    upper_loss: Tensor  # f_i at y_i, []
    lower_loss: Tensor  # what was descended, at y_i, []
    lower: Params  # y_i


@dataclass(frozen=True, kw_only=True)
class LearnerOptions(UpperOptions):
    """A solver that adapts y to each task from a start made of x, in every step anew, and moves x
    by what that gives. As it stands here it is MAML; the others change parts of it.
    """

    inner_steps: Steps = 5
    inner_lr: Positive = 0.1

    # whether d_i follows how the inner gradients depend on x
    second_order: ClassVar[bool] = True
    query_gradients: ClassVar[int] = 1  # of f, per task
    # whether each entry of y has to have an entry of x of its name and shape
    needs_pairs: ClassVar[bool] = False

    def check(self, problem: Problem) -> None:
        name, kind = type(self).__name__, type(problem).__name__
        if isinstance(problem, SharedProblem):
            raise ConfigError(
                f"problem.name: {kind} has one lower variable for all its data; solver {name} adapts one to each task: take a problem "
                "with tasks, as few_shot is"
            )
        if not problem.attached:
            return
        upper = problem.init_upper(torch.Generator().manual_seed(0))
        batch = {name: rows[0] for name, rows in problem.load([0], 0, "train").items()}
        with torch.enable_grad():
            leaves = tree.leaves(upper)
            lower = problem.init_lower(problem.encode(leaves, batch), batch)
        if not any(tensor.requires_grad for tensor in lower.values()):
            raise ConfigError(
                f"problem.name: y of {kind} does not start from x: init_lower makes nothing of it, and solver {name} learns where to "
                "start. Let init_lower return values of `encoded`; of few_shot take problem.form=network or problem.head=prototype"
            )
        self.check_names(problem, upper, lower)

    def check_names(self, problem: Problem, upper: Params, lower: Params) -> None:
        """Raises ConfigError where entries of y are not called as this algorithm needs it."""
        if self.needs_pairs and problem.encodes:
            raise ConfigError(
                f"problem.name: the losses of {type(problem).__name__} see x through its encode alone; solver "
                f"{type(self).__name__} wants y and x to have the same entries, and no encode. Of few_shot take problem.form=network"
            )
        alone = [n for n, y in lower.items() if n not in upper or upper[n].shape != y.shape]
        if self.needs_pairs and alone:
            raise ConfigError(
                f"problem.name: y of {type(problem).__name__} has {', '.join(alone)}, and x no entry of that name and shape; solver "
                f"{type(self).__name__} wants one for each"
            )

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        sums, lower = run(episodes)
        return StepResult(lower, move_upper(upper, sums, run))

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        here = cast(LocalOracle, oracle)  # `check` refused what is not asked on a worker
        steps = self.inner_steps if steps is None else steps
        start = start or oracle.init_lower()

        def adapted(encoded: Encoded, lower: Params, batch: Batch) -> Params:
            sizes = self.step_sizes(here.x, lower)
            return self.adapted(here.problem, encoded, lower, batch, steps, sizes).lower

        with torch.no_grad():  # of `torch.func`'s own gradients it takes nothing away
            return tree.detached(here.over_tasks(adapted, start))

    def adapts(self, problem: Problem, lower: Params) -> Iterable[str]:
        """The entries of y that take steps."""
        return lower

    def step_sizes(self, upper: Params, lower: Params) -> dict[str, float | Tensor]:
        """The inner step size of each entry of y."""
        return dict.fromkeys(lower, self.inner_lr)

    def adapted(
        self,
        problem: Problem,
        encoded: Encoded,
        lower: Params,
        batch: Batch,
        steps: int,
        sizes: dict[str, float | Tensor],
    ) -> AdaptedTree:
        """One task's y after `steps` steps from `lower`; differentiable in all that it is made of."""
        part = {name: lower[name] for name in self.adapts(problem, lower)}
        loss = problem.adaptation(encoded, lower, batch, tuple(part))
        for _ in range(steps):
            grads = torch.func.grad(loss)(part)
            part = {name: tensor - sizes[name] * grads[name] for name, tensor in part.items()}
            if type(problem).project_lower is not Problem.project_lower:  # it is for a stack
                whole = {name: tensor[None] for name, tensor in {**lower, **part}.items()}
                inside = problem.project_lower(whole)
                part = {name: inside[name][0] for name in part}

        def reached() -> Tensor:
            with torch.no_grad():
                return loss(part)

        return AdaptedTree({**lower, **part}, reached)

    def direction(self, oracle: LocalOracle, encoded: Encoded, batch: Batch) -> Direction:
        """One task's d_i: the gradient in x of f after adaptation."""
        problem = oracle.problem

        def outer(encoded: Encoded) -> tuple[Tensor, tuple[Tensor, Params]]:
            start = problem.init_lower(encoded, batch)
            sizes = self.step_sizes(encoded, start)
            end = self.adapted(problem, encoded, start, batch, self.inner_steps, sizes)
            return problem.upper_loss(encoded, end.lower, batch), (end.loss(), end.lower)

        grads, (value, (loss, y)) = torch.func.grad_and_value(outer, has_aux=True)(encoded)
        return Direction(grads, value, loss, y)


def episodes(
    solver: LearnerOptions, oracle: LocalOracle, lower: LowerGroups | None
) -> KernelResult:
    """Kernel: adapt to each task from x, add up the directions. A y that persists is replaced: the
    next step adapts from x again.
    """

    def one(encoded: Encoded, batch: Batch) -> Params:
        found = solver.direction(oracle, encoded, batch)
        return {
            **{f"x/{name}": tensor.detach() for name, tensor in found.in_encoded.items()},
            **{f"y/{name}": tensor.detach() for name, tensor in found.lower.items()},
            "upper_loss": found.upper_loss.detach(),
            "lower_loss": found.lower_loss.detach(),
        }

    found = oracle.over_tasks(one)
    products = solver.inner_steps if solver.second_order else 0
    sums = {
        "direction": oracle.in_upper(_named("x/", found)),
        "upper_loss": found["upper_loss"].sum(),
        "lower_loss": found["lower_loss"].sum(),
        "gradient_evaluations": torch.tensor(
            float((solver.inner_steps + solver.query_gradients) * oracle.tasks)
        ),
        "hessian_products": torch.tensor(float(products * oracle.tasks)),
    }
    return KernelResult(sums, {"y": _named("y/", found)})


def _named(prefix: str, found: Params) -> Params:
    return {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}
