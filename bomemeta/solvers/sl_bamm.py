"""sl-BAMM: single-loop bilevel optimisation with an averaged lower objective, for lower levels that
are convex or better.

Liu, Liu, Yao, Zeng, Zhang, "Averaged Method of Multipliers for Bi-Level Optimization without
Lower-Level Strong Convexity", ICML 2023.

    psi = mu f + (1 - mu) g                        strongly convex in y where f is, whatever g is
    d_y = grad_y psi                               y <- P_Y(y - beta d_y)
    d_v = (d2psi/dy2) v - grad_y f                 v <- v - eta d_v             v_0 = 0
    d_x = grad_x f - (d2psi/dxdy) v                x <- P_X(x - alpha d_x)

v is the multiplier of grad_y psi = 0: at its solution d_x is the gradient of f(x, argmin psi(x,
.)). Over N separable tasks each task has its own y_i and v_i, and d_x is a mean over tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.implicit import MEANS, adjoint_sums, move_upper
from bomemeta.core.inner import gradient_steps
from bomemeta.core.oracle import G, Hessian, Oracle, Psi
from bomemeta.core.solver import (
    KernelResult,
    LowerGroups,
    LowerStates,
    Reduced,
    Run,
    StepResult,
    mean_sums,
)
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.errors import ConfigError
from bomemeta.registry import solvers
from bomemeta.solvers.pacing import Paced
from bomemeta.solvers.upper_options import UpperSteps

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]

# The powers of mu_k in eta_k and in alpha_k. Source: the authors' code, whose three schedules these
# are.
POWERS = {"s1": (2, 7), "s2": (1, 5), "s3": (0, 3)}


class Rates(NamedTuple):
    """One step's numbers."""

    mu: float
    lower: float  # beta
    aux: float  # eta
    upper: float  # alpha


@solvers.register("sl_bamm")
@dataclass(frozen=True, kw_only=True)
class SLBAMM(Paced, UpperSteps):
    """Single-loop solver for lower levels that need not be strongly convex (sl-BAMM, Liu et al.,
    ICML 2023).

    The schedules are the paper's, with beta = `lower_lr` and k from 0:

        mu_k = mu (k+1)^(-1/p),  eta_k = beta (k+1)^(-tau/2) mu_k^a,  alpha_k = beta (k+1)^(-3 tau/2) mu_k^b
        s1: a, b = 2, 7      s2: 1, 5      s3: 0, 3

    What the run tends to is the solution at its last mu, which is O(mu) from the bilevel problem's
    own: p = 10 hardly lowers mu where that matters. `gradient_mu` freezes mu in psi alone; the authors'
    released script has .1 there, and `aux_step: cauchy`. Where the lower level is strongly convex,
    `schedule: constant` with `mu: 0` has no such error. A v that belongs to a y at the edge of its
    admissible set is not the multiplier of that constraint: solutions are taken as interior.

    Fresh tasks have no v of an earlier step: y is adapted on g by `adapt_steps`, v solved by
    `aux_steps` Cauchy steps from 0 at that y (with psi's Hessian, so that mu > 0 damps an
    ill-conditioned one), and then x takes its step.
    """

    schedule: Literal["s1", "s2", "s3", "constant"] = (
        "s3"  # of mu, and of the two step sizes below where they are not given
    )
    mu: Annotated[float, Field(ge=0, lt=1)] = (
        0.9  # at step 0; constant: at every step, and 0 makes psi = g
    )
    gradient_mu: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # mu of psi where it is another than that of the step sizes; none: the same
    )
    p: Positive = 10.0
    tau: Annotated[float, Field(ge=0)] = 1 / 40
    lower_lr: Positive = 0.1  # beta
    aux_lr: Positive | None = (
        None  # eta; none: the schedule's, or with schedule: constant `lower_lr`
    )
    upper_lr: Positive | None = None  # alpha; none: the schedule's
    order: Literal["jacobi", "gauss_seidel"] = (
        "jacobi"  # all steps from the old point, or each from the newest
    )
    aux_step: Literal["scheduled", "cauchy"] = (
        "scheduled"  # v's step: eta, or the exact line search along d_v, per task
    )
    adapt_steps: Count = 10  # fresh tasks: steps of size `lower_lr` on g
    aux_steps: Count = 5  # fresh tasks: Cauchy steps of v

    def __post_init__(self) -> None:
        if self.schedule == "constant" and self.upper_lr is None:
            raise ConfigError(
                "solver.upper_lr: schedule: constant has no step size of its own for x; give one, such as 0.05"
            )
        if self.schedule != "constant" and self.mu == 0:
            raise ConfigError(
                f"solver.mu: got 0; the step sizes of schedule {self.schedule} are powers of mu. Set solver.schedule=constant"
            )

    def rates(self, step: int) -> Rates:
        """mu and the step sizes at a step, counted from 0."""
        if self.schedule == "constant":
            mu, aux, upper = self.mu, self.lower_lr, 0.0
        else:
            k = step + 1
            mu = self.mu * k ** (-1 / self.p)
            for_aux, for_upper = POWERS[self.schedule]
            aux = self.lower_lr * k ** (-self.tau / 2) * mu**for_aux
            upper = self.lower_lr * k ** (-3 * self.tau / 2) * mu**for_upper
        return Rates(
            mu if self.gradient_mu is None else self.gradient_mu,
            self.lower_lr,
            aux if self.aux_lr is None else self.aux_lr,
            upper if self.upper_lr is None else self.upper_lr,
        )

    def start_upper(self, upper: Params, steps: int) -> UpperVariable:
        return self.moved_by(self.rates(0).upper, upper, steps)

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        return gradient_steps(
            oracle,
            start or oracle.init_lower(),
            self.adapt_steps if steps is None else steps,
            self.lower_lr,
        )

    def joint_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        rates = self.rates(run.step)
        sums, lower = self._asked(run, rates)
        return StepResult(lower, {"mu": rates.mu, **move_upper(upper, sums, run, rates.upper)})

    def lower_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        """The same question as in a joint step: y and v move."""
        rates = self.rates(run.step)
        sums, lower = self._asked(run, rates)
        return StepResult(lower, {"mu": rates.mu, **mean_sums(sums, MEANS, run.tasks)})

    @property
    def lower_step_size(self) -> float:
        return self.lower_lr

    def kept(self, at: Params) -> LowerGroups:
        return {"v": tree.zeros_like(at)}

    def _asked(self, run: Run, rates: Rates) -> Reduced:
        kernel = (
            episode if not run.persistent else jacobi if self.order == "jacobi" else gauss_seidel
        )
        return run(kernel, rates=rates)


def psi(mu: float) -> Psi:
    """psi's terms for the oracle, g last. With mu = 0 f is left out, not weighted by 0: it would
    cost its gradient.
    """
    return (("upper", mu), ("lower", 1 - mu)) if mu > 0 else G


def jacobi(
    solver: SLBAMM, oracle: Oracle, lower: LowerGroups | None, *, rates: Rates
) -> KernelResult:
    """Kernel for tasks that persist: all three directions at the old (y, v)."""
    y, v = _state(oracle, lower)
    at = oracle.adjoint(y, v, *psi(rates.mu))
    eta: float | Tensor = rates.aux
    if solver.aux_step == "cauchy":
        eta = _line_search(oracle.hessian(y, terms=psi(rates.mu)), at.residual, rates.aux)
    moved = oracle.project_lower(tree.axpy(-rates.lower, at.lower, y))
    sums = adjoint_sums(oracle, at, v, oracle.hessian_products)
    return KernelResult(sums, {"y": moved, "v": tree.axpy(-eta, at.residual, v)})


def gauss_seidel(
    solver: SLBAMM, oracle: Oracle, lower: LowerGroups | None, *, rates: Rates
) -> KernelResult:
    """Kernel for tasks that persist: y moves, then v at the new y, then d_x is taken at both. More
    evaluations than `jacobi`.
    """
    y, v = _state(oracle, lower)
    terms = psi(rates.mu)
    slopes = oracle.gradients(*((loss, y) for loss, _ in terms))
    for (_, weight), slope in zip(terms, slopes, strict=True):
        y = tree.axpy(-rates.lower * weight, slope.lower, y)
    y = oracle.project_lower(y)
    system = oracle.system(y, v, terms)
    residual = tree.axpy(-1.0, system.right.lower, system.image)
    eta = (
        _line_search(system.hessian, residual, rates.aux)
        if solver.aux_step == "cauchy"
        else rates.aux
    )
    v = tree.axpy(-eta, residual, v)
    products = (
        oracle.hessian_products
    )  # the residual after v's step comes with the cross product for nothing
    at = oracle.adjoint(y, v, *terms, gradient=False)
    return KernelResult(adjoint_sums(oracle, at, v, products), {"y": y, "v": v})


def episode(
    solver: SLBAMM, oracle: Oracle, lower: LowerGroups | None, *, rates: Rates
) -> KernelResult:
    """Kernel for fresh tasks: y on g, v from 0 at that y, and d_x at both."""
    y = solver.adapt(oracle, None)
    product = oracle.hessian(y, terms=psi(rates.mu))
    residual = tree.scaled(-1.0, oracle.upper(y).lower)  # at v = 0
    v = tree.zeros_like(y)
    for _ in range(solver.aux_steps):
        image = product(residual)
        eta = cauchy_step(residual, tree.dot_tasks(residual, image), rates.aux)
        v, residual = tree.axpy(-eta, residual, v), tree.axpy(-eta, image, residual)
    products = oracle.hessian_products
    return KernelResult(
        adjoint_sums(oracle, oracle.adjoint(y, v, *psi(rates.mu), gradient=False), v, products), {}
    )


def cauchy_step(residual: Params, curvature: Tensor, otherwise: float) -> Tensor:
    """eta = |r|^2 / r'Hr per task, [B], with `curvature` = r'Hr: minimises v'Hv/2 - b'v along -r.
    `otherwise` where r'Hr <= 0.
    """
    # r'Hr <= 0: psi is not convex along r (or r = 0, and any step will do), so there is no minimum
    # to go to
    convex = curvature > 0
    exact = tree.dot_tasks(residual, residual) / torch.where(
        convex, curvature, torch.ones_like(curvature)
    )
    return torch.where(convex, exact, torch.full_like(exact, otherwise))


def _line_search(hessian: Hessian, residual: Params, otherwise: float) -> Tensor:
    """`cauchy_step` along `residual`: one product, of which one number is needed."""
    return cauchy_step(residual, hessian.projected([residual])[:, 0, 0], otherwise)


def _state(oracle: Oracle, lower: LowerGroups | None) -> tuple[Params, Params]:
    if lower is not None:
        return lower["y"], lower[
            "v"
        ]  # v of a task that is met for the first time is 0, as every group but y
    y = oracle.init_lower()
    return y, tree.zeros_like(y)
