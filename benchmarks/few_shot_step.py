"""Time of one few-shot step: BOME, the floor that it cannot go below, and other libraries' MAML and
ANIL, in one interleaved run.

    python -m benchmarks.few_shot_step --threads 1 --filters 32 --data-root DATA --json OUT.json

In every round each contender takes one step in turn on that round's episodes, drawn before the
clock starts. Ratios are medians of those within a round, so that a busy machine disturbs both sides
alike; both clocks are recorded and `--clock` names the one of the ratios: CPU time of this process
(the default on one thread) or wall time.

    floor            forward and backward of a supervised loss, the same backbone, task by task, channels-last: the strict floor
    floor_nchw       the same in plain PyTorch layers, all images as one NCHW batch
    per_task_T       a whole step of bomemeta's head form with T inner steps: features, adaptation, barrier, direction, Adam, metrics
    global_T         the same with one barrier for all tasks
    X_maml, X_anil   a whole step of library X as its users run it: plain layers, NCHW, one task after the other, 5 inner steps, Adam
    ..._last         the same on bomemeta's channels-last backbone

At the top of the JSON: `per_task_over_floor` and `global_over_floor` are over the strict floor and
at the T for which they are largest; `maml_second_order_over_ours`, `maml_first_order_over_ours` and
`anil_over_ours` are learn2learn's as its users run it over per_task_T at that T. `peak_bytes` is
the memory of one step's live tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.peers import PEERS, QueryLoss, Task, absent, learn2learn_peer
from benchmarks.supervised import (
    IMAGES_LABELS,
    Preloaded,
    by_task,
    channels_last_network,
    one_batch,
    plain_network,
)
from bomemeta.allocator import keep_freed_memory
from bomemeta.core.solver import LowerStates, take_step
from bomemeta.distributed.rounds import StepRun
from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.worker import ShardWorker
from bomemeta.environment import environment
from bomemeta.live_bytes import LiveBytes
from bomemeta.registry import datasets
from bomemeta.solvers.bome import BOME

WARM_UP = 3
INNER_STEPS = (1, 10, 50)
PEERS_STEPS = 5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[], None]


def bome_step(
    problem: Preloaded,
    barrier: Literal["per_task", "global"],
    inner_steps: int,
    options: argparse.Namespace,
) -> Step:
    """A step with everything that a run does in it but logging: what the driver does too, over the
    serial transport.
    """
    solver = BOME(
        inner_steps=inner_steps,
        inner_lr=0.2,
        lower_lr=0.2,
        upper_lr=1e-3,
        upper_optimizer="adam",
        barrier=barrier,
        adapt_steps=5,
        barrier_steps=5,
        diagnose_every=0,
    )
    transport = SerialTransport(
        lambda device: ShardWorker(lambda changes: problem, "auto", device), threads=options.threads
    )
    upper = solver.start(problem.init_upper(torch.Generator().manual_seed(0)), 1)

    def step() -> None:
        run = StepRun(
            transport, range(options.tasks), options.shards, step=0, steps=1, persistent=False
        )
        take_step(solver, upper, LowerStates.none(), run)

    return step


def peer_step(
    problem: Preloaded, net: nn.Sequential, query_loss: QueryLoss, on_features: bool
) -> Step:
    """A meta-step: the mean of the tasks' losses, one task after the other, then Adam.
    `on_features`: ANIL, one pass over all images.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        batch = problem.batch
        for support, query, *labels in zip(*(batch[name] for name in IMAGES_LABELS), strict=True):
            inputs = [support, query]
            if on_features:
                features = net[0](torch.cat(inputs))
                inputs = [features[: len(support)], features[len(support) :]]
            loss = query_loss(Task(inputs[0], labels[0], inputs[1], labels[1]))
            (loss / len(batch["support"])).backward()
        optimizer.step()

    return step


def contenders(problem: Preloaded, options: argparse.Namespace) -> dict[str, Step]:
    """By name, in the order of a round."""
    found: dict[str, Step] = {"floor": by_task(problem), "floor_nchw": one_batch(problem)}
    for inner_steps in options.inner_steps:
        found[f"per_task_{inner_steps}"] = bome_step(problem, "per_task", inner_steps, options)
        found[f"global_{inner_steps}"] = bome_step(problem, "global", inner_steps, options)
    networks = {"": plain_network, "_last": channels_last_network}
    for suffix, network in networks.items():
        for name in options.peers:
            net = network(problem)
            found[f"{name}_maml{suffix}"] = peer_step(
                problem, net, PEERS[name](net, 0.1, PEERS_STEPS), False
            )
            net = network(problem)
            found[f"{name}_anil{suffix}"] = peer_step(
                problem, net, PEERS[name](net[1], 0.1, PEERS_STEPS), True
            )
        if "learn2learn" in options.peers:
            net = network(problem)
            first_order = learn2learn_peer(net, 0.1, PEERS_STEPS, first_order=True)
            found[f"learn2learn_first_order{suffix}"] = peer_step(problem, net, first_order, False)
    return found


def interleaved(
    steps: Mapping[str, Step], rounds: int, between: Callable[[int], None]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step, by clock and name, over the rounds; `between(round)` is called before
    each round, off the clock.
    """
    taken: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in steps} for clock in CLOCKS
    }
    for number in range(WARM_UP + rounds):
        between(number)
        for name, take in steps.items():
            start = {clock: now() for clock, now in CLOCKS.items()}
            take()
            if number >= WARM_UP:
                for clock, now in CLOCKS.items():
                    taken[clock][name].append(now() - start[clock])
    return taken


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def spread(taken: Sequence[float]) -> float:
    """Half of the distance between the quartiles, over the median."""
    if len(taken) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(taken, n=4)
    return (high - low) / 2 / middle


def headline(taken: Mapping[str, Sequence[float]], inner_steps: Sequence[int]) -> dict[str, float]:
    """The figures at the top of the JSON."""
    per_task, globally = (
        {steps: ratio(taken[f"{barrier}_{steps}"], taken["floor"]) for steps in inner_steps}
        for barrier in ("per_task", "global")
    )
    found = {
        "per_task_over_floor": max(per_task.values()),
        "global_over_floor": max(globally.values()),
    }
    ours = taken[f"per_task_{max(per_task, key=lambda steps: per_task[steps])}"]
    peers = {
        "maml_second_order_over_ours": "learn2learn_maml",
        "maml_first_order_over_ours": "learn2learn_first_order",
        "anil_over_ours": "learn2learn_anil",
    }
    return found | {key: ratio(taken[name], ours) for key, name in peers.items() if name in taken}


def peak_bytes(steps: Mapping[str, Step]) -> dict[str, int]:
    """The most that one step's live tensors take, by contender; what lives between the steps is not
    in it.
    """
    found = {}
    for name, take in steps.items():
        with LiveBytes() as counted:
            take()
        found[name] = counted.peak
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--filters", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--inner-steps",
        type=int,
        nargs="+",
        default=list(INNER_STEPS),
        help="T of bomemeta's steps",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(PEERS),
        default=list(PEERS),
        help="those not installed are left out",
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default=None,
        help="of the ratios; cpu on one thread, wall on more",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--shards",
        type=int,
        default=2,
        help="stacks that a step's tasks are cut into (the config's `shards`)",
    )
    parser.add_argument(
        "--tasks",
        type=int,
        default=8,
        help="episodes of 5 ways, 1 shot and 5 queries a class: 30 images each",
    )
    parser.add_argument("--dataset", default="omniglot")
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    clock = options.clock or ("cpu" if options.threads == 1 else "wall")
    torch.set_num_threads(options.threads)
    # what bomemeta's workers do is done for all contenders: the floor is the faster for it too
    keep_freed_memory()
    data = datasets.get(options.dataset)(root=options.data_root)
    data.prepare()
    problem = Preloaded(width=options.filters)
    problem.attach(seed=0, dtype=torch.float32, data=data)
    problem.draw(0, options.tasks)
    missing = absent()
    options.peers = [name for name in options.peers if name not in missing]

    steps = contenders(problem, options)
    taken = interleaved(steps, options.rounds, lambda number: problem.draw(number, options.tasks))
    times = taken[clock]
    result = {
        **headline(times, options.inner_steps),
        "over_floor": {name: ratio(times[name], times["floor"]) for name in times},
        "over_floor_nchw": {name: ratio(times[name], times["floor_nchw"]) for name in times},
        "milliseconds": {
            c: {name: 1000 * statistics.median(t) for name, t in by_name.items()}
            for c, by_name in taken.items()
        },
        "spread": {
            c: {name: spread(t) for name, t in by_name.items()} for c, by_name in taken.items()
        },
        "peak_bytes": peak_bytes(steps),
        "absent": missing,
        "filters": options.filters,
        "threads": options.threads,
        "clock": clock,
        "rounds": options.rounds,
        "shards": options.shards,
        "images": options.tasks * problem.ways * (problem.shots + problem.queries),
        "dataset": options.dataset,
        "environment": environment(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
