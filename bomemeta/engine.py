"""The loop: what one run does, step by step, in the order in which it does it.

Knows a problem, a solver, a transport and a folder, and nothing of how any of them was made.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from bomemeta import evaluation
from bomemeta.checkpoint import Checkpoint
from bomemeta.config import Config
from bomemeta.core.problem import Problem, StreamProblem, start_memory, stream_length
from bomemeta.core.randomness import mixed_seed
from bomemeta.core.solver import LowerStates, Solver, take_step
from bomemeta.core.tree import Layout, Params
from bomemeta.core.upper import UpperVariable
from bomemeta.distributed.joint import step_run
from bomemeta.distributed.rounds import SharedRun, StepRun
from bomemeta.distributed.transport import Transport, nothing
from bomemeta.errors import DivergenceError, LowerStateLost
from bomemeta.global_random import initial_upper

# A default batch for problems without end; a fixed set of tasks is taken whole.
FRESH_TASKS_PER_STEP = 8
# What a step costs, per task: added up over the run. Reduces and bytes are the driver's.
COUNTS = ("gradient_evaluations", "hessian_products", "reduces", "bytes_reduced")
# What the last step said of itself is worth keeping with the result.
LATEST = ("residual", "hypergradient_norm")


@dataclass
class State:
    """Everything that a run carries from step to step, committed together at a step's end."""

    step: int  # how many steps are committed
    upper: UpperVariable
    lower: LowerStates
    memory: Params = field(default_factory=dict)  # the problem's own, beside its data
    # COUNTS so far, and the last step's LATEST
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)  # the metrics of each milestone


class Trainer:
    """A run in this process: its parts, its state, and what is done with them.

    Whatever trains, checks, measures or counts steps uses one; `assembly.trainer_of` makes it of a
    config. A context manager: `close` gives back its workers.
    """

    def __init__(
        self,
        config: Config,
        problem: Problem,
        solver: Solver,
        transport: Transport,
        resources: ExitStack | None = None,
    ) -> None:
        self.config, self.problem, self.solver, self.transport = config, problem, solver, transport
        self.steps = run_length(config, problem)  # of the whole run
        self._resources = resources or ExitStack()
        self.start()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives back what `resources` holds. May be called twice."""
        self._resources.close()

    def start(self, step: int = 0) -> None:
        """Sets the state to that of the run's start, or to one that stands at `step` with everything
        else as at the start.
        """
        upper = initial_upper(self.problem)
        self.state = State(
            step,
            self.solver.start(upper, self.steps),
            LowerStates.none(),
            start_memory(self.problem),
        )

    def step_run(self, step: int, meanwhile: Callable[[], None] = nothing) -> StepRun | SharedRun:
        """This step's tasks: fresh ids, or a draw from all; a function of (config, step) alone."""
        num_tasks, wanted = self.problem.num_tasks, self.config.tasks_per_step
        if num_tasks is None:
            size = wanted if wanted is not None else FRESH_TASKS_PER_STEP
            ids = range(step * size, (step + 1) * size)
        elif wanted is None or wanted >= num_tasks:
            ids = range(num_tasks)
        else:
            drawn = np.random.default_rng([mixed_seed(self.config.seed), step]).choice(
                num_tasks, wanted, replace=False
            )
            ids = sorted(int(task) for task in drawn)  # type: ignore[assignment]
        return self.run_on(ids, self.config.shards, step=step, meanwhile=meanwhile)

    def run_on(self, ids: Sequence[int], shards: int, **rest: Any) -> StepRun | SharedRun:
        """A run on these tasks or blocks with the state's memory; `rest` as for StepRun."""
        given = {"steps": self.steps, "memory": self.state.memory} | rest
        return step_run(self.problem, self.transport, ids, shards, **given)

    def step(self, run: StepRun | SharedRun | None = None) -> dict[str, float]:
        """One step on the tasks of `run` (None: those of the state's step), committed. Returns its
        metrics.

        A step happens whole or not at all: whatever fails before its commit leaves the state as it
        was. Raises DivergenceError naming the step where a number is not finite, LowerStateLost
        where a lower state is gone with its node.
        """
        state, started = self.state, time.perf_counter()
        run = run if run is not None else self.step_run(state.step)
        memory = state.memory
        try:
            lower, metrics = take_step(self.solver, state.upper, state.lower, run)
            if (
                isinstance(run, SharedRun)
                and isinstance(self.problem, StreamProblem)
                and self.problem.memory_due(state.step)
            ):
                seen = state.lower if self.problem.memory_before else lower
                memory = run.update_memory(self.solver, state.upper.params, seen)
        except DivergenceError as error:
            raise DivergenceError(f"step {state.step}: {error}") from error

        # commit
        state.lower = LowerStates(lower.layout, {**state.lower.handles, **lower.handles})
        state.memory = memory
        state.step += 1

        metrics |= {name: float(value) for name, value in asdict(run.traffic).items()}
        state.metrics = {
            **{
                name: state.metrics.get(name, 0.0) + metrics[name]
                for name in COUNTS
                if name in metrics
            },
            **{name: metrics[name] for name in LATEST if name in metrics},
        }
        metrics |= run.seconds
        metrics["step_s"] = time.perf_counter() - started
        metrics["update_s"] = metrics["step_s"] - sum(run.seconds.values())
        return metrics

    def advance(self, steps: int) -> list[dict[str, float]]:
        """So many steps more, at most to the run's end, without validations. Returns the metrics of
        each.
        """
        goal = min(self.state.step + steps, self.steps)
        return [self.step() for _ in range(goal - self.state.step)]

    def fit(
        self,
        *,
        log: Callable[[int, Mapping[str, float]], None],
        save: Callable[[State], None],
        roll_back: Callable[[LowerStateLost], None],
        stop: Callable[[], bool],
        keep: Callable[[State], None] = lambda state: None,
    ) -> None:
        """Steps until `steps` or until `stop()`, with the config's validations. Saves when due and at
        the end, and before each step shows `keep` what is committed. `log` hears of a step while the
        next one's calls are computed, and before a save or an error. `roll_back` restores a
        checkpoint where a lower state is lost.

        Raises as `step`.
        """
        unreported: list[tuple[int, Mapping[str, float]]] = []

        def say() -> None:
            """Logs the step before, which waits for a moment in which there is nothing else to do."""
            while unreported:
                log(*unreported.pop())

        state = self.state
        while True:
            while state.step < self.steps and not stop():
                keep(state)
                try:
                    try:
                        metrics = self.step(self.step_run(state.step, meanwhile=say))
                    finally:
                        say()  # where no round came as far
                    metrics |= self._measured()
                    unreported.append((state.step - 1, metrics))
                    due = state.step % self.config.checkpoint.every_steps == 0
                    if due and state.step < self.steps:
                        say()
                        save(state)
                except LowerStateLost as error:
                    roll_back(error)
            say()
            try:
                save(state)
            except LowerStateLost as error:
                roll_back(error)
            else:
                return

    def evaluate(
        self,
        say: Callable[[str], None] = lambda text: None,
        doing: Callable[[str], None] = lambda text: None,
    ) -> dict[str, float]:
        """What the run is judged by, at its state; `say` hears what a person should know of it,
        `doing` what is measured from now on.
        """
        return evaluation.final_metrics(self, say, doing)

    def checkpoint(self) -> Checkpoint:
        """The state as plain tensors; fetches persistent lower states from wherever they are."""
        state = self.state
        return self.checkpoint_of(state)

    def checkpoint_of(self, state: State) -> Checkpoint:
        """As `checkpoint`, of a state that was kept."""
        ids = list(state.lower.handles)
        arrays = self.transport.fetch([state.lower.handles[task] for task in ids])
        return Checkpoint(
            step=state.step,
            upper=dict(state.upper.params),
            solver={
                "optimizer": state.upper.state_dict(),
                "lower_layout": state.lower.layout.plain(),
                "memory": dict(state.memory),
                "metrics": dict(state.metrics),
                "history": [dict(metrics) for metrics in state.history],
            },
            lower={task: torch.tensor(array) for task, array in zip(ids, arrays, strict=True)},
            config=self._record,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Sets the state to the checkpoint's."""
        state, solver = self.state, checkpoint.solver
        state.step = checkpoint.step
        state.upper.load(checkpoint.upper, solver["optimizer"])
        handles = {task: tensor.numpy() for task, tensor in checkpoint.lower.items()}
        state.lower = LowerStates(Layout.read(solver["lower_layout"]), handles)
        state.memory = dict(solver["memory"])
        state.metrics = dict(solver["metrics"])
        state.history = [dict(metrics) for metrics in solver["history"]]

    @functools.cached_property
    def _record(self) -> dict[str, Any]:
        return self.config.to_dict()

    def _measured(self) -> dict[str, float]:
        """The validation after the last step, where one is due, and a milestone's metrics."""
        state, every = self.state, self.config.evaluation.every_steps
        metrics: dict[str, float] = {}
        if every is not None and state.step % every == 0:
            test = evaluation.validate if self.problem.meta_tests else evaluation.own_metrics
            metrics |= test(self)
        if isinstance(self.problem, StreamProblem) and self.problem.milestone(state.step - 1):
            state.history.append(evaluation.own_metrics(self))
            metrics |= state.history[-1]
        return metrics


def run_length(config: Config, problem: Problem) -> int:
    """How many steps a run has: the config's number, or else the problem's own."""
    steps = config.steps if config.steps is not None else stream_length(problem)
    assert steps is not None, "build_problem refuses a config without either"
    return steps


def copy_of(state: State) -> State:
    """The state as it is now, whatever the run does next: x is moved in place, and before its step
    is committed.
    """
    # The rest is replaced and never changed. Copying x costs about as much as moving it.
    return replace(state, upper=copy.deepcopy(state.upper), history=list(state.history))
