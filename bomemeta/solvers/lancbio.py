"""LancBiO: bilevel optimisation with a Lanczos process that grows along with the outer steps.

Gao, Yang, Yuan, "LancBiO: Dynamic Lanczos-Aided Bilevel Optimization via Krylov Subspace", ICLR
2025, arXiv 2404.03331.

    hypergradient = grad_x f - (d2g/dxdy) v,   A v = b,   A = d2g/dy2,   b = grad_y f,   at the present (x, y)

Outer steps come in epochs of m = `subspace`. Every step, with I = `inner_steps`:

    y  <- y - inner_lr grad_y g,  I times
    at an epoch's start:  v_bar = v,  w = A v_bar,  q_1 = (b - w)/|b - w|,  Q = [q_1]
    Q and T grow by one Lanczos step with the present A
    v  = v_bar + Q T^-1 Q'(b - w)  with the present b
    x  <- x - upper_lr (grad_x f - (d2g/dxdy) v)

Each task has its own y, v and basis; the hypergradient is the mean of the tasks'. A step costs I +
3 gradients (grad_y f once for b, once for the hypergradient), 1 + 1/m Hessian products and one
cross product, and a task keeps m + 4 vectors of y's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bomemeta.core import krylov, tree
from bomemeta.core.implicit import flat, hypergradient, linear_system
from bomemeta.core.krylov import Lanczos, LinearSystem
from bomemeta.core.oracle import Oracle
from bomemeta.core.problem import Problem, SharedProblem
from bomemeta.core.solver import Kernel, KernelResult, LowerGroups
from bomemeta.core.tree import Params
from bomemeta.errors import ConfigError
from bomemeta.registry import solvers
from bomemeta.solvers.implicit_solver import Count, ImplicitSolver, Steps
from bomemeta.solvers.pacing import followed


@solvers.register("lancbio")
@dataclass(frozen=True, kw_only=True)
class LancBiO(ImplicitSolver):
    """Implicit hypergradient by a Lanczos process across outer steps (Gao et al., ICLR 2025).

    Tasks whose y persists grow their Krylov space by one vector per outer step. Fresh tasks have no
    last step: y is adapted on g, and v is solved for by `subspace` conjugate-gradient steps from 0,
    which is the same space made at once.
    """

    subspace: Steps = 10  # m, outer steps in an epoch: the largest size of the Krylov space
    reorthogonalise: bool = (
        True  # off: the recurrence as published, which breaks down for a large `subspace`
    )
    ritz_floor: Annotated[float, Field(ge=0, lt=1)] = (
        1e-6  # Ritz values up to this share of the largest are left out
    )
    warmup_steps: Count = (
        0  # m_0 of the theory: first steps of an epoch in which a task says nothing about x
    )
    stagger: bool = (
        False  # cut the first epochs short so that a shard's tasks restart at different steps
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps >= self.subspace:
            raise ConfigError(
                f"solver.warmup_steps: got {self.warmup_steps}; an epoch has solver.subspace = {self.subspace} steps, and x would "
                "never move: make it smaller"
            )
        if self.warmup_steps > 0 and (self.upper_optimizer != "sgd" or self.weight_decay > 0):
            mover = "weight_decay" if self.upper_optimizer == "sgd" else self.upper_optimizer
            raise ConfigError(
                f"solver.warmup_steps: x is to stand still in these steps, and {mover} moves it without a gradient: "
                "use solver.upper_optimizer sgd without weight_decay, or warmup_steps 0"
            )

    def check(self, problem: Problem) -> None:
        super().check(problem)
        draws = isinstance(problem, SharedProblem) and problem.minibatches
        if draws and self.subspace > 1:
            raise ConfigError(
                f"solver.subspace: got {self.subspace}; a Krylov space that grows from step to step is one of a single matrix, and "
                f"{type(problem).__name__} draws other samples for every step: set subspace=1, take the whole data in each step, or "
                "another solver (subbio, amigo_gd)"
            )

    def solve(self, system: LinearSystem) -> Tensor:
        return krylov.conjugate_gradients(system, self.subspace)

    def tracking(self) -> Kernel:
        return track

    def kept(self, at: Params) -> LowerGroups:
        zeros = tree.flatten_tasks(tree.zeros_like(at))
        return {"krylov": krylov.lanczos(zeros, self.subspace)._asdict()}


def track(
    solver: LancBiO, oracle: Oracle, lower: LowerGroups | None, *, residual: bool
) -> KernelResult:
    """Kernel for tasks whose y persists: y follows x, then one Lanczos step and v.

    b and the product that every task needs first are one question: of a task that restarts A v, of
    the others A q_j.
    """
    at, kept = followed(solver, oracle, lower)
    state = Lanczos(**(solver.kept(at) if lower is None else lower)["krylov"])
    due = state.left == 0
    system = linear_system(oracle, at, torch.where(due, state.v, krylov.newest(state)))
    _, image = system.begin()
    if due.any():
        state = krylov.restarted(state, due, image, system.right, _epoch_length(solver, state))
        fresh = krylov.newest(state)
        image = system.product(fresh) if due.all() else _with_images(oracle, at, fresh, due, image)
    # The theory wants no step of x while the new epoch's space is small.
    heard = (
        (state.size >= solver.warmup_steps)[:, 0].to(system.right.dtype)
        if solver.warmup_steps > 0
        else 1.0
    )
    state = krylov.extended(state, image, solver.reorthogonalise)
    state = krylov.solved(state, system.right, solver.ritz_floor)
    sums = hypergradient(oracle, at, state.v, heard, residual)
    return KernelResult(sums, {"y": at, "krylov": state._asdict(), **kept})


def _with_images(
    oracle: Oracle, at: Params, vectors: Tensor, due: Tensor, images: Tensor
) -> Tensor:
    """`images` with A times `vectors` in the rows that are due, at the cost of these rows."""
    rows = due[:, 0].nonzero()[:, 0]
    some = {name: tensor[rows] for name, tensor in at.items()}
    return images.index_put((rows,), flat(oracle.hessian(some, rows), some)(vectors[rows]))


def _epoch_length(solver: LancBiO, state: Lanczos) -> Tensor:
    """m steps [B, 1]; with `stagger` the first epoch of the shard's i-th task lasts m - i mod m,
    and all later ones come at other times.
    """
    length = torch.full_like(state.left, solver.subspace)
    if not solver.stagger:
        return length
    location = torch.arange(len(length), device=length.device)[:, None] % solver.subspace
    return torch.where(state.size == 0, length - location, length)
