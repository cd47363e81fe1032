"""What a step costs, calculated: counts and bytes exactly, from the sizes and the solver's
settings, and times from a few constants.

    python -m benchmarks.cost_model

prints what follows for hundreds of workers, the table of docs/performance.md. benchmarks/growth.py
holds the model against measured steps, tests/test_cost_model.py against real runs of two steps.

The letters of docs/performance.md: N tasks a step in S shards on W workers, |x| and |y| numbers, T
= `inner_steps`, A = `adapt_steps`, R = `barrier_steps`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from bomemeta.allocator import HEAP_BYTES
from bomemeta.core.solver import Solver
from bomemeta.solvers.aid_cg import AidCG
from bomemeta.solvers.bome import BOME
from bomemeta.solvers.implicit_solver import ImplicitSolver
from bomemeta.solvers.itd import ITD
from bomemeta.solvers.lancbio import LancBiO
from bomemeta.solvers.sl_bamm import SLBAMM

# fresh: y is forgotten after the step; pool: it persists, one per task; shared: it persists, one
# for all blocks
Where = Literal["fresh", "pool", "shared"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    where: Where
    tasks: int  # N; shared: blocks
    shards: int  # S, as the config has it
    upper: int  # |x|
    lower: int  # |y|
    workers: int = 0  # 0: this process, and no bytes go anywhere
    reduce: Literal["driver", "tree", "collective"] = "driver"
    number_bytes: int = 4
    images: int = 0  # of one task, where x is a network that they go through

    @property
    def stacks(self) -> int:
        """Shards that there are."""
        return min(self.shards, self.tasks)

    @property
    def stack(self) -> int:
        """Tasks of the largest shard."""
        return math.ceil(self.tasks / self.stacks)


class Kernel(NamedTuple):
    """One kernel of a step."""

    gradient_evaluations: float  # per task
    hessian_products: float
    pull_backs: int  # backward passes through `encode`
    rounds: tuple[int, ...]  # numbers in each shard's share, by round
    # Numbers that come back where all workers run it together (reduce: collective): y stays there.
    answer: int


class Cost(NamedTuple):
    """Of one step; the names are those of metrics.jsonl but for the passes."""

    gradient_evaluations: float
    hessian_products: float
    reduces: int
    bytes_reduced: int
    driver_bytes: int
    encodings: int  # forward passes of the backbone
    pull_backs: int  # backward passes


def cost(solver: Solver, sizes: Sizes, step: int = 0, last: bool = False) -> Cost:
    """What step number `step` (from 0) costs; `last`: it is the run's last."""
    kernels = kernels_of(solver, sizes, step, last)
    shares = [numbers for kernel in kernels for numbers in kernel.rounds]
    reduced = sizes.number_bytes * sizes.stacks * sum(shares)
    if sizes.workers == 0:
        arrived = 0
    elif sizes.reduce == "driver":
        arrived = reduced
    elif sizes.reduce == "collective" and sizes.where == "shared":
        arrived = sizes.number_bytes * sum(kernel.answer for kernel in kernels)
    else:
        arrived = sizes.number_bytes * sum(shares)
    return Cost(
        sum(kernel.gradient_evaluations for kernel in kernels),
        sum(kernel.hessian_products for kernel in kernels),
        len(shares),
        reduced,
        arrived,
        len(shares),
        sum(kernel.pull_backs for kernel in kernels),
    )


@functools.singledispatch
def kernels_of(solver: Solver, sizes: Sizes, step: int, last: bool) -> list[Kernel]:
    """The kernels of a step, in order."""
    raise NotImplementedError(
        f"no cost model of {type(solver).__name__}; benchmarks/cost_model.py wants a function for it"
    )


# Numbers of a round beside vectors: losses, norms and counts. A question for a gradient in y
# carries its loss along.
BOME_SCALARS, BOME_LOCAL = (
    7,
    2,
)  # f, g, q, <f, g>, |f|^2, |g|^2, evaluations; per-task barrier: lambda, how many are 0
ITD_SCALARS = 4  # f, g, evaluations, products
ADJOINT_SCALARS = 5  # f, g, |v|, evaluations, products; with the residual one more


@kernels_of.register
def _(solver: BOME, sizes: Sizes, step: int, last: bool) -> list[Kernel]:
    x, y = sizes.upper, sizes.lower
    local, gap = solver.barrier == "per_task", solver.phi == "gap"
    full = not local or (solver.diagnose_every > 0 and step % solver.diagnose_every == 0)
    evaluations = solver.inner_steps + 3 * full + (5 + gap) * local
    vectors = 2 * full + local
    scalars = BOME_SCALARS + BOME_LOCAL * local
    if sizes.where == "fresh":
        evaluations += solver.adapt_steps + 2 * solver.barrier_steps + gap
        return [Kernel(evaluations, 0, vectors, (vectors * x + scalars,), 0)]
    move = Kernel(0, 0, 0, (0,) if sizes.where == "pool" else (), 0)
    moves = [] if local else [move]
    if sizes.where == "pool":
        return [Kernel(evaluations, 0, vectors, (vectors * x + scalars,), 0), *moves]
    rounds = [y + 1] * solver.inner_steps + [2 * x + 2 * y + 3] * full
    # The local barrier's grad f and grad g come in one round.
    rounds += [y + 1] * gap * local + [2 * y + 2, x + 2 * y + 3] * local
    return [
        Kernel(evaluations, 0, vectors, tuple(rounds), vectors * x + scalars),
        *moves,
    ]


@kernels_of.register
def _(solver: ITD, sizes: Sizes, step: int, last: bool) -> list[Kernel]:
    x, y, steps = sizes.upper, sizes.lower, solver.inner_steps
    if sizes.where != "shared":
        return [Kernel(steps + 1, steps, 1, (x + ITD_SCALARS,), 0)]
    rounds = (y + 1,) * steps + (x + y + 1,) + (x + 2 * y + 2,) * steps
    return [Kernel(2 * steps + 1, steps, steps + 1, rounds, x + ITD_SCALARS)]


@kernels_of.register
def _(solver: AidCG, sizes: Sizes, step: int, last: bool) -> list[Kernel]:
    x, y, residual = sizes.upper, sizes.lower, _residual(solver, step, last)
    evaluations, scalars = solver.inner_steps + 3, ADJOINT_SCALARS + residual
    if sizes.where != "shared":
        return [Kernel(evaluations, solver.aux_steps, 1, (x + scalars,), 0)]
    rounds = (y + 1,) * (solver.inner_steps + 1) + (y,) * solver.aux_steps + (x + 2 + y * residual,)
    return [Kernel(evaluations, solver.aux_steps, 1, rounds, x + scalars)]


@kernels_of.register
def _(solver: LancBiO, sizes: Sizes, step: int, last: bool) -> list[Kernel]:
    """Where y persists: all tasks begin their epochs together, as they do without `stagger` in a
    pool that is taken whole.
    """
    x, y, residual, m = sizes.upper, sizes.lower, _residual(solver, step, last), solver.subspace
    evaluations, scalars = solver.inner_steps + 3, ADJOINT_SCALARS + residual
    if sizes.where == "fresh":
        return [Kernel(evaluations, m, 1, (x + scalars,), 0)]
    restart = step % m == 0
    if sizes.where == "pool":
        return [Kernel(evaluations, 1 + restart, 1, (x + scalars,), 0)]
    rounds = (y + 1,) * solver.inner_steps + (2 * y + 1,) + (y,) * restart + (x + 2 + y * residual,)
    return [Kernel(evaluations, 1 + restart, 1, rounds, x + scalars)]


@kernels_of.register
def _(solver: SLBAMM, sizes: Sizes, step: int, last: bool) -> list[Kernel]:
    if solver.order != "jacobi" and sizes.where != "fresh":
        raise NotImplementedError(
            "no cost model of sl_bamm with order: gauss_seidel; benchmarks/cost_model.py has jacobi's"
        )
    x, y, terms = sizes.upper, sizes.lower, 1 + (solver.mu > 0)  # of psi
    scalars = ADJOINT_SCALARS + 1
    if sizes.where == "fresh":
        return [Kernel(solver.adapt_steps + 2 + terms, solver.aux_steps, 1, (x + scalars,), 0)]
    search = solver.aux_step == "cauchy"
    if sizes.where == "pool":
        return [Kernel(1 + terms, 1 + search, 1, (x + scalars,), 0)]
    rounds = (x + 2 * y + 1 + terms,) + (1,) * search
    return [Kernel(1 + terms, 1 + search, 1, rounds, x + scalars)]


def _residual(solver: ImplicitSolver, step: int, last: bool) -> bool:
    return solver.residual_every > 0 and (step % solver.residual_every == 0 or last)


# Times


def work(costs: Cost, sizes: Sizes) -> dict[str, float]:
    """What a step's time is made of; each has a constant, its seconds."""
    array = sizes.number_bytes * sizes.upper
    moved = costs.bytes_reduced + costs.reduces * sizes.stacks * array
    return {
        "step": 1.0,
        "call": sizes.stacks * costs.reduces,
        "evaluation of a stack": sizes.stacks * costs.gradient_evaluations,
        "product of a stack": sizes.stacks * costs.hessian_products,
        "number of y in an evaluation": sizes.tasks * costs.gradient_evaluations * sizes.lower,
        "pass of an image": sizes.tasks * sizes.images * (costs.encodings + costs.pull_backs),
        "byte of x, out and back": moved,
        "the same, in pages that the system clears": moved if array > HEAP_BYTES else 0,
    }


def fitted(
    works: Sequence[Mapping[str, float]], seconds: Sequence[float], parts: Sequence[str]
) -> dict[str, float]:
    """Seconds of each of these parts, none negative, that come nearest to the measured times in
    relative terms.
    """
    from scipy.optimize import nnls

    rows = np.array(
        [[each[part] / taken for part in parts] for each, taken in zip(works, seconds, strict=True)]
    )
    scale = np.where(rows.max(0) > 0, rows.max(0), 1.0)  # parts that no run has keep the constant 0
    found, _ = nnls(rows / scale, np.ones(len(rows)))
    return dict(zip(parts, (found / scale).tolist(), strict=True))


def seconds_of(each: Mapping[str, float], constants: Mapping[str, float]) -> float:
    return sum(constant * each[part] for part, constant in constants.items())


# Larger machines


class Network(NamedTuple):
    latency_s: float
    bytes_per_s: float


SLOW, FAST = (
    Network(1e-3, 10e9 / 8),
    Network(1e-4, 100e9 / 8),
)  # 10 Gbit/s with 1 ms, 100 Gbit/s with 0.1 ms
CONV4, RESNET12 = (
    28_192,
    12_424_320,
)  # |x| of `few_shot` on Omniglot with 32 filters, and with backbone resnet12 on images in colour


def depth(shards: int) -> int:
    """Levels of the tree in which shards are added."""
    return math.ceil(math.log2(shards))


def reduce_seconds(
    size: int, shards: int, reduce: Literal["driver", "tree"], network: Network
) -> float:
    """One sum of `shards` arrays of `size` bytes: all into the driver's one network card, or level
    by level and one to the driver.
    """
    if reduce == "driver":
        return network.latency_s + shards * size / network.bytes_per_s
    return depth(shards) * (network.latency_s + size / network.bytes_per_s)


def broadcast_seconds(size: int, machines: int, network: Network) -> float:
    """`size` bytes to so many machines, each of which passes them on: twice as many have them after
    each turn.
    """
    return math.ceil(math.log2(machines + 1)) * (network.latency_s + size / network.bytes_per_s)


def extrapolation(workers: Sequence[int] = (8, 64, 256, 1024)) -> str:
    """A table, calculated: a step of BOME on fresh tasks with the per-task barrier, a shard to each
    worker and that on its own machine.
    """
    head = (
        "| network, numbers in x | workers = shards | levels | to the driver: driver, tree "
        "| 10 Gbit/s, 1 ms: x out; sum at the driver, in a tree | 100 Gbit/s, 0.1 ms: the same |"
    )
    lines = [head, "|---|---|---|---|---|---|"]
    for name, upper in (("four layers, 32 filters", CONV4), ("ResNet-12", RESNET12)):
        for count in workers:
            driver, tree = (
                cost(
                    BOME(barrier="per_task", diagnose_every=0),
                    Sizes(
                        where="fresh",
                        tasks=count,
                        shards=count,
                        upper=upper,
                        lower=0,
                        workers=count,
                        reduce=reduce,
                    ),
                ).driver_bytes
                for reduce in ("driver", "tree")
            )
            times = [
                f"{_time(broadcast_seconds(tree, count, network))}; {_time(reduce_seconds(tree, count, 'driver', network))}, "
                f"{_time(reduce_seconds(tree, count, 'tree', network))}"
                for network in (SLOW, FAST)
            ]
            amounts = f"{_amount(driver)}, {_amount(tree)}"
            lines.append(
                f"| {name}, {upper:,} | {count:,} | {depth(count)} | {amounts} | {times[0]} | {times[1]} |"
            )
    return "\n".join(lines)


def _amount(size: float) -> str:
    return (
        f"{size / 1e9:.1f} GB"
        if size >= 1e9
        else f"{size / 1e6:.1f} MB"
        if size >= 1e6
        else f"{size / 1e3:.0f} kB"
    )


def _time(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds >= 1
        else f"{1000 * seconds:.1f} ms"
        if seconds < 0.1
        else f"{1000 * seconds:.0f} ms"
    )


if __name__ == "__main__":
    print(extrapolation())
