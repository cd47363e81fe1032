"""Learnable l2 on 20 Newsgroups by the protocol of the BOME paper (Liu et al., NeurIPS 2022),
beside controls without a learned x.
"""

from __future__ import annotations

from typing import Any

from bomemeta.reproduce.curves import draw_curves, legend, mark
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
from bomemeta.reproduce.plain import PlainDescent

# Equal to configs/l2_newsgroups_bome.yaml; a test compares them.
BASE: dict[str, Any] = {
    "problem": {"name": "regularisation"},
    "data": {"dataset": "twenty_newsgroups"},
    "solver": {
        "name": "bome", "inner_steps": 10, "inner_lr": 100.0, "lower_lr": 100.0, "lower_momentum": 0.9, "upper_lr": 100.0,
        "upper_optimizer": "momentum", "momentum": 0.9, "phi": "gap", "eta": 1e-4,
    },
    "steps": 300,
}  # fmt: skip
# exp(-40) / (features classes) leaves the penalty below rounding.
NO_PENALTY = -40.0
# The authors' reference without regularisation.
PUBLISHED = {"test_accuracy": 0.7469, "test_loss": 0.8897}
PLAIN = {
    "unregularised": ("unregularised, train half", PlainDescent(upper=NO_PENALTY, lr=100.0)),
    "fixed_penalty": ("x = 0 throughout, train half", PlainDescent(upper=0.0, lr=100.0)),
    # The halves have as many rows, so the mean of their losses is the loss of all.
    "both_halves": (
        "control: no x, train + validation halves",
        PlainDescent(upper=NO_PENALTY, on_upper=0.5, on_lower=0.5, lr=100.0),
    ),
}
LABELS = {"bome": "BOME, T = 10", **{name: label for name, (label, _) in PLAIN.items()}}


def make(length: Length, seed: int) -> Experiment:
    full = length == "full"
    steps, plain_steps, solve_steps = (300, 1000, 1000) if full else (100, 200, 200)
    changes: dict[str, Any] = {
        "steps": steps,
        "seed": seed,
        "evaluation": {"solve_steps": solve_steps},
    }
    runs = [PaperRun(name="bome", label=LABELS["bome"], config=merged(BASE, **changes), points=25)]
    runs += [
        PaperRun(
            name=name,
            label=label,
            config=merged(BASE, **changes | {"steps": plain_steps}),
            points=25,
            plain=solver,
        )
        for name, (label, solver) in PLAIN.items()
    ]
    return Experiment(
        name="l2_newsgroups",
        title="Learnable l2 regularisation, 20 Newsgroups",
        source="Liu, Ye, Wright, Stone, Liu, NeurIPS 2022",
        runs=runs,
        tables=_tables,
        draw=_draw,
        notes=[
            f"130,107 log-decays x, 2.6 million numbers in y. `at its own y`: as the run left it. `solved`: after {solve_steps} "
            "more steps of y on g alone.",
            "BOME's y takes steps on the validation loss too: what it gains at its own y over the train half alone is to be "
            "read against the control, a plain classifier that is trained on both halves and has no x. `solved` does not settle "
            "it: it starts at BOME's y, and g is so flat that these steps do not forget the validation rows, as the control's "
            "own solved value shows. What settles it is `change of x`, the root mean square over its numbers: a log-decay that "
            "changes by c changes its penalty by the share c. In a step with lambda = 0 x does not move at all.",
        ],
    )


def _tables(records: Records) -> list[Table]:
    rows: list[list[Cell]] = []
    for name, record in records.items():
        final = record.final
        values = [final.get(f"{figure}{end}") for end in ("", "_solved") for figure in PUBLISHED]
        change = record.last["upper_change"] if name == "bome" else None
        zero = record.last.get("multiplier_zero_steps")
        rows.append(
            [LABELS[name], record.last["step"], *values, change, zero, record.last["seconds"]]
        )
    rows.append(
        ["published, unregularised", None, *PUBLISHED.values(), None, None, None, None, None]
    )
    columns = [
        Column("method"), Column("steps", "d"), Column("accuracy at its own y, %", ".2%"), Column("loss at its own y", ".4f"),
        Column("accuracy, solved, %", ".2%"), Column("loss, solved", ".4f"), Column("change of x", ".2g"),
        Column("steps with lambda = 0", ".0f"), Column("CPU seconds", ".0f"),
    ]  # fmt: skip
    return [Table(title="Test half, 3,766 rows", columns=columns, rows=rows)]


def _draw(figure: Any, records: Records) -> None:
    figure.set_size_inches(10, 4.5)
    panels = figure.subplots(1, 2)
    for axes, name, title in zip(panels, PUBLISHED, ("test accuracy", "test loss"), strict=True):
        draw_curves(axes, records, LABELS, "gradients", name)
        axes.set_title(f"{title} at the run's own y")
        mark(axes, {"published, unregularised": PUBLISHED[name]})
    if (
        "bome" in records
        and (solved := records["bome"].final.get("test_accuracy_solved")) is not None
    ):
        mark(panels[0], {"BOME, solved on g alone": solved})
    legend(figure, panels)
