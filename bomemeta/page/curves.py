"""The charts of a run's log: what was learned, lambda and q, and where the time went."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from bomemeta.page import charts, html
from bomemeta.page.charts import Curve
from bomemeta.page.html import Html

# In the order in which a step does them.
PARTS = {"broadcast_s": "send x", "compute_s": "compute", "reduce_s": "add", "update_s": "move x"}
OF_TASK = re.compile(r"accuracy_task_\d+")
# What has a chart or a table of its own, or is a cost and no curve.
ELSEWHERE = {
    *PARTS, "step_s", "upper_loss", "lower_loss", "multiplier", "gap", "multiplier_zero_share", "gradient_evaluations", "hessian_products",
    "reduces", "bytes_reduced", "driver_bytes", "exchanged_bytes", "stationarity_gradient", "stationarity_gap", "hypergradient_norm",
    "residual", "upper_norm", "upper_update_norm", "learning_rate", "grad_upper_gap_norm", "grad_lower_gap_norm",
}  # fmt: skip
MOST_OTHERS = 8


def learning(curves: Mapping[str, Curve]) -> Html:
    """Losses, accuracies, and what measures the distance from a solution."""
    drawn = []
    pairs = {"upper loss f": "upper_loss", "lower loss g": "lower_loss"}
    drawn += _chart("Losses of the steps", pairs, curves)
    accuracies = [name for name in curves if "accuracy" in name and not OF_TASK.fullmatch(name)]
    first = next((name for name in accuracies if name.startswith("validation_")), None)
    ordered = sorted(accuracies, key=lambda name: name != first)
    if ordered:
        widths = curves.get(ordered[0].replace("accuracy", "ci95"))
        chosen = {name.replace("_", " "): curves[name] for name in ordered[:6]}
        drawn.append(
            html.figure(
                charts.lines("Accuracy", chosen, half_widths=widths, per_cent=True),
                "The band is the 95 % interval over the validation episodes." if widths else "",
            )
        )
    if "validation_loss" in curves:
        drawn += _chart("Loss of the validation tasks", {"loss": "validation_loss"}, curves)
    distances = {
        "K, part of the gradient": "stationarity_gradient", "K, part of q": "stationarity_gap",
        "hypergradient": "hypergradient_norm", "residual": "residual",
    }  # fmt: skip
    drawn += _chart("Distance from a solution", distances, curves)
    moves = {"|x|": "upper_norm", "step of x": "upper_update_norm", "learning rate": "learning_rate"}  # fmt: skip
    drawn += _chart("x and its steps", moves, curves)
    if not drawn:
        return html.section("Learning curves", html.paragraph("The log has no losses."))
    return html.section("Learning curves", html.figures(drawn))


def barrier(curves: Mapping[str, Curve]) -> Html:
    """lambda, q, and the gradients of q."""
    if "multiplier" not in curves and "gap" not in curves:
        message = "The solver has no lambda and no q: it follows the hypergradient in another way."
        return html.section("Lambda and q", html.paragraph(message))
    drawn = _chart("Lambda", {"lambda": "multiplier"}, curves)
    drawn += _chart("q, the lower problem's gap", {"q": "gap"}, curves)
    zero = curves.get("multiplier_zero_share")
    if zero is not None and any(zero.values):
        chart = charts.lines("Tasks with lambda = 0", {"share": zero}, per_cent=True)
        drawn.append(
            html.figure(chart, "Where lambda is 0 the lower problem has no say in x's step.")
        )
    gradients = {"|grad_x q|": "grad_upper_gap_norm", "|grad_y q|": "grad_lower_gap_norm"}
    drawn += _chart("Gradients of q", gradients, curves)
    return html.section("Lambda and q", html.figures(drawn))


def stream(curves: Mapping[str, Curve]) -> Html | None:
    """The accuracy on every task of a stream after each of them; None where there is no stream."""
    names = sorted((name for name in curves if OF_TASK.fullmatch(name)), key=_number)
    if not names:
        return None
    after = curves[names[0]].steps
    by_step = {
        name: dict(zip(curves[name].steps, curves[name].values, strict=True)) for name in names
    }
    rows = []
    for learned, step in enumerate(after):
        cells: list[str | Html] = [f"after task {learned} (step {step + 1})"]
        for name in names:
            value = by_step[name].get(step)
            cells.append("" if value is None else html.heat(value, f"{100 * value:.0f}"))
        rows.append(cells)
    header = ["accuracy in %", *(f"task {_number(name)}" for name in names)]
    return html.section(
        "Accuracy on every task",
        html.paragraph("Each row is the state after one task, each column the task tested.", "dim"),
        html.table(header, rows, "heat"),
    )


def time(curves: Mapping[str, Curve]) -> Html:
    """Seconds of a step by its parts, over the run and in the median."""
    whole = curves.get("step_s")
    parts = {label: curves[name] for name, label in PARTS.items() if name in curves}
    if whole is None or not parts:
        return html.section("Time per step", html.paragraph("The log has no times."))
    same = {label: curve for label, curve in parts.items() if curve.steps == whole.steps}
    drawn = []
    if same:
        chart = charts.stacked("Seconds per step", same, "s")
        longest = f"The longest step took {duration(max(whole.values))}; what is far beyond the usual is cut off at the top."
        drawn.append(html.figure(chart, longest, True))
    total = sum(whole.values)
    rows: list[Sequence[str | Html]] = [
        (
            label,
            f"{statistics.median(curve.values):.3g} s",
            f"{100 * sum(curve.values) / total:.0f} %" if total > 0 else "",
            html.bar(sum(curve.values) / total if total > 0 else 0.0),
        )
        for label, curve in parts.items()
    ]
    rows.append(("whole step", f"{statistics.median(whole.values):.3g} s", "", ""))
    caption = f"{len(whole.values)} steps took {duration(total)} together, without validations and checkpoints."
    return html.section(
        "Time per step",
        html.paragraph(caption, "dim"),
        html.joined(drawn),
        html.table(("part", "median", "share", ""), rows, "bars"),
    )


def others(curves: Mapping[str, Curve]) -> Html | None:
    """Metrics that have no place elsewhere: a user's own."""
    names = [
        name
        for name in curves
        if name not in ELSEWHERE and "accuracy" not in name and "ci95" not in name
        and name != "validation_loss"
    ]  # fmt: skip
    if not names:
        return None
    drawn = [
        html.figure(charts.lines(name, {name: curves[name]}))
        for name in sorted(names)[:MOST_OTHERS]
    ]
    left = len(names) - len(drawn)
    more = html.paragraph(f"{left} more are in metrics.jsonl.", "dim") if left > 0 else Html("")
    return html.section("Other metrics of the log", html.figures(drawn), more)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"  # fmt: skip


def _chart(title: str, names: Mapping[str, str], curves: Mapping[str, Curve]) -> list[Html]:
    chosen = {label: curves[name] for label, name in names.items() if name in curves}
    return [html.figure(charts.lines(title, chosen))] if chosen else []


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])
