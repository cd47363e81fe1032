"""Peak memory of one meta-step over T, the number of inner steps: BOME, and ITD, which differentiates through them.

    python -m benchmarks.memory --filters 32 --json OUT.json

Counted are the bytes of live tensors while a whole step of 5-way 1-shot episodes runs in this process: a storage counts from the first
operation that returns it until it is freed. That is the program's own and not the machine's, the same at every run. It leaves out what an
operation uses and frees within itself, and the memory of Python and of the libraries. Images are random: sizes alone matter. The slope
is that of a least-squares line over all T.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bomemeta.core.solver import LowerStates, Solver
from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.distributed.rounds import StepRun
from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.worker import ShardWorker
from bomemeta.environment import environment
from bomemeta.live_bytes import LiveBytes
from bomemeta.problems.few_shot import FewShot
from bomemeta.solvers.bome import BOME
from bomemeta.solvers.itd import ITD

INNER_STEPS = (1, 5, 10, 20, 40, 80)
MIB = 2**20
# Beside T everything is as in few_shot_step.py; step sizes do not matter here.
SOLVERS: Mapping[str, Callable[[int], Solver]] = {
    "bome": lambda steps: BOME(inner_steps=steps, barrier="per_task", adapt_steps=5, barrier_steps=5, diagnose_every=0),
    "itd": lambda steps: ITD(inner_steps=steps),
}


@dataclass
class RandomImages:
    """A data set of noise, of Omniglot's size."""

    image_shape: tuple[int, int, int] = (1, 28, 28)

    def check(self, split: Split, spec: EpisodeSpec) -> None:
        pass

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        generator = torch.Generator().manual_seed(key[-1])

        def images(each: int) -> tuple[Tensor, Tensor]:
            labels = torch.arange(spec.ways).repeat_interleave(each)
            return torch.rand(len(labels), *self.image_shape, generator=generator), labels

        return Episode(*images(spec.shots), *images(spec.queries))


def peak_of_step(problem: FewShot, solver: Solver, tasks: int) -> int:
    """Peak bytes of live tensors in one step on so many tasks, all of one shard."""
    transport = SerialTransport(lambda device: ShardWorker(lambda changes: problem, "auto", device))
    upper = solver.start(problem.init_upper(torch.Generator().manual_seed(0)), 1)
    gc.collect()
    with LiveBytes() as counted:
        solver.step(upper, LowerStates.none(), StepRun(transport, range(tasks), 1, step=0, steps=1, persistent=False))
    return counted.peak


def measure(form: str, solver: str, options: argparse.Namespace) -> dict[str, Any]:
    """The peak for every T, and the line through them."""
    problem = FewShot(form=form, width=options.filters)  # type: ignore[arg-type]
    problem.attach(seed=0, dtype=torch.float32, data=RandomImages())
    peaks = [peak_of_step(problem, SOLVERS[solver](steps), options.tasks) for steps in options.inner_steps]
    slope, at_zero = np.polyfit(options.inner_steps, peaks, 1) if len(peaks) > 1 else (float("nan"), float("nan"))
    return {
        "form": form,
        "solver": solver,
        "peak_bytes": dict(zip(map(str, options.inner_steps), peaks, strict=True)),
        "bytes_per_inner_step": float(slope),
        "bytes_at_zero": float(at_zero),
    }


def table(results: Sequence[dict[str, Any]], inner_steps: Sequence[int]) -> str:
    """One line per form and solver, in MiB."""
    head = ["form", "solver", *(f"T = {steps}" for steps in inner_steps), "per inner step"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in results:
        peaks = [f"{r['peak_bytes'][str(steps)] / MIB:.2f}" for steps in inner_steps]
        lines.append("| " + " | ".join([r["form"], r["solver"], *peaks, f"{r['bytes_per_inner_step'] / MIB:.4f}"]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inner-steps", type=int, nargs="+", default=list(INNER_STEPS), help="the values of T")
    parser.add_argument("--forms", nargs="+", choices=["head", "network"], default=["head", "network"])
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--filters", type=int, default=32)
    parser.add_argument("--tasks", type=int, default=2, help="episodes in the step")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = [measure(form, solver, options) for form in options.forms for solver in options.solvers]
    result = {"filters": options.filters, "tasks": options.tasks, "results": results, "environment": environment()}
    print(table(results, options.inner_steps))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
