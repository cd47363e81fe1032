"""Workers against nodes: room, shards, threads, versions, and what a worker's process would fail
with.
"""

from __future__ import annotations

import os

from bomemeta.config import Config
from bomemeta.doctor import machine
from bomemeta.doctor.dry import TaskCounts
from bomemeta.doctor.findings import Finding, number
from bomemeta.doctor.nodes import Machines, Node, Workers, cores_of, room, spread

NAMED = 4  # nodes in a line
# A share of the workers' time that is lost without a word.
IDLE = 0.05


def bundles(config: Config, machines: Machines, workers: Workers) -> list[Finding]:
    """Whether the workers fit. Ray itself would wait for ever."""
    if machines.kind == "serial":
        return [
            Finding(
                "OK", "workers", "workers: 0: everything is computed in one process, without Ray"
            )
        ]
    if machines.error:
        return []
    asked = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    each = (
        " and ".join(f"{amount:g} {name}" for name, amount in asked.items() if amount > 0)
        or "nothing of their own"
    )
    at_all = sum(room(node.resources, config, workers.most) for node in machines.nodes)
    now = min(at_all, room(machines.free, config, workers.most))
    if machines.kind == "local":
        (only,) = machines.nodes
        where = f"a cluster on this machine, of up to {only.resources['CPU']:g} CPU on its {cores_of(only)} cores,"
    else:
        has = ", ".join(
            f"{sum(node.resources.get(name, 0.0) for node in machines.nodes):g} {name}"
            for name in ("CPU", "GPU")
        )
        where = f"{number(len(machines.nodes), 'node')} ({has})"
    wanted = (
        str(workers.most) if workers.least == workers.most else f"{workers.least} to {workers.most}"
    )
    verb = "have" if machines.kind == "cluster" and len(machines.nodes) > 1 else "has"
    text = f"{wanted} workers of {each}: {where} {verb} room for {at_all}"
    if at_all < workers.least:
        count = f"workers={at_all}, or" if at_all else ""
        return [
            Finding(
                "PROBLEM",
                "workers",
                text,
                f"Set {count} a smaller cpus_per_worker or gpus_per_worker, or join a larger cluster",
            )
        ]
    if now < workers.least:
        return [
            Finding(
                "PROBLEM",
                "workers",
                f"{text}, of which {now} free now",
                "End what else runs there, or wait for it",
            )
        ]
    return [Finding("OK", "workers", text)]


def shards(config: Config, plan: TaskCounts, workers: Workers) -> list[Finding]:
    """Whether every worker has something to do, all of the time."""
    text = f"{number(plan.tasks, 'task')} in a step in {number(plan.shards, 'shard')} of at most {plan.largest}"
    if plan.shards < config.shards:
        text += f" ({config.shards - plan.shards} of the {config.shards} shards would be empty)"
    count = workers.expected
    if count == 0:
        return [Finding("OK", "shards", text)]
    if plan.shards < count:
        more = (
            f"shards={count}"
            if plan.tasks >= count
            else f"more tasks in a step ({'problem.blocks' if plan.tasks else 'tasks_per_step'})"
        )
        return [
            Finding(
                "PROBLEM",
                "shards",
                f"{text}: {count - plan.shards} of {count} workers would never have work",
                f"Set workers={plan.shards}, or {more}, which changes the result's bits",
            )
        ]
    waves = -(-plan.shards // count)
    idle = 1 - plan.tasks / (waves * count * plan.largest)
    if idle > IDLE:
        even = [n for n in range(count, plan.tasks + 1, count) if plan.tasks % n == 0]
        do = (
            f"Set shards={min(even, key=lambda n: abs(n - plan.shards))}"
            if even
            else "Choose tasks and shards as multiples of the workers"
        )
        text += f": {count} workers wait for each other {idle:.0%} of the time"
        return [Finding("NOTE", "shards", text, f"{do}, which changes the result's bits")]
    return [Finding("OK", "shards", f"{text}: {waves} for each of {count} workers")]


def threads(config: Config, machines: Machines, workers: Workers) -> list[Finding]:
    """Threads against cores, node by node. Two processes of two threads each on two cores were
    measured 30 times slower than of one.
    """
    found = []
    loads = (
        [(machines.nodes[0], 1)]
        if machines.kind == "serial"
        else spread(config, machines, workers.expected)
    )
    for node, count in loads:
        cores = cores_of(node)
        text = f"{node.name}: {number(count, 'process')} of {number(config.threads, 'thread')} on {cores} cores"
        if count * config.threads <= cores:
            found.append(Finding("OK", "threads", text))
        elif config.threads > 1:
            fitting = cores // count
            do = f"Set threads={max(fitting, 1)}" + (
                f" or workers={cores // config.threads}" if cores // config.threads else ""
            )
            found.append(
                Finding(
                    "PROBLEM",
                    "threads",
                    f"{text}: they would stall each other",
                    f"{do}; threads changes the result's bits",
                )
            )
        else:
            found.append(
                Finding(
                    "NOTE",
                    "threads",
                    f"{text}: results stay the same, speed suffers",
                    f"workers={cores} is as many as it can use",
                )
            )
    if (
        machines.kind != "serial"
        and config.gpus_per_worker == 0
        and config.cpus_per_worker < config.threads
    ):
        text = f"a worker has {config.threads} threads and asks Ray for {config.cpus_per_worker:g} CPU: others may be placed on its cores"
        found.append(Finding("NOTE", "threads", text, f"Set cpus_per_worker={config.threads}"))
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given not in ("", str(config.threads)):
        text = f"OMP_NUM_THREADS={given} here, and the config has threads: {config.threads}, which counts in every process of a run"
        found.append(
            Finding("NOTE", "threads", text, f"Set threads={given} if that is what you mean")
        )
    return found


def bytecode(machines: Machines) -> list[Finding]:
    """Where every process that starts compiles its packages anew."""
    slow = [n.name for n in machines.nodes if n.facts and not n.facts.get("keeps_bytecode", True)]
    if not slow:
        return []
    text = (
        f"{', '.join(slow[:NAMED])}: packages are installed without compiled bytecode, and none can be kept, so that each worker "
        "compiles torch and ray anew when it starts (10.8 CPU-s instead of 4.4 where this was measured)"
    )
    advice = (
        "Compile at installation (UV_COMPILE_BYTECODE=1 uv sync), or unset PYTHONDONTWRITEBYTECODE"
    )
    return [Finding("NOTE", "bytecode", text, advice)]


def nodes(config: Config, machines: Machines) -> list[Finding]:
    """What the cluster's nodes say: the same versions as here, and a worker that can be built, with
    imports and data.
    """
    if machines.kind != "cluster" or machines.error:
        return []
    ours = machine.facts()["versions"]
    found = [_node(node, ours) for node in machines.nodes]
    wrong = [finding for finding in found if finding is not None]
    built = sum(node.worker == "" for node in machines.nodes)
    good = (
        f"{number(len(machines.nodes), 'node')} with our versions of {', '.join(ours)}; a worker was built on {built}, "
        "data and imports too"
    )
    return wrong or [Finding("OK", "nodes", good)]


def _node(node: Node, ours: dict[str, str | None]) -> Finding | None:
    if node.facts is None:
        return Finding(
            "PROBLEM",
            "nodes",
            f"{node.name} did not answer in time",
            "Look at it with `ray status`, or take it out",
        )
    theirs = node.facts["versions"]
    other = [
        f"{name} {theirs.get(name) or 'missing'} (here {version})"
        for name, version in ours.items()
        if theirs.get(name) != version
    ]
    if other:
        text = f"{node.name} has {', '.join(other)}"
        return Finding(
            "PROBLEM",
            "nodes",
            text,
            "Install the same versions everywhere: other ones fail, or add in another order",
        )
    if node.worker is None or not node.worker:
        return None
    return Finding(
        "PROBLEM", "nodes", f"{node.name}: a worker cannot be built there: {node.worker}"
    )
