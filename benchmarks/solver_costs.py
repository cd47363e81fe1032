"""What one outer step of each solver costs: counts, not times, of docs/solvers.md.

    python -m benchmarks.solver_costs

Problem `analytic` with four tasks whose y persist; T = I = Q = 10. Counts are per task and step,
means over two epochs of LancBiO, without the first step, in which a warm start is cold.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bomemeta import api
from bomemeta.errors import ConfigError
from bomemeta.registry import solvers
from bomemeta.report import Quiet

STEPS = 21  # the first, and two epochs of LancBiO
KEYS = {"inner_steps": 10, "aux_steps": 10, "inner_lr": 0.1, "upper_lr": 0.01}


class Counts(Quiet):
    """Keeps what each step says of its cost."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(metrics)

    def mean(self, name: str) -> float:
        """Over all steps but the first; 0 where the solver does not count it."""
        later = self.steps[1:]
        return sum(metrics.get(name, 0.0) for metrics in later) / len(later)


def counts(name: str) -> Counts | None:
    """The counts of the solver registered as `name`; None where it cannot solve `analytic`."""
    known = {field.name for field in fields(solvers.get(name))}
    solver = {"name": name, **{key: value for key, value in KEYS.items() if key in known}}
    found = Counts()
    with tempfile.TemporaryDirectory() as folder:
        config: dict[str, Any] = {
            "problem": {"name": "analytic", "case": "quadratic", "tasks": 4},
            "solver": solver,
            "steps": STEPS,
            "dtype": "float64",
            "log": {"tensorboard": False},
            "output_dir": f"{folder}/run",
        }
        try:
            api.train(config, listener=found)
        except ConfigError:
            return None
    return found


def table() -> list[str]:
    """The table's lines, as docs/solvers.md has them."""
    lines = ["| solver | gradients | Hessian products |", "|---|---|---|"]
    ours = [
        name for name in solvers.names() if solvers.get(name).__module__.startswith("bomemeta.")
    ]
    for name in ours:
        if (found := counts(name)) is not None:
            gradients, products = map(found.mean, ("gradient_evaluations", "hessian_products"))
            lines.append(f"| `{name}` | {gradients:g} | {products:g} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
