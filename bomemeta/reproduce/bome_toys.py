"""The three toys of the BOME paper (Liu et al., NeurIPS 2022), whose solutions are known."""

from __future__ import annotations

from typing import Any, NamedTuple

from bomemeta.reproduce.curves import style
from bomemeta.reproduce.experiment import (
    Cell,
    Column,
    Experiment,
    Length,
    PaperRun,
    Point,
    Record,
    Records,
    Table,
    merged,
)

# Equal to configs/analytic_minimax.yaml and configs/analytic_degenerate.yaml; a test compares them.
MINIMAX: dict[str, Any] = {
    "problem": {"name": "analytic", "case": "minimax"},
    "solver": {
        "name": "bome",
        "inner_steps": 10,
        "inner_lr": 0.05,
        "lower_lr": 0.05,
        "upper_lr": 0.05,
        "eta": 0.5,
    },
    "steps": 2000,
    "dtype": "float64",
}
DEGENERATE: dict[str, Any] = {
    "problem": {"name": "analytic", "case": "degenerate"},
    "solver": {
        "name": "bome",
        "inner_steps": 1,
        "inner_lr": 0.5,
        "lower_lr": 0.5,
        "upper_lr": 0.5,
        "eta": 0.5,
    },
    "steps": 2000,
    "dtype": "float64",
}
# The paper's script: the same constant step of 0.05 everywhere. (configs/analytic_coreset.yaml has
# others, which end nearer.)
CORESET = {**MINIMAX, "problem": {"name": "analytic", "case": "coreset"}, "steps": 5000}
STARTS = ((0.0, 3.0), (-3.0, 1.0), (3.5, -1.0))
POINTS = ((1.0, 3.0), (3.0, 1.0), (-2.0, 2.0), (-3.0, -2.0))  # that the coreset averages


class Known(NamedTuple):
    """A solution in closed form, in the order of `numbers`."""

    names: str
    numbers: tuple[float, ...]
    upper_loss: float


SOLUTIONS = {
    "coreset": Known("y", (1.8, 0.4), 0.72),
    "minimax": Known("x; y", (0.0, 0.0), 0.0),
    "degenerate": Known("x; y", (1.0, 1.0, 1.0), 0.0),
}
# Where a run starts, y for the coreset, x and y for the others.
LABELS = {
    "coreset_1": "from (0, 3)",
    "coreset_2": "from (-3, 1)",
    "coreset_3": "from (3.5, -1)",
    "minimax": "from (4; 4)",
    "degenerate": "from 0",
}


def make(length: Length, seed: int) -> Experiment:
    full = length == "full"
    runs = [
        PaperRun(
            name=f"coreset_{number}",
            label=f"coreset from {start}",
            config=merged(
                CORESET, problem={"start": list(start)}, steps=5000 if full else 1500, seed=seed
            ),
            points=250,
            variables=True,
        )
        for number, start in enumerate(STARTS, 1)
    ]
    for name, config, steps in (("minimax", MINIMAX, 1000), ("degenerate", DEGENERATE, 300)):
        changed = merged(config, seed=seed, **({} if full else {"steps": steps}))
        runs.append(
            PaperRun(
                name=name,
                label=name,
                config=changed,
                points=min(250, changed["steps"]),
                variables=True,
            )
        )
    return Experiment(
        name="bome_toys",
        title="BOME's toys against their closed forms",
        source="Liu, Ye, Wright, Stone, Liu, NeurIPS 2022",
        runs=runs,
        tables=_tables,
        draw=_draw,
        notes=[
            "Steps of 0.05 everywhere, T = 10, eta = 0.5 (degenerate: steps of 0.5, T = 1). f is at the run's own y. With "
            "constant steps y of the coreset ends about 0.03 from its solution; `bomemeta train analytic_coreset`, whose steps "
            "fall, ends within 0.005.",
        ],
    )


def _case(name: str) -> str:
    return name.partition("_")[0]


def _numbers(name: str, point: Point) -> list[float]:
    """The numbers that the closed form is about."""
    found = point["variables"]
    y: list[float] = found["lower"].get("y", [])
    return y if _case(name) == "coreset" else [*found["upper"]["x"], *y]


def _vector(numbers: list[float] | tuple[float, ...]) -> str:
    return f"({', '.join(f'{number:.4g}' for number in numbers)})"


def _row(name: str, record: Record) -> list[Cell]:
    known = SOLUTIONS[_case(name)]
    reached = _numbers(name, record.last)
    error = max(abs(a - b) for a, b in zip(reached, known.numbers, strict=True))
    return [
        f"{_case(name)}, {LABELS[name]}", record.last["step"], known.names, _vector(reached), _vector(known.numbers), error,
        record.last["upper_loss"], known.upper_loss,
    ]  # fmt: skip


def _tables(records: Records) -> list[Table]:
    columns = [
        Column("problem"), Column("steps", "d"), Column("numbers"), Column("reached"), Column("closed form"),
        Column("largest error", ".2g"), Column("f", ".4f"), Column("f in closed form", ".4f"),
    ]  # fmt: skip
    return [
        Table(
            title="Final values",
            columns=columns,
            rows=[_row(name, record) for name, record in records.items()],
        )
    ]


def _draw(figure: Any, records: Records) -> None:
    figure.set_size_inches(10, 7.5)
    ((plane, coreset), (minimax, degenerate)) = figure.subplots(2, 2)
    plane.plot(*zip(*POINTS, strict=True), "s", color="0.6", markersize=6, label="points")
    for number in range(len(STARTS)):
        name = f"coreset_{number + 1}"
        if name in records:
            label, points = LABELS[name], _known_points(records[name])
            track = [STARTS[number], *(tuple(_numbers(name, point)) for point in points)]
            plane.plot(*zip(*track, strict=True), label=label, **style(number + 1))
            plane.plot(*track[0], "o", color=style(number + 1)["color"], markersize=4)
            steps = [point["step"] for point in points]
            for i, dash in enumerate(("-", "--")):
                line = {**style(number + 1), "linestyle": dash}
                coreset.plot(
                    steps,
                    [_numbers(name, point)[i] for point in points],
                    label=f"y{i + 1} {label}",
                    **line,
                )
    plane.plot(*SOLUTIONS["coreset"].numbers, "*", color="#000000", markersize=12, label="solution")
    plane.set(title="coreset: y in the plane", xlabel="y1", ylabel="y2")
    _levels(coreset, "coreset: y", SOLUTIONS["coreset"].numbers)
    for name, axes, names in (
        ("minimax", minimax, ("x", "y")),
        ("degenerate", degenerate, ("x", "y1", "y2")),
    ):
        if name in records:
            points = _known_points(records[name])
            for i, letter in enumerate(names):
                line = {**style(i), "linestyle": ("-", "--", ":")[i]}
                axes.plot(
                    [point["step"] for point in points],
                    [_numbers(name, point)[i] for point in points],
                    label=letter,
                    **line,
                )
        _levels(axes, f"{name}: {', '.join(names)}", SOLUTIONS[name].numbers)
    for axes in (plane, coreset, minimax, degenerate):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)
        axes.grid(alpha=0.25)


def _known_points(record: Record) -> list[Point]:
    """Those with a y: at step 0 there is none yet."""
    return [point for point in record.curve if point["variables"]["lower"]]


def _levels(axes: Any, title: str, solution: tuple[float, ...]) -> None:
    for value in set(solution):
        axes.axhline(value, color="0.5", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(title=f"{title} (dashed: solution)", xlabel="steps")
