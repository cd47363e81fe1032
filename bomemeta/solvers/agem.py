"""A-GEM: y along the gradient of the incoming batch, less what of it would make the memory's loss
grow.

Source: Chaudhry, Ranzato, Rohrbach, Elhoseiny, "Efficient Lifelong Learning with A-GEM", ICLR 2019.

    d = grad_y g (the incoming batch),  m = grad_y f (samples of the memory)
    y <- y - inner_lr (d - min(<d, m>, 0) / |m|^2 m),  `inner_steps` times

For problem `continual` with `objective: finetune`, whose g is the batch and whose f is the memory.
x stands still.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.oracle import Oracle
from bomemeta.core.solver import KernelResult, LowerGroups, LowerStates, Run, StepResult, mean_sums
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.registry import solvers
from bomemeta.solvers.lower_only import MEANS, LowerOnly


@solvers.register("agem")
@dataclass(frozen=True, kw_only=True)
class AGem(LowerOnly):
    """Averaged gradient episodic memory (Chaudhry et al., ICLR 2019)."""

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        sums, lower = run(descend_projected)
        return StepResult(lower, mean_sums(sums, (*MEANS, "projected_share"), run.tasks))


def descend_projected(solver: AGem, oracle: Oracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel: the steps of y. Losses are those where they began."""
    at = lower["y"] if lower is not None else oracle.init_lower()
    first: tuple[Tensor, Tensor] | None = None
    share = torch.zeros(oracle.tasks)
    rule = solver.lower_rule()
    state = rule.state(lower, at)
    for _ in range(solver.inner_steps):
        g, f = oracle.gradients(("lower", at), ("upper", at))
        first = first or (g.value, f.value)
        direction, conflict = projected(g.lower, f.lower)
        share = share + conflict.to(share) / solver.inner_steps
        moved, state = rule.move(at, direction, solver.inner_lr, state)
        at = oracle.project_lower(moved)
    assert first is not None, "inner_steps is 1 or more"
    sums = {
        "lower_loss": first[0].sum(),
        "upper_loss": first[1].sum(),
        "projected_share": share.sum(),
        "gradient_evaluations": torch.tensor(float(oracle.gradient_evaluations * oracle.tasks)),
    }
    return KernelResult(sums, {"y": at, **state})


def projected(direction: Params, memory: Params) -> tuple[Params, Tensor]:
    """d - min(<d, m>, 0) / |m|^2 m of two stacks, and per task whether <d, m> was below 0. Where m
    is 0 there is no conflict.
    """
    inner, square = tree.dot_tasks(direction, memory), tree.dot_tasks(memory, memory)
    conflict = inner < 0
    scale = torch.where(conflict, inner / torch.where(conflict, square, 1.0), 0.0)
    return tree.axpy(-scale, memory, direction), conflict
