"""The parts of benchmarks/growth.py that need Ray: over workers, sums of shards, problems with one
shared y.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from benchmarks.growth_points import EPISODES, config_of, counted, in_turn, point, say
from bomemeta.assembly import open_transport
from bomemeta.distributed import cluster
from bomemeta.distributed.cluster import RayOptions

CLEANING = "{name: hyper_cleaning, train: 1000, validation: 200, selection: 200, blocks: 4}"


@contextmanager
def cluster_here() -> Iterator[None]:
    with cluster.local(RayOptions(workers=2, cpus_per_worker=0.1), print):
        yield


def workers(counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """W workers on the cores that there are. The model: what the shards take here, shared by the
    workers that have a core, and so much for a call, from one worker.
    """
    with ExitStack() as stack:
        points = []
        for count in (0, *counts):
            config = config_of([*EPISODES, "shards=4", f"workers={count}", "cpus_per_worker=0.1"])
            points.append(
                point(
                    "bome",
                    count,
                    config,
                    stack.enter_context(closing(open_transport(config, print))),
                )
            )
        rows = [counted(each) for each in points]
        for each in points:
            each.trainer.advance(10)  # until every worker has started and has had calls
        seconds = in_turn(
            [functools.partial(p.trainer.advance, 1) for p in points], rounds, time.perf_counter
        )
    medians = [statistics.median(each) for each in seconds]
    cores = len(os.sched_getaffinity(0))
    beyond = (
        medians[1] - medians[0]
    )  # one worker and this process wait for each other: the rest is Ray's
    for row, count, median, own in zip(rows[1:], counts, medians[1:], seconds[1:], strict=True):
        expected = medians[0] / min(count, cores, 4) + beyond
        row |= {
            "ms": 1000 * median,
            "predicted_ms": 1000 * expected,
            "ratio": statistics.median(a / b for a, b in zip(own, seconds[1], strict=True)),
            "difference": expected / median - 1,
            "serial_ms": 1000 * medians[0],
        }
        say(row)
    return rows[1:]


def sums(shards: Sequence[int], rounds: int, upper: int) -> list[dict[str, Any]]:
    """Bytes to the driver over the number of shards, and wall seconds, with two workers."""
    rows = []
    with ExitStack() as stack:
        sized = f"problem={{name: sized, upper_size: {upper}, lower_size: 1000}}"
        points = []
        for reduce in ("driver", "tree"):
            keys = [
                sized,
                "workers=2",
                "cpus_per_worker=0.1",
                f"reduce={reduce}",
                f"tasks_per_step={max(shards)}",
            ]
            transport = stack.enter_context(closing(open_transport(config_of(keys), print)))
            for count in shards:
                points.append(
                    point(reduce, count, config_of([*keys, f"shards={count}"]), transport)
                )
        rows = [counted(each) | {"reduce": each.solver} for each in points]
        seconds = in_turn(
            [functools.partial(p.trainer.advance, 1) for p in points], rounds, time.perf_counter
        )
    for row, own in zip(rows, seconds, strict=True):
        row |= {"ms": 1000 * statistics.median(own)}
        del row["solver"]
        say(row)
    return rows


SHARED = {
    "bome": [f"{{name: bome, inner_steps: {t}}}" for t in (1, 5, 20)],
    "sl_bamm": ["{name: sl_bamm, schedule: constant, mu: 0.1, upper_lr: 0.1}"],
    "lancbio": [
        f"{{name: lancbio, inner_steps: 1, subspace: {m}, residual_every: 0}}" for m in (4, 10)
    ],
    "aid_cg": [
        f"{{name: aid_cg, inner_steps: 5, aux_steps: {q}, residual_every: 0}}" for q in (4, 10)
    ],
    "itd": [f"{{name: itd, inner_steps: {t}}}" for t in (1, 5, 20)],
}


def shared(ways: Sequence[str], workers: int) -> list[dict[str, Any]]:
    """What a step of a problem with one y sends, with every `reduce`; the second step, which begins
    no epoch.
    """
    rows = []
    keys = [
        f"problem={CLEANING}",
        "data={dataset: digits}",
        "shards=4",
        f"workers={workers}",
        "cpus_per_worker=0.1",
    ]
    for way in ways:
        with closing(open_transport(config_of([*keys, f"reduce={way}"]), print)) as transport:
            for name, solvers in SHARED.items():
                for solver in solvers:
                    config = config_of([*keys, f"reduce={way}"], solver)
                    here = point(name, 0, config, transport)
                    setting: dict[str, Any] = {
                        key: getattr(config.solver, key)
                        for key in ("inner_steps", "subspace", "aux_steps")
                        if hasattr(config.solver, key)
                    }
                    rows.append({**counted(here), "reduce": way, **setting})
                    say(rows[-1])
    return rows
