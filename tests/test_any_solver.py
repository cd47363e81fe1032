"""Every shipped config with persistent lower variables runs with every solver, by `solver.name=`
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import quadratics
import toy

import bomemeta
from bomemeta.core import tree
from bomemeta.core.oracle import Oracle, Term
from bomemeta.core.problem import Problem
from bomemeta.core.solver import KernelResult, LowerGroups, LowerStates, Run, Solver, StepResult
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import LearnerOptions
from bomemeta.solvers.lower_options import LowerOptions
from bomemeta.solvers.upper_options import UpperOptions

__all__ = ["toy"]

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    "data={dataset: toy_labelled}",
    "problem.train=40",
    "problem.validation=20",
    "problem.selection=10",
    "problem.shuffle=true",
]
CHOICES = {
    "analytic_bamm_convex": ["problem.dim_upper=3"],
    "analytic_lancbio_synthetic": ["problem.dim_upper=3", "problem.dim_lower=6"],
    "hyper_cleaning_mnist_bome": SMALL,
    "hyper_cleaning_fashion_lancbio": [*SMALL, "problem.selection=0"],
}
NAMES = [
    name
    for name in solvers.names()
    if solvers.get(name).__module__.startswith("bomemeta.")
    and not issubclass(solvers.get(name), LearnerOptions)
]


@pytest.mark.parametrize("config", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_config_runs_with_any_solver(config: str, name: str, tmp_path: Path) -> None:
    # Two steps with the other solver's step sizes: what is tested is that the keys fit, not that it
    # learns.
    overrides = [
        f"solver.name={name}",
        "steps=2",
        "workers=0",
        "log.tensorboard=false",
        f"output_dir={tmp_path / 'run'}",
    ]
    if "upper_lr" in solvers.get(name).__dataclass_fields__:
        overrides.append("solver.upper_lr=0.01")
    result = bomemeta.train(CONFIGS / f"{config}.yaml", [*CHOICES[config], *overrides])
    assert result.steps == 2
    assert all(math.isfinite(value) for value in result.metrics.values())


@pytest.mark.parametrize(
    "name", sorted(set(solvers.names()) & {"maml", "fomaml", "anil", "meta_sgd", "reptile"})
)
def test_solvers_that_adapt_networks_say_that_they_need_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(bomemeta.errors.ConfigError, match="y of Analytic does not start from x"):
        bomemeta.train(
            CONFIGS / "analytic_bamm_convex.yaml",
            [f"solver.name={name}", f"output_dir={tmp_path / 'run'}"],
        )


@dataclass(frozen=True, kw_only=True)
class AllSaid(LowerOptions, UpperOptions):
    """Two rounds a step, the second from the states that the first left; `run` is told everything."""

    inner_lr: float = 0.1

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        return start or oracle.init_lower()

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        now = self.in_step(run)
        _, lower = run(descend, now, upper.params, lower, keeps=run.persistent, twice=False)
        sums, lower = run(descend, now, upper.params, lower, run.persistent, twice=True)
        seen, _ = run(descend, replace(now, inner_lr=9.0), upper.params, lower, twice=False)
        metrics = {"seen": float(seen["value"])}
        return StepResult(
            lower, metrics | upper.move(sums["direction"], run.step, run.project_upper)
        )


@dataclass(frozen=True, kw_only=True)
class Short(AllSaid):
    """The same, and `run` knows it."""

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        run(descend, twice=False)
        sums, lower = run(descend, twice=True)
        looser = replace(self.in_step(run), inner_lr=9.0)
        seen, _ = run(descend, solver=looser, keeps=False, twice=False)
        metrics = {"seen": float(seen["value"])}
        return StepResult(
            lower, metrics | upper.move(sums["direction"], run.step, run.project_upper)
        )


@dataclass(frozen=True, kw_only=True)
class Calling(UpperOptions):
    """Leaves its steps to another solver."""

    other: ClassVar[Solver] = Short(lower_schedule="cosine", upper_lr=0.1)

    def adapt(self, oracle: Oracle, steps: int | None, start: Params | None = None) -> Params:
        return self.other.adapt(oracle, steps, start)

    def step(self, upper: UpperVariable, lower: LowerStates, run: Run) -> StepResult:
        return self.other.step(upper, lower, run.by(self.other))


def descend(
    solver: AllSaid, oracle: Oracle, lower: LowerGroups | None, *, twice: bool
) -> KernelResult:
    """Kernel."""
    at = lower["y"] if lower is not None else oracle.init_lower()
    for _ in range(1 + twice):
        at = tree.axpy(-solver.inner_lr, oracle.lower(at).lower, at)
    f = oracle.total(Term("upper", at), Term("lower", at))
    return KernelResult({"direction": f.upper, "value": f.values[0].sum()}, {"y": at})


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "persistent tasks": lambda: quadratics.small(3),
    "one shared y": lambda: quadratics.shared(2),
    "fresh tasks": lambda: toy.attached(bomemeta.FewShot(ways=3, shots=1, queries=2, width=4)),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_a_run_knows_what_a_solver_need_not_say(problem: Callable[[], Problem]) -> None:
    """Equal bits whether a solver passes itself, x, the states and `keeps`, or leaves them to `run`."""
    found = []
    for solver in (
        AllSaid(lower_schedule="cosine", upper_lr=0.1),
        Short(lower_schedule="cosine", upper_lr=0.1),
        Calling(upper_lr=0.1),
        Short(upper_lr=0.1),
    ):
        bench = toy.Bench(problem(), solver, 4)
        seen = [bench.advance().metrics["seen"] for _ in range(4)]
        states = [bench.lower.handles[task].tolist() for task in sorted(bench.lower.handles)]
        found.append((bench.x().tolist(), states, seen))
    keyword, short, calling, constant = found
    assert keyword == short == calling
    assert short != constant
