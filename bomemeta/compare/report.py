"""A comparison as text: Markdown, JSON, a figure, and one self-contained HTML page."""

from __future__ import annotations

import html
import io
import json
from dataclasses import asdict
from typing import Any

from bomemeta.compare.statistics import Comparison, Difference, Mean, Row

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
    """One HTML page that needs nothing beside it: the tables, the figure, the notes."""
    tables = []
    for metric, rows in found.rows.items():
        head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADER)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells(row))}</tr>"
            for row in rows
        )
        title = html.escape(_title(found, metric).lstrip("# "))
        tables.append(f"<h2>{title}</h2><div><table><tr>{head}</tr>{body}</table></div>")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in (*found.notes, METHOD))
    drawing = figure(found, "svg").decode()
    drawing = drawing[drawing.index("<svg") :]
    return PAGE.format(tables="".join(tables), figure=drawing, notes=notes)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>bomemeta compare</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8886; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 1rem 0; background: white; }}
svg {{ max-width: 100%; height: auto; }}
</style>
<h1>Comparison of runs</h1>
{tables}
<figure>{figure}</figure>
<ul>{notes}</ul>
</html>
"""


def _title(found: Comparison, metric: str) -> str:
    return f"### {metric}: {_better(found, metric)} is better; differences from {found.reference}"


def _better(found: Comparison, metric: str) -> str:
    return "less" if found.less_is_better(metric) else "more"


def _with_interval(mean: Mean, sign: bool = False) -> str:
    value = f"{mean.value:+.4g}" if sign else f"{mean.value:.4g}"
    return value if mean.half_width is None else f"{value} ± {mean.half_width:.2g}"


def _record(difference: Difference) -> str:
    return f"{difference.wins} / {difference.ties} / {difference.losses}"
