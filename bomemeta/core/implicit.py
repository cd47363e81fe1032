"""What solvers share that take the hypergradient from the implicit function theorem:

    grad F = grad_x f - (d2g/dxdy) v,   A v = b,   A = d2g/dy2,   b = grad_y f,   all at (x, y) with y near argmin g(x, .)

They differ in how they come by v (`core/krylov.py`) and in what they keep of it from step to step. A y at the edge of its admissible
set is taken as if it were inside: the constraint has no part in A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.krylov import Product
from bomemeta.core.oracle import LocalOracle
from bomemeta.core.solver import Run, Sums, mean_sums
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable

MEANS = ("upper_loss", "lower_loss", "residual", "aux_norm", "gradient_evaluations", "hessian_products")


def flat_hessian(oracle: LocalOracle, at: Params, rows: Tensor | None = None) -> Product:
    """`oracle.hessian` on flat vectors, [B, n] to [B, n]."""
    product = oracle.hessian(at, rows)
    return lambda direction: tree.flatten_tasks(product(tree.unflatten_tasks(direction, at)))


def hypergradient(oracle: LocalOracle, at: Params, v: Tensor, weight: float | Tensor = 1.0) -> Sums:
    """The kernel's sums at y = `at` and `v` [B, n]: `direction` = sum_i weight_i (grad_x f_i - (d2g_i/dxdy) v_i), losses, |A v - b|, costs.

    The double backward of the cross product gives A v along with it: the residual is free, and not counted among the Hessian products.
    A task whose weight is 0 has no residual here.
    """
    products = oracle.hessian_products
    system = oracle.adjoint(at, tree.unflatten_tasks(v, at), ("lower", 1.0), weight=weight)
    return {
        "direction": system.upper,
        "upper_loss": system.upper_value.sum(),
        "lower_loss": system.values[0].sum(),
        "residual": tree.flatten_tasks(system.residual).norm(dim=1).sum(),
        "aux_norm": v.norm(dim=1).sum(),
        "gradient_evaluations": torch.tensor(float(oracle.gradient_evaluations * oracle.tasks)),
        "hessian_products": torch.tensor(float(products * oracle.tasks)),
    }


def move_upper(upper: UpperVariable, sums: Sums, run: Run, lr: float | None = None) -> dict[str, float]:
    """x along minus the mean hypergradient (`lr`: this step's size, where the solver has one); a step's last act. Returns its metrics."""
    direction = tree.scaled(1 / run.tasks, sums["direction"])
    metrics = mean_sums(sums, MEANS, run.tasks)
    metrics["hypergradient_norm"] = float(tree.dot(direction, direction).sqrt())
    return metrics | upper.move(direction, run.step, run.project_upper, lr)
