"""How the cost of a step grows, in what does not wobble (counts and bytes) and in ratios to the sweep's first point (times).

    python -m benchmarks.growth --json growth.json --figure docs/figures

Beside each measured number stands what benchmarks/cost_model.py says. Counts and bytes must be equal, or the benchmark fails. Peak bytes
of a shard (live tensors while the worker executes) and times have constants: they are fitted on the ends of the sweeps, and `difference`
says how far the model is from each point. Times of steps in this process are CPU times on one thread, those of workers wall times, from
rounds in which all points of a sweep take a step in turn.

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
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import cost_model
from benchmarks.cost_model import Cost, Sizes, Where
from benchmarks.growth_report import figure, tables
from bomemeta.assembly import BuildWorker, build_problem, build_solver, open_transport, torch_threads
from bomemeta.config import Config, load_config
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.problem import BilevelProblem
from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.transport import Transport
from bomemeta.engine import Job
from bomemeta.environment import environment
from bomemeta.files import written_whole
from bomemeta.live_bytes import LiveBytes
from bomemeta.profile import Course

COUNTS = ("gradient_evaluations", "hessian_products", "reduces", "bytes_reduced", "driver_bytes")
BOME = "{name: bome, barrier: per_task, diagnose_every: 0, inner_lr: 0.05, lower_lr: 0.05, upper_lr: 0.001}"
SOLVERS = {
    "bome": BOME,
    "itd": "{name: itd, inner_lr: 0.05, upper_lr: 0.001}",
    "aid_cg": "{name: aid_cg, inner_lr: 0.05, upper_lr: 0.001}",
}
EPISODES = ("problem={name: few_shot, width: 32}", "data={dataset: noise}", "tasks_per_step=16", "shards=2")
NETWORK = ("problem={name: few_shot, form: network, width: 16}", "data={dataset: noise}", "tasks_per_step=2", "shards=2")
SIZED = ("tasks_per_step=1", "shards=1")
CLEANING = "{name: hyper_cleaning, train: 1000, validation: 200, selection: 200, blocks: 4}"
COMMON = ("evaluation.every_steps=null", "log.tensorboard=false", "threads=1", "steps=100000")


class Weighed:
    """A worker; `peak`: the most bytes of live tensors while it executed."""

    def __init__(self, worker: Any) -> None:
        self._worker, self.peak = worker, 0

    def execute(self, *arguments: Any) -> Any:
        with LiveBytes() as counted:
            answer = self._worker.execute(*arguments)
        self.peak = max(self.peak, counted.peak)
        return answer


class Point(NamedTuple):
    """A run at one point of a sweep."""

    solver: str
    value: int
    course: Course
    job: Job
    sizes: Sizes

    def predicted(self, step: int = 0) -> Cost:
        return cost_model.cost(self.job.solver, self.sizes, step)


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
        lambda sizes, solver: sizes.upper, also=(10**7,),  # the last whose arrays the allocator keeps
    ),
    "lower": Sweep(
        SIZED, tuple(10**k for k in range(3, 8)), lambda n: [f"problem={{name: sized, upper_size: 1000, lower_size: {n}}}"],
        lambda sizes, solver: sizes.lower, ("bome", "itd", "aid_cg"),
    ),
}  # fmt: skip


def sizes_of(config: Config, problem: BilevelProblem) -> Sizes:
    """What the cost model wants to know of a run."""
    upper = problem.init_upper(torch.Generator().manual_seed(0))
    batch = problem.load([0], 0, "train")
    lower = LocalOracle(problem, upper, batch, "loop", differentiable=False).init_lower()
    where: Where = "shared" if problem.lower == "shared" else "fresh" if problem.pool is None else "pool"
    tasks = problem.pool if where == "shared" else config.tasks_per_step or problem.pool or 8
    assert tasks is not None
    assert isinstance(config.workers, int)
    return Sizes(
        where=where,
        tasks=tasks,
        shards=config.shards,
        upper=sum(tensor.numel() for tensor in upper.values()),
        lower=sum(tensor[0].numel() for tensor in lower.values()),
        workers=config.workers,
        reduce=config.reduce,
        images=sum(len(batch[name][0]) for name in ("support", "query") if name in batch),
    )


def config_of(keys: Sequence[str], solver: str = BOME) -> Config:
    base = {"imports": ["benchmarks.sized"], "problem": {"name": "sized"}, "solver": {"name": "bome"}}
    return load_config(base, [*COMMON, f"solver={solver}", *keys])


def point(name: str, value: int, config: Config, transport: Transport) -> Point:
    problem = build_problem(config)
    job = Job(config, problem, build_solver(config, problem), transport)
    return Point(name, value, Course(job), job, sizes_of(config, problem))


def counted(of: Point, steps: int = 2) -> dict[str, Any]:
    """What the first steps say that they cost, and what the model says. Raises where they differ."""
    row: dict[str, Any] = {"solver": of.solver, "value": of.value, "upper": of.sizes.upper, "lower": of.sizes.lower}
    for step, said in enumerate(of.course.go(steps)):
        model = of.predicted(step)._asdict()
        got: dict[str, float] = {name: said.get(name, 0.0) for name in COUNTS}
        wanted = {name: float(model[name]) for name in COUNTS}
        if got != wanted:
            raise SystemExit(f"step {step} of {of.solver} at {of.value}: measured {got}, the model says {wanted}")
        row |= got
    return row


def peak_of(config: Config) -> int:
    """Peak bytes of live tensors in a shard of one step."""
    weighed: list[Weighed] = []

    def build(device: str) -> Any:
        weighed.append(Weighed(BuildWorker(config.to_dict(), ())(device)))
        return weighed[-1]

    problem = build_problem(config)
    Course(Job(config, problem, build_solver(config, problem), SerialTransport(build))).go(1)
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
            _say(rows[-1])
    seconds = in_turn([functools.partial(p.course.go, 1) for p in points], rounds, time.process_time)
    for solver in sweep.solvers:
        here = [i for i, p in enumerate(points) if p.solver == solver]
        peaks = line([sweep.size(points[i].sizes, points[i].job.solver) for i in here], [rows[i]["peak_bytes"] for i in here])
        for i, peak in zip(here, peaks, strict=True):
            rows[i] |= {
                "predicted_peak_bytes": peak,
                "work": cost_model.work(points[i].predicted(2), points[i].sizes),
                "ms": 1000 * statistics.median(seconds[i]),
                "ratio": statistics.median(a / b for a, b in zip(seconds[i], seconds[here[0]], strict=True)),
                "fitted": i in (here[0], here[-1]) or points[i].value in sweep.also,
            }
    return rows


# Sweeps whose times are of one kind, and what these are made of (`cost_model.work`).
FITS = {
    ("tasks", "shards", "steps_head"): ("step", "call", "evaluation of a stack", "pass of an image"),
    ("steps_network",): ("step", "evaluation of a stack", "product of a stack"),
    ("upper",): ("step", "byte of x, out and back", "the same, in pages that the system clears"),
    ("lower",): ("step", "number of y in an evaluation"),
}


def fit(result: dict[str, Any]) -> None:
    """Beside the measured times those of the model, whose constants are fitted on the ends of the sweeps."""
    result["constants"] = {}
    for sweeps, parts in FITS.items():
        rows = [row for sweep in sweeps for row in result.get(sweep, [])]
        for solver in dict.fromkeys(row["solver"] for row in rows):
            own = [row for row in rows if row["solver"] == solver]
            ends = [row for row in own if row["fitted"]]
            constants = cost_model.fitted([row["work"] for row in ends], [row["ms"] / 1000 for row in ends], parts)
            result["constants"][f"{', '.join(sweeps)}; {solver}"] = constants
            for row in own:
                row["predicted_ms"] = 1000 * cost_model.seconds_of(row["work"], constants)
                row["difference"] = row["predicted_ms"] / row["ms"] - 1


def line(sizes: Sequence[float], values: Sequence[float]) -> list[float]:
    """The values of the straight line through the first and the last point."""
    return [float(found) for found in np.interp(sizes, *_ascending([sizes[0], sizes[-1]], [values[0], values[-1]]))]


def _ascending(sizes: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    return (sizes, values) if sizes[0] <= sizes[-1] else (sizes[::-1], values[::-1])


def in_turn(steps: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of each step in each round."""
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, own in zip(steps, taken, strict=True):
            start = clock()
            step()
            own.append(clock() - start)
    return taken


def workers(counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """W workers on the cores that there are. The model: what the shards take here, shared by the workers that have a core, and so much for
    a call, from one worker.
    """
    with ExitStack() as stack:
        points = []
        for count in (0, *counts):
            config = config_of([*EPISODES, "shards=4", f"workers={count}", "cpus_per_worker=0.1"])
            points.append(point("bome", count, config, stack.enter_context(closing(open_transport(config, print)))))
        rows = [counted(each) for each in points]
        for each in points:
            each.course.go(10)  # until every worker has started and has had calls
        seconds = in_turn([functools.partial(p.course.go, 1) for p in points], rounds, time.perf_counter)
    medians = [statistics.median(each) for each in seconds]
    cores = len(os.sched_getaffinity(0))
    beyond = medians[1] - medians[0]  # one worker and this process wait for each other: the rest is Ray's
    for row, count, median, own in zip(rows[1:], counts, medians[1:], seconds[1:], strict=True):
        expected = medians[0] / min(count, cores, 4) + beyond
        row |= {
            "ms": 1000 * median,
            "predicted_ms": 1000 * expected,
            "ratio": statistics.median(a / b for a, b in zip(own, seconds[1], strict=True)),
            "difference": expected / median - 1,
            "serial_ms": 1000 * medians[0],
        }
        _say(row)
    return rows[1:]


def sums(shards: Sequence[int], rounds: int, upper: int) -> list[dict[str, Any]]:
    """Bytes to the driver over the number of shards, and wall seconds, with two workers."""
    rows = []
    with ExitStack() as stack:
        sized = f"problem={{name: sized, upper_size: {upper}, lower_size: 1000}}"
        points = []
        for reduce in ("driver", "tree"):
            keys = [sized, "workers=2", "cpus_per_worker=0.1", f"reduce={reduce}", f"tasks_per_step={max(shards)}"]
            transport = stack.enter_context(closing(open_transport(config_of(keys), print)))
            for count in shards:
                points.append(point(reduce, count, config_of([*keys, f"shards={count}"]), transport))
        rows = [counted(each) | {"reduce": each.solver} for each in points]
        seconds = in_turn([functools.partial(p.course.go, 1) for p in points], rounds, time.perf_counter)
    for row, own in zip(rows, seconds, strict=True):
        row |= {"ms": 1000 * statistics.median(own)}
        del row["solver"]
        _say(row)
    return rows


SHARED = {
    "bome": [f"{{name: bome, inner_steps: {t}}}" for t in (1, 5, 20)],
    "sl_bamm": ["{name: sl_bamm, schedule: constant, mu: 0.1, upper_lr: 0.1}"],
    "lancbio": [f"{{name: lancbio, inner_steps: 1, subspace: {m}, residual_every: 0}}" for m in (4, 10)],
    "aid_cg": [f"{{name: aid_cg, inner_steps: 5, aux_steps: {q}, residual_every: 0}}" for q in (4, 10)],
    "itd": [f"{{name: itd, inner_steps: {t}}}" for t in (1, 5, 20)],
}


def shared(ways: Sequence[str], workers: int) -> list[dict[str, Any]]:
    """What a step of a problem with one y sends, with every `reduce`; the second step, which begins no epoch."""
    rows = []
    keys = [f"problem={CLEANING}", "data={dataset: digits}", "shards=4", f"workers={workers}", "cpus_per_worker=0.1"]
    for way in ways:
        with closing(open_transport(config_of([*keys, f"reduce={way}"]), print)) as transport:
            for name, solvers in SHARED.items():
                for solver in solvers:
                    config = config_of([*keys, f"reduce={way}"], solver)
                    here = point(name, 0, config, transport)
                    setting: dict[str, Any] = {
                        key: config.solver.fields[key]
                        for key in ("inner_steps", "subspace", "aux_steps")
                        if key in config.solver.fields
                    }
                    rows.append({**counted(here), "reduce": way, **setting})
                    _say(rows[-1])
    return rows


def _say(row: Mapping[str, Any]) -> None:
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)


@contextmanager
def cluster_here() -> Iterator[None]:
    from bomemeta.distributed import cluster
    from bomemeta.distributed.cluster import RayOptions

    with cluster.local(RayOptions(workers=2, cpus_per_worker=0.1), print):
        yield


ON_RAY = ("workers", "sums", "shared")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*SWEEPS, *ON_RAY], default=[*SWEEPS, *ON_RAY])
    parser.add_argument("--rounds", type=int, default=15, help="of the sweeps in this process; over |x| and |y| a third of them")
    parser.add_argument("--points", type=int, default=100, help="of a sweep, from its smallest")
    parser.add_argument("--json", type=Path, required=True, help="parts that are there and not measured now stay")
    parser.add_argument("--figure", type=Path, help="folder for growth.png")
    options = parser.parse_args(argv)
    result: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    with torch_threads(1), ExitStack() as stack:
        for part in options.parts:
            if part in SWEEPS:
                sweep = SWEEPS[part]
                rounds = max(options.rounds // 3, 1) if part in ("upper", "lower") else options.rounds
                result[part] = serial(sweep, sweep.values[: options.points], rounds)
        if set(options.parts) & set(ON_RAY):
            stack.enter_context(cluster_here())
        on_ray: dict[str, Callable[[], Any]] = {
            "workers": lambda: workers((1, 2, 4)[: options.points], 2 * options.rounds),
            "sums": lambda: sums((1, 2, 4, 8, 16)[: options.points], options.rounds, 1_000_000),
            "shared": lambda: shared(("driver", "tree", "collective")[: options.points], 2),
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
