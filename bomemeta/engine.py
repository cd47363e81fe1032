"""The loop: what one run does, step by step, in the order in which it does it.

Knows a problem, a solver, a transport and a folder, and nothing of how any of them was made.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from bomemeta.checkpoint import Checkpoint
from bomemeta.config import Config
from bomemeta.core.inner import evaluate, solve_lower
from bomemeta.core.problem import Problem, SharedProblem, Split, StreamProblem, stream_length
from bomemeta.core.randomness import mixed_seed
from bomemeta.core.solver import LowerStates, Solver, Sums
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.distributed.joint import step_run
from bomemeta.distributed.packing import PackedTasks, unpack_tasks
from bomemeta.distributed.rounds import SharedRun, StepRun
from bomemeta.distributed.transport import Transport
from bomemeta.errors import DivergenceError, LowerStateLost
from bomemeta.intervals import half_width

# A default batch for problems without end; pools are taken whole.
FRESH_TASKS_PER_STEP = 8
# Episodes that one evaluation call holds in memory at once.
EVALUATION_SHARD = 10
# What a step costs, per task: added up over the run. Reduces and bytes are the driver's.
COUNTS = ("gradient_evaluations", "hessian_products", "reduces", "bytes_reduced")
# What the last step said of itself is worth keeping with the result.
LATEST = ("residual", "hypergradient_norm")
# An accuracy that falls by more than this when y is solved on g alone was y's own doing.
ACCURACY_LOSS = 0.01
# result.json carries the final variables of problems with fewer numbers than this.
READABLE_NUMBERS = 1000


@dataclass
class State:
    """Everything that a run carries from step to step, committed together at a step's end."""

    step: int  # how many steps are committed
    upper: UpperVariable
    lower: LowerStates
    memory: Params = field(default_factory=dict)  # the problem's own, beside its data
    figures: dict[str, float] = field(
        default_factory=dict
    )  # COUNTS so far, and the last step's LATEST
    history: list[dict[str, float]] = field(default_factory=list)  # the figures of each milestone


@dataclass(frozen=True)
class Job:
    """What a run works with."""

    config: Config
    problem: Problem
    solver: Solver
    transport: Transport

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return run_length(self.config, self.problem)

    def step_run(self, step: int, **rest: Any) -> StepRun | SharedRun:
        """This step's tasks: fresh ids, or a draw from the pool; a function of (config, step)
        alone.
        """
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
        return self.run_on(ids, self.config.shards, step=step, **rest)

    def run_on(self, ids: Sequence[int], shards: int, **rest: Any) -> StepRun | SharedRun:
        """A run on these tasks or blocks; `rest` as for StepRun."""
        return step_run(self.problem, self.transport, ids, shards, steps=self.steps, **rest)


def run_length(config: Config, problem: Problem) -> int:
    """How many steps a run has: the config's number, or else the problem's own."""
    steps = config.steps if config.steps is not None else stream_length(problem)
    assert steps is not None, "build_problem refuses a config without either"
    return steps


def fit(
    job: Job,
    state: State,
    *,
    log: Callable[[int, Mapping[str, float]], None],
    save: Callable[[State], None],
    roll_back: Callable[[State, LowerStateLost], None],
    stop: Callable[[], bool],
    keep: Callable[[State], None] = lambda state: None,
) -> None:
    """Steps until `job.steps` or until `stop()`; moves `state` in place. Saves when due and at the
    end, and before each step shows `keep` what is committed. `log` hears of a step while the next
    one's calls are computed, and before a save or an error.

    A step happens whole or not at all: whatever fails before its commit leaves `state` as it was.
    Raises DivergenceError naming the step where a number is not finite.
    """
    config = job.config
    unsaid: list[tuple[int, Mapping[str, float]]] = []

    def say() -> None:
        """Logs the step before, which waits for a moment in which there is nothing else to do."""
        while unsaid:
            log(*unsaid.pop())

    while state.step < job.steps and not stop():
        keep(state)
        started = time.perf_counter()
        run = job.step_run(state.step, memory=state.memory, meanwhile=say)
        memory = state.memory
        try:
            try:
                lower, metrics = job.solver.step(state.upper, state.lower, run)
            finally:
                say()  # where no round came as far
            if (
                isinstance(run, SharedRun)
                and isinstance(job.problem, StreamProblem)
                and job.problem.memory_due(state.step)
            ):
                memory = run.update_memory(job.solver, state.upper.params, lower)
        except DivergenceError as error:
            raise DivergenceError(f"step {state.step}: {error}") from error
        except LowerStateLost as error:
            roll_back(state, error)
            continue

        # commit
        state.lower = LowerStates(lower.layout, {**state.lower.handles, **lower.handles})
        state.memory = memory
        state.step += 1

        metrics |= {name: float(value) for name, value in asdict(run.traffic).items()}
        state.figures = {
            **{
                name: state.figures.get(name, 0.0) + metrics[name]
                for name in COUNTS
                if name in metrics
            },
            **{name: metrics[name] for name in LATEST if name in metrics},
        }
        metrics |= run.seconds
        metrics["step_s"] = time.perf_counter() - started
        metrics["update_s"] = metrics["step_s"] - sum(run.seconds.values())
        every = config.evaluation.every_steps
        if every is not None and state.step % every == 0:
            metrics |= _validate(job, state) if job.problem.meta_tests else _own_figures(job, state)
        if isinstance(job.problem, StreamProblem) and job.problem.milestone(state.step - 1):
            state.history.append(_own_figures(job, state))
            metrics |= state.history[-1]
        unsaid.append((state.step - 1, metrics))
        if state.step % config.checkpoint.every_steps == 0 and state.step < job.steps:
            say()
            save(state)
    say()
    save(state)


def copy_of(state: State) -> State:
    """The state as it is now, whatever the run does next: x is moved in place, and before its step
    is committed.
    """
    # The rest is replaced and never changed. Copying x costs about as much as moving it.
    return replace(state, upper=copy.deepcopy(state.upper), history=list(state.history))


def final_metrics(job: Job, state: State, say: Callable[[str], None]) -> dict[str, float]:
    """What the run is judged by: meta-test figures for problems that have test tasks, else figures
    at the tasks' own y.
    """
    try:
        last = job.step_run(max(state.step - 1, 0), memory=state.memory)
        metrics = job.solver.examine(state.upper, state.lower, last)
    except DivergenceError as error:
        say(
            f"no figures with many more inner steps, which diverge ({error}): solver.inner_lr is at the edge of what is stable"
        )
        metrics = {}
    metrics |= state.figures
    if isinstance(job.problem, StreamProblem):
        metrics |= job.problem.final_metrics(state.history)
    if not job.problem.meta_tests:
        own = _own_figures(job, state)
        if (steps := job.config.evaluation.solve_steps) is None:
            return metrics | own
        solved = _own_figures(job, state, steps)
        for name in own:
            if name.endswith("accuracy") and own[name] - solved[name] > ACCURACY_LOSS:
                say(
                    f"{name} falls from {own[name]:.4f} to {solved[name]:.4f} in {steps} steps on g alone: y does not solve the lower "
                    "problem but was trained on the upper loss too, or too little. The second figure is nearer to what x is worth"
                )
        return metrics | own | {f"{name}_solved": value for name, value in solved.items()}
    episodes = job.config.evaluation.episodes
    metrics |= meta_test(job, state.upper, "test", episodes)
    for name, changes in job.problem.evaluation_variants().items():
        if any(getattr(job.problem, field) != value for field, value in changes.items()):
            other = meta_test(job, state.upper, "test", episodes, changes)
            metrics |= {
                f"{key}_{name}": value
                for key, value in other.items()
                if key in ("test_accuracy", "test_ci95", "test_loss")
            }
    return metrics


def _validate(job: Job, state: State) -> dict[str, float]:
    try:
        figures = meta_test(
            job, state.upper, "validation", job.config.evaluation.validation_episodes
        )
    except DivergenceError as error:
        raise DivergenceError(f"validation after step {state.step - 1}: {error}") from error
    return {name: value for name, value in figures.items() if not name.startswith("baseline_")}


def meta_test(
    job: Job,
    upper: UpperVariable,
    split: Split,
    episodes: int,
    variant: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Means over the split's first `episodes` tasks, y adapted on g alone; `<split>_ci95` is the 95
    % half-width of the accuracy by Student's t, and every figure with `accuracy` in its name has one, named with
    `ci95` in its place.
    """
    shards = math.ceil(episodes / EVALUATION_SHARD)
    run = job.run_on(
        range(episodes),
        shards,
        step=0,
        persistent=False,
        split=split,
        variant=variant,
        differentiable=False,
    )
    sums, _ = run(
        evaluate,
        job.solver,
        upper.averaged,
        LowerStates.none(),
        steps=job.config.evaluation.inner_steps,
    )
    means = _means(job, sums, episodes)
    # A baseline's figure is not the method's, so it does not take the split's name.
    figures = {
        name if name.startswith("baseline_") else f"{split}_{name}": value
        for name, value in means.items()
    }
    for name, mean in means.items():
        if (
            "accuracy" in name
            and not name.startswith("baseline_")
            and f"square/{name}" in sums
            and episodes > 1
        ):
            square = float(sums[f"square/{name}"]) / episodes
            width = half_width((square - mean**2) * episodes / (episodes - 1), episodes)
            assert width is not None, "episodes > 1"
            figures[f"{split}_{name.replace('accuracy', 'ci95')}"] = width
    return figures


def _own_figures(job: Job, state: State, steps: int = 0) -> dict[str, float]:
    """Figures at the lower variables that the run carries, after `steps` steps on g alone: of a
    pool's tasks, or of the one shared y.
    """
    num_tasks = job.problem.num_tasks
    if num_tasks is None:
        return {}
    lower, tasks, shards = state.lower, range(num_tasks), job.config.shards
    if steps > 0:
        run = job.run_on(tasks, shards, step=state.step, differentiable=False, memory=state.memory)
        _, lower = run(
            solve_lower, job.solver, state.upper.averaged, lower, keeps=True, steps=steps
        )
    split: Split = "test" if isinstance(job.problem, SharedProblem) else "train"
    run = job.run_on(
        tasks, shards, step=state.step, split=split, differentiable=False, memory=state.memory
    )
    sums, _ = run(evaluate, job.solver, state.upper.averaged, lower, steps=0)
    return _means(job, sums, run.tasks)


def _means(job: Job, sums: Sums, count: int) -> dict[str, float]:
    """What kernel `evaluate` summed, as the problem reports it."""
    return job.problem.summary(
        {
            name.removeprefix("sum/"): float(value) / count
            for name, value in sums.items()
            if name.startswith("sum/")
        }
    )


def final_variables(job: Job, state: State) -> dict[str, Any] | None:
    """x and y as nested lists, `{"upper": {name: ...}, "lower": {name: ...}}`, of problems small
    enough to be read, and what else the problem reports of x; None where there is neither.

    y has a leading task axis where the problem has several tasks, and is empty where it does not
    persist.
    """
    reported = job.problem.reported(state.upper.params)
    ids = sorted(state.lower.handles)
    each = sum(math.prod(shape) for group, _, shape in state.lower.layout if group == "y")
    upper = sum(tensor.numel() for tensor in state.upper.averaged.values())
    if upper + len(ids) * each >= READABLE_NUMBERS:
        return reported or None
    arrays = job.transport.fetch([state.lower.handles[task] for task in ids])
    rows = torch.tensor(np.array(arrays))
    lower = unpack_tasks(PackedTasks(state.lower.layout, rows))["y"] if ids else {}
    return {
        "upper": {name: tensor.tolist() for name, tensor in state.upper.averaged.items()},
        "lower": {
            name: (tensor[0] if len(ids) == 1 else tensor).tolist()
            for name, tensor in lower.items()
        },
        **reported,
    }


def to_checkpoint(job: Job, state: State) -> Checkpoint:
    """The state as plain tensors; fetches persistent lower states from wherever they are."""
    ids = list(state.lower.handles)
    arrays = job.transport.fetch([state.lower.handles[task] for task in ids])
    return Checkpoint(
        step=state.step,
        upper=dict(state.upper.params),
        solver={
            "optimizer": state.upper.state_dict(),
            "lower_layout": state.lower.layout,
            "memory": dict(state.memory),
            "figures": dict(state.figures),
            "history": [dict(figures) for figures in state.history],
        },
        lower={task: torch.tensor(array) for task, array in zip(ids, arrays, strict=True)},
        config=job.config.to_dict(),
    )


def restore(state: State, checkpoint: Checkpoint) -> None:
    """Sets `state` to the checkpoint's."""
    state.step = checkpoint.step
    state.upper.load(checkpoint.upper, checkpoint.solver["optimizer"])
    handles = {task: tensor.numpy() for task, tensor in checkpoint.lower.items()}
    state.lower = LowerStates(checkpoint.solver["lower_layout"], handles)
    state.memory = dict(checkpoint.solver["memory"])
    state.figures = dict(checkpoint.solver["figures"])
    state.history = [dict(figures) for figures in checkpoint.solver["history"]]
