"""What a stream's accuracies come to. a[i, j] is the accuracy on task j after task i, T the number
of tasks learned.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
PREFIX = "accuracy_task_"


def metric_name(task: int) -> str:
    return f"{PREFIX}{task:02d}"


def matrix_of(history: Sequence[Mapping[str, float]]) -> Matrix:
    """[milestones, tasks]; NaN where a task's data had not been appended yet."""
    names = sorted(
        (name for name in history[-1] if name.startswith(PREFIX)),
        key=lambda name: int(name.removeprefix(PREFIX)),
    )
    return np.array([[metrics.get(name, np.nan) for name in names] for metrics in history])


def scores(matrix: Matrix, chance: Sequence[float]) -> dict[str, float]:
    """The field's metrics, over the T tasks learned so far; those that compare tasks want T of 2 or
    more.

    acc = mean_j a[T-1, j],  ft = mean_j a[j, j],  nbt = mean_j (a[j, j] - a[T-1, j]):  ft = acc +
    nbt fm  = mean_{j < T-1} (max_{i < T-1} a[i, j] - a[T-1, j])          CTN's forgetting measure
    bwt = mean_{j < T-1} (a[T-1, j] - a[j, j]) fwt = mean_{j > 0} (a[j-1, j] - chance_j)

    What was not measured (NaN) is left out of fm and fwt; without any, there is no fwt.
    """
    t = len(matrix)
    learned = matrix[:, :t]
    own, last = learned.diagonal(), learned[-1]
    found = {"acc": last.mean(), "ft": own.mean(), "nbt": (own - last).mean()}
    if t > 1:
        found |= {
            "fm": (np.nanmax(learned[:-1, :-1], 0) - last[:-1]).mean(),
            "bwt": (last - own)[:-1].mean(),
        }
        next_task = learned.diagonal(1) - np.asarray(chance)[1:t]
        if not np.isnan(next_task).all():
            found["fwt"] = np.nanmean(next_task)
    return {name: float(value) for name, value in found.items()}


def matrix_file(matrix: Matrix, about: Mapping[str, Any]) -> bytes:
    """JSON; null where nothing was measured."""
    rows = [[None if np.isnan(value) else value for value in row] for row in matrix.tolist()]
    return (json.dumps({**about, "matrix": rows}, indent=2) + "\n").encode()


def heat_map(matrix: Matrix, title: str) -> bytes:
    """PNG: one row per task learned, one column per task tested."""
    figure, axes = new_figure(title)
    shown = axes.imshow(100 * matrix, vmin=0, vmax=100, cmap="viridis", origin="upper")
    if matrix.size <= 100:  # numbers in larger tables could not be read
        for (i, j), value in np.ndenumerate(matrix):
            axes.text(
                j,
                i,
                "" if np.isnan(value) else f"{100 * value:.0f}",
                ha="center",
                va="center",
                color="black" if value > 0.6 else "white",
                fontsize=8,
            )
    axes.set_xlabel("tested on task")
    axes.set_ylabel("after task")
    figure.colorbar(shown, label="accuracy, %")
    return png_of(figure)


def curve(matrix: Matrix, title: str) -> bytes:
    """PNG: the mean accuracy on the tasks learned so far, and that on the task just learned."""
    figure, axes = new_figure(title)
    learned = np.arange(1, len(matrix) + 1)
    axes.plot(
        learned,
        [100 * row[:k].mean() for k, row in zip(learned, matrix, strict=True)],
        marker="o",
        label="all tasks so far",
    )
    axes.plot(
        learned, 100 * matrix.diagonal(), marker="s", linestyle="--", label="the task just learned"
    )
    axes.set_xlabel("tasks learned")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    return png_of(figure)


def new_figure(title: str) -> tuple[Any, Any]:
    """A figure and its axes."""
    # Without pyplot, which keeps figures and a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def png_of(figure: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
