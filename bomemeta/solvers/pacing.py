"""When x moves: after a start in which y alone is trained, and then at every so many steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from bomemeta.core.arguments import replaced
from bomemeta.core.inner import rule_steps
from bomemeta.core.lower_moves import LowerRule
from bomemeta.core.oracle import Oracle
from bomemeta.core.problem import Problem, must_define
from bomemeta.core.solver import (
    KernelResult,
    LowerGroups,
    LowerStates,
    Run,
    Solver,
    StepResult,
    mean_sums,
)
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.errors import ConfigError

LOWER_MEANS = ("lower_loss", "upper_loss", "gradient_evaluations", "hessian_products")


@dataclass(frozen=True, kw_only=True)
class Paced(Solver):
    """A solver whose x may stand still in some of a run's steps, where y persists.

    In the first `warm_start_steps` steps y takes one step on g alone each. After them x moves at
    every `upper_every`-th step; in those between, y moves as `lower_step` says. All of them are
    steps of the run: counted, logged and saved as the others. What counts steps otherwise
    (schedules, penalties, how often something is measured) counts those of x. A subclass defines
    `joint_step`, what other solvers call `step`.
    """

    warm_start_steps: Annotated[int, Field(ge=0)] = 0
    upper_every: Annotated[int, Field(ge=1)] = 1

    def check(self, problem: Problem) -> None:
        for key in ("warm_start_steps", "upper_every"):
            if problem.num_tasks is None and getattr(self, key) != getattr(Paced, key):
                raise ConfigError(
                    f"solver.{key}: got {getattr(self, key)}; the y of fresh tasks are forgotten after their step, so a step without x "
                    "leaves nothing: take the key out, or a problem whose y persists"
                )

    def start(self, upper: Params, steps: int) -> UpperVariable:
        if self.upper_steps(steps) == 0 and self.paced:
            raise ConfigError(
                f"solver.warm_start_steps: x would never move: it first does in step {self.warm_start_steps + self.upper_every} "
                f"(warm_start_steps {self.warm_start_steps} + upper_every {self.upper_every}), and the run has {steps}: set more "
                "steps, or less here"
            )
        return self.start_upper(upper, self.upper_steps(steps))

    def start_upper(self, upper: Params, steps: int) -> UpperVariable:
        """x with its optimiser, for so many steps of its own."""
        raise must_define(self, "start_upper")

    @property
    def paced(self) -> bool:
        return self.warm_start_steps > 0 or self.upper_every > 1

    def upper_steps(self, steps: int) -> int:
        return max(steps - self.warm_start_steps, 0) // self.upper_every

    def unpaced(self) -> Solver:
        return replaced(self, {"warm_start_steps": 0, "upper_every": 1}) if self.paced else self

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        if not self.paced:
            return self.joint_step(upper, lower, run)
        moved = self.upper_steps(run.step)
        if run.step < self.warm_start_steps:
            sums, lower = run(train_lower, solver=self)
            result = StepResult(lower, mean_sums(sums, LOWER_MEANS, run.tasks))
        else:
            counted = run.counted(moved, self.upper_steps(run.steps))
            moves = self.upper_steps(run.step + 1) > moved
            result = (self.joint_step if moves else self.lower_step)(upper, lower, counted)
            moved += moves
        return StepResult(result.lower, result.metrics | {"upper_steps": float(moved)})

    def joint_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        """A step in which x moves, as `Solver.step`; `run` counts the steps of x."""
        raise must_define(self, "joint_step")

    def lower_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        """A step in which x stands still. Default: y moves as by `follow_lower`."""
        sums, lower = run(follow_lower)
        return StepResult(lower, mean_sums(sums, LOWER_MEANS, run.tasks))

    @property
    def lower_step_size(self) -> float:
        """Of y's own step on g."""
        return float(getattr(self, "inner_lr"))  # noqa: B009

    def lower_rule(self) -> LowerRule:
        """How y's own step is taken. Default: by SGD."""
        return LowerRule()

    def kept(self, at: Params) -> LowerGroups:
        """What else than y and its optimiser's state is kept with a task, as it is before its first
        step. Default: nothing.
        """
        return {}


def groups_of(solver: Paced, oracle: Oracle, lower: LowerGroups | None) -> LowerGroups:
    """Everything that is kept with the tasks, y with it; as at their first step where there is
    nothing yet.
    """
    if lower is not None:
        return dict(lower)
    at = oracle.init_lower()
    return {"y": at, **solver.kept(at), **solver.lower_rule().state(None, at)}


def train_lower(solver: Paced, oracle: Oracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel: one step of y on g alone, on the step's samples. `lower_loss` is g before it."""
    groups = groups_of(solver, oracle, lower)
    at, rule = groups["y"], solver.lower_rule()
    g = oracle.lower(at)
    moved, state = rule.move(at, g.lower, solver.lower_step_size, rule.state(groups, at))
    sums = {"lower_loss": g.value.sum(), "gradient_evaluations": evaluations(oracle)}
    return KernelResult(sums, {**groups, "y": oracle.project_lower(moved), **state})


def follow_lower(solver: Paced, oracle: Oracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel: y's `inner_steps` steps on g."""
    groups = groups_of(solver, oracle, lower)
    at, state = followed(solver, oracle, groups)
    sums = {"gradient_evaluations": evaluations(oracle)}
    return KernelResult(sums, {**groups, "y": at, **state})


def followed(
    solver: Paced, oracle: Oracle, lower: LowerGroups | None
) -> tuple[Params, LowerGroups]:
    """y after its `inner_steps` steps on g from where it is, and what its optimiser keeps then."""
    at, rule = lower["y"] if lower is not None else oracle.init_lower(), solver.lower_rule()
    steps, state = int(getattr(solver, "inner_steps")), rule.state(lower, at)  # noqa: B009
    return rule_steps(oracle, at, steps, solver.lower_step_size, rule, state)


def evaluations(oracle: Oracle) -> torch.Tensor:
    return torch.tensor(float(oracle.gradient_evaluations * oracle.tasks))
