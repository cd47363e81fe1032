"""What a solver is: a frozen record of hyperparameters, a `step` on the driver, and kernels that
run where the tasks are.

A *kernel* is a module-level function `kernel(solver, oracle, lower, **arguments) -> KernelResult`.
It sees one stack of tasks, must be a pure function of its arguments, and returns sums over its
tasks; the sums of all shards are added in an order that depends on their number alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from bomemeta.core.arguments import Recorded
from bomemeta.core.oracle import Oracle
from bomemeta.core.problem import Problem, must_define
from bomemeta.core.tree import Layout, Params
from bomemeta.core.upper import UpperVariable

# Named sums over tasks: scalars [] and vectors in x.
Sums = dict[str, Any]
# Named groups of stacks that stay with their tasks: `y` itself, and whatever else the solver keeps
# per task (its velocity, ...).
LowerGroups = dict[str, Params]


class KernelResult(NamedTuple):
    sums: Sums
    lower: LowerGroups


Kernel = Callable[..., KernelResult]


class LowerStates(NamedTuple):
    """The driver's references to per-task states: what is in each, and one opaque handle per task
    id.
    """

    layout: Layout
    handles: Mapping[int, Any]

    @classmethod
    def none(cls) -> LowerStates:
        return cls(Layout(), {})


class Reduced(NamedTuple):
    """A round's answer: sums over every task of the step, and the new per-task states where the
    kernel returned any.
    """

    sums: Sums
    lower: LowerStates


class Rounds(Protocol):
    """Runs a kernel on every task of the present step, wherever the tasks are."""

    tasks: int  # how many tasks this step has
    step: int
    steps: int  # of the whole run
    persistent: bool  # whether lower states live on to the next step
    project_upper: Callable[[Params], Params]

    def __call__(
        self,
        kernel: Kernel,
        solver: Solver,
        upper: Params,
        lower: LowerStates,
        keeps: bool = False,
        **arguments: Any,
    ) -> Reduced:
        """One round; `keeps`: the lower groups that the kernel returns stay with the tasks.

        Raises DivergenceError where a sum is not finite.
        """
        ...


class Run:
    """A step's rounds in the hands of its solver: it knows the solver, x and the lower states.

    `run(kernel, **arguments)` is one round. `lower` is what the last round left that kept any.
    """

    def __init__(
        self, rounds: Rounds, solver: Solver, upper: UpperVariable, lower: LowerStates
    ) -> None:
        self.rounds, self.solver, self.upper, self.lower = rounds, solver, upper, lower
        self.tasks, self.persistent = rounds.tasks, rounds.persistent
        self.step, self.steps = rounds.step, rounds.steps
        self.project_upper: Callable[[Params], Params] = rounds.project_upper

    def __call__(
        self,
        kernel: Kernel,
        solver: Solver | None = None,
        upper: Params | None = None,
        lower: LowerStates | None = None,
        keeps: bool | None = None,
        **arguments: Any,
    ) -> Reduced:
        """One round of `kernel(solver, oracle, lower, **arguments)`.

        `solver`: None is the run's own as it is in this step (`Solver.in_step`). `upper`: None is
        the present x. `lower`: None is `self.lower`. `keeps`: whether the lower groups that the
        kernel returns stay with the tasks; None: where y persists, unless `lower` is given.

        Raises DivergenceError where a sum is not finite.
        """
        if keeps is None:
            keeps = self.persistent and lower is None
        reduced = self.rounds(
            kernel,
            solver if solver is not None else self.solver.in_step(self),
            upper if upper is not None else self.upper.params,
            lower if lower is not None else self.lower,
            keeps,
            **arguments,
        )
        if keeps:
            self.lower = reduced.lower
        return reduced

    def by(self, solver: Solver) -> Run:
        """The same for the step of another solver, which this one calls."""
        other = copy.copy(self)
        other.solver = solver
        return other

    def counted(self, step: int, steps: int) -> Run:
        """The same with other numbers for `step` and `steps`."""
        other = copy.copy(self)
        other.step, other.steps = step, steps
        return other


class StepResult(NamedTuple):
    """What a step leaves besides the moved x: the new lower states and what to log."""

    lower: LowerStates
    metrics: dict[str, float]


class Solver(Recorded):
    """Base class of all solvers: frozen dataclasses registered in `bomemeta.registry.solvers`,
    their fields being the keys of the config's `solver:` section. A subclass must define `start`,
    `step` and `adapt`.
    """

    def check(self, problem: Problem) -> None:
        """Raises ConfigError where this solver cannot solve that problem. Default: it can."""

    def start(self, upper: Params, steps: int) -> UpperVariable:
        """x with its optimiser, for a run of `steps` steps."""
        raise must_define(self, "start")

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        """One iteration of the algorithm. Moves `upper` in place as its LAST act: what fails before
        that changes nothing.
        """
        raise must_define(self, "step")

    def in_step(self, run: Run) -> Solver:
        """This solver as its kernels see it in a step: with the sizes that follow a schedule.
        Default: itself.
        """
        return self

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        """y solved on g alone, as meta-testing uses it: `steps` inner steps (None: as many as
        training uses) from `start` (None: from where a fresh task's y is).
        """
        raise must_define(self, "adapt")

    def examine(
        self, upper: UpperVariable, lower: LowerStates, run: Run, steps: int | None = None
    ) -> dict[str, float]:
        """Metrics that are worth one more round at the end of a run (stationarity with many more
        inner steps: `steps`; None: the solver's own number; 0: none). Default: none.
        """
        return {}

    def upper_steps(self, steps: int) -> int:
        """In how many of a run's first `steps` steps x moves. Default: in all."""
        return steps

    def unpaced(self) -> Solver:
        """This solver with x moving in every step, for what looks at single steps. Default: itself."""
        return self

    def examined_steps(self, steps: int | None) -> tuple[int, int] | None:
        """Where `examine` takes fewer inner steps than it usually would: how many, and of how many.
        None: it takes as many. Default.
        """
        return None


def take_step(
    solver: Solver, upper: UpperVariable, lower: LowerStates, rounds: Rounds
) -> StepResult:
    """One iteration of the solver, from this x and these lower states."""
    return solver.step(upper, lower, Run(rounds, solver, upper, lower))


def mean_sums(sums: Sums, names: tuple[str, ...], tasks: int) -> dict[str, float]:
    """The named scalar sums as means over tasks, ready to log."""
    return {name: float(sums[name]) / tasks for name in names if isinstance(sums.get(name), Tensor)}
