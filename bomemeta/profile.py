"""`bomemeta profile`: where the time of a step goes, from a few real steps, and what moves the
largest part of it.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from bomemeta.assembly import trainer_of
from bomemeta.callable_module import callable_as
from bomemeta.config import Config, load_config
from bomemeta.core import spans
from bomemeta.core.problem import SharedProblem
from bomemeta.engine import Trainer
from bomemeta.environment import environment, environment_line
from bomemeta.errors import ConfigError
from bomemeta.files import replace_text

# The parts of a step as metrics.jsonl has them.
STEP = ("broadcast", "compute", "reduce", "update")
REST = "the rest"  # of compute: what the solver computes between its questions, packing, dispatch
OPERATIONS = 8  # of the longest table of operations
# What moves a part.
KNOBS: Mapping[str, str] = {
    "broadcast": "x is sent once a round: fewer rounds (solver.barrier=per_task for fresh tasks) or a smaller network (problem.width)",
    "reduce": "a shard answers with one or two vectors in x: fewer shards, reduce=tree, or solver.barrier=per_task, which needs one vector",
    "update": "the driver moves x and logs alone, whatever the number of workers: more tasks_per_step for each move",
    spans.LOAD: "images are read and cut where they are used: fewer problem.queries, or more workers",
    spans.ENCODE: "one forward pass over all images: problem.width, problem.queries, tasks_per_step; more threads or workers share it",
    spans.INNER_LOOP: "gradient steps on the encoded data: solver.inner_steps, adapt_steps, barrier_steps; fewer shards make larger stacks",
    spans.LOSSES: "the losses' own backward pass: closed forms (`loss_gradient` of the problem), or fewer shards, which make larger stacks",
    spans.PULL_BACK: (
        "one backward pass over all images per vector in x: solver.barrier=per_task has one where global has two, "
        "solver.diagnose_every=0 measures nothing beside; problem.width, problem.queries"
    ),
    spans.SECOND_ORDER: "products with second derivatives: a solver that takes fewer of them a step, or none, as bome",
    REST: "fewer shards make larger stacks, and with them less to dispatch for each task",
}


@dataclasses.dataclass(frozen=True)
class Profile:
    """Medians over the steps, in seconds."""

    steps: int
    tasks: int
    shards: int
    workers: int | str
    threads: int
    step_s: float
    parts: dict[str, float]  # of a step: STEP
    within: dict[
        str, float
    ]  # of the work of all shards, one after the other in one process: spans and REST
    operations: dict[
        str, float
    ]  # torch's operations with the most time of their own, the same work
    gradient_evaluations: float | None  # per task
    reduces: float
    bytes_reduced: float
    environment: dict[str, Any]

    @property
    def largest(self) -> str:
        """The part with the most time, compute's own parts in its place."""
        part = max(self.parts, key=lambda name: self.parts[name])
        return max(self.within, key=lambda name: self.within[name]) if part == "compute" else part

    def lines(self) -> list[str]:
        """The report as it is printed."""
        busy = sum(self.within.values())
        return [
            f"a step takes {_ms(self.step_s)}: {self.tasks} tasks in {self.shards} shards, workers {self.workers}, threads "
            f"{self.threads}; median of {self.steps} steps",
            *(_line(name, taken, self.step_s) for name, taken in self.parts.items()),
            "",
            f"compute: the shards one after the other in this process take {_ms(busy)}",
            *(_line(name, taken, busy) for name, taken in self.within.items()),
            "",
            f"torch's operations in it, time of their own in {_ms(sum(self.operations.values()))}",
            *(
                _line(name, taken, sum(self.operations.values()))
                for name, taken in self.operations.items()
            ),
            "",
            f"to the driver: {self.reduces:.0f} reduces of {self.bytes_reduced / 2**20:.2f} MiB in all"
            + (
                f"; gradient evaluations per task: {self.gradient_evaluations:.0f}"
                if self.gradient_evaluations
                else ""
            ),
            f"largest part: {self.largest}. {KNOBS[self.largest]}",
            environment_line(self.environment),
        ]

    def write(self, path: Path) -> None:
        """All of it as JSON."""
        record = dataclasses.asdict(self) | {"largest": self.largest, "knob": KNOBS[self.largest]}
        replace_text(path, json.dumps(record, indent=2) + "\n")


def profile(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    steps: int = 10,
    warm_up: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Takes `warm_up` and then `steps` steps of the config from its start; nothing is written, and
    the run's folder is not touched. They are steps in which x moves, whenever it does.

    With workers the steps run there, and then once more in this process, where the spans and
    torch's profiler listen. Raises ConfigError where the run has too few steps for that.
    """
    settings = load_config(
        config, [*overrides, "evaluation.every_steps=null"]
    )  # a validation is no part of a step
    with trainer_of(settings, say) as trainer:
        trainer.solver = trainer.solver.unpaced()
        if trainer.steps < warm_up + steps:
            raise ConfigError(
                f"steps: the run has {trainer.steps}; {warm_up} to warm up and {steps} to profile are more: set fewer with --steps"
            )
        trainer.advance(warm_up)
        say(f"{steps} steps after {warm_up}")
        measured = trainer.advance(steps)
    here = settings.model_copy(update={"workers": 0})
    with trainer_of(here, say) as trainer:
        trainer.solver = trainer.solver.unpaced()
        trainer.advance(warm_up)
        inside = within(trainer, steps)
        operations = operations_of(trainer, min(steps, 3))
        problem, tasks = trainer.problem, trainer.step_run(0).tasks
    first = measured[0]
    blocks = problem.num_tasks if isinstance(problem, SharedProblem) else None
    tasks = blocks or tasks
    return Profile(
        steps=steps,
        tasks=tasks,
        shards=min(settings.shards, tasks),
        workers=settings.workers,
        threads=settings.threads,
        step_s=_median(measured, "step_s"),
        parts={name: _median(measured, f"{name}_s") for name in STEP},
        within=inside,
        operations=operations,
        gradient_evaluations=first.get("gradient_evaluations"),
        reduces=first["reduces"],
        bytes_reduced=first["bytes_reduced"],
        environment=environment(),
    )


def within(trainer: Trainer, steps: int) -> dict[str, float]:
    """Medians over so many steps of the spans in this process, and of what of the computation is in
    none.
    """
    each = []
    for _ in range(steps):
        with spans.heard() as heard:
            compute = trainer.step()["compute_s"]
        each.append(heard.seconds | {REST: max(compute - sum(heard.seconds.values()), 0.0)})
    return {name: _median(each, name) for name in each[0]}


def operations_of(trainer: Trainer, steps: int) -> dict[str, float]:
    """The longest of torch's operations per step, without those that they call. The profiler slows
    what it looks at.
    """
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer.advance(steps)
    found = {
        event.key: event.self_cpu_time_total / 1e6 / steps
        for event in profiled.key_averages()
        if "::" in event.key
    }
    longest = sorted(found, key=lambda name: -found[name])[:OPERATIONS]
    others = sum(taken for name, taken in found.items() if name not in longest)
    return {name: found[name] for name in longest} | {"all others": others}


def _median(each: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(one.get(name, 0.0) for one in each)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _line(name: str, taken: float, whole: float) -> str:
    return f"  {name:<30} {_ms(taken):>10} {100 * taken / whole:5.1f} %"


callable_as(__name__, "profile")
