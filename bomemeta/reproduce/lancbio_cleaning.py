"""Data hyper-cleaning by LancBiO's protocol (Gao, Yang, Yuan, ICLR 2025), at equal Hessian products
and at equal time.
"""

from __future__ import annotations

from typing import Any

from bomemeta.reproduce.bome_cleaning import TITLES, DataName
from bomemeta.reproduce.curves import draw_curves, legend, mark
from bomemeta.reproduce.experiment import (
    Budget,
    Cell,
    Column,
    Cost,
    Experiment,
    Length,
    PaperRun,
    Record,
    Records,
    Table,
    merged,
)

# LancBiO's steps, of 1 + 1/m products each; the paper's 3,000 in the full version.
FULL, SHORT = 3000, 300
# The share of labels that are wrong, and test accuracies read off the paper's plots (+- 0.3
# points).
NOISE: dict[DataName, float] = {"mnist": 0.8, "fashion_mnist": 0.5}
# By the data's mean and deviation, or by the ones that the authors' loader has.
STANDARDISE: dict[DataName, bool | list[float]] = {"mnist": True, "fashion_mnist": [0.5, 0.5]}
PUBLISHED: dict[DataName, dict[str, float]] = {
    "mnist": {
        "lancbio": 0.8946, "subbio": 0.8932, "amigo_gd": 0.8932, "amigo_cg": 0.8901, "soba": 0.8921, "f2sa": 0.8875, "stocbio": 0.8719,
    },
    "fashion_mnist": {
        "lancbio": 0.8149, "subbio": 0.8144, "amigo_gd": 0.8137, "amigo_cg": 0.8126, "soba": 0.8137, "f2sa": 0.7925, "stocbio": 0.7982,
    },
}  # fmt: skip
PUBLISHED_RESIDUAL = {"lancbio": 1.5e-5, "amigo_cg": 1.1e-4, "subbio": 1e-2}


def base(data: DataName) -> dict[str, Any]:
    """Equal to configs/hyper_cleaning_*_lancbio.yaml; a test compares them."""
    return {
        "problem": {
            "name": "hyper_cleaning", "train": 5000, "validation": 5000, "selection": 0, "shuffle": False, "validation_from": "all",
            "standardise": STANDARDISE[data], "corruption": "shift", "noise": NOISE[data], "weights": "sigmoid", "ridge": 0.01, "blocks": 2,
        },
        "data": {"dataset": data},
        "solver": {"name": "lancbio", "subspace": 10, "inner_steps": 5, "inner_lr": 0.1, "upper_lr": 500.0},
        "steps": 3000,
        "dtype": "float64",
        "shards": 2,
    }  # fmt: skip


# I, Q and all steps are those of the authors' scripts; F2SA's are ours.
_Y_AND_X = {"inner_lr": 0.1, "upper_lr": 500.0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lancbio": ("LancBiO, m = 10, I = 5", base("mnist")["solver"]),
    "amigo_cg": (
        "AmIGO-CG, Q = 5, I = 10",
        {"name": "amigo_cg", **_Y_AND_X, "inner_steps": 10, "aux_steps": 5},
    ),
    "amigo_gd": (
        "AmIGO-GD, Q = 5, I = 10",
        {"name": "amigo_gd", **_Y_AND_X, "inner_steps": 10, "aux_steps": 5, "aux_lr": 0.05},
    ),
    "subbio": ("SubBiO, I = 5", {"name": "subbio", **_Y_AND_X, "inner_steps": 5, "aux_lr": 0.05}),
    "soba": ("SOBA", {"name": "soba", **_Y_AND_X, "aux_lr": 0.05}),
    "stocbio": (
        "stocBiO, Q = 10, I = 10",
        {"name": "stocbio", **_Y_AND_X, "inner_steps": 10, "aux_steps": 10, "aux_lr": 0.05},
    ),
    "f2sa": (
        "F2SA, I = 1",
        {
            "name": "f2sa",
            **_Y_AND_X,
            "inner_steps": 1,
            "lower_lr": 0.02,
            "penalty": 2.0,
            "penalty_growth": 0.01,
        },
    ),
}
OTHERWISE: dict[DataName, dict[str, dict[str, Any]]] = {
    "mnist": {},
    "fashion_mnist": {"amigo_cg": {"upper_lr": 100.0}},
}
FIGURES = {
    "test_accuracy": "test accuracy",
    "hypergradient_norm": "|hypergradient|",
    "residual": "|A v - b|",
}


def make(data: DataName, length: Length, seed: int) -> Experiment:
    steps = FULL if length == "full" else SHORT
    products = round(1.1 * steps)
    runs = [
        PaperRun(
            name=name,
            label=label,
            config=merged(
                base(data), solver=solver | OTHERWISE[data].get(name, {}), steps=steps, seed=seed
            ),
            # f2sa has no products: it takes all steps.
            budget=Budget("hessian_products", products) if name != "f2sa" else None,
            points=50,
        )
        for name, (label, solver) in METHODS.items()
    ]
    return Experiment(
        name=f"lancbio_{data.removesuffix('_mnist')}",
        title=f"Data hyper-cleaning, LancBiO's protocol, {TITLES[data]}, {NOISE[data]:.0%} of the labels wrong",
        source="Gao, Yang, Yuan, ICLR 2025",
        runs=runs,
        tables=lambda records: _tables(records, data, products),
        draw=lambda figure, records: _draw(figure, records, data),
        notes=[
            "5,000 training samples, 5,000 for validation drawn from all 60,000, sigmoid weights, ridge 0.01, full batch, float64; I "
            "steps of 0.1 in y, x's step 500 (AmIGO-CG on Fashion-MNIST: 100). Every method ends with the step that spends "
            f"{products:,} Hessian products or with step {steps:,}: one that takes more products per step takes fewer steps. The cross "
            "product, one per step for every method but F2SA, is not counted. Equal time is the CPU time (one thread, steps alone) of "
            "the fastest run. I and Q are the authors' scripts'; F2SA's settings are first choices. Published values are read off the "
            "paper's plots (accuracies +- 0.3 points), after 3,000 steps of LancBiO.",
        ],
    )


def _tables(records: Records, data: DataName, products: int) -> list[Table]:
    seconds = min(
        (record.last["seconds"] for record in records.values() if record.diverged is None),
        default=0.0,
    )
    rows = [_row(name, record, data, seconds) for name, record in records.items()]
    columns = [
        Column("method"), Column("steps", "d"), Column("products", ".0f"), Column("accuracy, %", ".2%"), Column("F1", ".4f"),
        Column("hypergradient", ".1e"), Column("residual", ".1e"), Column("accuracy at equal time, %", ".2%"),
        Column("residual at equal time", ".1e"), Column("CPU seconds", ".0f"),
        Column("published accuracy, %", ".2%"), Column("published residual", ".1e"),
    ]  # fmt: skip
    return [
        Table(
            title=f"At {products:,} Hessian products, and at {seconds:.1f} CPU seconds",
            columns=columns,
            rows=rows,
        )
    ]


def _row(name: str, record: Record, data: DataName, seconds: float) -> list[Cell]:
    last, timed = record.last, record.at("seconds", seconds)
    values = [
        last.get(figure) for figure in ("test_accuracy", "f1", "hypergradient_norm", "residual")
    ]
    return [
        METHODS[name][0], last["step"], last["hessian_products"] or None, *values, timed.get("test_accuracy"), timed.get("residual"),
        last["seconds"], PUBLISHED[data][name], PUBLISHED_RESIDUAL.get(name) if data == "mnist" else None,
    ]  # fmt: skip


def _draw(figure: Any, records: Records, data: DataName) -> None:
    figure.set_size_inches(12, 7.5)
    panels = figure.subplots(2, len(FIGURES), sharey="col")
    labels = {name: label for name, (label, _) in METHODS.items()}
    costs: tuple[Cost, ...] = ("hessian_products", "seconds")
    for line, cost in zip(panels, costs, strict=True):
        for axes, (name, title) in zip(line, FIGURES.items(), strict=True):
            draw_curves(axes, records, labels, cost, name, log=name != "test_accuracy")
            axes.set_title(title)
        mark(line[0], {"LancBiO, published, 3,000 steps": PUBLISHED[data]["lancbio"]})
    panels[0, 0].set_ylim(PUBLISHED[data]["lancbio"] - 0.25, PUBLISHED[data]["lancbio"] + 0.03)
    legend(figure, panels.flat)
