"""The reference, as kernels on ONE task (or on the one shared y): the lower solution, the implicit
hypergradient there, A's spectrum.

They share no linear algebra with the solvers that they are the measure of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.oracle import Gradient, Oracle, Term
from bomemeta.core.solver import KernelResult, LowerGroups, Solver
from bomemeta.core.tree import Params

# y* is solved until |grad_y g| has fallen by this factor; finite differences divide what is left by
# 1e-4 or so.
SOLVED = 1e-13
NEWTON_STEPS = 50
HALVINGS = 40
CG_STEPS = 2000
LANCZOS_STEPS = 100
ENOUGH = 1e-2  # |v_m - v| / |v| that `steps_enough` counts steps to

Product = Callable[[Tensor], Tensor]


def locate(
    solver: Solver, oracle: Oracle, lower: LowerGroups | None, *, adapts: bool
) -> KernelResult:
    """Kernel: the solver's own y, kept: of its last step, or adapted (`adapts`), or where it would
    start.

    `mismatch`: how far the problem's closed-form gradients in y are from autograd's, relative.
    """
    at = (
        lower["y"]
        if lower is not None
        else solver.adapt(oracle, None)
        if adapts
        else oracle.init_lower()
    )
    asked = (oracle.upper(at), oracle.lower(at))
    exact = (oracle.total(Term("upper", at)), oracle.total(Term("lower", at)))
    mismatch = max(
        _relative(tree.flatten(a.lower), tree.flatten(b.lowers[0]))
        for a, b in zip(asked, exact, strict=True)
    )
    start = tree.flatten(oracle.lower(oracle.init_lower()).lower).norm()
    grad = tree.flatten(asked[1].lower).norm()
    return KernelResult(
        {"mismatch": torch.tensor(mismatch), "grad": grad, "scale": torch.maximum(start, grad)},
        {"y": at},
    )


def solve(solver: Solver, oracle: Oracle, lower: LowerGroups, *, scale: float) -> KernelResult:
    """Kernel: y* from lower["y"], kept, by Newton's method with conjugate gradients and a line
    search; f and |grad_y g| there.

    `grad` is the length of the projected gradient, `scale` the length that it is judged by. `edge`:
    where the constraint holds y.
    """
    at = lower["y"]
    here = oracle.lower(at)
    size = _projected(oracle, at, here)
    steps = 0
    while steps < NEWTON_STEPS and size > SOLVED * scale:
        moved = _newton_step(oracle, at, here, size, min(0.1, size / scale))
        if moved is None:
            break
        at, here, size = moved
        steps += 1
    stepped = tree.axpy(-1.0, here.lower, at)
    free, held = tree.flatten(stepped), tree.flatten(oracle.project_lower(stepped))
    edge = (free - held).norm() > 1e-9 * scale
    sums = {
        "upper_loss": oracle.upper(at).value.sum(),
        "grad": torch.tensor(size),
        "steps": torch.tensor(float(steps)),
        "edge": edge.to(torch.float64),
        "moved": (tree.flatten(at) - tree.flatten(lower["y"])).norm(),
        "norm": torch.maximum(tree.flatten(at).norm(), tree.flatten(lower["y"]).norm()),
    }
    return KernelResult(sums, {"y": at})


def implicit(
    solver: Solver, oracle: Oracle, lower: LowerGroups, *, inner: tuple[int, float] = (0, 0.0)
) -> KernelResult:
    """Kernel: grad_x f - (d2g/dxdy) v with A v = grad_y f at lower["y"]. `residual` is |A v - b| /
    |b|, `steps_enough` how many steps conjugate gradients took until v was known to `ENOUGH`.

    `seen`, for `inner` = (T, alpha): the same with (I - (I - alpha A)^T) v, all that T gradient
    steps on g tell of v. With T = 0 it is `direction`.
    """
    at = lower["y"]
    product, right = _flat_hessian(oracle, at), tree.flatten(oracle.upper(at).lower)
    solution = conjugate_gradients(product, right, CG_STEPS, 1e-14)
    enough = conjugate_gradients(product, right, solution.steps, 0.0, goal=solution.v).steps
    system = oracle.adjoint(at, tree.unflatten(solution.v, at), ("lower", 1.0))
    residual = tree.flatten(system.residual).norm()
    unseen = solution.v
    for _ in range(inner[0]):
        unseen = unseen - inner[1] * product(unseen)
    seen = (
        oracle.adjoint(at, tree.unflatten(solution.v - unseen, at), ("lower", 1.0))
        if inner[0]
        else system
    )
    sums = {
        "direction": system.upper,
        "seen": seen.upper,
        "grad_upper_f": oracle.total(Term("upper", at)).upper,
        "residual": residual / right.norm() if right.any() else residual,
        "steps_enough": torch.tensor(float(enough)),
    }
    return KernelResult(sums, {})


def spectrum(solver: Solver, oracle: Oracle, lower: LowerGroups, *, seed: int) -> KernelResult:
    """Kernel: the outermost eigenvalues of A at lower["y"] by Lanczos. `smallest_error` bounds how
    far the smallest is from one of A's.
    """
    at = lower["y"]
    like = tree.flatten(at)
    start = torch.randn(
        len(like), generator=torch.Generator().manual_seed(seed), dtype=like.dtype
    ).to(like.device)
    values, error = ritz_values(_flat_hessian(oracle, at), start, LANCZOS_STEPS)
    return KernelResult({"smallest": values[0], "largest": values[-1], "smallest_error": error}, {})


class Solution(NamedTuple):
    v: Tensor
    steps: int


def conjugate_gradients(
    product: Product, right: Tensor, most: int, tolerance: float, goal: Tensor | None = None
) -> Solution:
    """A v = `right` from 0 on flat vectors, until |residual| <= tolerance |right| or v is within
    `ENOUGH` of `goal`.

    Stops where a direction has no positive curvature.
    """
    v, residual = torch.zeros_like(right), right
    direction, square = residual, residual.dot(residual)
    least, near = tolerance**2 * square, None if goal is None else ENOUGH * goal.norm()
    for step in range(most):
        if square <= least or (goal is not None and near is not None and (v - goal).norm() <= near):
            return Solution(v, step)
        image = product(direction)
        curvature = direction.dot(image)
        if not curvature > 0:
            return Solution(v, step)
        length = square / curvature
        v, residual = v + length * direction, residual - length * image
        before, square = square, residual.dot(residual)
        direction = residual + square / before * direction
    return Solution(v, most)


def ritz_values(product: Product, start: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Ritz values of A, ascending, from Lanczos with full reorthogonalisation, and the residual of
    the smallest one's pair.
    """
    basis = [start / start.norm()]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(min(most, len(start))):
        image = product(basis[-1])
        alphas.append(basis[-1].dot(image))
        rows = torch.stack(basis)
        # Twice: what the first pass leaves of a vector that nearly lay in the space is mostly
        # rounding.
        rest = image - rows.T @ (rows @ image)
        rest = rest - rows.T @ (rows @ rest)
        betas.append(rest.norm())
        if betas[-1] <= 1e-13 * image.norm():
            break  # the space is A's own: its Ritz values are eigenvalues
        basis.append(rest / betas[-1])
    diagonal, off = torch.stack(alphas).cpu(), torch.stack(betas).cpu()
    values, vectors = torch.linalg.eigh(
        torch.diag(diagonal) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
    )
    return values, off[-1] * vectors[-1, 0].abs()


def _newton_step(
    oracle: Oracle, at: Params, here: Gradient, size: float, tolerance: float
) -> tuple[Params, Gradient, float] | None:
    """The next y with its gradient and projected gradient's length; None where no step makes
    anything smaller.
    """
    grad = tree.flatten(here.lower)
    newton = conjugate_gradients(_flat_hessian(oracle, at), grad, CG_STEPS, tolerance).v
    value = float(here.value.sum())
    rounding = 1e-13 * abs(value)
    # No positive curvature along the gradient leaves Newton's direction 0.
    for direction in [newton, grad] if newton.any() else [grad]:
        slope = float(direction.dot(grad))
        length = 1.0
        for _ in range(HALVINGS):
            trial = oracle.project_lower(tree.axpy(-length, tree.unflatten(direction, at), at))
            there = oracle.lower(trial)
            found, left = float(there.value.sum()), _projected(oracle, trial, there)
            # Near the solution g's own differences are rounding, and the gradient decides.
            if found < value - 1e-4 * length * slope - rounding or (
                found <= value + rounding and left < (1 - 0.1 * length) * size
            ):
                return trial, there, left
            length /= 2
    return None


def _projected(oracle: Oracle, at: Params, here: Gradient) -> float:
    """|y - P(y - grad_y g)|: the gradient's length where nothing holds y."""
    stepped = oracle.project_lower(tree.axpy(-1.0, here.lower, at))
    return float((tree.flatten(at) - tree.flatten(stepped)).norm())


def _flat_hessian(oracle: Oracle, at: Params) -> Product:
    hessian = oracle.hessian(at)
    return lambda direction: tree.flatten(hessian(tree.unflatten(direction, at)))


def _relative(a: Tensor, b: Tensor) -> float:
    scale = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / scale if scale > 0 else 0.0
