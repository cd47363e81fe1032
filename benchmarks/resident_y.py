"""A step with one large y: y with the workers (reduce: collective), y at the driver, and plain torch
DistributedDataParallel over gloo that takes the same gradients.

    OMP_NUM_THREADS=1 python -m benchmarks.resident_y --numbers 100000 1000000 --json OUT.json

BOME's step on two blocks, two processes of one thread each. The peer is the algorithm box in a
script: T steps of z on g, then f and g at y and g at z, every gradient of y added by DDP. In turn,
round by round; ratios are medians within a round, of wall time and of the CPU time of all processes
together, which other work on the machine hardly changes. `--apart` takes one way after the other, where
memory is short; ratios are then of rounds that did not stand side by side. All three walk the same path: `difference` is how
far x is apart, as a share of how far it has come. Memory is the most that a process held in a step;
the table has what it grows by from one size to the next, in vectors of y; of the driver what a step
adds to what the process holds before it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.two_layers import BLOCKS, CLASSES, FEATURES, data, logits, start, weighted
from bomemeta.assembly import open_transport, trainer_of
from bomemeta.config import load_config
from bomemeta.core.tree import Params
from bomemeta.distributed import cluster
from bomemeta.distributed.cluster import RayOptions
from bomemeta.engine import Trainer
from bomemeta.environment import environment

dist: Any = torch.distributed  # whose stubs leave out what is used here
UPPER_LR = 1.0
WAYS = {"resident": "collective", "driver": "driver"}  # ours, and their `reduce`
DDP = "ddp"
# A wide network's gradients of f and g point the same way: <grad f, grad q> is up to twice |grad q|^2,
# and BOME moves x only where eta is above that.
ETA = 4.0


def step_size(numbers: int) -> float:
    """Of y: the loss's curvature grows with the width."""
    return min(0.05, 4 * (FEATURES + CLASSES) / numbers)


class Net(nn.Module):
    """y as a module whose forward pass is a loss, as DDP wants it."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        for name, tensor in start(numbers).items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, of: str, weights: Tensor, batch: Params) -> Tensor:
        y = dict(self.named_parameters())
        if of == "f":
            return functional.cross_entropy(
                logits(y, batch["validation"]), batch["validation_labels"]
            )
        return weighted(y, weights, batch)


def peer(rank: int, store: str, options: argparse.Namespace, numbers: int, pipe: Any) -> None:
    """A process of the peer's: takes a step whenever it is told to."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=BLOCKS)
    batch = data(options.batch, rank)
    y, z = (nn.parallel.DistributedDataParallel(Net(numbers)) for _ in range(2))
    x = torch.zeros(BLOCKS, options.batch, requires_grad=True)
    lr = step_size(numbers)
    inner = torch.optim.SGD(z.parameters(), lr=lr)

    def gradient(of: str, net: Any) -> list[Tensor]:
        net.zero_grad()
        net(of, x.sigmoid()[rank], batch).backward()
        return [part.grad for part in net.parameters()]

    def step() -> None:
        with torch.no_grad():
            for part, of_y in zip(z.parameters(), y.parameters(), strict=True):
                part.copy_(of_y)
        for _ in range(options.inner_steps):
            gradient("g", z)
            inner.step()
        y_f = [part.clone() for part in gradient("f", y)]
        x.grad = None
        y_g = gradient("g", y)
        with z.no_sync():
            z.zero_grad()
            (-z("g", x.sigmoid()[rank], batch)).backward()  # q's gradient in x
        x_q = x.grad.clone()
        dist.all_reduce(x_q)
        x_q /= BLOCKS
        with torch.no_grad():
            square = (x_q**2).sum() + sum((part**2).sum() for part in y_g)
            inner_product = sum((a * b).sum() for a, b in zip(y_f, y_g, strict=True))
            multiplier = (ETA - inner_product / square).clamp_min(0)  # phi: grad_norm
            for part, a, b in zip(y.parameters(), y_f, y_g, strict=True):
                part.sub_(lr * (a + multiplier * b))
            x.sub_(UPPER_LR * multiplier * x_q)

    while pipe.recv():
        step()
        pipe.send(x.detach().flatten().tolist())
    dist.destroy_process_group()


@contextmanager
def peers(
    options: argparse.Namespace, numbers: int
) -> Iterator[tuple[Callable[[], Any], list[int]]]:
    """A step of the peer's, which returns x, and its processes."""
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(BLOCKS):
            here, there = spawning.Pipe()
            given = (rank, f"{folder}/store", options, numbers, there)
            processes.append(spawning.Process(target=peer, args=given, daemon=True))
            processes[-1].start()
            pipes.append(here)

        def step() -> Any:
            for pipe in pipes:
                pipe.send(True)
            xs = [pipe.recv() for pipe in pipes]  # waits for all
            return xs[0]

        yield step, [process.pid for process in processes]
        for pipe in pipes:
            pipe.send(False)
        for process in processes:
            process.join(30)


def status(pid: int, name: str) -> int:
    """Bytes; VmHWM is the most that the process has held since `reset`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"/proc/{pid}/status has no {name}")


def cpu_seconds(pid: int) -> float:
    """Of all its threads, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reset(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def ours(reduce: str, numbers: int, options: argparse.Namespace, stack: ExitStack) -> Trainer:
    lr = step_size(numbers)
    config = load_config(
        {
            "imports": ["benchmarks.two_layers"],
            "problem": {"name": "two_layers", "numbers": numbers, "batch": options.batch},
            "solver": {
                "name": "bome", "inner_steps": options.inner_steps, "inner_lr": lr, "lower_lr": lr, "upper_lr": UPPER_LR,
                "phi": "grad_norm", "eta": ETA,
            },
            "steps": 10_000, "shards": BLOCKS, "workers": BLOCKS, "cpus_per_worker": 0.1, "reduce": reduce, "threads": 1,
        }
    )  # fmt: skip
    transport = stack.enter_context(closing(open_transport(config, print)))
    return stack.enter_context(trainer_of(config, transport=transport))


@dataclass
class Measured:
    """What the ways of one |y| left, by name."""

    times: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    xs: dict[str, Tensor] = field(default_factory=dict)


def rounds(
    names: Sequence[str], numbers: int, options: argparse.Namespace, found: Measured
) -> None:
    """Steps of these ways in turn, all of which are open together."""
    here = os.getpid()
    with ExitStack() as stack:
        trainers = {
            name: ours(WAYS[name], numbers, options, stack) for name in names if name in WAYS
        }
        if DDP in names:
            peer_step, peer_pids = stack.enter_context(peers(options, numbers))

        def step(name: str) -> None:
            if name == DDP:
                found.xs[name] = torch.tensor(peer_step())
            else:
                found.metrics[name] = trainers[name].step()
                found.xs[name] = trainers[name].state.upper.params["x"].flatten()

        def processes(name: str) -> dict[str, list[int]]:
            if name == DDP:
                return {"process": peer_pids}
            transport: Any = trainers[name].transport
            return {"process": transport.worker_pids(), "driver": [here]}

        for number in range(-1, options.rounds):
            for name in names:
                everyone = [pid for pids in processes(name).values() for pid in pids]
                for pid in everyone:
                    reset(pid)
                # This process drives both: what a step adds to what it has.
                had = status(here, "VmRSS")
                began, used = time.perf_counter(), sum(map(cpu_seconds, everyone))
                step(name)
                if number >= 0:  # before: they start
                    found.times.setdefault(name, []).append(time.perf_counter() - began)
                    spent = sum(map(cpu_seconds, everyone)) - used
                    found.cpu.setdefault(name, []).append(spent)
                for kind, pids in processes(name).items():
                    key = f"{name} {kind}"
                    less = had if kind == "driver" else 0
                    most = max(status(pid, "VmHWM") for pid in pids) - less
                    found.held[key] = max(found.held.get(key, 0), most)


def measure(numbers: int, options: argparse.Namespace) -> dict[str, Any]:
    """One |y|: times, memory and bytes."""
    size = sum(part.numel() for part in start(numbers).values())
    names = [name for name in (*WAYS, DDP) if not (options.no_driver and name == "driver")]
    found = Measured()
    for together in [[name] for name in names] if options.apart else [names]:
        rounds(together, numbers, options, found)
    peer_x, x = found.xs.pop(DDP), found.xs["resident"]
    if not (x.isfinite().all() and x.norm() > 0):  # it started at 0
        raise SystemExit(f"{numbers:,} numbers: x is at {x.norm():g}; it was to move and be finite")
    times, cpu, resident = found.times, found.cpu, found.metrics["resident"]
    return {
        "numbers": size,
        "milliseconds": {name: 1000 * statistics.median(each) for name, each in times.items()},
        "cpu_milliseconds": {name: 1000 * statistics.median(each) for name, each in cpu.items()},
        "over_ddp": {name: ratio(times[name], times[DDP]) for name in found.xs},
        "cpu_over_ddp": {name: ratio(cpu[name], cpu[DDP]) for name in found.xs},
        "bytes_held": found.held,
        "driver_bytes": {name: each["driver_bytes"] for name, each in found.metrics.items()},
        "exchanged_bytes": resident["exchanged_bytes"],
        "numbers_reduced": resident["bytes_reduced"] / 4 / BLOCKS,
        "same_bits": all(torch.equal(x, other) for other in found.xs.values()),
        "loss": resident["upper_loss"],
        "x_norm": float(x.norm()),
        "difference": float((x - peer_x).norm() / x.norm()),
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / max(b, 1e-3) for a, b in zip(ours, theirs, strict=True))


def grown(before: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, str]:
    """Vectors of y that each process holds more than with the smaller y before."""
    if before is None:
        return dict.fromkeys(row["bytes_held"], "-")
    more = 4 * (row["numbers"] - before["numbers"])
    return {
        name: f"{(held - before['bytes_held'][name]) / more:.1f}"
        for name, held in row["bytes_held"].items()
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    names = list(results[0]["over_ddp"])  # resident, and driver if it was measured
    shown = ", ".join(names)
    head = (
        f"| numbers in y | ms: {shown}, ddp | over DDP: {shown} | the same in CPU time "
        f"| MB to the driver: {shown} | MB sent by a worker, over a ring's "
        f"| vectors of y at the peak: {', '.join(results[0]['bytes_held'])} | x: apart from DDP's, moved |"
    )
    lines = [head, "|" + "---|" * 8]
    for before, row in zip([None, *results[:-1]], results, strict=True):
        ring = 2 * 4 * row["numbers_reduced"] * (BLOCKS - 1) / BLOCKS
        cells = [
            f"{row['numbers']:,}",
            ", ".join(f"{row['milliseconds'][name]:.0f}" for name in [*names, "ddp"]),
            ", ".join(f"{row['over_ddp'][name]:.2f}" for name in names),
            ", ".join(f"{row['cpu_over_ddp'][name]:.2f}" for name in names),
            ", ".join(f"{row['driver_bytes'][name] / 1e6:.3f}" for name in names),
            f"{row['exchanged_bytes'] / 1e6:.1f}, {row['exchanged_bytes'] / ring:.2f}",
            ", ".join(grown(before, row).values()),
            f"{row['difference']:.1e}, {row['x_norm']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numbers", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--inner-steps", type=int, default=10, help="T")
    parser.add_argument("--batch", type=int, default=64, help="samples of a block")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-driver", action="store_true", help="leaves out y at the driver")
    parser.add_argument(
        "--apart", action="store_true", help="one way after the other, where memory is short"
    )
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    with cluster.local(RayOptions(workers=2 * BLOCKS, cpus_per_worker=0.1), print):
        results = []
        for numbers in options.numbers:
            results.append(measure(numbers, options))
            print(results[-1], flush=True)
    result = {
        "inner_steps": options.inner_steps,
        "batch": options.batch,
        "rounds": options.rounds,
        "apart": options.apart,
        "results": results,
        "environment": environment(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(results))
    return result


if __name__ == "__main__":
    main()
