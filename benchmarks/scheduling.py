"""The driver's own work for a round of W workers: what it schedules, with Ray stubbed out, and real
workers as far as memory goes.

    python -m benchmarks.scheduling --json OUT [--figure FOLDER] [--workers 16 64 ...] [--real 2 4 ...]

Stubbed: every call takes 1 s and up to 0.2 s more of a clock of its own, so that each answer comes
for itself, which is the dearest case. Steps are counted (bytecodes of bomemeta.distributed, which
do not depend on the machine's load) and CPU time is measured, least of the repetitions, less what
a loop of the stub alone takes. Above the default of `leaders_above` it is taken with leaders too,
whose own work is that of as many workers as they lead. With deaths: one call in a hundred kills its
worker, or its leader. Real workers, each number without leaders and with them, are given a module
without content in the place of torch: 60 MB each instead of 340.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stubbed_ray import StubbedRay
from bomemeta.config import Settings
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.leaders import LedTransport, group_sizes
from bomemeta.distributed.ray_transport import RayTransport
from bomemeta.distributed.transport import ShardCall
from bomemeta.environment import environment
from bomemeta.files import written_whole

WORKERS = (16, 64, 256, 1024, 4096)
LEADERS_ABOVE: int = Settings.model_fields["leaders_above"].default
DEATHS = 0.01
NUMBERS = 1000  # in a message: 4 KB


class Null:
    """A worker that has nothing to compute."""

    def __init__(self, device: str) -> None: ...

    def execute(self, request: Any, broadcast: np.ndarray, *states: np.ndarray) -> tuple[Any, ...]:
        return None, broadcast.copy()


@contextmanager
def stubbed(
    workers: int, deaths: float = 0.0, led: bool = False, **options: Any
) -> Iterator[RayTransport]:
    """A transport on a cluster that computes nothing."""
    stub = StubbedRay(workers, deaths=deaths)
    with stub.instead():
        given = RayOptions(workers=workers, max_replacements=10**9, **options)
        with closing((LedTransport if led else RayTransport)(Null, given)) as transport:
            yield transport


def play(transport: RayTransport, calls: int) -> None:
    transport.run(np.zeros(NUMBERS, np.float32), [ShardCall(None, kind="null")] * calls)


def steps_of(action: Callable[[], Any]) -> int:
    """The bytecodes that bomemeta.distributed executes in the action."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "call":
            if f"bomemeta{'/'}distributed" not in frame.f_code.co_filename:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def counted(workers: int, calls: int, deaths: float = 0.0, warm: int = 2, led: bool = False) -> int:
    """Steps of one round, after some that the scheduler learned from."""
    with stubbed(workers, deaths, led) as transport:
        for _ in range(warm):
            play(transport, calls)
        return steps_of(lambda: play(transport, calls))


def bare(workers: int, calls: int) -> None:
    """A loop that does nothing but give out calls and take answers."""
    stub = StubbedRay(workers)
    actors = [stub.remote()(Null).remote() for _ in range(workers)]
    busy, left = {}, calls
    for actor in actors[:calls]:
        busy[actor.execute.remote()] = actor
        left -= 1
    while busy:
        (ref,), _ = stub.wait([next(iter(busy))])
        actor = busy.pop(ref)
        stub.get(ref)
        if left:
            busy[actor.execute.remote()] = actor
            left -= 1


def least_ms(action: Callable[[], Any], repetitions: int) -> float:
    """The least CPU time of this process."""
    found = []
    for _ in range(repetitions):
        started = time.process_time()
        action()
        found.append(time.process_time() - started)
    return 1000 * min(found)


def stubbed_row(workers: int, repetitions: int, led: bool) -> dict[str, Any]:
    """`led`: with leaders, each of whose calls is answered as one; a death is a leader's."""
    row: dict[str, Any] = {"workers": workers, "led": led}
    for name, calls, deaths in (
        ("S = W", workers, 0.0),
        ("S = 2W", 2 * workers, 0.0),
        ("deaths", workers, DEATHS),
    ):
        with stubbed(workers, deaths, led) as transport:
            for _ in range(2):
                play(transport, calls)
            whole = least_ms(lambda: play(transport, calls), repetitions)  # noqa: B023
        alone = (len(group_sizes(workers)),) * 2 if led else (workers, calls)
        own = whole - least_ms(lambda: bare(*alone), repetitions)  # noqa: B023
        row[name] = {"ms": own, "steps": counted(workers, calls, deaths, led=led)}
    print(row, flush=True)
    return row


@contextmanager
def without_torch() -> Iterator[None]:
    """Ray's processes that are started within do not import torch, but an empty module."""
    before = os.environ.get("PYTHONPATH")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "torch.py").write_text("def set_num_threads(number): pass\n")
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *([before] if before else [])])
        try:
            yield
        finally:
            del os.environ["PYTHONPATH"]
            if before is not None:
                os.environ["PYTHONPATH"] = before


def real_row(workers: int, repetitions: int, led: bool) -> dict[str, Any]:
    """CPU and wall milliseconds of a round of null calls, 4 KB each way, on real workers."""
    options = RayOptions(
        workers=workers, cpus_per_worker=4 / max(workers, 4), start_timeout_s=1800.0
    )
    calls = [ShardCall(None, summed=True, kind="null")] * workers
    x = np.zeros(NUMBERS, np.float32)
    made = LedTransport if led else RayTransport
    with without_torch(), closing(made(Null, options, print)) as transport:
        while len(transport.worker_pids()) < workers:
            transport.run(x, calls)
        cpu, wall = [], []
        for _ in range(10 * repetitions):
            started = time.process_time(), time.perf_counter()
            transport.run(x, calls)
            cpu.append(time.process_time() - started[0])
            wall.append(time.perf_counter() - started[1])
    row = {
        "workers": workers,
        "led": led,
        "cpu_ms": 1000 * float(np.median(cpu)),
        "wall_ms": 1000 * float(np.median(wall)),
    }
    print(row, flush=True)  # the next may take minutes
    return row


def table(result: dict[str, Any]) -> str:
    lines = [
        "| workers | leaders | S = W, ms | steps an answer | S = 2W, ms | steps, times S = W | with deaths, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["stubbed"]:
        one, two, deaths = row["S = W"], row["S = 2W"], row["deaths"]
        leaders = len(group_sizes(row["workers"])) if row["led"] else "-"
        lines.append(
            f"| {row['workers']} | {leaders} | {one['ms']:.1f} | {one['steps'] / row['workers']:.0f} | {two['ms']:.1f} | "
            f"{two['steps'] / one['steps']:.2f} | {deaths['ms']:.1f} |"
        )
    if result["real"]:
        lines += [
            "",
            "| real workers | driver CPU, ms a round: without leaders, with | wall, ms a round: the same |",
            "|---|---|---|",
        ]
        real = result["real"]
        lines += [
            f"| {one['workers']} | {one['cpu_ms']:.1f}, {two['cpu_ms']:.1f} | {one['wall_ms']:.1f}, {two['wall_ms']:.1f} |"
            for one, two in zip(real[::2], real[1::2], strict=True)
        ]
    return "\n".join(lines)


def draw(result: dict[str, Any], folder: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for led, line, end in ((False, "o-", ""), (True, "^:", ", with leaders")):
        rows = [row for row in result["stubbed"] if row["led"] is led]
        for name, colour in zip(("S = W", "S = 2W", "deaths"), ("C0", "C1", "C2"), strict=True):
            # What the stub itself takes is taken off, and may be more than what there is.
            there = [row for row in rows if row[name]["ms"] > 0]
            axes.loglog(
                [row["workers"] for row in there],
                [row[name]["ms"] for row in there],
                line,
                color=colour,
                label=name + end,
            )
    if result["real"]:
        for led, name in ((False, "real, S = W"), (True, "real, S = W, with leaders")):
            real = [row for row in result["real"] if row["led"] is led]
            axes.loglog(
                [row["workers"] for row in real],
                [row["cpu_ms"] for row in real],
                "s--",
                label=name,
            )
    axes.set(xlabel="workers", ylabel="driver's CPU, ms a round")
    axes.legend()
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "scheduling.png", dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--workers", type=int, nargs="*", default=list(WORKERS))
    parser.add_argument("--real", type=int, nargs="*", default=[])
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args(argv)
    result = {
        "stubbed": [
            stubbed_row(workers, options.repetitions, led)
            for workers in options.workers
            for led in (False, True)
            if not led or workers > LEADERS_ABOVE
        ],
        "real": [
            real_row(workers, options.repetitions, led)
            for workers in options.real
            for led in (False, True)
        ],
        "environment": environment(),
    }
    print(table(result))
    if options.figure is not None:
        draw(result, options.figure)
    with written_whole(options.json) as file:
        file.write(json.dumps(result, indent=2).encode())
    return result


if __name__ == "__main__":
    main()
