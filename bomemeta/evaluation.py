"""What a run is judged by: metrics on test tasks, or at the y that it carries, and readable variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bomemeta.core.inner import evaluate, solve_lower
from bomemeta.core.problem import SharedProblem, Split, StreamProblem
from bomemeta.core.solver import LowerStates, Run, Sums
from bomemeta.distributed.packing import PackedTasks, unpack_tasks
from bomemeta.errors import DivergenceError
from bomemeta.intervals import half_width

if TYPE_CHECKING:
    from bomemeta.engine import Trainer

# Episodes that one evaluation call holds in memory at once.
EVALUATION_SHARD = 10
# An accuracy that falls by more than this when y is solved on g alone was y's own doing.
ACCURACY_LOSS = 0.01
# result.json carries the final variables of problems with fewer numbers than this.
READABLE_NUMBERS = 1000


def final_metrics(
    trainer: Trainer,
    say: Callable[[str], None],
    doing: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """What the run is judged by: meta-test metrics for problems that have test tasks, else metrics
    at the tasks' own y. `say` hears findings, `doing` what is measured from now on.
    """
    solver, longest = trainer.solver, trainer.config.evaluation.examine_steps
    if (capped := solver.examined_steps(longest)) is not None:
        say(
            f"the stationarity_*_long metrics are measured with {capped[0]} inner steps and not with the usual {capped[1]}, which would "
            "take as long as so many steps of training: evaluation.examine_steps sets the number, 0 leaves them out"
        )
    doing("the closing examination, with more inner steps than in training")
    try:
        state = trainer.state
        last = trainer.step_run(max(state.step - 1, 0))
        run = Run(last, solver, state.upper, state.lower)
        metrics = solver.examine(state.upper, state.lower, run, longest)
    except DivergenceError as error:
        say(
            f"no metrics with many more inner steps, which diverge ({error}): solver.inner_lr is at the edge of what is stable"
        )
        metrics = {}
    metrics |= trainer.state.metrics
    if isinstance(trainer.problem, StreamProblem):
        metrics |= trainer.problem.final_metrics(trainer.state.history)
        if (text := cut_short(trainer.problem, trainer.state.step)) is not None:
            say(text)
    doing("the closing test")
    if not trainer.problem.meta_tests:
        own = own_metrics(trainer)
        if (steps := trainer.config.evaluation.solve_steps) is None:
            return metrics | own
        solved = own_metrics(trainer, steps)
        for name in own:
            if name.endswith("accuracy") and own[name] - solved[name] > ACCURACY_LOSS:
                say(
                    f"{name} falls from {own[name]:.4f} to {solved[name]:.4f} in {steps} steps on g alone: y does not solve the lower "
                    "problem but was trained on the upper loss too, or too little. The second one is nearer to what x is worth"
                )
        return metrics | own | {f"{name}_solved": value for name, value in solved.items()}
    episodes = trainer.config.evaluation.episodes
    metrics |= meta_test(trainer, "test", episodes)
    for name, changes in trainer.problem.evaluation_variants().items():
        if any(getattr(trainer.problem, field) != value for field, value in changes.items()):
            other = meta_test(trainer, "test", episodes, changes)
            metrics |= {
                f"{key}_{name}": value
                for key, value in other.items()
                if key in ("test_accuracy", "test_ci95", "test_loss")
            }
    return metrics


def cut_short(problem: StreamProblem, steps: int) -> str | None:
    """What a run of so many steps leaves out of the stream; None: nothing."""
    if steps >= problem.length:
        return None
    ends = [step + 1 for step in range(problem.length) if problem.milestone(step)]
    done = sum(end <= steps for end in ends)
    if not ends:
        return None
    if done == 0:
        return (
            f"no metrics of the stream: it was cut after {steps} of {problem.length} steps, inside its first task, which ends after step "
            f"{ends[0]}. Give steps={ends[0]} or more, or leave `steps` out"
        )
    return (
        f"the stream was cut after {steps} of {problem.length} steps: its metrics are those of the {done} of {len(ends)} tasks that were "
        f"learned to their end{'' if ends[done - 1] == steps else f', as they were after step {ends[done - 1]}'}"
    )


def validate(trainer: Trainer) -> dict[str, float]:
    try:
        metrics = meta_test(trainer, "validation", trainer.config.evaluation.validation_episodes)
    except DivergenceError as error:
        raise DivergenceError(f"validation after step {trainer.state.step - 1}: {error}") from error
    return {name: value for name, value in metrics.items() if not name.startswith("baseline_")}


def meta_test(
    trainer: Trainer,
    split: Split,
    episodes: int,
    variant: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Means over the split's first `episodes` tasks, y adapted on g alone; `<split>_ci95` is the 95
    % half-width of the accuracy by Student's t, and every metric with `accuracy` in its name has one, named with
    `ci95` in its place.
    """
    shards = math.ceil(episodes / EVALUATION_SHARD)
    run = trainer.run_on(
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
        trainer.solver,
        trainer.state.upper.averaged,
        LowerStates.none(),
        steps=trainer.config.evaluation.inner_steps,
    )
    means = _means(trainer, sums, episodes)
    # A baseline's metric is not the method's, so it does not take the split's name.
    metrics = {
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
            metrics[f"{split}_{name.replace('accuracy', 'ci95')}"] = width
    return metrics


def own_metrics(trainer: Trainer, steps: int = 0) -> dict[str, float]:
    """Metrics at the lower variables that the run carries, after `steps` steps on g alone: of a
    fixed set of tasks, or of the one shared y.
    """
    num_tasks = trainer.problem.num_tasks
    if num_tasks is None:
        return {}
    lower, tasks, shards = trainer.state.lower, range(num_tasks), trainer.config.shards
    if steps > 0:
        run = trainer.run_on(tasks, shards, step=trainer.state.step, differentiable=False)
        _, lower = run(
            solve_lower,
            trainer.solver,
            trainer.state.upper.averaged,
            lower,
            keeps=True,
            steps=steps,
        )
    split: Split = "test" if isinstance(trainer.problem, SharedProblem) else "train"
    run = trainer.run_on(tasks, shards, step=trainer.state.step, split=split, differentiable=False)
    sums, _ = run(evaluate, trainer.solver, trainer.state.upper.averaged, lower, steps=0)
    return _means(trainer, sums, run.tasks)


def _means(trainer: Trainer, sums: Sums, count: int) -> dict[str, float]:
    """What kernel `evaluate` summed, as the problem reports it."""
    return trainer.problem.summary(
        {
            name.removeprefix("sum/"): float(value) / count
            for name, value in sums.items()
            if name.startswith("sum/")
        }
    )


def final_variables(trainer: Trainer) -> dict[str, Any] | None:
    """x and y as nested lists, `{"upper": {name: ...}, "lower": {name: ...}}`, of problems small
    enough to be read, and what else the problem reports of x; None where there is neither.

    y has a leading task axis where the problem has several tasks, and is empty where it does not
    persist.
    """
    reported = trainer.problem.reported(trainer.state.upper.params)
    ids = sorted(trainer.state.lower.handles)
    each = sum(math.prod(shape) for group, _, shape in trainer.state.lower.layout if group == "y")
    upper = sum(tensor.numel() for tensor in trainer.state.upper.averaged.values())
    if upper + len(ids) * each >= READABLE_NUMBERS:
        return reported or None
    arrays = trainer.transport.fetch([trainer.state.lower.handles[task] for task in ids])
    rows = torch.tensor(np.array(arrays))
    lower = unpack_tasks(PackedTasks(trainer.state.lower.layout, rows))["y"] if ids else {}
    return {
        "upper": {name: tensor.tolist() for name, tensor in trainer.state.upper.averaged.items()},
        "lower": {
            name: (tensor[0] if len(ids) == 1 else tensor).tolist()
            for name, tensor in lower.items()
        },
        **reported,
    }
