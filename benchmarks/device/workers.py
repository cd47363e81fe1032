"""Parts `two_on_one` and `scaling`: Ray workers that share a card, and workers on the CPU's cores."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import ExitStack, closing
from typing import Any

from benchmarks.device.jobs import NOISE, trained
from benchmarks.device.sizes import TINY, Say, Sizes, device_here
from bomemeta.assembly import build_problem, open_transport, torch_threads, trainer_of
from bomemeta.config import load_config


class Absent(Exception):
    """Why a part has nothing to run."""


def _needs_ray() -> None:
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise Absent(f"ray is not installed here ({error})") from error


def _job(sizes: Sizes, tasks: int) -> dict[str, Any]:
    return {
        "imports": [NOISE],
        "problem": {"name": "few_shot", "width": sizes.width},
        "data": {"dataset": "device_noise"},
        "solver": {"name": "bome", "barrier": "per_task", "upper_lr": 0.003, "diagnose_every": 0},
        "steps": 1000,
        "tasks_per_step": tasks,
        "shards": min(tasks, 16),
        "log": {"tensorboard": False},
        "evaluation": {"episodes": 2},
    }


def step_ms(job: dict[str, Any], keys: list[str], sizes: Sizes) -> float:
    """The median of a step, after two that are not counted."""
    with ExitStack() as stack:
        settings = load_config(job, keys)
        stack.enter_context(torch_threads(settings.threads))
        problem = build_problem(settings)
        transport = stack.enter_context(closing(open_transport(settings, print)))
        course = trainer_of(settings, problem=problem, transport=transport)
        course.advance(1 if sizes is TINY else 3)
        taken = []
        for _ in range(max(sizes.rounds, 2)):
            start = time.perf_counter()
            course.advance(1)
            taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)


def two_on_one(sizes: Sizes, say: Say) -> None:
    """Two workers with half a card each, against one with all of it: the same bits, and the time."""
    _needs_ray()
    if device_here() == "cpu":
        raise Absent("there is no card to share here")
    job = _job(sizes, sizes.tasks)
    hashes = {}
    for workers, share in ((1, 1.0), (2, 0.5)):
        keys = [f"workers={workers}", f"gpus_per_worker={share}", "device=cuda"]
        taken = step_ms(job, keys, sizes)
        hashes[workers] = trained(job | {"steps": 5}, keys).upper_sha256
        say({"workers": workers, "gpus_per_worker": share, "step_ms": taken,
             "same_bits": hashes[workers] == hashes[1]})  # fmt: skip


def scaling(sizes: Sizes, say: Say) -> None:
    """Steps of 16 tasks in 16 shards of one thread each, over 1, 2, 4 ... workers on the CPU."""
    _needs_ray()
    cores = len(os.sched_getaffinity(0))
    job = _job(sizes, 4 if sizes is TINY else 16)
    keys = ["device=cpu", "threads=1"]
    serial = step_ms(job, [*keys, "workers=0"], sizes)
    say({"workers": 0, "step_ms": serial})
    for workers in [2] if sizes is TINY else [w for w in (1, 2, 4, 8, 16) if w <= max(cores, 2)]:
        taken = step_ms(job, [*keys, f"workers={workers}"], sizes)
        say({"workers": workers, "step_ms": taken, "over_ideal": workers * taken / serial})
