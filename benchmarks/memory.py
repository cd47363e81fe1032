"""Peak memory of one meta-step over T, the number of inner steps: BOME, and ITD, which
differentiates through them.

    python -m benchmarks.memory --filters 32 --json OUT.json
    python -m benchmarks.memory --filters 32 --peers --json OUT.json

`--peers`: other libraries' MAML (network form) and ANIL (head form) too, on the same network and
images, where they are installed (benchmarks/peers/requirements.txt).

Counted are the bytes of live tensors while a whole step of 5-way 1-shot episodes runs in this
process: a storage counts from the first operation that returns it until it is freed. That is the
program's own and not the machine's, the same at every run. It leaves out what an operation uses and
frees within itself, and the memory of Python and of the libraries. Images are random: sizes alone
matter. The slope is that of a least-squares line over all T.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.few_shot_step import peer_step
from benchmarks.peers import PEERS, QueryLoss, absent, learn2learn_peer
from benchmarks.supervised import Preloaded, channels_last_network
from bomemeta.core.solver import LowerStates, Solver, take_step
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
    "bome": lambda steps: BOME(
        inner_steps=steps, barrier="per_task", adapt_steps=5, barrier_steps=5, diagnose_every=0
    ),
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
    run = StepRun(transport, range(tasks), 1, step=0, steps=1, persistent=False)
    return _peak(lambda: take_step(solver, upper, LowerStates.none(), run))


def measure(form: str, solver: str, options: argparse.Namespace) -> dict[str, Any]:
    """The peak for every T, and the line through them."""
    problem = FewShot(form=form, width=options.filters)  # type: ignore[arg-type]
    problem.attach(seed=0, dtype=torch.float32, data=RandomImages())
    peaks = [
        peak_of_step(problem, SOLVERS[solver](steps), options.tasks)
        for steps in options.inner_steps
    ]
    return _result(form, solver, options.inner_steps, peaks)


def _peak(step: Callable[[], object]) -> int:
    with LiveBytes() as counted:
        step()
    return int(counted.peak)


def _result(
    form: str, solver: str, inner_steps: Sequence[int], peaks: Sequence[int]
) -> dict[str, Any]:
    slope, at_zero = (
        np.polyfit(inner_steps, peaks, 1) if len(peaks) > 1 else (float("nan"), float("nan"))
    )
    return {
        "form": form,
        "solver": solver,
        "peak_bytes": dict(zip(map(str, inner_steps), peaks, strict=True)),
        "bytes_per_inner_step": float(slope),
        "bytes_at_zero": float(at_zero),
    }


def peers_of(form: str) -> dict[str, Callable[..., QueryLoss]]:
    """The installed ones, by name; each is called with the module that adapts, a step size and T."""
    known = [name for name in PEERS if name not in absent()]
    found: dict[str, Callable[..., QueryLoss]] = {
        f"{name} {'ANIL' if form == 'head' else 'MAML'}": PEERS[name] for name in known
    }
    if form == "network" and "learn2learn" in known:
        found["learn2learn first-order MAML"] = functools.partial(
            learn2learn_peer, first_order=True
        )
    return found


def measure_peer(form: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """As `measure`. The optimiser's state is there before the step, as in a run."""
    problem = Preloaded(width=options.filters)
    problem.attach(seed=0, dtype=torch.float32, data=RandomImages())
    problem.draw(0, options.tasks)
    peaks = []
    for steps in options.inner_steps:
        net = channels_last_network(problem)
        step = peer_step(
            problem,
            net,
            peers_of(form)[name](net[1] if form == "head" else net, 0.1, steps),
            form == "head",
        )
        step()
        gc.collect()
        peaks.append(_peak(step))
    return _result(form, name, options.inner_steps, peaks)


def table(results: Sequence[dict[str, Any]], inner_steps: Sequence[int]) -> str:
    """One line per form and solver, in MiB."""
    head = ["form", "solver", *(f"T = {steps}" for steps in inner_steps), "per inner step"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in results:
        peaks = [f"{r['peak_bytes'][str(steps)] / MIB:.2f}" for steps in inner_steps]
        lines.append(
            "| "
            + " | ".join([r["form"], r["solver"], *peaks, f"{r['bytes_per_inner_step'] / MIB:.4f}"])
            + " |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--inner-steps", type=int, nargs="+", default=list(INNER_STEPS), help="the values of T"
    )
    parser.add_argument(
        "--forms", nargs="+", choices=["head", "network"], default=["head", "network"]
    )
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument(
        "--peers",
        action="store_true",
        help="other libraries too; what is not installed is left out and named",
    )
    parser.add_argument("--filters", type=int, default=32)
    parser.add_argument("--tasks", type=int, default=2, help="episodes in the step")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = [
        measure(form, solver, options) for form in options.forms for solver in options.solvers
    ]
    result = {
        "filters": options.filters,
        "tasks": options.tasks,
        "results": results,
        "environment": environment(),
    }
    if options.peers:
        with warnings.catch_warnings():  # of the peers' own code about newer versions of torch
            warnings.simplefilter("ignore")
            results += [
                measure_peer(form, name, options)
                for form in options.forms
                for name in peers_of(form)
            ]
        result["absent"] = absent()
    print(table(results, options.inner_steps))
    for name, why in result.get("absent", {}).items():
        print(f"left out: {name} ({why})")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
