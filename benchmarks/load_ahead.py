"""What `load_ahead` saves: steps of a config with it and without, in turn, in this process on one
thread; another core draws the episodes.

    BOMEMETA_DATA=DATA python -m benchmarks.load_ahead --config configs/quickstart.yaml configs/omniglot_5w1s.yaml --json OUT.json

`ratio` is the median, over the rounds, of wall time with over without. `load` is the share of a
step without it in which the computation waits for its tasks, and so the most that can be saved;
`waited` is that share with it. `cpu` is the ratio of the CPU times of the whole process: what the
thread costs. `idle` says how much of a core was free beside a step without it, as the operating
system counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from bomemeta.assembly import build_problem, open_transport, torch_threads, trainer_of
from bomemeta.config import load_config
from bomemeta.core import spans
from bomemeta.engine import Trainer
from bomemeta.environment import environment
from bomemeta.files import written_whole

KEYS = ("evaluation.every_steps=null", "log.tensorboard=false", "threads=1", "workers=0")


class Taken(NamedTuple):
    wall: float
    cpu: float
    load: float
    idle: float


def taken(course: Trainer) -> Taken:
    """One step. A step that follows others' without a pause finds its tasks as far as they are
    loaded by then.
    """
    idle, wall, cpu = _idle_s(), time.perf_counter(), time.process_time()
    with spans.heard() as heard:
        course.advance(1)
    return Taken(
        time.perf_counter() - wall,
        time.process_time() - cpu,
        heard.seconds[spans.LOAD],
        _idle_s() - idle,
    )


def _idle_s() -> float:
    """Of all cores together."""
    return int(Path("/proc/stat").read_text().split()[4]) / os.sysconf("SC_CLK_TCK")


def measure(config: str, keys: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    with ExitStack() as stack, torch_threads(1):
        courses = {}
        for on in (False, True):
            settings = load_config(config, [*KEYS, *keys, f"load_ahead={str(on).lower()}"])
            problem = build_problem(settings)
            transport = stack.enter_context(closing(open_transport(settings, print)))
            courses[on] = trainer_of(settings, problem=problem, transport=transport)
            courses[on].advance(5)
        pairs = []
        for _ in range(rounds):
            # The first step of each turn is not counted: its tasks were loaded in the other's turn.
            of = {}
            for on, course in courses.items():
                course.advance(1)
                each = [taken(course) for _ in range(steps)]
                of[on] = Taken(*(sum(parts) for parts in zip(*each, strict=True)))
            pairs.append(of)
    ratios = sorted(of[True].wall / of[False].wall for of in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    row = {
        "config": config,
        "ms": 1000 * statistics.median(of[False].wall for of in pairs) / steps,
        "ratio": middle,
        "quartiles": [low, high],
        "load": statistics.median(of[False].load / of[False].wall for of in pairs),
        "waited": statistics.median(of[True].load / of[True].wall for of in pairs),
        "cpu": statistics.median(of[True].cpu / of[False].cpu for of in pairs),
        "idle": statistics.median(of[False].idle / of[False].wall for of in pairs),
    }
    print(row, flush=True)
    return row


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", nargs="+", default=["configs/quickstart.yaml", "configs/omniglot_5w1s.yaml"]
    )
    parser.add_argument("--set", nargs="*", default=[], help="overrides for all of them")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="in each turn of a round")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    rows = [
        measure(config, options.set, options.rounds, options.steps) for config in options.config
    ]
    result = {"rows": rows, "environment": environment()}
    with written_whole(options.json) as file:
        file.write(json.dumps(result, indent=1).encode())
    return result


if __name__ == "__main__":
    main()
