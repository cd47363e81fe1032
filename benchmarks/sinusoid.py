"""The sinusoids of MAML's paper by three lower problems at equal CPU time: `configs/sinusoid.yaml` and changes of it.

    python -m benchmarks.sinusoid --cpu-s 60 --seeds 3 --shots 5 10 --tune-s 15 --out OUT

| method | what it is |
|---|---|
| ridge | the config: y is a ridge regression on the network's last layer, in closed form, with its exact hypergradient |
| bome | y is the whole network, held near x; BOME with the per-task barrier |
| maml | MAML's second order, one step |

bome and maml are tried with as many settings each (SETTINGS) for `--tune-s` CPU-seconds, with TUNED_ON's seed, which no run
of the table has, and the most shots; the first are MAML's paper's, and what answers to it. The best by test error of that
seed's functions is taken. `--tune-s 0`: the first. Where the whole network is y, x enters g by the distance |y - x|^2 alone, so BOME
needs g nearly solved, in few steps: weight * step near 1/2, and the weight as large as MAML's step is small.

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
from bomemeta.errors import DivergenceError
from bomemeta.intervals import half_width

CONFIG = "sinusoid"
NETWORK = ("problem.form=network",)


def _bome(weight: float, upper_lr: float) -> tuple[str, ...]:
    return (
        *NETWORK,
        f"problem.regularisation={weight}",
        "solver={name: bome, barrier: per_task, adapt_steps: 4, inner_steps: 3, barrier_steps: 1, inner_lr: 0.004, "
        f"lower_lr: 0.004, upper_lr: {upper_lr}, upper_optimizer: adam}}",
    )


def _maml(inner_lr: float, upper_lr: float) -> tuple[str, ...]:
    return (
        *NETWORK,
        f"solver={{name: maml, inner_steps: 1, inner_lr: {inner_lr}, upper_lr: {upper_lr}, upper_optimizer: adam}}",
    )


# 0.01 and 0.001 are MAML's paper's; one step of 0.01 and the weight 100 move y about as far.
SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "ridge": {"the config": ("solver.upper_schedule=constant",)},
    "bome": {
        f"weight {w}, Adam {lr}": _bome(w, lr)
        for w, lr in ((100, 0.001), (100, 0.003), (100, 0.01), (40, 0.003))
    },
    "maml": {
        f"step {a}, Adam {lr}": _maml(a, lr)
        for a, lr in ((0.01, 0.001), (0.01, 0.003), (0.01, 0.01), (0.025, 0.003))
    },
}
TUNED_ON = 100  # seed
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


def of_run(
    method: str, setting: str, shots: int, seed: int, cpu_s: float, episodes: int
) -> dict[str, Any]:
    own = (f"problem.shots={shots}", f"seed={seed}", f"steps={MOST}", "workers=0", "threads=1")
    with trainer_of(load_config(CONFIG, [*SETTINGS[method][setting], *own])) as trainer:
        taken = trained(trainer, cpu_s)
        mse, width = tested(trainer, episodes)
        steps = trainer.state.step
    return {
        "method": method,
        "setting": setting,
        "shots": shots,
        "seed": seed,
        "steps": steps,
        "cpu_s": taken,
        "mse": mse,
        "ci95": width,
    }


def tuned(method: str, options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """The best setting, and the runs that say so; one that diverges has no error."""
    names = list(SETTINGS[method])
    if options.tune_s <= 0 or len(names) == 1:
        return names[0], []
    tries: list[dict[str, Any]] = []
    for name in names:
        try:
            found = of_run(
                method, name, max(options.shots), TUNED_ON, options.tune_s, options.episodes
            )
        except DivergenceError:
            found = {"method": method, "setting": name, "mse": math.inf}
        tries.append(found if math.isfinite(found["mse"]) else {**found, "mse": math.inf})
        print(json.dumps(tries[-1]), flush=True)
    return min(tries, key=lambda one: one["mse"])["setting"], tries


def table(runs: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| points | method | setting | mean squared error, each seed | over seeds | steps |",
        "|---|---|---|---|---|---|",
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
            f"| {shots} | {method} | {alike[0]['setting']} | {each} | {mean:.3f}{f' ± {width:.3f}' if width is not None else ''} "
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
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--tune-s", type=float, default=0.0, help="CPU-seconds of each setting")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    chosen: dict[str, str] = {}
    tries: list[dict[str, Any]] = []
    for method in options.methods:
        chosen[method], of_method = tuned(method, options)
        tries += of_method
    for seed in range(options.seeds):
        for shots in options.shots:
            for method in options.methods:
                setting = chosen[method]
                runs.append(of_run(method, setting, shots, seed, options.cpu_s, options.episodes))
                print(json.dumps(runs[-1]), flush=True)
                (options.out / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")
    where = environment()
    tried = "; ".join(f"{one['method']} {one['setting']}: {one['mse']:.3f}" for one in tries)
    text = (
        f"{table(runs)}\n\n{options.cpu_s:g} CPU-seconds a run, {options.episodes} test functions. Settings tried: "
        f"{len(tries)}{f' ({tried})' if tries else ''}. {environment_line(where)}\n"
    )
    (options.out / "table.md").write_text(text)
    print(text)
    return {"runs": runs, "tries": tries, "environment": where}


if __name__ == "__main__":
    main()
