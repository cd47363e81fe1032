"""Few-shot accuracy after a budget of CPU time: BOME beside learn2learn's MAML and ANIL.

    python -m benchmarks.few_shot_accuracy --method bome --ways 5 --shots 1 --width 32 --data-root DATA --json OUT.json

The budget is the process's own CPU time on one thread (20 CPU-minutes = 10 minutes on 2 cores), so
other work on the machine costs a method little. Evaluation and the reading of the data set are not
counted; drawing the training episodes is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import METHODS, UPPER_LR, Method
from bomemeta.environment import environment
from bomemeta.files import written_whole
from bomemeta.problems.few_shot import FewShot
from bomemeta.registry import datasets

TASKS_PER_STEP = {5: 8, 20: 4}  # by ways: 240 and 480 training images per meta-step
CURVE_S = (15, 30, 60, 120, 300, 600, 900)  # CPU seconds at which the learning curve is measured
CURVE_EPISODES = 100


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=sorted(METHODS), required=True)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--width", type=int, default=32, help="filters of the four convolutions")
    parser.add_argument("--cpu-minutes", type=float, default=20.0, help="training budget")
    parser.add_argument(
        "--max-steps", type=int, default=None, help="stop earlier, after so many meta-steps"
    )
    parser.add_argument(
        "--tasks-per-step", type=int, default=None, help="default: 8 for 5-way, 4 for 20-way"
    )
    parser.add_argument(
        "--schedule",
        choices=("cosine", "constant"),
        default="cosine",
        help="of Adam's step, over the budget",
    )
    parser.add_argument(
        "--inner-lr",
        type=float,
        default=None,
        help="step of the adaptation; default: the method's own",
    )
    parser.add_argument("--upper-lr", type=float, default=UPPER_LR, help="Adam's step")
    parser.add_argument("--episodes", type=int, default=1000, help="test episodes")
    parser.add_argument(
        "--curve",
        type=float,
        nargs="*",
        default=CURVE_S,
        help="CPU seconds after which accuracy is measured",
    )
    parser.add_argument(
        "--curve-split",
        choices=("validation", "test"),
        default="validation",
        help="on which classes that is",
    )
    parser.add_argument(
        "--curve-episodes", type=int, default=CURVE_EPISODES, help="episodes per point"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", default="omniglot", help="omniglot, glyphs, ...")
    parser.add_argument(
        "--data-root", default=None, help="folder of the data set; default: BOMEMETA_DATA"
    )
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    return parser.parse_args(argv)


def few_shot_problem(options: argparse.Namespace) -> FewShot:
    """The problem on the chosen data set; reads the images."""
    data = datasets.get(options.dataset)(root=options.data_root)
    data.prepare()
    problem = FewShot(ways=options.ways, shots=options.shots, width=options.width)
    problem.attach(seed=options.seed, dtype=torch.float32, data=data)
    return problem


def train(method: Method, options: argparse.Namespace, tasks_per_step: int) -> dict[str, Any]:
    """Meta-steps until the CPU time is used up; returns the steps, the CPU time, and the learning
    curve.
    """
    budget_s = 60 * options.cpu_minutes
    used_s, steps = 0.0, 0
    waiting = sorted(options.curve)
    curve: list[dict[str, float]] = []
    while used_s < budget_s and steps != options.max_steps:
        start = time.process_time()
        method.step(range(steps * tasks_per_step, (steps + 1) * tasks_per_step), used_s / budget_s)
        used_s += time.process_time() - start
        steps += 1
        if waiting and used_s >= waiting[0]:
            waiting = [seconds for seconds in waiting if used_s < seconds]
            accuracy = method.accuracy(options.curve_split, options.curve_episodes)
            curve.append(
                {"cpu_s": used_s, "steps": steps, "accuracy": accuracy.mean, "ci95": accuracy.ci95}
            )
            print(
                f"{used_s:7.0f} CPU-s  step {steps:6d}  {options.curve_split} {100 * accuracy.mean:.1f} %",
                flush=True,
            )
    return {"steps": steps, "cpu_s": used_s, "curve": curve}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments(argv)
    started = time.perf_counter()
    torch.set_num_threads(1)
    problem = few_shot_problem(options)
    tasks_per_step = options.tasks_per_step or TASKS_PER_STEP.get(options.ways, 8)
    method: Method = METHODS[options.method](problem, options)
    trained = train(method, options, tasks_per_step)
    test = method.accuracy("test", options.episodes)
    result = {
        **{
            name: getattr(options, name)
            for name in (
                "method",
                "dataset",
                "ways",
                "shots",
                "width",
                "seed",
                "schedule",
                "curve_split",
                "curve_episodes",
            )
        },
        "accuracy": test.mean,
        "ci95": test.ci95,
        "episodes": options.episodes,
        "test_queries": problem.test_queries,
        "cpu_minutes": options.cpu_minutes,
        **trained,
        "wall_s": time.perf_counter() - started,
        "tasks_per_step": tasks_per_step,
        "queries": problem.queries,
        "backbone": problem.backbone,
        "hyperparameters": method.hyperparameters,
        "environment": environment(),
    }
    with written_whole(options.json) as file:
        file.write(json.dumps(result, indent=1).encode())
    print(
        f"{options.method} {options.ways}w{options.shots}s width {options.width}: {100 * test.mean:.2f} +- {100 * test.ci95:.2f} %"
    )
    return result


if __name__ == "__main__":
    main()
