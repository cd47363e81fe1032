"""A comparison as text: Markdown, JSON, a figure, and one self-contained HTML page."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import Any

from bomemeta.compare.statistics import Comparison, Difference, Mean, Row
from bomemeta.page import charts, html

HEADER = ("entry", "seeds", "mean", "rank", "difference", "win / tie / loss", "p (Holm)")


def cells(row: Row) -> tuple[str, ...]:
    """A row's cells, in the order of HEADER."""
    difference = row.difference
    return (
        row.label,
        str(row.mean.seeds),
        _with_interval(row.mean),
        "" if row.rank is None else f"{row.rank:.2f}",
        "" if difference is None else _with_interval(difference.mean, sign=True),
        "" if difference is None else _record(difference),
        "" if difference is None or difference.p is None else f"{difference.p:.2g}",
    )


def markdown(found: Comparison) -> str:
    """One table for each metric, and the notes."""
    lines = []
    for metric, rows in found.rows.items():
        lines += [_title(found, metric), ""]
        lines += [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows] + [""]
    return "\n".join(lines + [f"* {note}" for note in (*found.notes, METHOD)]) + "\n"


METHOD = (
    "± is the half-width of a 95 % interval by Student's t over seeds; differences are taken seed "
    "by seed; p is of the paired t test, corrected by Holm for all tests shown"
)


def as_json(found: Comparison) -> str:
    """Everything in the comparison, as JSON."""
    record = {
        "reference": found.reference,
        "less_is_better": [metric for metric in found.rows if found.less_is_better(metric)],
        "rows": {metric: [asdict(row) for row in rows] for metric, rows in found.rows.items()},
        "notes": found.notes,
    }
    return json.dumps(record, indent=1) + "\n"


def figure(found: Comparison, kind: str = "png") -> bytes:
    """Means with their intervals, one panel for each metric. `kind`: png or svg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = max(len(rows) for rows in found.rows.values())
    drawing = Figure(figsize=(7, (0.8 + 0.32 * entries) * len(found.rows)), layout="constrained")
    FigureCanvasAgg(drawing)
    for number, (metric, rows) in enumerate(found.rows.items()):
        axes: Any = drawing.add_subplot(len(found.rows), 1, number + 1)
        for height, row in enumerate(reversed(rows)):
            width = row.mean.half_width or 0.0
            axes.errorbar(row.mean.value, height, xerr=width, fmt="o", color="#0072B2", capsize=3)
        axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
        axes.set_xlabel(f"{metric} ({_better(found, metric)} is better)")
        axes.grid(axis="x", alpha=0.25)
    out = io.BytesIO()
    drawing.savefig(out, format=kind, dpi=150)
    return out.getvalue()


def page(found: Comparison) -> str:
    """One HTML page that needs nothing beside it: for each metric the table and the figure, and the
    notes.
    """
    parts = []
    for metric, rows in found.rows.items():
        means = [(row.label, row.mean.value, row.mean.half_width or 0.0) for row in rows]
        better = f"{_better(found, metric)} is better"
        table = html.table(HEADER, [(html.long(first), *rest) for first, *rest in map(cells, rows)])
        drawing = charts.intervals(metric, means, better)
        caption = f"{better.capitalize()}; differences from {found.reference}."
        parts.append(
            html.section(
                metric, html.paragraph(caption, "dim"), table, html.figure(drawing, alone=True)
            )
        )
    entries = len(next(iter(found.rows.values())))
    return html.document(
        "bomemeta compare",
        html.joined(["<h1>Comparison of runs</h1>"]),
        html.paragraph(f"{entries} entries; the reference is {found.reference}.", "dim"),
        *parts,
        html.section("Notes", html.listing([*found.notes, METHOD])),
    )


def _title(found: Comparison, metric: str) -> str:
    return f"### {metric}: {_better(found, metric)} is better; differences from {found.reference}"


def _better(found: Comparison, metric: str) -> str:
    return "less" if found.less_is_better(metric) else "more"


def _with_interval(mean: Mean, sign: bool = False) -> str:
    value = f"{mean.value:+.4g}" if sign else f"{mean.value:.4g}"
    return value if mean.half_width is None else f"{value} ± {mean.half_width:.2g}"


def _record(difference: Difference) -> str:
    return f"{difference.wins} / {difference.ties} / {difference.losses}"
