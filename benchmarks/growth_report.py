"""What benchmarks/growth.py measured, as the tables and the figure of docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = {"bome": "BOME", "itd": "ITD", "aid_cg": "AID-CG"}


def figure(result: Mapping[str, Any], path: Path) -> None:
    """Six panels, log-log: dots are measured, lines are the model's, everything over the first
    point of BOME's sweep.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    page = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(page)
    panels = list(page.subplots(2, 3).flat)
    colours = {"bome": "C0", "itd": "C1", "aid_cg": "C2"}

    def of(sweep: str, solver: str = "bome") -> list[Mapping[str, Any]]:
        return [row for row in result[sweep] if row["solver"] == solver]

    def draw(
        axes: Any,
        rows: Sequence[Mapping[str, Any]],
        name: str,
        label: str,
        colour: str,
        first: float | None = None,
    ) -> None:
        values, over = [row["value"] for row in rows], first or rows[0][name]
        axes.plot(
            values,
            [row.get(f"predicted_{name}", row[name]) / over for row in rows],
            "-",
            lw=1,
            color=colour,
        )
        axes.plot(values, [row[name] / over for row in rows], "o", ms=4, label=label, color=colour)

    for sweep, axes, label in (
        ("tasks", panels[0], "tasks a step, N"),
        ("upper", panels[1], "numbers in x"),
        ("shards", panels[5], "shards, S"),
    ):
        draw(axes, of(sweep), "ms", "CPU time", "C7")
        draw(axes, of(sweep), "peak_bytes", "peak bytes of a shard", "C0")
        axes.set_xlabel(label)
    draw(panels[1], of("upper"), "bytes_reduced", "bytes reduced", "C4")
    for sweep, axes, label in (
        ("lower", panels[2], "numbers in y"),
        ("steps_network", panels[3], "inner steps, T (y a network)"),
    ):
        for solver, colour in colours.items():
            draw(
                axes,
                of(sweep, solver),
                "peak_bytes",
                f"peak bytes, {NAMES[solver]}",
                colour,
                of(sweep)[0]["peak_bytes"],
            )
        draw(axes, of(sweep), "ms", "CPU time, BOME", "C7")
        axes.set_xlabel(label)
    draw(panels[4], result["workers"], "ms", "wall time", "C7")
    draw(panels[4], result["workers"], "driver_bytes", "bytes to the driver", "C4")
    panels[4].set_xlabel(f"workers, W, on {result['environment']['cores']} cores")
    for reduce, colour in (("driver", "C4"), ("tree", "C5")):
        rows = [row for row in result["sums"] if row["reduce"] == reduce]
        draw(panels[5], rows, "driver_bytes", f"bytes to the driver, {reduce}", colour)
    for axes in panels:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        if axes in (panels[1], panels[2]):
            axes.set_xscale("log")
        else:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    panels[4].set_yticks([0.25, 0.5, 1, 2])
    page.supylabel("over the first point; dots measured, lines the cost model", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(path, dpi=90)


def tables(result: Mapping[str, Any]) -> str:
    """What docs/performance.md shows: in brackets what the model says, where it has constants;
    counts and bytes are equal.
    """
    found: list[str] = []

    def table(head: str, rows: Sequence[Sequence[object]]) -> None:
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        found.append("\n".join([head, "|---" * (head.count(" | ") + 1) + "|", *lines]))

    def peak(row: Mapping[str, Any]) -> str:
        return f"{_mib(row['peak_bytes'])} ({_mib(row['predicted_peak_bytes'])})"

    def times(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
        return f"{row['ratio']:.2f} ({row['predicted_ms'] / first['predicted_ms']:.2f})"

    few_shot = {"tasks": "N", "shards": "S", "steps_head": "T"}
    table(
        "| few-shot, head form | evaluations per task | kB reduced | peak of a shard, MiB | CPU time over the first | model off by |",
        [
            [
                f"{letter} = {row['value']}",
                f"{row['gradient_evaluations']:.0f}",
                _kb(row["bytes_reduced"]),
                peak(row),
                times(row, result[sweep][0]),
                _off(row),
            ]
            for sweep, letter in few_shot.items()
            for row in result.get(sweep, [])
        ],
    )
    if "upper" in result:
        table(
            "| numbers in x | kB reduced | peak of a shard, MiB | CPU time over the first | model off by |",
            [
                [
                    f"{row['value']:,}",
                    _kb(row["bytes_reduced"]),
                    peak(row),
                    times(row, result["upper"][0]),
                    _off(row),
                ]
                for row in result["upper"]
            ],
        )
    for sweep, name in (("steps_network", "T, y a network"), ("lower", "numbers in y")):
        if sweep not in result:
            continue
        of = {solver: [row for row in result[sweep] if row["solver"] == solver] for solver in NAMES}
        table(
            f"| {name} | evaluations + products per task: {', '.join(NAMES.values())} "
            + "".join(f"| {each}, peak MiB " for each in NAMES.values())
            + "".join(f"| {each}, CPU time " for each in NAMES.values())
            + "|",
            [
                [f"{rows[0]['value']:,}", ", ".join(_counts(row) for row in rows)]
                + [peak(row) for row in rows]
                + [times(row, of[row["solver"]][0]) for row in rows]
                for rows in zip(*of.values(), strict=True)
            ],
        )
    if "workers" in result:
        table(
            "| workers | kB to the driver | wall time over one worker's | model off by |",
            [
                [
                    row["value"],
                    _kb(row["driver_bytes"]),
                    times(row, result["workers"][0]),
                    _off(row),
                ]
                for row in result["workers"]
            ],
        )
    if "sums" in result:
        of = {
            way: [row for row in result["sums"] if row["reduce"] == way]
            for way in ("driver", "tree")
        }
        table(
            "| shards of a sum of 1,000,000 numbers | MB reduced | MB to the driver: driver, tree | wall ms: driver, tree |",
            [
                [
                    at["value"],
                    f"{at['bytes_reduced'] / 1000000.0:.1f}",
                    f"{at['driver_bytes'] / 1000000.0:.1f}, {tree['driver_bytes'] / 1000000.0:.1f}",
                    f"{at['ms']:.0f}, {tree['ms']:.0f}",
                ]
                for at, tree in zip(of["driver"], of["tree"], strict=True)
            ],
        )
    if "shared" in result:
        by: dict[str, dict[str, Mapping[str, Any]]] = {}
        for row in result["shared"]:
            short = {"inner_steps": "T", "subspace": "m", "aux_steps": "Q"}
            message = ", ".join(
                f"{short[key]} = {row[key]}"
                for key in short
                if key in row and row["solver"] != "sl_bamm"
            )
            by.setdefault(f"{row['solver']}{', ' if message else ''}{message}", {})[
                row["reduce"]
            ] = row
        table(
            "| one shared y | evaluations + products | reduces | kB reduced | kB to the driver: driver, tree, collective |",
            [
                [
                    name,
                    _counts(rows["driver"]),
                    f"{rows['driver']['reduces']:.0f}",
                    _kb(rows["driver"]["bytes_reduced"]),
                    ", ".join(_kb(row["driver_bytes"]) for row in rows.values()),
                ]
                for name, rows in by.items()
            ],
        )
    return "\n\n".join(found)


def _counts(row: Mapping[str, Any]) -> str:
    return f"{row['gradient_evaluations']:.0f} + {row['hessian_products']:.0f}"


def _off(row: Mapping[str, Any]) -> str:
    return f"{round(100 * row['difference']) or 0:+d} %".replace("+0 %", "0 %")


def _mib(size: float) -> str:
    return f"{size / 2**20:.{0 if size >= 2**27 else 1 if size > 2**20 else 2}f}"


def _kb(size: float) -> str:
    return f"{size / 1000:,.{0 if size >= 1e5 else 1}f}"
