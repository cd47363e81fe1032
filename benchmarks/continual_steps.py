"""Does a step of continual learning take longer as tasks go by? Steps of several places in the
stream, in turn.

    OMP_NUM_THREADS=1 python -m benchmarks.continual_steps --config configs/continual_pmnist_bome.yaml --data-root DATA --json OUT.json

For each task: the samples in g (incoming and replayed) and in f (semantic memory, which has some of
every task so far), the CPU time of a step, also over that in the second task, and the CPU time of
drawing its samples, which includes every write into memory since the step before. Network and
memory are as at the start of a run, since times do not depend on what is in them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from bomemeta.assembly import build_problem, build_solver, open_transport, torch_threads, trainer_of
from bomemeta.config import load_config
from bomemeta.environment import environment
from bomemeta.files import written_whole
from bomemeta.problems.continual import Continual

PLACE = 0.5  # of a task's own steps: where its steps are taken


class Place:
    """A run that stands in the middle of a task, and beside it the same stream once more, to time
    the drawing alone.
    """

    def __init__(self, options: argparse.Namespace, task: int, stack: ExitStack) -> None:
        keys = [f"data.root={options.data_root}"] if options.data_root else []
        self.config = load_config(
            options.config, [*keys, "workers=0", "threads=1", "log.tensorboard=false"]
        )
        self.problem, self.stream = self._built(), self._built()
        steps = self.problem.length // self.problem.tasks
        self.step = int((task + PLACE) * steps)
        self.ids = range(self.problem.blocks)
        transport = stack.enter_context(closing(open_transport(self.config, print)))
        self.solver = build_solver(self.config, self.problem)
        self.course = trainer_of(
            self.config, problem=self.problem, solver=self.solver, transport=transport
        )
        self.course.start(self.step)
        batch = self.draw()
        self.in_g, self.in_f = (
            int((batch[f"{part}_weight"] > 0).sum()) if f"{part}_weight" in batch else 0
            for part in "gf"
        )
        self.times: list[float] = []
        self.draws: list[float] = []

    def _built(self) -> Continual:
        problem = build_problem(self.config)
        assert isinstance(problem, Continual)
        return problem

    def draw(self) -> Any:
        return self.stream.load(self.ids, self.step, "train")

    def go(self) -> None:
        self.draws.append(_seconds(self.draw))
        self.times.append(_seconds(lambda: self.course.advance(1)))
        self.step += 1


def _seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/continual_pmnist_bome.yaml")
    parser.add_argument("--tasks", type=int, nargs="+", default=[0, 1, 2, 5, 10, 19])
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--data-root", default=None, help="default: BOMEMETA_DATA")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    options = parser.parse_args(argv)
    with ExitStack() as stack, torch_threads(1):
        places = {task: Place(options, task, stack) for task in options.tasks}
        for repetition in range(options.repetitions + 3):
            for place in places.values():
                place.go()
            if repetition == 2:  # warm
                for place in places.values():
                    place.times.clear()
                    place.draws.clear()
    rows = []
    for task, place in places.items():
        step_ms, draw_ms = (
            1000 * statistics.median(seconds) for seconds in (place.times, place.draws)
        )
        rows.append(
            {
                "task": task,
                "in_g": place.in_g,
                "in_f": place.in_f,
                "step_ms": step_ms,
                "draw_ms": draw_ms,
            }
        )
    base = rows[min(1, len(rows) - 1)]
    for row in rows:
        row["over_second"] = row["step_ms"] / base["step_ms"]
        print(", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    result = {
        "config": options.config,
        "rows": rows,
        "repetitions": options.repetitions,
        "environment": environment(),
    }
    with written_whole(options.json) as file:
        file.write(json.dumps(result, indent=1).encode())
    return result


if __name__ == "__main__":
    main()
