"""The result of a search: its rows, the best of them, and the files that say so."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.storage import Store, below
from bomemeta.tune.locations import REPORT_FILE, metrics_in, trial_run
from bomemeta.tune.spec import Search
from bomemeta.yaml_text import dump


@dataclass(frozen=True)
class Row:
    """One trial. `ended`: done, stopped (by the scheduler), diverged, failed, lost (more often than
    max_failures), or unfinished.
    """

    trial: int
    ended: str
    steps: int
    metric: float | None  # the metric at its last report
    values: dict[str, Any]
    metrics: dict[str, float]
    upper_sha256: str | None
    seconds: float
    run_dir: str  # below the search's folder
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    lineage: list[dict[str, Any]] = field(
        default_factory=list
    )  # which values held from which step on: several under PBT


@dataclass(frozen=True)
class SearchResult:
    """A finished or interrupted search. `best` and `best_config` are there where it is finished and
    a trial came to its end.
    """

    output_dir: Path | str  # a URI, where the tune file has one
    rows: list[Row]
    best: Row | None
    best_config: Path | str | None
    interrupted: bool

    @property
    def table(self) -> str:
        """The rows as Markdown, the best first."""
        return _table(self.rows)


def rows_of(results: Iterable[Any], search: Search, interrupted: bool) -> list[Row]:
    """From Tune's results, the best first: trials that came to their end by the metric, then the
    others by how far they came.
    """
    rows = [_row(result, search, interrupted) for result in results]
    sign = -1 if search.settings.mode == "max" else 1
    return sorted(
        rows,
        key=lambda row: (
            row.ended != "done",
            0 if row.ended == "done" else -row.steps,
            _order(row.metric, sign),
            row.trial,
        ),
    )


def write_outcome(output_dir: Path | str, search: Search, rows: list[Row]) -> SearchResult:
    """Writes best.yaml, results.md and, last, results.json, which says that the search is finished.

    Raises ConfigError where a trial found the search to be wrong; then nothing is written, so that
    it can resume when it is put right.
    """
    for row in rows:
        if row.ended == "wrong":
            raise ConfigError(f"trial {row.trial}: {row.reason}")
    best = rows[0] if rows and rows[0].ended == "done" and rows[0].metric is not None else None
    folder = Store.at(output_dir)
    if best is not None:
        folder.put("best.yaml", _best_text(search, best).encode())
    folder.put("results.md", (_heading(search) + _table(rows)).encode())
    record = {
        "metric": search.settings.metric,
        "mode": search.settings.mode,
        "best": best.trial if best else None,
        "rows": [asdict(row) for row in rows],
    }
    folder.put("results.json", (json.dumps(record, indent=2, default=str) + "\n").encode())
    return SearchResult(
        output_dir, rows, best, below(output_dir, "best.yaml") if best else None, interrupted=False
    )


def check_any(result: SearchResult) -> None:
    """Raises BomemetaError where no trial came to its end."""
    if result.best is None:
        first = next(
            (f"; trial {row.trial} {row.ended}: {row.reason}" for row in result.rows if row.reason),
            "",
        )
        raise BomemetaError(
            f"no trial came to its end with a metric{first}. The table is in {below(result.output_dir, 'results.md')}"
        )


def _row(result: Any, search: Search, interrupted: bool) -> Row:
    metrics = dict(result.metrics or {})
    name = Path(result.path).name
    ended = metrics.get("ended")
    if ended is None:
        ended = "lost" if result.error is not None else "unfinished" if interrupted else "stopped"
    metric = metrics.get(search.settings.metric)
    lineage = json.loads(metrics.get("lineage", "[]"))
    return Row(
        trial=int(name.rpartition("-")[2]),
        ended=ended,
        steps=int(metrics.get("steps", 0)),
        metric=metric if isinstance(metric, float) and math.isfinite(metric) else None,
        values=dict(result.config or {}),
        metrics=_metrics(result.checkpoint),
        upper_sha256=metrics.get("upper_sha256"),
        seconds=round(float(metrics.get("time_total_s", 0.0)), 3),
        run_dir=trial_run(name),
        reason=metrics.get("reason")
        or (str(result.error).strip().splitlines()[-1] if result.error is not None else None),
        notes=metrics.get("notes", "").splitlines(),
        lineage=lineage,
    )


def _metrics(checkpoint: Any) -> dict[str, float]:
    """What was reported with one of Tune's checkpoints."""
    if checkpoint is None:
        return {}
    report = Store(
        checkpoint.filesystem, checkpoint.path, f"the checkpoint in {checkpoint.path}"
    ).read(REPORT_FILE)
    metrics = metrics_in(json.loads(report)) if report is not None else {}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _order(metric: float | None, sign: int) -> float:
    return sign * metric if metric is not None else math.inf


def _best_text(search: Search, best: Row) -> str:
    config = search.trial_config(best.values).to_dict() | {"output_dir": None}
    lines = [
        f"# The best of {search.name}: trial {best.trial}, {search.settings.metric} {best.metric:.6g} after {best.steps} steps.",
        "# `bomemeta train` with this file repeats it to the same bits."
        if len(best.lineage) == 1
        else "# Its values changed on the way:",
    ]
    if len(best.lineage) > 1:
        lines += [
            f"#   from step {part['from_step']}: {json.dumps(part['values'])}"
            for part in best.lineage
        ]
        lines.append(
            "# This file has the last ones, so `bomemeta train` with it does not repeat the trial."
        )
    return "\n".join(lines) + "\n" + dump(config)


def _heading(search: Search) -> str:
    settings = search.settings
    return (
        f"# {search.name}\n\n{settings.mode}imum of `{settings.metric}`, scheduler {settings.scheduler}, seed {settings.seed}. "
        "Trials that came to their end are first, the best above.\n\n"
    )


def _table(rows: list[Row]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    head = ["trial", "ended", "steps", "metric", *keys, "seconds"]
    lines = [
        [
            str(row.trial),
            row.ended,
            str(row.steps),
            _short(row.metric),
            *(_short(row.values.get(key)) for key in keys),
            f"{row.seconds:.1f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    texts = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in [head, *lines]
    ]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {text} |" for text in [texts[0], rule, *texts[1:]]) + "\n"


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
