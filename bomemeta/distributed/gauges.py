"""A run's numbers as Ray's own metrics: each node of a cluster gives them to Prometheus at its port,
where launch/grafana.json looks for them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray.util.metrics import Counter, Gauge

RUN, PART = "run", "part"  # tags
# How Ray writes the names.
PREFIX, COUNTED = "ray_", "_total"


class Shown(NamedTuple):
    """A gauge: the metric of a step that it shows, and what Prometheus says of it."""

    metric: str
    description: str


GAUGES = {
    "bomemeta_step": Shown("step", "steps that are committed"),
    "bomemeta_multiplier": Shown("multiplier", "lambda of the last step"),
    "bomemeta_gap": Shown("gap", "q of the last step"),
    "bomemeta_validation_accuracy": Shown(
        "validation_accuracy", "accuracy on the validation tasks, when last measured"
    ),
    "bomemeta_workers_alive": Shown("workers_alive", "workers that are built and not lost"),
    "bomemeta_restarts": Shown("restarts", "how often --restarts started the run again"),
}
SECONDS = "bomemeta_step_seconds"  # a gauge with a second tag, the part of the step
PARTS = {
    "broadcast": "broadcast_s",
    "compute": "compute_s",
    "reduce": "reduce_s",
    "update": "update_s",
}
LOST = "bomemeta_workers_lost"  # a counter


def exported() -> set[str]:
    """The names under which Prometheus has them."""
    return {PREFIX + name for name in (*GAUGES, SECONDS)} | {PREFIX + LOST + COUNTED}


class Gauges:
    """What a driver shows of its runs. Setting one costs microseconds; Ray's own thread sends them."""

    def __init__(self) -> None:
        self._lost = 0

    def show(self, run: str, metrics: Mapping[str, float], lost: int) -> None:
        """Shows those of the metrics that are there; the others stay as they were. `lost`: workers
        that were lost so far.
        """
        tags = {RUN: run}
        for name, shown in GAUGES.items():
            if shown.metric in metrics:
                _gauge(name, shown.description).set(float(metrics[shown.metric]), tags)
        for part, metric in PARTS.items():
            if metric in metrics:
                seconds = _gauge(SECONDS, "seconds of the last step, by part", (RUN, PART))
                seconds.set(float(metrics[metric]), tags | {PART: part})
        if lost > self._lost:
            _lost().inc(lost - self._lost, tags)
            self._lost = lost


# Once in a process, whatever the number of its runs: Ray warns of a name that is there already.
@functools.cache
def _gauge(name: str, description: str, tags: tuple[str, ...] = (RUN,)) -> Any:
    return Gauge(name, description=description, tag_keys=tags)


@functools.cache
def _lost() -> Any:
    return Counter(LOST, description="workers that were lost and replaced", tag_keys=(RUN,))
