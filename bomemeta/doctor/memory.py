"""Memory: what dry steps held, carried over to the run's shards, against what is free on each
machine.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from bomemeta.config import Config
from bomemeta.doctor.dry import Dry, Line, TaskCounts
from bomemeta.doctor.findings import Finding, Level, number, size
from bomemeta.doctor.nodes import Machines, Node, Workers, spread
from bomemeta.doctor.together import Together
from bomemeta.sections import label

# Ray kills workers from here on (its memory_usage_threshold); without Ray the system is not far
# from doing so.
FULL = 0.95
# From here on a note says that it is close.
CLOSE = 0.8
# What a process holds on a GPU before its first tensor (CUDA's context and cuBLAS), roughly.
CUDA_CONTEXT = 600e6
# Of the machine's memory, what Ray gives its object store unless told otherwise.
STORE_SHARE = 0.3
# Share of a step's memory that inner steps must hold before they are worth a note.
WORTH = 0.2


class MemoryNeeds(NamedTuple):
    """Bytes. `process` is what a worker holds before its first step; `step` and `evaluation` are
    its tensors, by tasks held at once.
    """

    process: float
    step: Line
    evaluation: Line
    updating_memory: float
    driver: float
    measured: tuple[int, ...]  # on so many tasks
    device: str
    inner_steps: Line | None  # in one step on one task, by T

    def tensors(self, plan: TaskCounts) -> float:
        """The most that a worker's tensors take, whatever it is doing."""
        return max(
            self.step.at(plan.largest),
            self.evaluation.at(plan.evaluated) if plan.evaluated else 0.0,
            self.updating_memory,
        )


def memory(
    config: Config, plan: TaskCounts, machines: Machines, workers: Workers, needs: MemoryNeeds
) -> list[Finding]:
    """Whether the workers, or the one process, fit into what is free."""
    tensors = needs.tensors(plan)
    rest = (
        f"{size(needs.step.rest)} + "
        if needs.step.rest >= 0.01 * needs.step.at(plan.largest)
        else ""
    )
    what = f"tensors of a step {rest}{number(plan.largest, 'task')} x {size(needs.step.each)} = {size(needs.step.at(plan.largest))}"
    if plan.evaluated and needs.evaluation.at(plan.evaluated) > needs.step.at(plan.largest):
        what += f", of an evaluation of {plan.evaluated} at once {size(needs.evaluation.at(plan.evaluated))}"
    if needs.updating_memory > needs.step.at(plan.largest):
        what += f", where memory is made anew {size(needs.updating_memory)}"
    measured = " and ".join(map(str, needs.measured))
    on_gpu = config.gpus_per_worker > 0 if config.workers != 0 else needs.device != "cpu"
    where = f" (measured on {measured} at a time on {'this GPU' if needs.device != 'cpu' else 'the CPU'})"
    found = []
    if on_gpu:
        found += _on_gpus(config, plan, machines, workers, needs, f"{what}{where}")
        each, text = (
            needs.process,
            f"a worker's process {size(needs.process)}, its tensors on a GPU",
        )
    else:
        each, text = (
            needs.process + tensors,
            f"a worker needs {size(needs.process + tensors)}: process {size(needs.process)}, {what}{where}",
        )
    loads = [(node, count) for node, count in spread(config, machines, workers.expected)]
    if machines.kind == "serial":
        # This process is there already.
        each, text, loads = (
            each - needs.process + needs.driver,
            text.replace("a worker", "the run", 1),
            [(machines.nodes[0], 1)],
        )
    for node, count in loads:
        if node.facts is not None:
            driver = (
                0.0 if machines.kind == "serial" or node is not machines.nodes[0] else needs.driver
            )
            found.append(_fits(node, count, each, driver, plan, needs, text))
    return found or [Finding("OK", "memory", text)]


def inner_steps(config: Config, needs: MemoryNeeds) -> list[Finding]:
    """Whether memory grows with T, as in methods that differentiate through the inner loop."""
    steps = getattr(config.solver, "inner_steps", None)
    if needs.inner_steps is None or not isinstance(steps, int):
        return []
    grown = needs.inner_steps.each * steps
    if grown < WORTH * needs.inner_steps.at(steps):
        return [
            Finding(
                "OK",
                "inner steps",
                f"memory does not grow much with solver.inner_steps: {size(grown)} of a task's step for T = {steps}",
            )
        ]
    text = f"{label(config.solver)} holds {size(needs.inner_steps.each)} more for each inner step in a task: {size(grown)} for T = {steps}"
    return [
        Finding(
            "NOTE",
            "inner steps",
            text,
            "Halving solver.inner_steps halves it; bome, sl_bamm or aid_cg keep no steps",
        )
    ]


def states(
    config: Config,
    plan: TaskCounts,
    machines: Machines,
    workers: Workers,
    dry: Dry,
    num_tasks: int | None,
    shared: bool,
    joint: Together | None,
) -> list[Finding]:
    """Lower states that persist, in Ray's object store and in checkpoints; and what else is in that
    store in a step.
    """
    found = []
    kept = 0 if shared else dry.state_bytes * (num_tasks or 0)
    moving: float = (
        dry.sent_bytes
        + dry.bytes_reduced * plan.shards
        + (0 if shared else dry.state_bytes * plan.tasks)
    )
    if joint is not None:
        moving = joint.down + joint.to_driver
    if shared:
        where = "on the driver" if joint is None else "with every member"
        text = f"the one y, with what the solver keeps beside it, has {size(dry.state_bytes)}: {where} and in every checkpoint"
        found.append(Finding("OK", "lower states", text))
    elif kept:
        text = (
            f"{number(num_tasks or 0, 'task')} x {size(dry.state_bytes)} = {size(kept)} "
            "persist between steps and are in every checkpoint"
        )
        found.append(Finding("OK", "lower states", text))
    if machines.kind == "serial":
        return found
    for node, count in spread(config, machines, workers.expected):
        share = count / max(workers.expected, 1)
        wanted = (kept + moving) * share
        room = node.resources.get("object_store_memory") or (
            STORE_SHARE * node.facts["memory_available"] if node.facts else 0
        )
        if node.facts and wanted > node.facts["shm_available"]:
            text = f"{node.name}: a step puts {size(wanted)} into Ray's object store, and /dev/shm has {size(node.facts['shm_available'])}"
            found.append(
                Finding(
                    "NOTE",
                    "object store",
                    text,
                    "Ray then uses the disk, slowly: give the container a larger /dev/shm",
                )
            )
        elif room and wanted > FULL * room:
            text = (
                f"{node.name}: a step puts {size(wanted)} into Ray's object store of {size(room)}"
            )
            found.append(
                Finding(
                    "PROBLEM",
                    "object store",
                    text,
                    "Start Ray with a larger --object-store-memory, or use fewer tasks",
                )
            )
    return found


def _fits(
    node: Node,
    count: int,
    each: float,
    driver: float,
    plan: TaskCounts,
    needs: MemoryNeeds,
    text: str,
) -> Finding:
    assert node.facts is not None
    free, wanted = node.facts["memory_available"], count * each + driver
    text += f"; {number(count, 'process')} on {node.name}: {size(wanted)} of {size(free)} free"
    if wanted > FULL * free:
        return Finding("PROBLEM", "memory", text, _smaller(FULL * free, count, driver, plan, needs))
    if wanted > CLOSE * free:
        return Finding(
            "NOTE", "memory", f"{text}: that is close", "Leave nothing else running there"
        )
    return Finding("OK", "memory", text)


def _smaller(free: float, count: int, driver: float, plan: TaskCounts, needs: MemoryNeeds) -> str:
    """What would make it fit."""
    left = (free - driver) / count - needs.process
    tasks = math.floor((left - needs.step.rest) / needs.step.each) if needs.step.each > 0 else 0
    if 1 <= tasks < plan.largest:
        count = math.ceil(plan.tasks / tasks)
        return f"Set shards={count}, of at most {tasks} tasks each, which changes the result's bits, or use fewer workers"
    return "Use fewer workers, fewer or smaller tasks, or a machine with more memory"


def _on_gpus(
    config: Config,
    plan: TaskCounts,
    machines: Machines,
    workers: Workers,
    needs: MemoryNeeds,
    what: str,
) -> list[Finding]:
    """A worker has a share of one GPU, or whole ones."""
    tensors = needs.tensors(plan)
    together = (
        max(int(1 / config.gpus_per_worker + 1e-9), 1) if 0 < config.gpus_per_worker < 1 else 1
    )
    together = min(together, max(workers.expected, 1))
    wanted = together * (tensors + CUDA_CONTEXT)
    text = f"{number(together, 'worker')} on a GPU: {size(wanted)}, each {size(CUDA_CONTEXT)} for CUDA and {what}"
    gpus = [gpu for node in machines.nodes if node.facts for gpu in node.facts["gpus"]]
    if not gpus:
        return [Finding("NOTE", "GPU memory", f"{text}; no GPU was seen to compare with")]
    least = min(free for _, free in gpus)
    level: Level = (
        "PROBLEM" if wanted > FULL * least else "NOTE" if wanted > CLOSE * least else "OK"
    )
    do = (
        "Use more shards (smaller ones; this changes the result's bits), or a larger gpus_per_worker"
        if level != "OK"
        else ""
    )
    return [
        Finding(
            level,
            "GPU memory",
            f"{text}; the fullest of {number(len(gpus), 'GPU')} has {size(least)} free",
            do,
        )
    ]
