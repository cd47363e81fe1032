"""The bundles of a trial's placement group, and whether a cluster can place them: Ray itself would
wait for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray

from bomemeta.config import Config
from bomemeta.errors import ClusterError, ConfigError


def bundles_of(config: Config, driver_cpus: float) -> list[dict[str, float]]:
    """The trial's own bundle, then one for each worker. Without workers the trial computes itself
    and has the GPU, if one is asked for.
    """
    if not isinstance(config.workers, int):
        raise ConfigError(
            f"workers: got {config.workers!r}, wanted a number: a trial's placement group has a fixed size"
        )
    if config.worker_labels:
        raise ConfigError(
            f"worker_labels: got {config.worker_labels}; a trial's placement group says where its workers are. Take it out"
        )
    worker = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    own = {"CPU": driver_cpus, "GPU": config.gpus_per_worker if config.workers == 0 else 0.0}
    return [
        {name: amount for name, amount in bundle.items() if amount > 0}
        for bundle in (own, *[worker] * config.workers)
    ]


def check_placement(bundles: Sequence[Mapping[str, float]]) -> None:
    """Raises ClusterError naming the first bundle of a trial that no node has room for, even with
    nothing else running there.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    own, *workers = bundles
    # Worker bundles are all alike, so that it only matters on which node the trial's own one lies.
    placed = [
        _workers_placed(nodes, own, workers, home)
        for home, node in enumerate(nodes)
        if _times(node, own) > 0
    ]
    if placed and max(placed) >= len(workers):
        return
    number = 1 + max(placed) + 1 if placed else 1
    bundle = workers[0] if placed else own
    role = f"of worker {number - 1}" if placed else "of the trial itself"
    rooms = "; ".join(_resources_text(node) for node in nodes) or "none"
    raise ClusterError(
        f"bundle {number} of {len(bundles)} of a trial, {role}, fits nowhere: wanted {_resources_text(bundle)} on one node"
        + (f" beside the {number - 1} before it" if placed else "")
        + f"; the nodes have {rooms}. Use fewer workers, a smaller cpus_per_worker, gpus_per_worker or driver_cpus, or address of a larger "
        "cluster"
    )


def _workers_placed(
    nodes: Sequence[Mapping[str, float]],
    own: Mapping[str, float],
    workers: Sequence[Mapping[str, float]],
    home: int,
) -> int:
    if not workers:
        return 0
    left = [
        {
            name: amount - (own.get(name, 0.0) if index == home else 0.0)
            for name, amount in node.items()
        }
        for index, node in enumerate(nodes)
    ]
    return sum(min(_times(node, workers[0]), len(workers)) for node in left)


def _times(node: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How often the bundle fits; 1e-9 since three times 0.1 is a little more than 0.3."""
    if not bundle:
        return 1_000_000
    return min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in bundle.items())


def _resources_text(resources: Mapping[str, float]) -> str:
    return " and ".join(
        f"{resources.get(name, 0.0):g} {name}"
        for name in ("CPU", "GPU")
        if name == "CPU" or resources.get(name)
    )
