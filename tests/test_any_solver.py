"""Every shipped config with persistent lower variables runs with every solver, by `solver.name=`
alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import toy

import bomemeta
from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import LearnerOptions

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
