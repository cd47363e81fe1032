"""What an objective of problem `continual` makes of its stream: weights, draws and notes; and which
settings have no sense together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bomemeta.data.digest import check_rows
from bomemeta.data.labelled import LabelledArrays
from bomemeta.errors import ConfigError
from bomemeta.problems.continual_samples import Notes, StreamSizes

if TYPE_CHECKING:
    from bomemeta.problems.continual import Continual

Objective = Literal["ctn", "finetune", "er", "er_ace", "derpp", "ewc", "joint"]
# What earlier networks said of the samples in memory: probabilities at the end of their task, or
# logits when they came.
NOTES = {"ctn": "soft_targets", "derpp": "logits"}
REPLAYING = ("er", "er_ace", "derpp")


def sizes_of(problem: Continual) -> StreamSizes:
    """How this problem's stream is walked through."""
    objective, pooled = problem.objective, problem.memory_total is not None
    weights: dict[str, tuple[float, float]] = {
        "ctn": (1.0, problem.distillation),
        "er": (1.0, 0.0),
        "er_ace": (1.0, 0.0),
        "derpp": (problem.der_beta, problem.der_alpha),
    }
    notes: dict[str, Notes] = {"ctn": "task", "derpp": "batch", "ewc": "fisher"}
    replay_weight, notes_weight = weights.get(objective, (None, 0.0))
    return StreamSizes(
        seed=problem.seed,
        batch=problem.batch,
        rounds=problem.rounds,
        memory=problem.memory,
        capacity=problem.memory_total or problem.memory_per_task,
        pooled=pooled,
        semantic=problem.semantic_per_task if objective == "ctn" else 0,
        replay=problem.replay,
        replay_weight=replay_weight,
        notes_weight=notes_weight,
        notes=notes.get(objective, "none"),
        fisher_samples=problem.fisher_samples,
        own_classes=objective == "er_ace",
        shuffled=objective == "joint",
        blocks=problem.blocks,
    )


def check(problem: Continual) -> None:
    """Raises ConfigError where settings have no sense together."""
    data, objective = problem.data, problem.objective
    if not isinstance(data, LabelledArrays):
        raise ConfigError(
            f"data.dataset: continual wants labelled rows (digits, mnist, cifar10_subset, labelled_array ...), and "
            f"{type(data).__name__} is none of these"
        )
    check_rows(data, problem.dtype)
    if objective == "joint" and problem.appended:
        raise ConfigError(
            "problem.appended: objective joint draws from all tasks at once, which a stream that is continued later does not have. "
            "Train anew on everything"
        )
    if problem.method == "ctn" and problem.protocol == "class_incremental":
        raise ConfigError(
            "problem.protocol: class_incremental does not tell the task, which method ctn is a function of. Take method: plain, or "
            "protocol: task_incremental"
        )
    if objective == "ctn" and problem.semantic_per_task >= problem.memory_per_task:
        raise ConfigError(
            f"problem.semantic_per_task: got {problem.semantic_per_task} of memory_per_task {problem.memory_per_task}, which leaves "
            "nothing to replay; wanted less"
        )
    if objective == "ctn" and problem.memory_total is not None:
        raise ConfigError(
            f"problem.memory_total: got {problem.memory_total}; objective ctn keeps a memory of each task. Take memory_per_task, or "
            "another objective"
        )
    if objective in REPLAYING and not (problem.memory_total or problem.memory_per_task):
        raise ConfigError(
            f"problem.memory_per_task: got 0; objective {objective} replays from memory and wants 1 or more"
        )
