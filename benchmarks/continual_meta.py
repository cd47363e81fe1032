"""Which representation can a head learn on, class after class? The online pass of problem
`continual_meta` on x learned in several ways.

    python -m benchmarks.continual_meta --method few_shot --cpu-minutes 10 --data-root DATA --json OUT.json
    python -m benchmarks.continual_meta --run runs/continual_meta_omniglot --data-root DATA --json OUT.json

untrained  the network as it was drawn classify   plain classification of all training classes by
one softmax layer few_shot   meta-learning with a prototype prior by BOME, `--ways` and `--shots`
(problem `few_shot` as it is, on this network) --run      the x of a finished run of
`continual_meta`

All have the same network, without batch statistics. The pass's step is chosen for each on
validation trajectories, from a grid and by the accuracy at the longest length, and the test
trajectories are the same. Budgets are CPU time of one thread, evaluation not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.checkpoint import load_latest
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.problem import Split
from bomemeta.core.solver import LowerStates, take_step
from bomemeta.core.tree import Params
from bomemeta.core.upper import schedule_factor
from bomemeta.data.episodes import EpisodeSpec
from bomemeta.distributed.rounds import StepRun
from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.worker import ShardWorker, variant_of
from bomemeta.environment import environment
from bomemeta.errors import DataError
from bomemeta.files import written_whole
from bomemeta.intervals import half_width
from bomemeta.nets.sample_conv import SampleConv
from bomemeta.problems.continual_meta import LOG_SHARPNESS, LOG_STEP, ContinualMeta
from bomemeta.problems.few_shot import FewShot
from bomemeta.registry import datasets
from bomemeta.solvers.bome import BOME

UPPER_LR = 3e-3  # Adam's, with half a cosine over the budget: as in the shipped configs
CLOCK = 10_000  # the ticks of a budget
STEPS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # of the online pass
IMAGES = 160  # of a batch of `classify`
FEATURE_SCALE = 16.0  # of its normalised features: few_shot's, 4 squared


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--method", choices=("untrained", "classify", "few_shot"))
    source.add_argument("--run", type=Path, help="folder of a finished run of continual_meta")
    parser.add_argument("--ways", type=int, default=20, help="few_shot")
    parser.add_argument("--shots", type=int, default=5, help="few_shot")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--cpu-minutes", type=float, default=10.0)
    parser.add_argument("--max-steps", type=int, default=None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 20, 50, 100, 200])
    parser.add_argument("--test-shots", type=int, default=15)
    parser.add_argument("--trajectories", type=int, default=100, help="in the test")
    parser.add_argument(
        "--validation", type=int, default=10, help="trajectories for the choice of the step"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", default="omniglot")
    parser.add_argument("--data-root", default=None, help="default: BOMEMETA_DATA")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    return parser.parse_args(argv)


def train(step: Callable[[int, float], None], options: argparse.Namespace) -> tuple[int, float]:
    """Calls `step(number, elapsed)` until the budget is used. Returns how many there were, and the
    CPU minutes.
    """
    budget, used, steps = 60 * options.cpu_minutes, 0.0, 0
    while used < budget and steps != options.max_steps:
        before = time.process_time()
        step(steps, used / budget)
        used += time.process_time() - before
        steps += 1
    return steps, used / 60


def few_shot(data: Any, options: argparse.Namespace) -> tuple[Params, int, float]:
    drawn = torch.Generator().manual_seed(options.seed)
    network = SampleConv(data.image_shape[0], options.width, drawn)  # continual_meta's
    problem = FewShot(ways=options.ways, shots=options.shots, backbone=network)
    problem.attach(seed=options.seed, dtype=torch.float32, data=data)
    solver = BOME(
        barrier="per_task", inner_steps=5, inner_lr=0.2, lower_lr=0.2, adapt_steps=5, barrier_steps=5, diagnose_every=0,
        upper_lr=UPPER_LR, upper_optimizer="adam", upper_schedule="cosine",
    )  # fmt: skip
    transport = SerialTransport(
        lambda device: ShardWorker(lambda changes: variant_of(problem, changes), "auto", device)
    )
    upper = solver.start(problem.init_upper(torch.Generator().manual_seed(options.seed)), CLOCK)
    tasks = max(
        1, 320 // (options.ways * (options.shots + problem.queries))
    )  # about as many images as continual_meta's step has

    def step(number: int, elapsed: float) -> None:
        ids = range(number * tasks, (number + 1) * tasks)
        run = StepRun(transport, ids, 1, step=int(elapsed * CLOCK), steps=CLOCK, persistent=False)
        take_step(solver, upper, LowerStates.none(), run)

    steps, minutes = train(step, options)
    return upper.params, steps, minutes


def classify(data: Any, options: argparse.Namespace) -> tuple[Params, int, float]:
    channels = data.image_shape[0]
    net = SampleConv(channels, options.width, torch.Generator().manual_seed(options.seed))
    images = _all_images(data)
    features = net(torch.zeros(2, *data.image_shape)).shape[1]
    head = torch.zeros(features, len(images), requires_grad=True)
    optimizer = torch.optim.Adam([*net.parameters(), head], lr=UPPER_LR)

    def step(number: int, elapsed: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = UPPER_LR * schedule_factor("cosine", int(elapsed * CLOCK), CLOCK)
        rng = np.random.default_rng((options.seed, number))
        labels = torch.from_numpy(rng.integers(0, len(images), IMAGES))
        inputs = images[labels, torch.from_numpy(rng.integers(0, images.shape[1], IMAGES))]
        logits = FEATURE_SCALE * functional.normalize(net(inputs.float() / 255), dim=1) @ head
        optimizer.zero_grad()
        functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    steps, minutes = train(step, options)
    return {name: tensor.detach() for name, tensor in net.named_parameters()}, steps, minutes


def _all_images(data: Any) -> Tensor:
    """uint8 [classes, images, C, H, W] of the training split, as one episode of all that it has."""
    ways = _most(lambda n: EpisodeSpec(n, 1, 1), data)
    shots = _most(lambda n: EpisodeSpec(ways, n, 1), data)
    episode = data.episode("train", EpisodeSpec(ways, shots, 1), (0,))
    both = [
        images.reshape(ways, -1, *data.image_shape) for images in (episode.support, episode.query)
    ]
    return (255 * torch.cat(both, 1)).round().to(torch.uint8)


def _most(spec: Callable[[int], EpisodeSpec], data: Any) -> int:
    """The largest number of which the training split has episodes: it refuses those that are too
    large.
    """
    fits, does_not = 1, 1 << 20
    while does_not - fits > 1:
        middle = (fits + does_not) // 2
        try:
            data.check("train", spec(middle))
            fits = middle
        except DataError:
            does_not = middle
    return fits


def metrics(
    problem: ContinualMeta, x: Params, step: float, split: Split, count: int
) -> dict[str, Tensor]:
    """Every figure of `evaluate`, one number per trajectory."""
    x = x | {LOG_STEP: torch.tensor(math.log(step))}
    found: list[dict[str, Tensor]] = []
    for task in range(count):
        oracle = LocalOracle(
            problem, x, problem.load([task], 0, split), "loop", differentiable=False
        )
        found.append(oracle.evaluate(oracle.init_lower()))
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments(argv)
    torch.set_num_threads(1)
    data = datasets.get(options.dataset)(root=options.data_root)
    data.prepare()
    problem = ContinualMeta(
        lengths=options.lengths, test_shots=options.test_shots, width=options.width
    )
    problem.attach(seed=options.seed, dtype=torch.float32, data=data)
    start = problem.init_upper(torch.Generator().manual_seed(options.seed))
    backbone, steps, minutes = start, 0, 0.0
    if options.run is not None:
        saved = load_latest(options.run / "checkpoints").checkpoint
        backbone, steps = saved.upper, saved.step
    elif options.method != "untrained":
        backbone, steps, minutes = (few_shot if options.method == "few_shot" else classify)(
            data, options
        )
    # What x has beside the network plays no part in the choice: its own step is replaced by one of
    # the grid.
    x = start | {name: backbone[name] for name in start if name not in (LOG_STEP, LOG_SHARPNESS)}
    chosen = {
        step: float(metrics(problem, x, step, "validation", options.validation)["accuracy"].mean())
        for step in STEPS
    }
    best = max(chosen, key=lambda step: chosen[step])
    tested = metrics(problem, x, best, "test", options.trajectories)
    curves = {
        name: {
            "mean": float(values.mean()),
            "ci95": half_width(float(values.var()), len(values)),
        }
        for name, values in tested.items()
        if "accuracy" in name and len(values) > 1
    }
    result = {
        "method": options.method or "continual_meta", "ways": options.ways, "shots": options.shots, "width": options.width, "steps": steps,
        "cpu_minutes": minutes, "seed": options.seed, "online_step": best, "validation": {str(step): a for step, a in chosen.items()},
        "test": curves, "trajectories": options.trajectories, "test_shots": options.test_shots, "environment": environment(),
    }  # fmt: skip
    with written_whole(options.json) as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps({name: round(100 * value["mean"], 2) for name, value in curves.items()}))
    return result


if __name__ == "__main__":
    main()
