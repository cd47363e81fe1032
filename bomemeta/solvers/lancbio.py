"""LancBiO: bilevel optimisation with a Lanczos process that grows along with the outer steps.

Gao, Yang, Yuan, "LancBiO: Dynamic Lanczos-Aided Bilevel Optimization via Krylov Subspace", ICLR 2025, arXiv 2404.03331.

    hypergradient = grad_x f - (d2g/dxdy) v,   A v = b,   A = d2g/dy2,   b = grad_y f,   at the present (x, y)

Outer steps come in epochs of m = `subspace`. Every step, with I = `inner_steps`:

    y  <- y - inner_lr grad_y g,  I times
    at an epoch's start:  v_bar = v,  w = A v_bar,  q_1 = (b - w)/|b - w|,  Q = [q_1]
    Q and T grow by one Lanczos step with the present A
    v  = v_bar + Q T^-1 Q'(b - w)  with the present b
    x  <- x - upper_lr (grad_x f - (d2g/dxdy) v)

Each task has its own y, v and basis; the hypergradient is the mean of the tasks'. A step costs I + 3 gradients (grad_y f once for b, once
for the hypergradient), 1 + 1/m Hessian products and one cross product, and a task keeps m + 4 vectors of y's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bomemeta.core import krylov, tree
from bomemeta.core.implicit import flat_hessian, hypergradient, move_upper
from bomemeta.core.inner import gradient_steps
from bomemeta.core.krylov import Lanczos
from bomemeta.core.oracle import LocalOracle
from bomemeta.core.solver import KernelResult, LowerGroups, LowerStates, Run, StepResult
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.errors import ConfigError
from bomemeta.registry import solvers
from bomemeta.solvers.upper_options import UpperOptions

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Steps = Annotated[int, Field(ge=1)]


@solvers.register("lancbio")
@dataclass(frozen=True, kw_only=True)
class LancBiO(UpperOptions):
    """Implicit hypergradient by a Lanczos process across outer steps (Gao et al., ICLR 2025).

    Tasks whose y persists grow their Krylov space by one vector per outer step. Fresh tasks have no last step: y is adapted on g, and v
    is solved for by `subspace` conjugate-gradient steps from 0, which is the same space made at once.
    """

    subspace: Steps = 10  # m, outer steps in an epoch: the largest size of the Krylov space
    inner_steps: Steps = 5  # I; fresh tasks: all the steps that y gets
    inner_lr: Positive = 0.1  # theta, the step of y on g
    reorthogonalise: bool = True  # off: the recurrence as published, which breaks down for a large `subspace`
    ritz_floor: Annotated[float, Field(ge=0, lt=1)] = 1e-6  # Ritz values up to this share of the largest are left out
    warmup_steps: Count = 0  # m_0 of the theory: first steps of an epoch in which a task says nothing about x
    stagger: bool = False  # cut the first epochs short so that a shard's tasks restart at different steps

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.subspace:
            raise ConfigError(
                f"solver.warmup_steps: got {self.warmup_steps}; an epoch has solver.subspace = {self.subspace} steps, and x would "
                "never move: make it smaller"
            )
        if self.warmup_steps > 0 and self.upper_optimizer != "sgd":
            raise ConfigError(
                f"solver.warmup_steps: x is to stand still in these steps, and {self.upper_optimizer} moves it without a gradient: "
                "use solver.upper_optimizer sgd, or warmup_steps 0"
            )

    def adapt(self, oracle: LocalOracle, steps: int | None) -> Params:
        return gradient_steps(oracle, oracle.init_lower(), self.inner_steps if steps is None else steps, self.inner_lr)

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        sums, lower = run(track if run.persistent else episode, self, upper.params, lower, keeps=run.persistent)
        return StepResult(lower, move_upper(upper, sums, run))


def episode(solver: LancBiO, oracle: LocalOracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel for fresh tasks: adapt y on g, solve for v from 0 at that y."""
    at = solver.adapt(oracle, None)
    right = tree.flatten_tasks(oracle.upper(at).lower)
    v = krylov.conjugate_gradients(flat_hessian(oracle, at), right, None, solver.subspace)
    return KernelResult(hypergradient(oracle, at, v), {})


def track(solver: LancBiO, oracle: LocalOracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel for tasks whose y persists: y follows x, then one Lanczos step and v."""
    at = gradient_steps(oracle, lower["y"] if lower is not None else oracle.init_lower(), solver.inner_steps, solver.inner_lr)
    right = tree.flatten_tasks(oracle.upper(at).lower)
    state = Lanczos(**lower["krylov"]) if lower is not None else krylov.lanczos(torch.zeros_like(right), solver.subspace)
    product = flat_hessian(oracle, at)
    due = state.left == 0
    if due.any():
        image = product(state.v) if due.all() else _some_images(oracle, at, state.v, due)
        state = krylov.restarted(state, due, image, right, _epoch_length(solver, state))
    # The theory wants no step of x while the new epoch's space is small.
    heard = (state.size >= solver.warmup_steps)[:, 0].to(right.dtype) if solver.warmup_steps > 0 else 1.0
    state = krylov.extended(state, product(krylov.newest(state)), solver.reorthogonalise)
    state = krylov.solved(state, right, solver.ritz_floor)
    return KernelResult(hypergradient(oracle, at, state.v, heard), {"y": at, "krylov": state._asdict()})


def _some_images(oracle: LocalOracle, at: Params, v: Tensor, due: Tensor) -> Tensor:
    """A v of the tasks that are due, 0 for the others, at the cost of those that are due."""
    rows = due[:, 0].nonzero()[:, 0]
    product = flat_hessian(oracle, {name: tensor[rows] for name, tensor in at.items()}, rows)
    return torch.zeros_like(v).index_put((rows,), product(v[rows]))


def _epoch_length(solver: LancBiO, state: Lanczos) -> Tensor:
    """m steps [B, 1]; with `stagger` the first epoch of the shard's i-th task lasts m - i mod m, and all later ones come at other times."""
    length = torch.full_like(state.left, solver.subspace)
    if not solver.stagger:
        return length
    place = torch.arange(len(length), device=length.device)[:, None] % solver.subspace
    return torch.where(state.size == 0, length - place, length)
