"""The merely convex toy of the sl-BAMM paper (Liu et al., ICML 2023): g does not contain half of y.
Error of x against iterations.
"""

from __future__ import annotations

from typing import Any

from bomemeta.reproduce.curves import draw_curves, legend
from bomemeta.reproduce.experiment import (
    Cell,
    Column,
    Experiment,
    Length,
    PaperRun,
    Records,
    Table,
    merged,
)

# Equal to configs/analytic_bamm_convex.yaml; a test compares them.
BASE: dict[str, Any] = {
    "problem": {"name": "analytic", "case": "bamm_convex", "dim_upper": 100},
    "solver": {
        "name": "sl_bamm",
        "schedule": "s3",
        "mu": 0.9,
        "p": 10,
        "tau": 0.025,
        "lower_lr": 0.1,
    },
    "steps": 6000,
    "checkpoint": {"every_steps": 2000},
    "dtype": "float64",
}
DIMENSIONS = (10, 100, 1000)
# The curvature of g is 1 in y_1 and 0 in y_2. No step size helps the methods that take y from g
# alone.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sl_bamm": ("sl-BAMM, schedule s3", BASE["solver"]),
    "sl_bamm_script": (
        "sl-BAMM, as the released script: mu = .1 in psi, Cauchy steps of v",
        {**BASE["solver"], "gradient_mu": 0.1, "aux_step": "cauchy"},
    ),
    "bome": (
        "BOME, T = 10",
        {"name": "bome", "inner_steps": 10, "inner_lr": 0.1, "lower_lr": 0.1, "upper_lr": 0.1},
    ),
    "itd": ("ITD, T = 10", {"name": "itd", "inner_steps": 10, "inner_lr": 0.1, "upper_lr": 0.1}),
    "aid_cg": (
        "AID-CG, Q = 10",
        {"name": "aid_cg", "inner_steps": 10, "inner_lr": 0.1, "aux_steps": 10, "upper_lr": 0.1},
    ),
    "aid_neumann": (
        "AID-Neumann, K = 10",
        {
            "name": "aid_neumann",
            "inner_steps": 10,
            "inner_lr": 0.1,
            "aux_steps": 10,
            "upper_lr": 0.1,
        },
    ),
}
# Relative errors of x by the recursion of the published schedule s3. The authors' released script is
# another: it freezes mu = .1 in its gradients and takes Cauchy steps of v.
SCHEDULE = {1000: 7.43e-2, 3000: 1.37e-3, 6000: 9.09e-6}


def make(length: Length, seed: int) -> Experiment:
    most = (
        {"sl_bamm": 6000, "other": 6000}
        if length == "full"
        else {"sl_bamm": 6000, "sl_bamm_script": 6000, "other": 1000}
    )
    runs = [
        PaperRun(
            name=f"{method}_{dimension}",
            label=f"{label}, {dimension} dimensions",
            config=merged(
                BASE,
                problem={"dim_upper": dimension},
                solver=solver,
                steps=most.get(method, most["other"]),
                seed=seed,
            ),
            points=60,
        )
        for dimension in DIMENSIONS
        for method, (label, solver) in METHODS.items()
    ]
    return Experiment(
        name="bamm_toy",
        title="A lower level with many solutions: relative error of x",
        source="Liu, Liu, Yao, Zeng, Zhang, ICML 2023",
        runs=runs,
        tables=_tables,
        draw=_draw,
        notes=[
            "Relative error is |x - x*| / |x*| with x* = 1 in every number, from 0.01. g does not contain y_2, which x has to "
            "meet: a method that takes y from g alone leaves it where it started, and x settles between that and y_1's target. "
            "(AID-CG: A v = b has no solution.) sl-BAMM's error does not depend on the dimension, as every number does the "
            "same. The released script computes something else than the published schedule: mu is .1 in its gradients at "
            "every step, and v takes Cauchy steps. That variant is `solver: {gradient_mu: 0.1, aux_step: cauchy}`; x* does not "
            "move with mu here, so it does not show.",
        ],
    )


def _error(records: Records, name: str, step: int) -> float | None:
    if name not in records or records[name].last["step"] < step:
        return None
    value: float | None = records[name].at("step", step)["upper_relative_error"]
    return value


def _tables(records: Records) -> list[Table]:
    columns = [
        Column("dimensions", "d"), Column("method"), *(Column(f"after {step}", ".2e") for step in SCHEDULE),
        Column("CPU seconds", ".1f"),
    ]  # fmt: skip
    rows: list[list[Cell]] = []
    for dimension in DIMENSIONS:
        for method, (label, _) in METHODS.items():
            name = f"{method}_{dimension}"
            if name in records:
                errors = [_error(records, name, step) for step in SCHEDULE]
                rows.append([dimension, label, *errors, records[name].last["seconds"]])
    rows.append([100, "the recursion of the published s3", *SCHEDULE.values(), None])
    return [Table(title="Relative error of x", columns=columns, rows=rows)]


def _draw(figure: Any, records: Records) -> None:
    figure.set_size_inches(11, 4)
    panels = figure.subplots(1, len(DIMENSIONS), sharey=True)
    for axes, dimension in zip(panels, DIMENSIONS, strict=True):
        labels = {f"{method}_{dimension}": label for method, (label, _) in METHODS.items()}
        draw_curves(axes, records, labels, "step", "upper_relative_error", log=True)
        if dimension == 100:
            axes.plot(
                list(SCHEDULE),
                list(SCHEDULE.values()),
                "x",
                color="#D55E00",
                markersize=8,
                label="the recursion of the published s3",
            )
        axes.set_title(f"{dimension} dimensions")
    panels[0].set_ylabel("|x - x*| / |x*|")
    legend(figure, panels)
