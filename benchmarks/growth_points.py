"""The points of benchmarks/growth.py's sweeps: a run each, what its steps say that they cost, and
what the cost model says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import cost_model
from benchmarks.cost_model import Cost, Sizes, Where
from bomemeta.assembly import build_problem, trainer_of
from bomemeta.config import Config, load_config
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.problem import Problem, SharedProblem
from bomemeta.distributed.transport import Transport
from bomemeta.engine import Trainer

COUNTS = ("gradient_evaluations", "hessian_products", "reduces", "bytes_reduced", "driver_bytes")
BOME = "{name: bome, barrier: per_task, diagnose_every: 0, inner_lr: 0.05, lower_lr: 0.05, upper_lr: 0.001}"
SOLVERS = {
    "bome": BOME,
    "itd": "{name: itd, inner_lr: 0.05, upper_lr: 0.001}",
    "aid_cg": "{name: aid_cg, inner_lr: 0.05, upper_lr: 0.001}",
}
EPISODES = (
    "problem={name: few_shot, width: 32}",
    "data={dataset: noise}",
    "tasks_per_step=16",
    "shards=2",
)
COMMON = ("evaluation.every_steps=null", "log.tensorboard=false", "threads=1", "steps=100000")


class Point(NamedTuple):
    """A run at one point of a sweep."""

    solver: str
    value: int
    trainer: Trainer
    sizes: Sizes

    def predicted(self, step: int = 0) -> Cost:
        return cost_model.cost(self.trainer.solver, self.sizes, step)


def sizes_of(config: Config, problem: Problem) -> Sizes:
    """What the cost model wants to know of a run."""
    upper = problem.init_upper(torch.Generator().manual_seed(0))
    batch = problem.load([0], 0, "train")
    lower = LocalOracle(problem, upper, batch, "loop", differentiable=False).init_lower()
    where: Where = (
        "shared"
        if isinstance(problem, SharedProblem)
        else "fresh"
        if problem.num_tasks is None
        else "pool"
    )
    tasks = (
        problem.num_tasks if where == "shared" else config.tasks_per_step or problem.num_tasks or 8
    )
    assert tasks is not None
    assert isinstance(config.workers, int)
    return Sizes(
        where=where,
        tasks=tasks,
        shards=config.shards,
        upper=sum(tensor.numel() for tensor in upper.values()),
        lower=sum(tensor[0].numel() for tensor in lower.values()),
        workers=config.workers,
        reduce=config.reduce,
        images=sum(len(batch[name][0]) for name in ("support", "query") if name in batch),
    )


def config_of(keys: Sequence[str], solver: str = BOME) -> Config:
    base = {
        "imports": ["benchmarks.sized"],
        "problem": {"name": "sized"},
        "solver": {"name": "bome"},
    }
    return load_config(base, [*COMMON, f"solver={solver}", *keys])


def point(name: str, value: int, config: Config, transport: Transport) -> Point:
    problem = build_problem(config)
    trainer = trainer_of(config, problem=problem, transport=transport)
    return Point(name, value, trainer, sizes_of(config, problem))


def counted(of: Point, steps: int = 2) -> dict[str, Any]:
    """What the first steps say that they cost, and what the model says. Raises where they differ."""
    row: dict[str, Any] = {
        "solver": of.solver,
        "value": of.value,
        "upper": of.sizes.upper,
        "lower": of.sizes.lower,
    }
    for step, message in enumerate(of.trainer.advance(steps)):
        model = of.predicted(step)._asdict()
        got: dict[str, float] = {name: message.get(name, 0.0) for name in COUNTS}
        wanted = {name: float(model[name]) for name in COUNTS}
        if got != wanted:
            raise SystemExit(
                f"step {step} of {of.solver} at {of.value}: measured {got}, the model says {wanted}"
            )
        row |= got
    return row


def in_turn(
    steps: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> list[list[float]]:
    """Seconds of each step in each round."""
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, own in zip(steps, taken, strict=True):
            start = clock()
            step()
            own.append(clock() - start)
    return taken


def say(row: Mapping[str, Any]) -> None:
    print(
        {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()},
        flush=True,
    )
