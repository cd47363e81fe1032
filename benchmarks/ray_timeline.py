"""Where a step over Ray goes, by the clocks of the driver and of the workers, which processes of
one machine share.

    BOMEMETA_DATA=DATA python -m benchmarks.ray_timeline --config configs/omniglot_5w1s.yaml --workers 2 --json OUT.json

For solvers with one round a step. Medians and quartiles over the steps, and beside them what the
same calls take in this process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bomemeta.assembly import (
    BuildWorker,
    build_problem,
    open_transport,
    torch_threads,
    trainer_of,
)
from bomemeta.config import Config, load_config
from bomemeta.distributed.transport import Round, ShardCall, Transport, nothing
from bomemeta.environment import environment
from bomemeta.files import written_whole

WARM_UP = 40  # steps: workers start, the first calls are planned
KEYS = ("evaluation.every_steps=null", "log.tensorboard=false", "threads=1")


class Call(NamedTuple):
    process: int
    step: int
    begun: float  # monotonic, seconds
    ended: float


@dataclass(frozen=True)
class BuildClocked:
    """Makes workers that write into a file of `folder`, one for each process, when their calls
    began and ended.
    """

    build: BuildWorker
    folder: str

    def __call__(self, device: str) -> Clocked:
        return Clocked(self.build(device), Path(self.folder))


class Clocked:
    def __init__(self, worker: Any, folder: Path) -> None:
        self._worker, self._path = worker, folder / str(os.getpid())

    def execute(self, request: Any, broadcast: np.ndarray, *states: np.ndarray) -> tuple[Any, ...]:
        begun = time.monotonic()
        answer: tuple[Any, ...] = self._worker.execute(request, broadcast, *states)
        ended = time.monotonic()
        with self._path.open("a") as file:
            print(request.step, begun, ended, file=file)
        return answer


class ClockedRounds:
    """A transport whose rounds' begin and end are written down."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rounds: dict[int, tuple[float, float]] = {}  # by step

    def run(
        self,
        broadcast: np.ndarray,
        calls: Sequence[ShardCall],
        meanwhile: Callable[[], None] = nothing,
    ) -> Round:
        begun = time.monotonic()
        answer = self._transport.run(broadcast, calls, meanwhile)
        step = calls[0].request.step
        assert step not in self.rounds, "one round a step"
        self.rounds[step] = begun, time.monotonic()
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def clocked(config: Config, steps: int) -> tuple[dict[int, tuple[float, float]], list[Call]]:
    """The rounds after WARM_UP by step, and the calls."""
    with tempfile.TemporaryDirectory() as folder:
        problem = build_problem(config)
        factory = BuildClocked(BuildWorker.of(config), folder)
        with torch_threads(1), closing(open_transport(config, print, factory)) as transport:
            rounds = ClockedRounds(transport)
            trainer_of(config, problem=problem, transport=rounds).advance(WARM_UP + steps)
        calls = [
            Call(int(file.name), int(step), float(begun), float(ended))
            for file in Path(folder).iterdir()
            for step, begun, ended in (line.split() for line in file.read_text().splitlines())
        ]
    return {step: times for step, times in rounds.rounds.items() if step >= WARM_UP}, calls


def parts(
    rounds: Mapping[int, tuple[float, float]], calls: Sequence[Call]
) -> dict[str, list[float]]:
    """Milliseconds of each part of a step, over the steps."""
    found: dict[str, list[float]] = defaultdict(list)
    for step, (begun, ended) in rounds.items():
        by_worker: dict[int, list[Call]] = defaultdict(list)
        for call in sorted(
            (call for call in calls if call.step == step), key=lambda call: call.begun
        ):
            by_worker[call.process].append(call)
        workers = sorted(by_worker.values(), key=lambda own: own[0].begun)
        last = max(own[-1].ended for own in workers)
        step_parts = {
            "the last answer comes": ended - last,
            "the round": ended - begun,
            "the first worker begins": workers[0][0].begun - begun,
            "the last worker begins": workers[-1][0].begun - begun,
            "one worker is done before the last": last - min(own[-1].ended for own in workers),
        }
        if step - 1 in rounds:
            step_parts["between two rounds: x moves"] = begun - rounds[step - 1][1]
            step_parts["the step"] = ended - rounds[step - 1][1]
        for name, seconds in step_parts.items():
            found[name].append(1000 * seconds)
        for own in workers:
            found["a worker computes"].append(1000 * sum(call.ended - call.begun for call in own))
            found["between two of its calls"] += [
                1000 * (b.begun - a.ended) for a, b in itertools.pairwise(own)
            ]
        found["all calls"].append(
            1000 * sum(call.ended - call.begun for own in workers for call in own)
        )
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/omniglot_5w1s.yaml")
    parser.add_argument(
        "--keys", nargs="*", default=[], metavar="KEY=VALUE", help="over the config"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(argv)
    result: dict[str, Any] = {"config": options.config, "keys": options.keys}
    for name, workers in (
        ("serial, before", 0),
        ("workers", options.workers),
        ("serial, after", 0),
    ):
        config = load_config(options.config, [*KEYS, *options.keys, f"workers={workers}"])
        print(name)
        result[name] = {}
        for part, times in parts(*clocked(config, options.steps)).items():
            if len(times) > 1:
                low, middle, high = statistics.quantiles(times, n=4)
                result[name][part] = {"median_ms": middle, "low_ms": low, "high_ms": high}
                print(f"  {part:<36} {middle:7.2f} ms ({low:.2f} to {high:.2f})", flush=True)
    result["environment"] = environment()
    if options.json is not None:
        with written_whole(options.json) as file:
            file.write(json.dumps(result, indent=1).encode())
    return result


if __name__ == "__main__":
    main()
