"""How far W workers come to 1/W of the serial time: steps of one config over the serial transport,
plain processes and Ray, in turn.

    BOMEMETA_DATA=DATA python -m benchmarks.ray_scaling --configs configs/omniglot_5w1s.yaml configs/omniglot_20w5s.yaml --json OUT.json
    BOMEMETA_DATA=DATA python -m benchmarks.ray_scaling --tasks 8 32 128 --keys shards=2 --json OUT.json

Blocks of steps in turn, the first two of each not counted, since caches and sleeping processes are
no part of a run; ratios of the blocks' medians. Every worker and the serial transport have one
thread. The same machine bounds what can be reached: `beside` is the time of a serial step while
`--workers - 1` other processes take serial steps of their own, over that of one alone. Where cores
share caches, memory or a physical core it is above 1, and no division of the work can do better
than `beside` / W. `plain_over_ideal` is of as many processes over pipes (`pipes.py`), one message
to and from each a round: what is left without Ray and without watching anybody.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from benchmarks.pipes import PipeTransport
from bomemeta.assembly import (
    BuildWorker,
    build_problem,
    open_transport,
    torch_threads,
    trainer_of,
)
from bomemeta.config import load_config
from bomemeta.engine import Trainer
from bomemeta.environment import environment
from bomemeta.files import written_whole

WARM_UP = 10
BLOCK, SKIPPED = 10, 2  # steps
KEYS = ("evaluation.every_steps=null", "log.tensorboard=false", "threads=1")


def course(
    config: str, keys: Sequence[str], workers: int, stack: ExitStack, plain: bool = False
) -> Trainer:
    """`plain`: the workers are processes over pipes."""
    settings = load_config(config, [*KEYS, *keys, f"workers={workers}"])
    problem = build_problem(settings)
    opened = (
        PipeTransport(BuildWorker.of(settings), workers)
        if plain
        else open_transport(settings, print)
    )
    transport = stack.enter_context(closing(opened))
    return trainer_of(settings, problem=problem, transport=transport)


def seconds_of(one: Trainer) -> float:
    """Of a step: the median over a block."""
    times = []
    for _ in range(BLOCK):
        start = time.perf_counter()
        one.advance(1)
        times.append(time.perf_counter() - start)
    return statistics.median(times[SKIPPED:])


def neighbours(
    options: argparse.Namespace, config: str, keys: Sequence[str], stack: ExitStack
) -> None:
    """Processes that take serial steps until the stack is closed; returns when all of them are at
    it.
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks.ray_scaling",
        "--configs",
        config,
        "--keys",
        *keys,
        "--endless",
    ]
    for _ in range(options.workers - 1):
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        stack.callback(process.kill)
        assert process.stdout is not None
        process.stdout.readline()


def endless(options: argparse.Namespace) -> None:
    with ExitStack() as stack, torch_threads(1):
        serial = course(options.configs[0], options.keys, 0, stack)
        serial.advance(WARM_UP)
        print("warm", flush=True)
        while True:
            serial.advance(1)


def measure(options: argparse.Namespace, config: str, tasks: int | None) -> dict[str, Any]:
    """`tasks`: of a step; None: as in the config."""
    keys = [*options.keys, *([] if tasks is None else [f"tasks_per_step={tasks}"])]
    with ExitStack() as stack, torch_threads(1):
        serial = course(config, keys, 0, stack)
        spread = course(config, keys, options.workers, stack)
        plain = course(config, keys, options.workers, stack, plain=True)
        for one in (serial, spread, plain):
            one.advance(WARM_UP)
        times = [
            (seconds_of(serial), seconds_of(spread), seconds_of(plain))
            for _ in range(options.repetitions)
        ]
        with ExitStack() as others:
            neighbours(options, config, keys, others)
            beside = statistics.median(seconds_of(serial) for _ in range(3))
        alone = statistics.median(seconds_of(serial) for _ in range(3))
    low, middle, high = statistics.quantiles(
        (options.workers * workers / one for one, workers, _ in times), n=4
    )
    plain_low, plain_middle, plain_high = statistics.quantiles(
        (options.workers * processes / one for one, _, processes in times), n=4
    )
    row = {
        "config": config,
        "keys": keys,
        "workers": options.workers,
        "serial_ms": 1000 * statistics.median(one for one, _, _ in times),
        "workers_ms": 1000 * statistics.median(workers for _, workers, _ in times),
        "plain_ms": 1000 * statistics.median(processes for _, _, processes in times),
        "over_ideal": middle,
        "quartiles": [low, high],
        "plain_over_ideal": plain_middle,
        "plain_quartiles": [plain_low, plain_high],
        "beside": beside / alone,
    }
    print(
        f"{' '.join([config, *keys])}: serial {row['serial_ms']:.1f} ms, {options.workers} workers {row['workers_ms']:.1f} ms, "
        f"over ideal {middle:.3f} ({low:.3f} to {high:.3f}); plain processes {plain_middle:.3f} ({plain_low:.3f} to {plain_high:.3f}); "
        f"a serial step beside others {row['beside']:.3f}",
        flush=True,
    )
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=["configs/omniglot_5w1s.yaml"])
    parser.add_argument(
        "--tasks",
        type=int,
        nargs="+",
        default=[None],
        help="values of tasks_per_step; default: the config's own",
    )
    parser.add_argument(
        "--keys", nargs="*", default=[], metavar="KEY=VALUE", help="over every config"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=6, help="blocks of each")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--endless", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.endless:
        endless(options)
    rows = [
        measure(options, config, tasks) for config in options.configs for tasks in options.tasks
    ]
    if options.json is not None:
        result = {"rows": rows, "environment": environment()}
        with written_whole(options.json) as file:
            file.write(json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
