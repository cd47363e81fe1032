"""What the experiments' figures share: curves over a cost, a colour per run, published values as
lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bomemeta.reproduce.experiment import Cost, Records

COST_LABELS: dict[Cost, str] = {
    "step": "steps of x",
    "gradients": "gradient evaluations (a Hessian product counts as 2)",
    "hessian_products": "Hessian products",
    "seconds": "CPU seconds, one thread",
}
# Okabe and Ito's colours, which colour-blind readers tell apart; then the same dashed.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def style(number: int) -> dict[str, Any]:
    """Line style of the run of this number."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3],
        "linewidth": 1.4,
    }


def draw_curves(
    axes: Any,
    records: Records,
    labels: Mapping[str, str],
    cost: Cost,
    figure: str,
    *,
    log: bool = False,
) -> None:
    """One curve per run of `labels` that is done and has the figure; a run's colour is its position in
    `labels`.
    """
    drawn = False
    for number, (name, label) in enumerate(labels.items()):
        if name not in records:
            continue
        across, up = records[name].series(cost, figure)
        if not up or across[-1] <= 0:  # it was not measured, or the run has no such cost
            continue
        axes.plot(across, up, label=label, **style(number))
        drawn = drawn or any(value > 0 for value in up)
    if log and drawn:
        axes.set_yscale("log")
    axes.set_xlabel(COST_LABELS[cost])
    axes.grid(alpha=0.25)


def mark(axes: Any, values: Mapping[str, float]) -> None:
    """Horizontal lines with their names at the right edge: published or closed-form values."""
    for name, value in values.items():
        axes.axhline(value, color="0.5", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            name, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
            ha="right", va="bottom", fontsize=7, color="0.35",
        )  # fmt: skip


def legend(figure: Any, panels: Sequence[Any]) -> None:
    """One legend for all panels, below them."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower center",
            ncols=min(len(found), 5),
            fontsize=8,
            frameon=False,
        )
