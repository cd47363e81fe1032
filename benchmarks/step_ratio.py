"""Time of one BOME step over the time of one supervised forward and backward pass over the same images.

    python -m benchmarks.step_ratio --filters 32 64 --threads 1 --data-root DATA --json OUT.json

In every round each contender takes one step, in turn, on that round's episodes; reported are the medians over rounds of the times and of
the ratios within a round, so that a busy machine disturbs both sides alike. Images are drawn before the clock starts; `load` is the time
that drawing them takes. `--clock cpu` counts the process's CPU time instead of the wall's: for one thread on a machine with other work.

    bome_per_task     a whole step of the head form: features, adaptation, barrier steps, direction, Adam, metrics
    bome_global       the same with one barrier for all tasks
    supervised_tasks  forward and backward of the same backbone with a linear layer, task by task (own BatchNorm statistics), channels-last
    supervised_batch  the same in plain PyTorch layers, all images as one NCHW batch
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from benchmarks.few_shot_accuracy import TASKS_PER_STEP
from bomemeta.core.problem import Batch, Split
from bomemeta.core.solver import LowerStates
from bomemeta.distributed.rounds import StepRun
from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.worker import ShardWorker
from bomemeta.environment import environment
from bomemeta.nets import build_backbone
from bomemeta.problems.few_shot import FewShot
from bomemeta.registry import datasets
from bomemeta.solvers.bome import BOME

WARM_UP = 5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RATIOS = [(bome, plain) for bome in ("bome_per_task", "bome_global") for plain in ("supervised_tasks", "supervised_batch")]


class Preloaded(FewShot):
    """Hands out the episodes in `batch` whatever it is asked for, so that a step's time has no data loading in it."""

    batch: Batch

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        first = task_ids[0] % len(self.batch["support"])
        return {name: tensor[first : first + len(task_ids)] for name, tensor in self.batch.items()}


def bome_step(
    problem: FewShot, barrier: Literal["per_task", "global"], tasks: int, threads: int, shards: int
) -> Callable[[], None]:
    solver = BOME(
        inner_steps=5,
        inner_lr=0.2,
        lower_lr=0.2,
        upper_lr=1e-3,
        upper_optimizer="adam",
        barrier=barrier,
        adapt_steps=5,
        barrier_steps=5,
        diagnose_every=0,
    )
    transport = SerialTransport(lambda device: ShardWorker(lambda changes: problem, "auto", device), threads=threads)
    upper = solver.start(problem.init_upper(torch.Generator().manual_seed(0)), 1)

    def step() -> None:
        solver.step(upper, LowerStates.none(), StepRun(transport, range(tasks), shards, step=0, steps=1, persistent=False))

    return step


def supervised_tasks(problem: Preloaded) -> Callable[[], None]:
    channels, height, width = problem.data.image_shape
    net = build_backbone(problem.backbone, channels, problem.width, torch.Generator().manual_seed(0))
    head = nn.Linear(net(torch.zeros(1, channels, height, width)).shape[1], problem.ways)

    def step() -> None:
        for support, query, *labels in zip(*(problem.batch[name] for name in IMAGES_LABELS), strict=True):
            functional.cross_entropy(head(net(torch.cat([support, query]))), torch.cat(labels)).backward()
        net.zero_grad()

    return step


def supervised_batch(problem: Preloaded) -> Callable[[], None]:
    channels, height, width = problem.data.image_shape
    sizes = [channels, *[problem.width] * 4]
    blocks = [
        layer
        for i in range(4)
        for layer in (nn.Conv2d(*sizes[i : i + 2], 3, padding=1), nn.BatchNorm2d(problem.width), nn.ReLU(), nn.MaxPool2d(2))
    ]
    features = nn.Sequential(*blocks, nn.Flatten())
    net = nn.Sequential(features, nn.Linear(features(torch.zeros(2, channels, height, width)).shape[1], problem.ways))

    def step() -> None:
        support, query, *labels = (problem.batch[name].flatten(0, 1) for name in IMAGES_LABELS)
        functional.cross_entropy(net(torch.cat([support, query])), torch.cat(labels)).backward()
        net.zero_grad()

    return step


IMAGES_LABELS = ("support", "query", "support_labels", "query_labels")


def measure(width: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of the times in milliseconds and of the ratios within a round, for one width."""
    data = datasets.get(options.dataset)(root=options.data_root)
    data.prepare()
    problem = Preloaded(ways=options.ways, shots=options.shots, width=width)
    problem.attach(seed=0, dtype=torch.float32, data=data)
    tasks = options.tasks_per_step or TASKS_PER_STEP.get(options.ways, 8)

    def load(number: int) -> None:
        problem.batch = FewShot.load(problem, range(number * tasks, (number + 1) * tasks), 0, "train")

    load(0)
    contenders = {
        "bome_per_task": bome_step(problem, "per_task", tasks, options.threads, options.shards),
        "bome_global": bome_step(problem, "global", tasks, options.threads, options.shards),
        "supervised_tasks": supervised_tasks(problem),
        "supervised_batch": supervised_batch(problem),
    }
    clock = CLOCKS[options.clock]
    times: dict[str, list[float]] = {name: [] for name in ("load", *contenders)}
    for number in range(WARM_UP + options.rounds):
        for name, take in {"load": lambda number=number: load(number), **contenders}.items():
            start = clock()
            take()
            if number >= WARM_UP:
                times[name].append(1000 * (clock() - start))
    ratios = {
        f"{bome}/{plain}": statistics.median(a / b for a, b in zip(times[bome], times[plain], strict=True))
        for bome, plain in RATIOS
    }
    images = tasks * options.ways * (options.shots + problem.queries)
    return {
        "width": width,
        "images": images,
        "milliseconds": {name: statistics.median(taken) for name, taken in times.items()},
        "ratios": ratios,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shards", type=int, default=2, help="stacks that a step's tasks are cut into (the config's `shards`)")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--tasks-per-step", type=int, default=None)
    parser.add_argument("--dataset", default="omniglot")
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    results = [measure(width, options) for width in options.filters]
    settings = {name: getattr(options, name) for name in ("threads", "shards", "clock", "rounds", "ways", "shots", "dataset")}
    result = {**settings, "results": results, "environment": environment()}
    options.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
