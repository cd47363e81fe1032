"""BOME: bilevel optimisation with a dynamic barrier on the value-function gap; first order, memory
independent of T.

Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel Optimization Made Easy: A Simple First-Order Approach",
NeurIPS 2022.

    y_T     = y after T gradient steps on g(x, .), started at the current y, held constant
    q       = g(x, y) - g(x, y_T)
    grad q  = [ grad_x g(x, y) - grad_x g(x, y_T) ; grad_y g(x, y) ]
    lambda  = max( (phi - <grad f, grad q>) / |grad q|^2, 0 )
    (x, y) <- (x, y) - (upper_lr, lower_lr) * (grad f + lambda grad q)

Over N separable tasks f, g and q are means over tasks; inner products over the lower blocks are
averaged with 1/N, so that N = 1 is the paper and repeating every task changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.barrier import Barrier, Phi, barrier, stationarity
from bomemeta.core.inner import rule_steps
from bomemeta.core.lower_moves import LowerOptimizer, LowerRule
from bomemeta.core.oracle import Oracle, Term
from bomemeta.core.solver import (
    KernelResult,
    LowerGroups,
    LowerStates,
    Run,
    StepResult,
    Sums,
    mean_sums,
)
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.registry import solvers
from bomemeta.solvers.lower_options import LowerOptions, named_rule
from bomemeta.solvers.pacing import evaluations, groups_of
from bomemeta.solvers.upper_options import PacedOptions

# T_eval of `examine`: K measured with the training T cannot see the bias that comes from T being
# finite.
EXAMINE_FACTOR = 10
# And no more than so many, or than T: what is to take no longer than a step or two.
EXAMINE_MOST = 1000

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


@solvers.register("bome")
@dataclass(frozen=True, kw_only=True)
class BOME(LowerOptions, PacedOptions):
    """First-order bilevel optimisation with a dynamic barrier (Liu et al., NeurIPS 2022).

    Tasks whose y persists take one joint step, as in the paper. Fresh tasks are first adapted
    (`adapt_steps` on g), then take `barrier_steps` steps in y alone, then x takes its step: a
    single joint step from a cold y says little about x. `barrier: per_task` computes lambda_i from
    task i's lower block alone and then needs one vector in x instead of two.
    """

    scheduled: ClassVar[str] = "lower_lr"

    inner_steps: Annotated[int, Field(ge=1)] = 10  # T
    inner_lr: Positive = 0.1  # alpha, the step of the inner loop
    lower_lr: Positive = 0.1  # the step of y along grad f + lambda grad q
    barrier: Literal["global", "per_task"] = "global"
    phi: Phi = "grad_norm"
    eta: Annotated[float, Field(gt=0)] = 0.5
    inner_optimizer: LowerOptimizer = "sgd"  # of the inner loop, anew in each
    inner_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    adapt_steps: Count = 5  # fresh tasks: steps on g before anything is measured
    barrier_steps: Count = 5  # fresh tasks: R, steps of y alone along grad f + lambda_i grad g
    scale_barrier_steps: bool = (
        True  # divide those by 1 + lambda_i: their length then stays of the order of the gradients'
    )
    diagnose_every: Count = (
        25  # per_task barrier: how often the full grad q is measured for the log (0: never)
    )

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        steps = self.adapt_steps + self.inner_steps if steps is None else steps
        return self.solved(oracle, start or oracle.init_lower(), steps)

    def joint_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        alone = run.persistent and run.tasks == 1 and self.barrier == "global"
        full = self.barrier == "global" or (
            self.diagnose_every > 0 and run.step % self.diagnose_every == 0
        )
        kernel = measure_and_move if alone else measure if run.persistent else episode
        sums, lower = run(kernel, full=full)
        metrics = mean_sums(sums, MEANS, run.tasks)
        if full:
            whole = _whole_barrier(self, sums, run.tasks)
            metrics |= whole.metrics
        if self.barrier == "global":
            metrics |= {
                "multiplier": float(whole.barrier.multiplier),
                "multiplier_zero_share": float(whole.barrier.multiplier == 0),
            }
            weight = whole.barrier.weights()
            direction = tree.axpy(weight, sums["grad_upper_gap"], sums["grad_upper_f"])
            if run.persistent and not alone:
                _, lower = run(move_lower, weight=float(weight))
        else:
            direction = sums["direction"]
        metrics |= upper.move(tree.scaled(1 / run.tasks, direction), run.step, run.project_upper)
        return StepResult(lower, metrics)

    def lower_step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        sums, lower = run(move_lower_alone)
        return StepResult(lower, mean_sums(sums, MEANS, run.tasks))

    @property
    def lower_step_size(self) -> float:
        return self.lower_lr

    def solved(self, oracle: Oracle, at: Params, steps: int | None = None) -> Params:
        """y_T: the inner loop from `at`, whose optimiser begins anew; `steps` None: T."""
        rule = self._inner_rule()
        state, steps = rule.state(None, at), self.inner_steps if steps is None else steps
        return rule_steps(oracle, at, steps, self.inner_lr, rule, state)[0]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._inner_rule()

    def _inner_rule(self) -> LowerRule:
        name = named_rule("inner", self.inner_optimizer, self.inner_momentum)
        return LowerRule(name, self.inner_momentum)

    def examine(
        self, upper: UpperVariable, lower: LowerStates, run: Run, steps: int | None = None
    ) -> dict[str, float]:
        if steps == 0:
            return {}
        longer = replace(self, inner_steps=self._examine_steps(steps))
        kernel = measure if run.persistent else episode
        sums, _ = run(kernel, solver=longer, keeps=False, full=True)
        metrics = _whole_barrier(longer, sums, run.tasks).metrics
        return {
            f"{name}_long": metrics[name] for name in ("stationarity_gradient", "stationarity_gap")
        }

    def examined_steps(self, steps: int | None) -> tuple[int, int] | None:
        usual, taken = EXAMINE_FACTOR * self.inner_steps, self._examine_steps(steps)
        return (taken, usual) if steps is None and taken < usual else None

    def _examine_steps(self, steps: int | None) -> int:
        if steps is not None:
            return steps
        return min(EXAMINE_FACTOR * self.inner_steps, max(EXAMINE_MOST, self.inner_steps))


# Scalars that every kernel sums and the log shows as means over tasks.
MEANS = (
    "upper_loss",
    "lower_loss",
    "gap",
    "gradient_evaluations",
    "multiplier",
    "multiplier_zero_share",
)


def episode(solver: BOME, oracle: Oracle, lower: LowerGroups | None, *, full: bool) -> KernelResult:
    """Kernel for fresh tasks: adapt on g, keep a separate chain to y_T, move y by lower-only
    barrier steps, measure.
    """
    at = solver.adapt(oracle, solver.adapt_steps)
    solved = solver.solved(oracle, at)
    solved_value = oracle.lower(solved).value if solver.phi == "gap" else None
    for _ in range(solver.barrier_steps):
        local = _local_barrier(solver, oracle, at, solved_value)
        lr: float | Tensor = solver.lower_lr
        if solver.scale_barrier_steps:
            lr = solver.lower_lr / (1 + local.barrier.multiplier)
        at = oracle.project_lower(tree.axpy(-lr, local.direction, at))
    return _measure_at(solver, oracle, at, solved, full)


def measure(solver: BOME, oracle: Oracle, lower: LowerGroups | None, *, full: bool) -> KernelResult:
    """Kernel for tasks whose y persists: T inner steps from the current y, then f, q and their
    gradients at it.

    With the per-task barrier y is moved at once; with the global one its gradients wait for the
    multiplier (`move_lower`).
    """
    at = lower["y"] if lower is not None else oracle.init_lower()
    solved = solver.solved(oracle, at)
    result = _measure_at(solver, oracle, at, solved, full)
    waiting = {"y": at, **result.lower, **solver.lower_rule().state(lower, at)}
    if solver.barrier == "global":
        return KernelResult(result.sums, waiting)
    return KernelResult(result.sums, _moved(solver, oracle, waiting, waiting["direction"]))


def measure_and_move(
    solver: BOME, oracle: Oracle, lower: LowerGroups | None, *, full: bool
) -> KernelResult:
    """Kernel for the one task that there is, or the one y of all data: its sums are the whole barrier's,
    so y is moved at once and no gradient waits.
    """
    sums, waiting = measure(solver, oracle, lower, full=full)
    weight = float(_whole_barrier(solver, sums, 1).barrier.weights())
    return KernelResult(sums, move_lower(solver, oracle, waiting, weight=weight).lower)


def move_lower(solver: BOME, oracle: Oracle, lower: LowerGroups, *, weight: float) -> KernelResult:
    """Kernel: y <- y - lower_lr (grad_y f + lambda grad_y g), once lambda is known."""
    return KernelResult(
        {}, _moved(solver, oracle, lower, tree.axpy(weight, lower["grad_g"], lower["grad_f"]))
    )


def move_lower_alone(solver: BOME, oracle: Oracle, lower: LowerGroups | None) -> KernelResult:
    """Kernel: y alone along grad_y f + lambda_i grad_y g, with each task's own lambda_i, which wants
    y_T with phi = gap only.
    """
    groups = groups_of(solver, oracle, lower)
    at = groups["y"]
    solved_value = None
    if solver.phi == "gap":
        solved = solver.solved(oracle, at)
        solved_value = oracle.lower(solved).value
    local = _local_barrier(solver, oracle, at, solved_value)
    multiplier = local.barrier.multiplier
    sums: Sums = {
        "upper_loss": local.upper_value.sum(),
        "lower_loss": local.lower_value.sum(),
        "multiplier": multiplier.sum(),
        "multiplier_zero_share": (multiplier == 0).to(multiplier.dtype).sum(),
        "gradient_evaluations": evaluations(oracle),
    }
    return KernelResult(sums, _moved(solver, oracle, groups, local.direction))


class _Local(NamedTuple):
    barrier: Barrier  # per task, [B]
    direction: Params  # grad_y f + lambda_i grad_y g, computed in projection form
    upper_value: Tensor
    lower_value: Tensor
    grad_f: Params
    grad_g: Params


def _local_barrier(solver: BOME, oracle: Oracle, at: Params, solved_value: Tensor | None) -> _Local:
    """Each task's own barrier from its lower block alone. `solved_value` = g(x, y_T), needed for
    phi = gap.
    """
    f, g = oracle.gradients(("upper", at), ("lower", at))
    gap = g.value - solved_value if solved_value is not None else torch.zeros_like(g.value)
    inner, sq_norm = tree.dot_tasks(f.lower, g.lower), tree.dot_tasks(g.lower, g.lower)
    local = barrier(solver.phi, solver.eta, gap, inner, sq_norm)
    return _Local(
        local, tree.axpy(local.weights(), g.lower, f.lower), f.value, g.value, f.lower, g.lower
    )


def _measure_at(
    solver: BOME, oracle: Oracle, at: Params, solved: Params, full: bool
) -> KernelResult:
    """f, q and what the barrier needs at (x, y), as sums over tasks.

    `full`: both vectors in x, grad_x f and grad_x q. Per-task barrier: one vector, grad_x f + sum_i
    lambda_i grad_x q_i, the weights entering before the single pull-back.
    """
    groups: LowerGroups = {}
    sums: Sums = {}
    if full:
        f, q = oracle.totals(
            (Term("upper", at),), (Term("lower", at), Term("lower", solved, -1.0, in_y=False))
        )
        values, solved_value = (f.values[0], q.values[0]), q.values[1]
        grad_f, grad_g = f.lowers[0], q.lowers[0]
        sums = {"grad_upper_f": f.upper, "grad_upper_gap": q.upper}
        groups = {"grad_f": grad_f, "grad_g": grad_g}
    if solver.barrier == "per_task":
        # With phi = grad_norm lambda_i does not depend on g(x, y_T), which `total` then gives for
        # nothing.
        known = None if solver.phi == "grad_norm" else oracle.lower(solved).value
        local = _local_barrier(solver, oracle, at, known)
        weights = local.barrier.weights()
        combined = oracle.total(
            Term("upper", at),
            Term("lower", at, weights),
            Term("lower", solved, -weights, in_y=False),
        )
        values, solved_value = (combined.values[0], combined.values[1]), combined.values[2]
        grad_f, grad_g = local.grad_f, local.grad_g
        groups = {"direction": local.direction}
        sums |= {
            "direction": combined.upper,
            "multiplier": local.barrier.multiplier.sum(),
            "multiplier_zero_share": (local.barrier.multiplier == 0).to(values[0].dtype).sum(),
        }
    evaluations = torch.tensor(float(oracle.gradient_evaluations * oracle.tasks))
    scalars = {
        "upper_loss": values[0].sum(),
        "lower_loss": values[1].sum(),
        "gap": (values[1] - solved_value).sum(),
        "inner": tree.dot_tasks(grad_f, grad_g).sum(),
        "sq_lower_f": tree.dot_tasks(grad_f, grad_f).sum(),
        "sq_lower_gap": tree.dot_tasks(grad_g, grad_g).sum(),
        "gradient_evaluations": evaluations,
    }
    return KernelResult(scalars | sums, groups)


def _moved(solver: BOME, oracle: Oracle, lower: LowerGroups, direction: Params) -> LowerGroups:
    rule = solver.lower_rule()
    y, kept = rule.move(lower["y"], direction, solver.lower_lr, rule.state(lower, lower["y"]))
    return {"y": oracle.project_lower(y), **kept}


class _Whole(NamedTuple):
    barrier: Barrier  # one for all tasks, []
    metrics: dict[str, float]


def _whole_barrier(solver: BOME, sums: Sums, tasks: int) -> _Whole:
    """The barrier of the whole problem, F = mean_i f_i and q = mean_i q_i, from reduced sums.

    x-blocks are averaged BEFORE they are squared; inner products over the lower blocks are averaged
    with 1/N.
    """
    a, b = (
        tree.scaled(1 / tasks, sums["grad_upper_f"]),
        tree.scaled(1 / tasks, sums["grad_upper_gap"]),
    )
    gap, sq_upper_gap, sq_lower_gap = (
        sums["gap"] / tasks,
        tree.dot(b, b),
        sums["sq_lower_gap"] / tasks,
    )
    inner = tree.dot(a, b) + sums["inner"] / tasks
    sq_norm = sq_upper_gap + sq_lower_gap
    k = stationarity(tree.dot(a, a) + sums["sq_lower_f"] / tasks, gap, inner, sq_norm)
    metrics = {
        "grad_upper_gap_norm": float(sq_upper_gap.sqrt()),
        "grad_lower_gap_norm": float(sq_lower_gap.sqrt()),
        "stationarity_gradient": float(k.gradient),
        "stationarity_gap": float(k.gap),
    }
    return _Whole(barrier(solver.phi, solver.eta, gap, inner, sq_norm), metrics)
