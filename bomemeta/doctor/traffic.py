"""Bytes and seconds of a step, carried over from the dry steps to the run's shards, nodes and
workers. Seconds are estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bomemeta.config import Config
from bomemeta.core.problem import Problem
from bomemeta.doctor import together
from bomemeta.doctor.dry import Dry, Line, Still, TaskCounts
from bomemeta.doctor.findings import Finding, duration, number, size
from bomemeta.doctor.nodes import Machines, Workers, spread
from bomemeta.doctor.storage import TENSORBOARD_BYTES, Needs
from bomemeta.doctor.together import Together

# As measured with Ray on one machine (docs/ray.md): an empty round, and a megabyte out and back.
ROUND_S = 0.005
MEGABYTE_S = 0.002
# Bytes a step brings to the driver from which on adding them elsewhere is worth a thought.
LARGE = 50e6


class ExpectedTraffic(NamedTuple):
    """Bytes of a step."""

    down: float  # x and what goes with it, to every node
    up: float  # the shards' sums, all of them


def traffic_of(
    config: Config, plan: TaskCounts, machines: Machines, workers: Workers, dry: Dry
) -> ExpectedTraffic:
    nodes = len(spread(config, machines, workers.expected)) if machines.kind != "serial" else 1
    return ExpectedTraffic(dry.sent_bytes * nodes, dry.bytes_reduced * plan.shards)


def traffic(
    config: Config, plan: TaskCounts, machines: Machines, workers: Workers, dry: Dry
) -> list[Finding]:
    bytes_ = traffic_of(config, plan, machines, workers, dry)
    nodes = round(bytes_.down / dry.sent_bytes) if dry.sent_bytes else 1
    text = f"in {number(dry.reduces, 'round')}: {size(dry.sent_bytes)} down to each of {number(nodes, 'node')}, "
    text += f"{size(bytes_.up)} up ({number(plan.shards, 'shard')} x {size(dry.bytes_reduced)})"
    if dry.bytes_reduced_later != dry.bytes_reduced:
        text += f"; {size(dry.bytes_reduced_later * plan.shards)} up in steps that measure less"
    if machines.kind == "serial":
        return [
            Finding("OK", "bytes per step", f"{text}; within one process, so none of it travels")
        ]
    if config.reduce != "driver":
        return [
            Finding(
                "OK", "bytes per step", f"{text}, added among the workers (reduce: {config.reduce})"
            )
        ]
    if bytes_.up > LARGE and plan.shards >= 4:
        do = f"reduce=tree adds on the workers, and {size(dry.bytes_reduced)} come to the driver"
        return [Finding("NOTE", "bytes per step", f"{text}: all of it comes to one process", do)]
    return [Finding("OK", "bytes per step", text)]


class Times(NamedTuple):
    """Seconds; estimates."""

    dry: float  # the step that was timed
    step: float
    run: float  # all steps
    evaluation: float  # all evaluations


def times_of(
    config: Config, problem: Problem, plan: TaskCounts, machines: Machines, workers: Workers, dries: list[Dry], worker: Line,
    evaluating: Line, steps: int, still: Sequence[tuple[int, Still]] = (), joint: Together | None = None,
) -> Times:  # fmt: skip
    """`still`: how many steps there are of each kind in which x stands still, and one of them."""
    dry = dries[-1]
    lanes = _lanes(config, machines, workers)
    sizes = [plan.tasks // plan.shards + (i < plan.tasks % plan.shards) for i in range(plan.shards)]

    def estimate(one: Dry | Still) -> float:
        driver = max(one.step_s - one.worker_s, 0.0)
        share = one.worker_s / dry.worker_s if dry.worker_s > 0 else 1.0
        if machines.kind == "serial":
            return driver + share * sum(worker.at(tasks) for tasks in sizes)
        computing = driver + -(-plan.shards // lanes) * share * worker.at(plan.largest)
        if joint is not None:
            return computing + together.seconds(joint, one, ROUND_S, MEGABYTE_S)
        moved = (dry.sent_bytes + one.bytes_reduced * plan.shards) / 1e6 * MEGABYTE_S
        return computing + one.reduces * ROUND_S + moved

    step = estimate(dry)
    moving = steps - sum(count for count, _ in still)
    run = step * moving + sum(estimate(one) * count for count, one in still)
    evaluation = config.evaluation
    episodes = 0
    if problem.meta_tests:
        variants = problem.evaluation_variants().values()
        others = sum(
            any(getattr(problem, name) != value for name, value in changes.items())
            for changes in variants
        )
        episodes = evaluation.episodes * (1 + others)
        episodes += (
            evaluation.validation_episodes * (steps // evaluation.every_steps)
            if evaluation.every_steps
            else 0
        )
    return Times(
        dry.step_s,
        step,
        run * config.seeds,
        episodes * evaluating.each / lanes * config.seeds,
    )


def times(
    config: Config,
    machines: Machines,
    workers: Workers,
    found: Times,
    tasks: int,
    steps: int,
    device: str,
) -> list[Finding]:
    where = (
        "in this process"
        if machines.kind == "serial"
        else f"with {number(workers.expected, 'worker')}"
    )
    seeds = f" x {config.seeds} seeds" if config.seeds > 1 else ""
    text = f"a step on {number(tasks, 'task')} took {duration(found.dry)} here ({device}). Estimated {where}: {duration(found.step)} "
    text += f"a step, {duration(found.run)} for {steps:,} steps{seeds}"
    if found.evaluation:
        text += f", {duration(found.evaluation)} for evaluations"
    if config.workers != 0 and config.gpus_per_worker > 0 and device == "cpu":
        return [
            Finding(
                "NOTE",
                "time",
                f"{text}; on GPUs it will be another",
                "Ask again on a machine with one",
            )
        ]
    if machines.kind == "cluster":
        text += ", were the nodes as fast as this machine"
    return [Finding("OK", "time", text)]


def needs_of(
    config: Config, dries: list[Dry], num_tasks: int | None, shared: bool, steps: int
) -> Needs:
    """What the run will leave on the disk."""
    dry = dries[-1]
    # Each task that persists is an entry of its own, with its overhead.
    checkpoint = float(dry.checkpoint_bytes)
    if num_tasks is not None and not shared:
        first = dries[0]
        each = (dry.checkpoint_bytes - first.checkpoint_bytes) / max(dry.tasks - first.tasks, 1)
        checkpoint += max(each, dry.state_bytes) * max(num_tasks - dry.tasks, 0)
    # The new one is whole before the oldest goes.
    at_once = min(config.checkpoint.keep + 1, steps // config.checkpoint.every_steps + 2)
    # Names and brackets of TensorBoard's events are as long as those of a line of metrics.jsonl.
    log = dry.log_bytes + (
        dry.log_bytes + dry.log_numbers * TENSORBOARD_BYTES if config.log.tensorboard else 0
    )
    return Needs(checkpoint, at_once * checkpoint * config.seeds, float(log * steps * config.seeds))


def _lanes(config: Config, machines: Machines, workers: Workers) -> int:
    """How many workers really compute at a time: those that have cores of their own."""
    if machines.kind == "serial":
        return 1
    total = 0
    for node, count in spread(config, machines, workers.expected):
        cores = node.facts["cores"] if node.facts else count
        total += (
            min(count, max(cores // config.threads, 1)) if config.gpus_per_worker == 0 else count
        )
    return max(total, 1)
