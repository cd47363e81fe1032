"""How the cost of a step grows, in what does not wobble (counts and bytes) and in ratios to the
sweep's first point (times).

    python -m benchmarks.growth --json growth.json --figure docs/figures

Beside each measured number stands what benchmarks/cost_model.py says. Counts and bytes must be
equal, or the benchmark fails. Peak bytes of a shard (live tensors while the worker executes) and
times have constants: they are fitted on the ends of the sweeps, and `difference` says how far the
model is from each point. Times of steps in this process are CPU times on one thread, those of
workers wall times, from rounds in which all points of a sweep take a step in turn.

    tasks, shards       few_shot, head form, 32 filters; BOME with the per-task barrier on fresh tasks
    steps_head          the same over T
    steps_network       few_shot, network form, 16 filters, over T; ITD and AID-CG beside BOME
    upper, lower        problem `sized` over |x| and |y|
    workers             few_shot as above on Ray workers
    sums                sums of problem `sized` over the number of shards, added at the driver or in a tree
    shared              hyper_cleaning with two workers: what a step of each solver sends
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cost_model, growth_on_ray
from benchmarks.cost_model import Sizes
from benchmarks.growth_points import (
    EPISODES,
    SOLVERS,
    Point,
    config_of,
    counted,
    in_turn,
    point,
    say,
)
from benchmarks.growth_report import figure, tables
from bomemeta.assembly import (
    BuildWorker,
    build_problem,
    open_transport,
    torch_threads,
    trainer_of,
)
from bomemeta.config import Config
from bomemeta.distributed.serial import SerialTransport
from bomemeta.environment import environment
from bomemeta.files import written_whole
from bomemeta.live_bytes import LiveBytes

NETWORK = (
    "problem={name: few_shot, form: network, width: 16}",
    "data={dataset: noise}",
    "tasks_per_step=2",
    "shards=2",
)
SIZED = ("tasks_per_step=1", "shards=1")


class Weighed:
    """A worker; `peak`: the most bytes of live tensors while it executed."""

    def __init__(self, worker: Any) -> None:
        self._worker, self.peak = worker, 0

    def execute(self, *arguments: Any) -> Any:
        with LiveBytes() as counted:
            answer = self._worker.execute(*arguments)
        self.peak = max(self.peak, counted.peak)
        return answer


@dataclass(frozen=True)
class Sweep:
    """`keys`: the overrides of a value. `size`: what the peak is a line in."""

    base: tuple[str, ...]
    values: tuple[int, ...]
    keys: Callable[[int], list[str]]
    size: Callable[[Sizes, Any], float]
    solvers: tuple[str, ...] = ("bome",)
    also: tuple[int, ...] = ()  # values beside the ends that constants are fitted on


SWEEPS: Mapping[str, Sweep] = {
    "tasks": Sweep(
        EPISODES, (2, 4, 8, 16, 32, 64), lambda n: [f"tasks_per_step={n}"],
        lambda sizes, solver: sizes.stack,
    ),
    "shards": Sweep(
        EPISODES, (1, 2, 4, 8, 16), lambda s: [f"shards={s}"],
        lambda sizes, solver: sizes.stack,
    ),
    "steps_head": Sweep(
        EPISODES, (1, 5, 10, 20, 40, 80, 160), lambda t: [f"solver.inner_steps={t}"],
        lambda sizes, solver: solver.inner_steps,
    ),
    "steps_network": Sweep(
        NETWORK, (1, 2, 5, 10, 20, 40), lambda t: [f"solver.inner_steps={t}"],
        lambda sizes, solver: solver.inner_steps, ("bome", "itd", "aid_cg"),
    ),
    "upper": Sweep(
        SIZED, tuple(10**k for k in range(4, 9)), lambda n: [f"problem={{name: sized, upper_size: {n}, lower_size: 1000}}"],
        # the last whose arrays the allocator keeps
        lambda sizes, solver: sizes.upper, also=(10**7,),
    ),
    "lower": Sweep(
        SIZED, tuple(10**k for k in range(3, 8)), lambda n: [f"problem={{name: sized, upper_size: 1000, lower_size: {n}}}"],
        lambda sizes, solver: sizes.lower, ("bome", "itd", "aid_cg"),
    ),
}  # fmt: skip


def peak_of(config: Config) -> int:
    """Peak bytes of live tensors in a shard of one step."""
    weighed: list[Weighed] = []

    def build(device: str) -> Any:
        weighed.append(Weighed(BuildWorker.of(config)(device)))
        return weighed[-1]

    problem = build_problem(config)
    trainer_of(config, problem=problem, transport=SerialTransport(build)).advance(1)
    return weighed[0].peak


def serial(sweep: Sweep, values: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """A row per solver and value: counts, peak bytes and CPU seconds, each beside the model's."""
    points: list[Point] = []
    rows: list[dict[str, Any]] = []
    for solver in sweep.solvers:
        for value in values:
            config = config_of([*sweep.base, *sweep.keys(value)], SOLVERS[solver])
            peak = peak_of(config)
            transport = open_transport(config, print)
            points.append(point(solver, value, config, transport))
            rows.append({**counted(points[-1]), "peak_bytes": peak})
            say(rows[-1])
    seconds = in_turn(
        [functools.partial(p.trainer.advance, 1) for p in points], rounds, time.process_time
    )
    for solver in sweep.solvers:
        here = [i for i, p in enumerate(points) if p.solver == solver]
        peaks = line(
            [sweep.size(points[i].sizes, points[i].trainer.solver) for i in here],
            [rows[i]["peak_bytes"] for i in here],
        )
        for i, peak in zip(here, peaks, strict=True):
            rows[i] |= {
                "predicted_peak_bytes": peak,
                "work": cost_model.work(points[i].predicted(2), points[i].sizes),
                "ms": 1000 * statistics.median(seconds[i]),
                "ratio": statistics.median(
                    a / b for a, b in zip(seconds[i], seconds[here[0]], strict=True)
                ),
                "fitted": i in (here[0], here[-1]) or points[i].value in sweep.also,
            }
    return rows


# Sweeps whose times are of one kind, and what these are made of (`cost_model.work`).
FITS = {
    ("tasks", "shards", "steps_head"): (
        "step",
        "call",
        "evaluation of a stack",
        "pass of an image",
    ),
    ("steps_network",): ("step", "evaluation of a stack", "product of a stack"),
    ("upper",): ("step", "byte of x, out and back", "the same, in pages that the system clears"),
    ("lower",): ("step", "number of y in an evaluation"),
}


def fit(result: dict[str, Any]) -> None:
    """Beside the measured times those of the model, whose constants are fitted on the ends of the
    sweeps.
    """
    result["constants"] = {}
    for sweeps, parts in FITS.items():
        rows = [row for sweep in sweeps for row in result.get(sweep, [])]
        for solver in dict.fromkeys(row["solver"] for row in rows):
            own = [row for row in rows if row["solver"] == solver]
            ends = [row for row in own if row["fitted"]]
            constants = cost_model.fitted(
                [row["work"] for row in ends], [row["ms"] / 1000 for row in ends], parts
            )
            result["constants"][f"{', '.join(sweeps)}; {solver}"] = constants
            for row in own:
                row["predicted_ms"] = 1000 * cost_model.seconds_of(row["work"], constants)
                row["difference"] = row["predicted_ms"] / row["ms"] - 1


def line(sizes: Sequence[float], values: Sequence[float]) -> list[float]:
    """The values of the straight line through the first and the last point."""
    slope = (values[-1] - values[0]) / (sizes[-1] - sizes[0])
    return [values[0] + slope * (size - sizes[0]) for size in sizes]


ON_RAY = ("workers", "sums", "shared")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=[*SWEEPS, *ON_RAY], default=[*SWEEPS, *ON_RAY]
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=15,
        help="of the sweeps in this process; over |x| and |y| a third of them",
    )
    parser.add_argument("--points", type=int, default=100, help="of a sweep, from its smallest")
    parser.add_argument(
        "--json", type=Path, required=True, help="parts that are there and not measured now stay"
    )
    parser.add_argument("--figure", type=Path, help="folder for growth.png")
    options = parser.parse_args(argv)
    result: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    with torch_threads(1), ExitStack() as stack:
        for part in options.parts:
            if part in SWEEPS:
                sweep = SWEEPS[part]
                rounds = (
                    max(options.rounds // 3, 1) if part in ("upper", "lower") else options.rounds
                )
                result[part] = serial(sweep, sweep.values[: options.points], rounds)
        if set(options.parts) & set(ON_RAY):
            stack.enter_context(growth_on_ray.cluster_here())
        on_ray: dict[str, Callable[[], Any]] = {
            "workers": lambda: growth_on_ray.workers(
                (1, 2, 4)[: options.points], 2 * options.rounds
            ),
            "sums": lambda: growth_on_ray.sums(
                (1, 2, 4, 8, 16)[: options.points], options.rounds, 1_000_000
            ),
            "shared": lambda: growth_on_ray.shared(
                ("driver", "tree", "collective")[: options.points], 2
            ),
        }
        for part in ON_RAY:
            if part in options.parts:
                result[part] = on_ray[part]()
    fit(result)
    result["environment"] = environment()
    with written_whole(options.json) as file:
        file.write(json.dumps(result, indent=1).encode())
    print(tables(result))
    if options.figure is not None:
        figure(result, options.figure / "growth.png")
    return result


if __name__ == "__main__":
    main()
