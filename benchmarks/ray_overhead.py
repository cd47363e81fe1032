"""What distribution itself costs: rounds with nothing to compute, sums, losses, and what stays in
the object store.

    python -m benchmarks.ray_overhead --json OUT [--parts null ways_out sums shared kill store] [--largest 100_000_000]

Times are medians of interleaved repetitions on one machine, with ratios taken repetition by
repetition; counts and bytes do not wobble.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray

from bomemeta import api
from bomemeta.distributed import cluster
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.ray_transport import RayTransport
from bomemeta.distributed.transport import ShardCall
from bomemeta.environment import environment
from bomemeta.files import written_whole

WORKERS = (1, 2, 4, 8)
SMALL, MIDDLE = (
    1_000,
    113_000,
)  # numbers in a message; the second is a four-layer backbone with 64 filters
RESNET12 = 8_000_000


class Null:
    """A worker that has nothing to compute."""

    def __init__(self, device: str) -> None: ...

    def execute(self, request: Any, broadcast: np.ndarray, *states: np.ndarray) -> tuple[Any, ...]:
        if request is not None:
            time.sleep(request)
        return os.getpid(), broadcast.copy()


class Bare:
    """The same without bomemeta: what Ray alone takes for the same messages."""

    def execute(self, broadcast: np.ndarray) -> np.ndarray:
        return broadcast.copy()

    def size(self, broadcast: np.ndarray) -> int:
        return broadcast.nbytes


class Times(NamedTuple):
    median_ms: float
    low_ms: float  # quartiles
    high_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        low, middle, high = statistics.quantiles([1000 * one for one in seconds], n=4)
        return cls(middle, low, high)


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def opened(workers: int, **options: Any) -> RayTransport:
    transport = RayTransport(
        Null,
        RayOptions(workers=workers, cpus_per_worker=0.1, step_timeout_s=120.0, **options),
        print,
    )
    while len(transport.worker_pids()) < workers:
        transport.run(np.ones(1, np.float32), [ShardCall(0.05, summed=True)] * workers)
    return transport


def null_rounds(repetitions: int) -> list[dict[str, Any]]:
    """A round of W calls on W workers beside W bare actor calls with the same arrays, sent the same
    way, received and added.
    """
    rows = []
    for workers in WORKERS:
        with closing(opened(workers)) as transport:
            actors = [ray.remote(num_cpus=0.1)(Bare).remote() for _ in range(workers)]
            for numbers in (SMALL, MIDDLE):
                x = np.ones(numbers, np.float32)
                calls = [ShardCall(None, summed=True)] * workers

                def bare(actors: list[Any] = actors, x: np.ndarray = x) -> None:
                    shared = cluster.outgoing(x, len(actors))
                    waiting = [actor.execute.remote(shared) for actor in actors]
                    total = np.zeros_like(x)
                    while waiting:
                        (ready, *_), waiting = ray.wait(waiting)
                        total += ray.get(ready)

                ours, plain, ratios = [], [], []
                for repetition in range(repetitions + 3):
                    one, other = (
                        seconds_of(
                            lambda x=x, calls=calls, transport=transport: transport.run(x, calls)
                        ),
                        seconds_of(bare),
                    )
                    if repetition >= 3:
                        ours.append(one)
                        plain.append(other)
                        ratios.append(one / other)
                row = {
                    "workers": workers,
                    "numbers": numbers,
                    "round": Times.of(ours)._asdict(),
                    "bare": Times.of(plain)._asdict(),
                    "round_over_bare": statistics.median(ratios),
                }
                rows.append(row)
                print(
                    f"{workers} workers, {numbers} numbers: round {row['round']['median_ms']:.1f} ms, bare "
                    f"{row['bare']['median_ms']:.1f} ms, ratio {row['round_over_bare']:.2f}",
                    flush=True,
                )
            for actor in actors:
                ray.kill(actor)
    return rows


def ways_out(repetitions: int) -> list[dict[str, Any]]:
    """x to W bare actors through the object store, and within their calls: what `cluster.outgoing`
    decides by.
    """
    rows = []
    actors = [ray.remote(num_cpus=0.1)(Bare).remote() for _ in range(max(WORKERS))]
    ray.get([actor.size.remote(np.ones(1)) for actor in actors])
    for kib in (16, 112, 256, 512, 1000):
        x = np.ones(kib * 256, np.float32)
        for workers in WORKERS:

            def sent(shared: Any, actors: list[Any] = actors[:workers]) -> None:
                waiting = [actor.size.remote(shared) for actor in actors]
                while waiting:
                    (ready, *_), waiting = ray.wait(waiting)
                    ray.get(ready)

            store, within = [], []
            for _ in range(repetitions):
                store.append(seconds_of(lambda x=x, sent=sent: sent(ray.put(x))))
                within.append(seconds_of(lambda x=x, sent=sent: sent(x)))
            row = {
                "kib": kib,
                "calls": workers,
                "store": Times.of(store)._asdict(),
                "within": Times.of(within)._asdict(),
            }
            rows.append(row)
            print(
                f"{kib} KiB to {workers}: through the store {row['store']['median_ms']:.1f} ms, within the calls "
                f"{row['within']['median_ms']:.1f} ms",
                flush=True,
            )
    return rows


def sums(largest: int, repetitions: int) -> list[dict[str, Any]]:
    """Where shards are added: bytes that come to the driver, and the time of a round that is
    nothing but its sum.
    """
    rows = []
    transports = {reduce: opened(2, reduce=reduce) for reduce in ("driver", "tree")}
    for numbers in dict.fromkeys((MIDDLE, RESNET12, largest)):
        for shards in (2, 4, 8):
            if (
                shards * numbers * 4 > 2.5e9
            ):  # bytes of the shares, all in this machine's store at once
                continue
            x = np.ones(numbers, np.float32)
            calls = [ShardCall(None, summed=True)] * shards
            seconds: dict[str, list[float]] = {reduce: [] for reduce in transports}
            received, totals = {}, {}
            for _ in range(repetitions if numbers < RESNET12 else 3):
                for reduce, transport in transports.items():
                    start = time.perf_counter()
                    answer = transport.run(x, calls)
                    seconds[reduce].append(time.perf_counter() - start)
                    received[reduce] = answer.driver_bytes
                    totals[reduce] = float(answer.total[0]) if answer.total is not None else 0.0
                    del answer
            row = {"numbers": numbers, "shards": shards, "driver_bytes": received}
            row["median_ms"] = {
                reduce: 1000 * statistics.median(found) for reduce, found in seconds.items()
            }
            assert set(totals.values()) == {float(shards)}
            rows.append(row)
            print(row, flush=True)
    for transport in transports.values():
        transport.close()
    return rows


def shared_steps(steps: int) -> dict[str, Any]:
    """Hyper-cleaning with BOME, T = 20 rounds of y's size per step: each one a round of Ray, or all
    workers together.
    """
    config: dict[str, Any] = {
        "problem": {"name": "hyper_cleaning", "train": 1000, "validation": 200, "selection": 200, "blocks": 4},
        "data": {"dataset": "digits"},
        "solver": {"name": "bome", "inner_steps": 20, "inner_lr": 0.1, "lower_lr": 0.1, "upper_lr": 1.0},
        "steps": steps, "shards": 4, "cpus_per_worker": 0.1, "log": {"tensorboard": False},
    }  # fmt: skip
    rows: dict[str, Any] = {}
    for name, keys in {
        "serial": ["workers=0"],
        "driver": ["workers=2"],
        "collective": ["workers=2", "reduce=collective"],
    }.items():
        folder = Path(f"/tmp/bomemeta-overhead-{os.getpid()}-{name}")
        result = api.train(config, [*keys, f"output_dir={folder}"])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows[name] = {
            "step": Times.of([line["step_s"] for line in lines[3:]])._asdict(),
            "reduces_per_step": lines[-1]["reduces"],
            "upper_sha256": result.upper_sha256,
        }
        print(name, rows[name], flush=True)
    assert len({row["upper_sha256"] for row in rows.values()}) == 1
    return rows


def kill(repetitions: int) -> dict[str, Any]:
    """SIGKILL of a worker 0.3 s into calls of 1 s, until the same round is complete; the lost call
    alone is 1 s of that.
    """
    after, lost = [], 0
    with closing(opened(2)) as transport:
        for _ in range(repetitions):
            while len(transport.worker_pids()) < 2:
                transport.run(np.ones(1, np.float32), [ShardCall(0.05, summed=True)] * 2)
            killed = []

            def strike(pid: int = transport.worker_pids()[0], killed: list[float] = killed) -> None:
                time.sleep(0.3)
                os.kill(pid, signal.SIGKILL)
                killed.append(time.perf_counter())

            thread = threading.Thread(target=strike)
            thread.start()
            answer = transport.run(np.ones(MIDDLE, np.float32), [ShardCall(1.0, summed=True)] * 2)
            after.append(time.perf_counter() - killed[0])
            lost += len(answer.replies) != 2
            thread.join()
    found = {
        "completed_after": Times.of(after)._asdict(),
        "call_s": 1.0,
        "rounds_lost": lost,
        "kills": repetitions,
    }
    print(found, flush=True)
    return found


def store(rounds: int) -> dict[str, Any]:
    """The object store in use over many rounds of 1 MB out and 2 MB back."""
    used = []
    with closing(opened(2, reduce="tree")) as transport:
        x = np.ones(250_000, np.float32)
        whole = ray.cluster_resources()["object_store_memory"]
        for number in range(rounds):
            transport.run(x, [ShardCall(None, summed=True)] * 2)
            if number % (rounds // 10) == rounds // 10 - 1:
                time.sleep(1.5)  # Ray reports its memory once a second
                used.append(whole - ray.available_resources()["object_store_memory"])
    found = {"rounds": rounds, "bytes_in_use": used}
    print(found, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "null": lambda options: null_rounds(options.repetitions),
        "ways_out": lambda options: ways_out(options.repetitions),
        "sums": lambda options: sums(options.largest, options.repetitions),
        "shared": lambda options: shared_steps(options.repetitions),
        "kill": lambda options: kill(5),
        "store": lambda options: store(options.rounds),
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2000, help="of part store")
    parser.add_argument(
        "--largest", type=int, default=100_000_000, help="numbers in the largest sum"
    )
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    result: dict[str, Any] = {}
    with cluster.local(RayOptions(workers=2, cpus_per_worker=0.1), print):
        for part in options.parts:
            result[part] = parts[part](options)
    result["environment"] = environment()
    with written_whole(options.json) as file:
        file.write(json.dumps(result, indent=1).encode())
    return result


if __name__ == "__main__":
    main()
