"""The learning curves of `few_shot_accuracy`, side by side: a figure, and a table of what each
method reached when.

    python -m benchmarks.few_shot_curves FOLDER --figure docs/figures/few_shot_curves.png

Takes every JSON file in the folder. A method that was run with several budgets has a curve for
each, since its step size falls over the budget; the last point of a curve is the test at its end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.table import NAMES, Result, hardware_lines

TICKS = (15, 30, 60, 120, 300, 600, 1200)  # CPU seconds
COLOURS = {"bome": "tab:blue", "maml": "tab:red", "fomaml": "tab:orange", "anil": "tab:green"}


class Point(NamedTuple):
    seconds: float  # CPU, one thread
    accuracy: float
    ci95: float


def curve(result: Result) -> list[Point]:
    points = [Point(each["cpu_s"], each["accuracy"], each["ci95"]) for each in result["curve"]]
    return [*points, Point(result["cpu_s"], result["accuracy"], result["ci95"])]


def table(results: Sequence[Result]) -> str:
    """One line per run: settings, where it ended, and the CPU seconds after which it was past
    second-order MAML's end.
    """
    lines = [
        "| episodes | method | seed | inner step, Adam's step | CPU minutes | meta-steps | test accuracy, % | past MAML's end after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        h = r["hyperparameters"]
        ends = [
            other for other in results if other["method"] == "maml" and other["ways"] == r["ways"]
        ]
        past = [
            point.seconds
            for point in curve(r)
            if ends and point.accuracy - point.ci95 > ends[0]["accuracy"]
        ]
        when = "-" if r["method"] == "maml" or not past else f"{past[0]:.0f} CPU-s"
        lines.append(
            f"| {r['ways']}-way {r['shots']}-shot | {NAMES[r['method']]} | {r['seed']} | {h['inner_lr']:g}, {h['upper_lr']:g} "
            f"| {r['cpu_s'] / 60:.1f} | {r['steps']:,} | {100 * r['accuracy']:.2f} ± {100 * r['ci95']:.2f} | {when} |"
        )
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    ways = sorted({result["ways"] for result in results})
    figure = Figure(figsize=(5.2 * len(ways), 3.8), layout="constrained")
    panels: Any = figure.subplots(1, len(ways), squeeze=False)[0]
    for axes, way in zip(panels, ways, strict=True):
        named: set[str] = set()
        for result in (result for result in results if result["ways"] == way):
            points, method = curve(result), result["method"]
            axes.errorbar(
                [point.seconds for point in points],
                [100 * point.accuracy for point in points],
                [100 * point.ci95 for point in points],
                color=COLOURS[method], marker=".", capsize=2, linewidth=1,
                label=None if method in named else NAMES[method],
            )  # fmt: skip
            named.add(method)
        axes.set_xscale("log")
        axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axes.set_xticks([], minor=True)
        axes.set_title(f"{way}-way {results[0]['shots']}-shot Omniglot")
        axes.set_xlabel("CPU seconds of one thread")
        axes.grid(True, alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figure", type=Path, help="where the figure goes")
    options = parser.parse_args(argv)
    found: list[Result] = [
        json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))
    ]
    results = sorted(
        found, key=lambda r: (r["ways"], r["method"] != "bome", r["method"], r["cpu_s"])
    )
    text = f"{table(results)}\n\n{hardware_lines(results)}"
    print(text)
    if options.figure is not None:
        draw(results, options.figure)
    return text


if __name__ == "__main__":
    main()
