"""Gradient descent on the lower loss alone: the inner loop that every first-order solver shares,
and meta-testing's adaptation.
"""

from __future__ import annotations

from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.lower_moves import LowerRule
from bomemeta.core.oracle import Oracle
from bomemeta.core.solver import KernelResult, LowerGroups, Solver
from bomemeta.core.tree import Params


def gradient_steps(oracle: Oracle, start: Params, steps: int, lr: float) -> Params:
    """`steps` projected gradient steps of size `lr` on g, each task its own."""
    return oracle.descended(start, steps, lr)


def rule_steps(
    oracle: Oracle, start: Params, steps: int, lr: float, rule: LowerRule, state: LowerGroups
) -> tuple[Params, LowerGroups]:
    """The same by an optimiser that continues from `state`; with what it keeps then."""
    if rule.plain:
        return gradient_steps(oracle, start, steps, lr), {}
    at = start
    for number in range(steps):
        with oracle.inner_batch(number):
            g = oracle.lower(at)
        moved, state = rule.move(at, g.lower, lr, state)
        at = oracle.project_lower(moved)
    return at, state


def evaluate(
    solver: Solver, oracle: Oracle, lower: LowerGroups | None, *, steps: int | None
) -> KernelResult:
    """Kernel: the problem's metrics, as sums and sums of squares over tasks.

    Tasks that carry a y of their own are judged at it, fresh ones at y adapted on g.
    """
    at = lower["y"] if lower is not None else solver.adapt(oracle, steps)
    metrics = oracle.evaluate(at)
    sums = {f"sum/{name}": value.sum() for name, value in metrics.items()}
    squares = {f"square/{name}": value.square().sum() for name, value in metrics.items()}
    return KernelResult(sums | squares, {})


def solve_lower(
    solver: Solver, oracle: Oracle, lower: LowerGroups | None, *, steps: int
) -> KernelResult:
    """Kernel: every y after `steps` steps on g alone from where it is."""
    return KernelResult(
        {}, {"y": solver.adapt(oracle, steps, lower["y"] if lower is not None else None)}
    )


def update_memory(solver: Solver, oracle: LocalOracle, lower: LowerGroups) -> KernelResult:
    """Kernel on blocks: their shares of the problem's memory at y."""
    return KernelResult({"memory": oracle.update_memory(lower["y"])}, {})
