"""Where a run's workers would be: nodes with what Ray counts there, what their machines have, and
how many workers go where.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from bomemeta.assembly import worker_range
from bomemeta.config import Config
from bomemeta.doctor import machine


class Node(NamedTuple):
    name: str
    resources: Mapping[str, float]  # as Ray counts them, all of the node's
    facts: Mapping[str, Any] | None  # of `machine.facts`; None: the node did not answer
    worker: str | None = (
        None  # what went wrong when a run's worker was built there; empty: nothing, None: not tried
    )


class Machines(NamedTuple):
    """Where a run would be computed. `error`: why there are no nodes to look at."""

    kind: Literal["serial", "local", "cluster"]
    nodes: Sequence[Node]
    free: Mapping[str, float]  # what Ray has left over all nodes
    error: str = ""


class Workers(NamedTuple):
    """How many a run wants, least and most, and how many it would have; 0: it computes in its own
    process.
    """

    least: int
    most: int
    expected: int


def kind_of(config: Config) -> Literal["serial", "local", "cluster"]:
    """Which of the three a run with this config has, here and now."""
    if config.workers == 0:
        return "serial"
    joins = config.address not in (None, "local") or (
        config.address is None and bool(os.environ.get("RAY_ADDRESS"))
    )
    return "cluster" if joins else "local"


def here(config: Config) -> Machines:
    """This machine, alone: for a run without Ray, or with a cluster that it starts itself."""
    facts = machine.facts()
    kind = kind_of(config)
    resources = {"CPU": float(facts["cores"]), "GPU": float(len(facts["gpus"]))}
    if kind == "local":
        from bomemeta.distributed.cluster import MAX_OVERSUBSCRIPTION  # imports Ray

        # A local cluster is told that it has as many as the workers want (the least number of
        # them), up to here.
        most = resources["CPU"] * MAX_OVERSUBSCRIPTION
        asked = (
            most
            if config.workers != "auto"
            else math.ceil(worker_range(config)[0] * config.cpus_per_worker)
        )
        resources["CPU"] = max(resources["CPU"], min(most, asked))
    return Machines(
        "serial" if kind == "serial" else "local",
        [Node("this machine", resources, facts)],
        resources,
    )


def room(resources: Mapping[str, float], config: Config, most: int) -> int:
    """How many workers fit; `most` where they ask for nothing."""
    wanted = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    # 1e-9: three workers of 0.1 fit in 0.3, which is a little less in floating point.
    return min(
        (
            int(resources.get(name, 0.0) / amount + 1e-9)
            for name, amount in wanted.items()
            if amount > 0
        ),
        default=most,
    )


def cores_of(node: Node) -> int:
    """The machine's, or what Ray says where the node did not answer."""
    return int(node.facts["cores"] if node.facts else node.resources.get("CPU", 0))


def workers_of(config: Config, machines: Machines) -> Workers:
    if machines.kind == "serial":
        return Workers(0, 0, 0)
    least, most = worker_range(config)
    fits = sum(room(node.resources, config, most) for node in machines.nodes)
    return Workers(least, most, min(most, max(least, fits)) if machines.nodes else most)


def spread(config: Config, machines: Machines, workers: int) -> list[tuple[Node, int]]:
    """Nodes with the number of workers that each would get: one by one to the nodes that have room,
    as Ray's SPREAD does.
    """
    left = [room(node.resources, config, workers) for node in machines.nodes]
    given = [0] * len(left)
    for _ in range(workers):
        if not any(left):
            break
        chosen = min((i for i in range(len(left)) if left[i]), key=lambda i: given[i])
        given[chosen] += 1
        left[chosen] -= 1
    return [(node, count) for node, count in zip(machines.nodes, given, strict=True) if count]
