"""What solvers share that take the hypergradient from the implicit function theorem:

    grad F = grad_x f - (d2g/dxdy) v,   A v = b,   A = d2g/dy2,   b = grad_y f,   all at (x, y) with y near argmin g(x, .)

They differ in how they come by v (`core/krylov.py`) and in what they keep of it from step to step.
A y at the edge of its admissible set is taken as if it were inside: the constraint has no part in
A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.krylov import LinearSystem, Product
from bomemeta.core.oracle import Adjoint, G, Hessian, Oracle
from bomemeta.core.solver import Run, Sums, mean_sums
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable

MEANS = (
    "upper_loss",
    "lower_loss",
    "residual",
    "aux_norm",
    "gradient_evaluations",
    "hessian_products",
)


def linear_system(oracle: Oracle, at: Params, start: Tensor | None) -> LinearSystem:
    """A v = b at y = `at` on flat vectors, to be started from `start` [B, n]; None: from 0. One
    question.
    """
    right, image, hessian = oracle.system(
        at, None if start is None else tree.unflatten_tasks(start, at)
    )

    def projected(basis: Tensor) -> Tensor:
        return hessian.projected([tree.unflatten_tasks(vector, at) for vector in basis.unbind(1)])

    return LinearSystem(
        tree.flatten_tasks(right.lower),
        flat(hessian, at),
        projected,
        start,
        tree.flatten_tasks(image) if image else None,
    )


def flat(hessian: Hessian, at: Params) -> Product:
    """A Hessian on flat vectors, [B, n] to [B, n]."""
    return lambda direction: tree.flatten_tasks(hessian(tree.unflatten_tasks(direction, at)))


def hypergradient(
    oracle: Oracle, at: Params, v: Tensor, weight: float | Tensor = 1.0, residual: bool = True
) -> Sums:
    """The kernel's sums at y = `at` and `v` [B, n]: `direction` = sum_i weight_i (grad_x f_i -
    (d2g_i/dxdy) v_i), losses, costs and, with `residual`, |A v - b|.

    The double backward of the cross product gives A v along with it: the residual costs no product
    and is not counted as one, but it is sent where the lower problem is shared. A task whose weight
    is 0 has no residual here.
    """
    products = oracle.hessian_products
    at_v = tree.unflatten_tasks(v, at)
    found = oracle.adjoint(at, at_v, *G, weight=weight, gradient=False, residual=residual)
    return adjoint_sums(oracle, found, at_v, products)


def adjoint_sums(oracle: Oracle, at: Adjoint, v: Params, hessian_products: float) -> Sums:
    """What the driver needs of an adjoint system, as sums over tasks. `hessian_products`: per task,
    so far.
    """
    sums: Sums = {
        "direction": at.upper,
        "upper_loss": at.upper_value.sum(),
        "lower_loss": at.values[-1].sum(),
        "aux_norm": tree.dot_tasks(v, v).sqrt().sum(),
        "gradient_evaluations": torch.tensor(float(oracle.gradient_evaluations * oracle.tasks)),
        "hessian_products": torch.tensor(float(hessian_products * oracle.tasks)),
    }
    return sums | (
        {"residual": tree.dot_tasks(at.residual, at.residual).sqrt().sum()} if at.residual else {}
    )


def move_upper(
    upper: UpperVariable, sums: Sums, run: Run, lr: float | None = None
) -> dict[str, float]:
    """x along minus the mean hypergradient (`lr`: this step's size, where the solver has one); a
    step's last act. Returns its metrics.
    """
    direction = tree.scaled(1 / run.tasks, sums["direction"])
    metrics = mean_sums(sums, MEANS, run.tasks)
    metrics["hypergradient_norm"] = float(tree.dot(direction, direction).sqrt())
    return metrics | upper.move(direction, run.step, run.project_upper, lr)
