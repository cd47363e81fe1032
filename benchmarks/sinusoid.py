"""The sinusoids of MAML's paper by three lower problems at equal CPU time: `configs/sinusoid.yaml` and changes of it.

    python -m benchmarks.sinusoid --cpu-s 60 --seeds 3 --shots 5 10 --out OUT

| method | what it is |
|---|---|
| ridge | the config: y is a ridge regression on the network's last layer, in closed form, with its exact hypergradient |
| bome | y is the whole network, held near x; BOME with the per-task barrier |
| maml | MAML's second order, one step of 0.01, Adam with 0.001, as in its paper |

CPU time is the process's own, with one thread: the meta-steps alone, with the drawing of their tasks. Test error is the
mean squared error at 100 points of each of `--episodes` new functions; the interval of a run is over them, of all
seeds over seeds. The step of x does not fall: how many steps there are is not known before.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bomemeta.assembly import trainer_of
from bomemeta.config import load_config
from bomemeta.core.inner import evaluate
from bomemeta.core.solver import LowerStates
from bomemeta.engine import Trainer
from bomemeta.environment import environment, environment_line
from bomemeta.intervals import half_width

CONFIG = "sinusoid"
NETWORK = ("problem.form=network",)
METHODS: dict[str, tuple[str, ...]] = {
    "ridge": ("solver.upper_schedule=constant",),
    "bome": (
        *NETWORK,
        "solver={name: bome, barrier: per_task, adapt_steps: 5, inner_steps: 5, barrier_steps: 5, inner_lr: 0.001, "
        "lower_lr: 0.001, upper_lr: 0.001, upper_optimizer: adam}",
    ),
    "maml": (
        *NETWORK,
        "solver={name: maml, inner_steps: 1, inner_lr: 0.01, upper_lr: 0.001, upper_optimizer: adam}",
    ),
}
SLICE = 10  # steps between two looks at the clock
AT_ONCE = 100  # test functions in memory
MOST = 10**6  # steps: the clock ends a run


def trained(trainer: Trainer, cpu_s: float) -> float:
    """Steps until the budget is spent; what they took."""
    began = time.process_time()
    while (taken := time.process_time() - began) < cpu_s and trainer.state.step < trainer.steps:
        trainer.advance(SLICE)
    return taken


def tested(trainer: Trainer, episodes: int) -> tuple[float, float | None]:
    """The mean squared error over new functions, and the half-width of its 95 % interval."""
    shards = math.ceil(episodes / AT_ONCE)
    run = trainer.run_on(
        range(episodes), shards, step=0, persistent=False, split="test", differentiable=False
    )
    x = trainer.state.upper.averaged
    sums, _ = run(evaluate, trainer.solver, x, LowerStates.none(), steps=None)
    mean = float(sums["sum/loss"]) / episodes
    square = float(sums["square/loss"]) / episodes
    return mean, half_width((square - mean**2) * episodes / max(episodes - 1, 1), episodes)


def of_run(method: str, shots: int, seed: int, cpu_s: float, episodes: int) -> dict[str, Any]:
    own = (f"problem.shots={shots}", f"seed={seed}", f"steps={MOST}", "workers=0", "threads=1")
    with trainer_of(load_config(CONFIG, [*METHODS[method], *own])) as trainer:
        taken = trained(trainer, cpu_s)
        mse, width = tested(trainer, episodes)
        steps = trainer.state.step
    return {"method": method, "shots": shots, "seed": seed, "steps": steps, "cpu_s": taken, "mse": mse, "ci95": width}  # fmt: skip


def table(runs: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| points | method | mean squared error, each seed | over seeds | steps |",
        "|---|---|---|---|---|",
    ]
    for shots, method in dict.fromkeys((run["shots"], run["method"]) for run in runs):
        alike = [run for run in runs if (run["shots"], run["method"]) == (shots, method)]
        values = [run["mse"] for run in alike]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
        width = half_width(variance, len(values))
        each = ", ".join(f"{run['mse']:.3f} ± {run['ci95'] or 0:.3f}" for run in alike)
        steps = sorted(run["steps"] for run in alike)
        lines.append(
            f"| {shots} | {method} | {each} | {mean:.3f}{f' ± {width:.3f}' if width is not None else ''} "
            f"| {steps[0]:,} to {steps[-1]:,} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu-s", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for shots in options.shots:
            for method in options.methods:
                runs.append(of_run(method, shots, seed, options.cpu_s, options.episodes))
                print(json.dumps(runs[-1]), flush=True)
                (options.out / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")
    where = environment()
    text = f"{table(runs)}\n\n{options.cpu_s:g} CPU-seconds a run, {options.episodes} test functions; {environment_line(where)}\n"
    (options.out / "table.md").write_text(text)
    print(text)
    return {"runs": runs, "environment": where}


if __name__ == "__main__":
    main()
