"""Accuracy against the number of classes learned, as a file and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bomemeta.problems.continual_report import new_figure, png_of

PREFIX = "accuracy_classes_"
# What is reported at every number of classes, by the name that the engine gives it, and how the
# image calls it.
CURVES = {"test_": "held-out images", "test_trajectory_": "images of the trajectory"}


def metric_name(classes: int) -> str:
    return f"{PREFIX}{classes:03d}"


def files(
    metrics: Mapping[str, float], about: Mapping[str, Any], ceiling: str | None
) -> dict[str, bytes]:
    """`accuracy_classes.json` and `accuracy_classes.png` from a run's final metrics; nothing where
    these are not there.

    `ceiling`: the metric of the i.i.d. pass over the longest trajectories.
    """
    curves = {
        label: {
            int(name.removeprefix(prefix + PREFIX)): (
                value,
                metrics.get(name.replace("accuracy", "ci95")),
            )
            for name, value in metrics.items()
            if name.startswith(prefix + PREFIX)
        }
        for prefix, label in CURVES.items()
    }
    if not all(curves.values()):
        return {}
    shuffled = metrics.get(ceiling) if ceiling is not None else None
    rows = {
        label: [
            {"classes": classes, "accuracy": value, "ci95": interval}
            for classes, (value, interval) in curve.items()
        ]
        for label, curve in curves.items()
    }
    content = {**about, "curves": rows} | (
        {"shuffled_accuracy": shuffled} if shuffled is not None else {}
    )
    return {
        "accuracy_classes.json": (json.dumps(content, indent=2) + "\n").encode(),
        "accuracy_classes.png": _curve(curves, shuffled),
    }


def _curve(
    curves: Mapping[str, Mapping[int, tuple[float, float | None]]], shuffled: float | None
) -> bytes:
    """PNG: accuracy with its 95 % interval over test trajectories, on held-out images and on those
    of the trajectory.
    """
    figure, axes = new_figure("online, class after class")
    for label, curve in curves.items():
        classes = list(curve)
        values = [100 * value for value, _ in curve.values()]
        half = [100 * (interval or 0.0) for _, interval in curve.values()]
        axes.errorbar(classes, values, yerr=half, marker="o", capsize=3, label=label)
    if shuffled is not None:
        axes.plot(
            [classes[-1]],
            [100 * shuffled],
            marker="*",
            markersize=12,
            linestyle="none",
            label="held-out, order shuffled",
        )
    axes.set_xlabel("classes learned")
    axes.set_ylabel("accuracy on all of them, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    return png_of(figure)
