"""Records to table.json, table.md and figure.png: the same rows once as numbers, once to be read,
once to be looked at.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

from bomemeta.environment import environment_line
from bomemeta.reproduce.experiment import Cell, Column, Experiment, Record, Records, Table
from bomemeta.reproduce.folder import Folder


def write(
    folder: Folder, experiment: Experiment, records: Records, identity: dict[str, Any]
) -> None:
    """Tables and figure of the runs that are done."""
    tables = experiment.tables(records)
    missing = [run.name for run in experiment.runs if run.name not in records]
    result = {
        **identity,
        "title": experiment.title,
        "source": experiment.source,
        "runs_missing": missing,
        "tables": [_as_json(table) for table in tables],
        "notes": list(experiment.notes),
        "diverged": {
            name: record.diverged for name, record in records.items() if record.diverged is not None
        },
        "environments": _environments(records.values()),
    }
    folder.write("table.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    folder.write("table.md", markdown(result, tables))
    folder.write("figure.png", _figure(experiment, records))


def markdown(result: dict[str, Any], tables: Sequence[Table]) -> str:
    """table.md of what is in table.json."""
    length = f"{result['length']} version, seed {result['seed']}"
    lines = [
        f"# {result['title']}",
        "",
        f"{result['source']}. `bomemeta reproduce {result['experiment']}`, {length}.",
    ]
    for table in tables:
        lines += ["", f"**{table.title}**", "", *table_lines(table)]
    for run, reason in result["diverged"].items():
        lines += ["", f"`{run}` diverged ({reason}): its rows stand where it did."]
    if result["runs_missing"]:
        lines += ["", f"Not done yet, and missing above: {', '.join(result['runs_missing'])}."]
    lines += [line for note in result["notes"] for line in ("", note)]
    lines += [
        line
        for found in result["environments"]
        for line in ("", f"{environment_line(found)}, one thread.")
    ]
    return "\n".join(lines) + "\n"


def table_lines(table: Table) -> list[str]:
    """The table as Markdown; a bar within a cell is written `\\|`."""
    rows = [
        [_text(cell, column) for cell, column in zip(row, table.columns, strict=True)]
        for row in table.rows
    ]
    cells = [[column.name for column in table.columns], ["---"] * len(table.columns), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]


def _text(cell: Cell, column: Column) -> str:
    if cell is None:
        return "-"
    # The column's name says that it is in percent.
    return cell if isinstance(cell, str) else format(cell, column.format).removesuffix("%")


def _as_json(table: Table) -> dict[str, Any]:
    names = [column.name for column in table.columns]
    return {
        "title": table.title,
        "rows": [dict(zip(names, row, strict=True)) for row in table.rows],
    }


def _environments(records: Any) -> list[dict[str, Any]]:
    """Each once, in the order of the runs."""
    found: list[dict[str, Any]] = []
    record: Record
    for record in records:
        if record.environment not in found:
            found.append(record.environment)
    return found


def _figure(experiment: Experiment, records: Records) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)  # no display, no pyplot, no state of the process
    experiment.draw(figure, records)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=120)
    return written.getvalue()
