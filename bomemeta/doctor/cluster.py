"""A running Ray cluster, asked from a process of its own: what hangs there (Ray's start does, at a
wrong address) is ended in time.

    python -m bomemeta.doctor.cluster < question > answer      pickled question, JSON answer in the last line

The cluster is joined, asked and left as it was.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import time
from typing import Any

from bomemeta.assembly import BuildWorker
from bomemeta.config import Config
from bomemeta.doctor import machine
from bomemeta.doctor.nodes import Machines, Node
from bomemeta.errors import ClusterError, ConfigError

PATIENCE_S = (
    180.0  # for all of it; a worker's process takes about 20 s to start, load torch and its data
)
ANSWER_S = 60.0  # for a node's first word


def ask(config: Config, patience_s: float = PATIENCE_S) -> Machines:
    """The cluster of `address` or RAY_ADDRESS, with what each node says. Raises ConfigError where
    the address can be none.
    """
    address = config.address or os.environ["RAY_ADDRESS"]
    paths = [os.path.abspath(path) for path in sys.path]
    factory = BuildWorker.of(config)
    question = {
        "address": address,
        "factory": base64.b64encode(pickle.dumps(factory)).decode(),
        "threads": config.threads,
        "paths": paths,
        "cpus": config.cpus_per_worker,
        "gpus": config.gpus_per_worker,
        "labels": dict(config.worker_labels),
        "until": patience_s - 20,  # what is left is for joining
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bomemeta.doctor.cluster"],
            input=pickle.dumps(question),
            capture_output=True,
            env=environment,
            timeout=patience_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Machines(
            "cluster", [], {}, f"the cluster at {address} did not answer within {patience_s:g} s"
        )
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        message = done.stderr.decode(errors="replace").strip().splitlines()
        return Machines(
            "cluster",
            [],
            {},
            f"the process that asks {address} ended with {done.returncode}: {(message or ['no word'])[-1][:300]}",
        )
    if answer.get("config_error"):
        raise ConfigError(answer["config_error"])
    if answer.get("error"):
        return Machines("cluster", [], {}, answer["error"])
    return Machines("cluster", [Node(*node) for node in answer["nodes"]], answer["free"])


def main() -> None:
    """The other side."""
    question = pickle.loads(sys.stdin.buffer.read())
    try:
        answer = _answer(question)
    except ConfigError as error:
        answer = {"config_error": str(error)}
    except ClusterError as error:
        answer = {"error": str(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from bomemeta.distributed import capacity, cluster

    cloudpickle.register_pickle_by_value(machine)  # so that a node without bomemeta can say so
    deadline = time.monotonic() + question["until"]

    def started(function: Any, node: dict[str, Any], *arguments: Any) -> Any:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(function).remote(
            *arguments
        )

    def answers(references: dict[str, Any], until: float) -> dict[str, Any]:
        """What came in time, by node; an exception's text instead of its answer."""
        ready, late = ray.wait(
            list(references.values()),
            num_returns=len(references),
            timeout=max(until - time.monotonic(), 1.0),
        )
        for reference in late:
            ray.cancel(reference, force=True)
        found: dict[str, Any] = {}
        for name, reference in references.items():
            if reference in ready:
                try:
                    found[name] = ray.get(reference)
                except ray.exceptions.RayError as error:
                    found[name] = str(error).strip().splitlines()[-1]
        return found

    with cluster.joined(cluster.RayOptions(workers=1, address=question["address"])):
        labels = question["labels"]
        if (without := capacity.unmatched(labels)) is not None:
            raise ClusterError(without)
        there = [node for node in ray.nodes() if node["Alive"]]
        alive = [node for node in there if capacity.matches(node["Labels"], labels)]
        free = capacity.free_on(alive) if labels else ray.available_resources()
        asked = {node["NodeID"]: started(machine.facts, node) for node in alive}
        facts = {
            name: message
            for name, message in answers(asked, min(deadline, time.monotonic() + ANSWER_S)).items()
            if isinstance(message, dict)
        }
        wanted = {
            name: amount
            for name, amount in (("CPU", question["cpus"]), ("GPU", question["gpus"]))
            if amount > 0
        }
        able = [
            node
            for node in alive
            if all(node["Resources"].get(name, 0.0) >= amount for name, amount in wanted.items())
        ]
        arguments = (question["factory"], question["threads"], question["paths"])
        building = {
            node["NodeID"]: started(machine.build_worker, node, *arguments)
            for node in able
            if node["NodeID"] in facts
        }
        built = answers(building, deadline) if building else {}
        missing = dict.fromkeys(building, "it was not ready in time")
        workers = {**missing, **built}
        nodes = [
            (
                f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})",
                node["Resources"],
                facts.get(node["NodeID"]),
                workers.get(node["NodeID"]),
            )
            for node in alive
        ]
        return {"nodes": nodes, "free": free}


if __name__ == "__main__":
    main()
