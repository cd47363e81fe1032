"""Whether the cluster has room for workers, and where they are placed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray._private.state import available_resources_per_node

from bomemeta.distributed.cluster import RayOptions
from bomemeta.errors import ClusterError

# Ray counts the resources of actors that were just killed as taken for a moment (measured: below 1
# s).
CAPACITY_PATIENCE_S = 10.0


class _Capacity(NamedTuple):
    at_all: int  # workers that fit on the nodes that there are
    now: int  # that fit beside what runs there
    where: str


def room(options: RayOptions) -> int:
    """How many workers of this kind could be started now, beside those that run."""
    return _capacity(options).now


def check_capacity(options: RayOptions, say: Callable[[str], None] = lambda line: None) -> None:
    """Raises ClusterError where the cluster has no room for the workers; Ray itself would wait for
    ever.

    Where their number follows the cluster, or a full cluster is to be waited for
    (`wait_for_room_s`), room for the least number is waited for, as nodes may still come.
    """
    workers = options.workers if options.min_workers is None else options.min_workers
    waits = options.elastic or options.wait_for_room_s > 0
    patience = max(
        options.start_timeout_s if options.elastic else CAPACITY_PATIENCE_S,
        options.wait_for_room_s,
    )
    deadline = time.monotonic() + patience
    reported = False
    while (capacity := _capacity(options)).now < workers:
        if (capacity.at_all < workers and not waits) or time.monotonic() > deadline:
            if (missing := unmatched(options.worker_labels)) is not None:
                raise ClusterError(missing)
            hint = "" if waits else ", or wait for room with wait_for_room_s="
            raise ClusterError(
                f"{workers} workers of {options.cpus_per_worker:g} CPU and {options.gpus_per_worker:g} GPU each do not fit: "
                f"{capacity.where}, room for {capacity.now} workers. Use fewer workers=, a smaller cpus_per_worker= or "
                f"gpus_per_worker=, or end what else runs there{hint}"
            )
        if not reported and waits:
            say(f"waiting for room for {workers} workers, {patience:g} s at most: {capacity.where}")
            reported = True
        time.sleep(0.2)


def _capacity(options: RayOptions) -> _Capacity:
    bundles, labels = _placement_bundles(), options.worker_labels
    if bundles is None:
        alive = [node for node in ray.nodes() if node["Alive"]]
        chosen = [node for node in alive if not labels or matches(node["Labels"], labels)]
        nodes = [node["Resources"] for node in chosen]
        where, free = f"the cluster ({len(nodes)} nodes)", ray.available_resources()
        if labels:
            where = f"the part of the cluster with worker_labels {labels_text(labels)} ({len(nodes)} of {len(alive)} nodes)"
            free = free_on(chosen)
    elif labels:
        raise ClusterError(
            f"worker_labels: got {labels_text(labels)} in a placement group, as of a trial of Ray Tune: the group says where the "
            "workers are. Take worker_labels out"
        )
    else:
        nodes = bundles
        where, free = (
            "the placement group of this trial",
            {name: _sum(bundles, name) for name in ("CPU", "GPU")},
        )
    at_all = sum(_room(node, options) for node in nodes)
    where = (
        f"{where} has {_sum(nodes, 'CPU'):g} CPU and {_sum(nodes, 'GPU'):g} GPU, free are {free.get('CPU', 0.0):g} CPU and "
        f"{free.get('GPU', 0.0):g} GPU"
    )
    return _Capacity(at_all, min(at_all, _room(free, options)), where)


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels are what a selector asks for: VALUE, !VALUE, in(A, B) or !in(A, B). As
    with Ray, a label that is not there is none of these values.
    """
    for key, wanted in selector.items():
        listed = wanted.removeprefix("!")
        inside = listed[3:-1].split(",") if listed.startswith("in(") else [listed]
        there = labels.get(key) in {value.strip() for value in inside}
        if there == wanted.startswith("!"):
            return False
    return True


def free_on(nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What is free on these of `ray.nodes()` together."""
    each = available_resources_per_node()
    there = [each.get(node["NodeID"], {}) for node in nodes]
    return {name: _sum(there, name) for name in ("CPU", "GPU")}


def labels_text(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def unmatched(selector: Mapping[str, str]) -> str | None:
    """What is to be said where no node has the labels; None where one has."""
    if not selector:
        return None
    alive = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    if any(matches(labels, selector) for labels in alive):
        return None
    there = {
        f"{key}={labels[key]}"
        for labels in alive
        for key in selector
        if labels.get(key) is not None
    }
    have = (
        f"there are {', '.join(sorted(there))}"
        if there
        else f"none has a label {', '.join(selector)}"
    )
    return (
        f"worker_labels: got {labels_text(selector)}, and no node of the cluster ({len(alive)} nodes) is so: {have}. Change the key, "
        "or start nodes with `ray start --labels=NAME=VALUE`"
    )


def ask_autoscaler(options: RayOptions, workers: int) -> None:
    """Tells the cluster's autoscaler, where there is one, that so many workers are wanted; 0 takes
    the request back.
    """
    from ray.autoscaler.sdk import request_resources

    wanted = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
    bundle = {name: math.ceil(amount) for name, amount in wanted.items() if amount > 0}
    bundles = [bundle] * workers if bundle else []
    labels = [dict(options.worker_labels)] * len(bundles) if options.worker_labels else None
    request_resources(bundles=bundles, bundle_label_selectors=labels)


def _room(resources: Mapping[str, float], options: RayOptions) -> int:
    """How many workers fit; `options.workers` where they ask for nothing."""
    wanted = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
    # 1e-9: three workers of 0.1 fit in 0.3, which is a little less in floating point.
    fits = [
        int(resources.get(name, 0.0) / amount + 1e-9)
        for name, amount in wanted.items()
        if amount > 0
    ]
    return min(fits, default=options.workers)


def _sum(resources: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(one.get(name, 0.0) for one in resources)


def scheduling_strategy() -> str | None:
    """SPREAD puts workers on different nodes; in a placement group (Ray Tune) the group has decided
    already.

    Only None stays in the group: with "DEFAULT" Ray places an actor outside of it, where a trial's
    workers wait for ever.
    """
    return "SPREAD" if _placement_bundles() is None else None


def _placement_bundles() -> list[dict[str, float]] | None:
    """What is left of the placement group that our actors will be placed in, or None outside of
    one.
    """
    group = ray.util.get_current_placement_group()
    if group is None or not ray.get_runtime_context().should_capture_child_tasks_in_placement_group:
        return None
    first, *rest = group.bundle_specs
    # The first bundle is where this driver runs.
    own = ray.get_runtime_context().get_assigned_resources()
    return [{name: amount - own.get(name, 0.0) for name, amount in first.items()}, *rest]
