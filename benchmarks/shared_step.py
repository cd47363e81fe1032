"""One BOME step of hyper-cleaning against the same mathematics in plain single-process PyTorch.

    OMP_NUM_THREADS=1 python -m benchmarks.shared_step --inner-steps 1 10 --data-root DATA --json OUT.json

MNIST's 50,000 training and 5,000 validation images, softmax regression,
configs/hyper_cleaning_mnist_bome.yaml with a barrier that moves x from the first step on.
`bomemeta` is a whole step of a run but for logging: the data in two blocks, every question of the
kernel a round over the serial transport. `plain` is the algorithm box on the unblocked data with
autograd, as one would write it in a script. In turn, round by round; ratios are medians within a
round. The two walk the same path: `difference` is that of x after the last round, as a share of how
far x has come.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.few_shot_step import WARM_UP, interleaved, ratio, spread
from bomemeta.assembly import build_problem, build_solver, open_transport, torch_threads, trainer_of
from bomemeta.config import load_config
from bomemeta.core.solver import LowerStates, take_step
from bomemeta.core.upper import UpperVariable
from bomemeta.engine import Trainer
from bomemeta.environment import environment
from bomemeta.problems.hyper_cleaning import HyperCleaning
from bomemeta.solvers.bome import BOME

CONFIG = Path(__file__).parents[1] / "configs" / "hyper_cleaning_mnist_bome.yaml"
START = 0.5  # of every weight


def ours(trainer: Trainer) -> tuple[Callable[[], None], UpperVariable]:
    upper = trainer.state.upper
    lower, number = LowerStates.none(), 0

    def step() -> None:
        nonlocal lower, number
        lower = take_step(trainer.solver, upper, lower, trainer.step_run(number)).lower
        number += 1

    return step, upper


def plain(problem: HyperCleaning, solver: BOME) -> tuple[Callable[[], None], Tensor]:
    """The step, and x, which it moves in place."""
    batch = problem.load(range(problem.blocks), 0, "train")
    real = {name: batch[f"{name}_scale"].flatten() > 0 for name in ("train", "validation")}
    train, validation = (
        (
            batch[f"{name}_inputs"].flatten(0, 1)[real[name]],
            batch[f"{name}_labels"].flatten()[real[name]],
        )
        for name in real
    )
    x = torch.full((problem.train,), START, requires_grad=True)
    y = [
        torch.zeros(problem.data.classes, problem.data.features),
        torch.zeros(problem.data.classes),
    ]
    velocity_x, velocity_y = torch.zeros_like(x), [torch.zeros_like(part) for part in y]

    def f(y: list[Tensor]) -> Tensor:
        return functional.cross_entropy(functional.linear(validation[0], *y), validation[1])

    def g(x: Tensor, y: list[Tensor]) -> Tensor:
        losses = functional.cross_entropy(
            functional.linear(train[0], *y), train[1], reduction="none"
        )
        return (x * losses).mean() + problem.ridge * sum((part**2).sum() for part in y)

    def step() -> None:
        here = [part.detach().requires_grad_() for part in y]
        solved = here
        for _ in range(solver.inner_steps):
            slopes = torch.autograd.grad(g(x.detach(), solved), solved)
            solved = [
                (part - solver.inner_lr * slope).detach().requires_grad_()
                for part, slope in zip(solved, slopes, strict=True)
            ]
        gap = g(x, here) - g(x, [part.detach() for part in solved])
        x_q, *y_q = torch.autograd.grad(gap, [x, *here])
        y_f = torch.autograd.grad(f(here), here)
        square = x_q @ x_q + sum((part**2).sum() for part in y_q)
        inner = sum((a * b).sum() for a, b in zip(y_f, y_q, strict=True))
        multiplier = (solver.eta - inner / square).clamp_min(0)  # phi: grad_norm
        with torch.no_grad():
            velocity_x.mul_(solver.momentum).add_(multiplier * x_q)
            x.sub_(solver.upper_lr * velocity_x).clamp_(0, 1)
            for part, velocity, a, b in zip(y, velocity_y, y_f, y_q, strict=True):
                velocity.mul_(solver.lower_momentum).add_(a + multiplier * b)
                part.sub_(solver.lower_lr * velocity)

    return step, x


def measure(inner_steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds and the ratio at one T."""
    changed = [
        "workers=0",
        "solver.phi=grad_norm",
        f"solver.inner_steps={inner_steps}",
        f"threads={options.threads}",
    ]
    changed += [f"data.root={options.data_root}"] if options.data_root else []
    config = load_config(CONFIG, [*changed, *options.set])
    problem = build_problem(config)
    solver = build_solver(config, problem)
    assert isinstance(problem, HyperCleaning)
    assert isinstance(solver, BOME)
    with torch_threads(config.threads), closing(open_transport(config, print)) as transport:
        our_step, upper = ours(
            trainer_of(config, problem=problem, solver=solver, transport=transport)
        )
        plain_step, x = plain(problem, solver)
        taken = interleaved(
            {"bomemeta": our_step, "plain": plain_step}, options.rounds, lambda number: None
        )
    come = (x.detach() - START).norm()
    return {
        "inner_steps": inner_steps,
        "over_plain": {
            clock: ratio(times["bomemeta"], times["plain"]) for clock, times in taken.items()
        },
        "milliseconds": {
            c: {name: 1000 * statistics.median(t) for name, t in by_name.items()}
            for c, by_name in taken.items()
        },
        "spread": {
            c: {name: spread(t) for name, t in by_name.items()} for c, by_name in taken.items()
        },
        "difference": float((upper.params["weights"] - x.detach()).norm() / come)
        if come > 0
        else 0.0,
        "steps": WARM_UP + options.rounds,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1, 10], help="T")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--data-root", default=None)
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="config keys, as for bomemeta train",
    )
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    results = [measure(inner_steps, options) for inner_steps in options.inner_steps]
    result = {
        "threads": options.threads,
        "rounds": options.rounds,
        "results": results,
        "environment": environment(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
