"""The Markdown tables of docs/results.md from a folder of results.

    python -m benchmarks.table FOLDER

Takes every JSON file of `few_shot_accuracy` and of `step_ratio` in the folder and prints what it finds to standard output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

NAMES = {"bome": "BOME, prototype head", "maml": "learn2learn MAML, second order", "anil": "learn2learn ANIL"}
Result = dict[str, Any]


def accuracy_table(results: Iterable[Result]) -> str:
    """One line per result: what was trained, its test accuracy in percent with the 95 % interval, and what it took."""
    lines = [
        "| episodes | filters | method | test accuracy, % | meta-steps | CPU minutes | step size | seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(results, key=lambda r: (r["dataset"], r["ways"], r["shots"], r["width"], -r["accuracy"])):
        lines.append(
            f"| {r['dataset']} {r['ways']}-way {r['shots']}-shot | {r['width']} | {NAMES[r['method']]} "
            f"| {100 * r['accuracy']:.2f} ± {100 * r['ci95']:.2f} | {r['steps']:,} | {r['cpu_s'] / 60:.1f} "
            f"| {r['schedule']} | {r['seed']} |"
        )
    return "\n".join(lines)


def ratio_table(results: Iterable[Result]) -> str:
    """One line per width: times in milliseconds, then BOME over supervised."""
    lines = [
        "| filters | threads | clock | images | BOME per task, ms | BOME global, ms | supervised by task, ms "
        "| supervised NCHW batch, ms | loading, ms | per task / by task | global / by task | per task / batch | global / batch |",
        "|" + "---|" * 13,
    ]
    for result in results:
        for r in result["results"]:
            names = ("bome_per_task", "bome_global", "supervised_tasks", "supervised_batch", "load")
            times = [f"{r['milliseconds'][name]:.0f}" for name in names]
            ratios = [
                f"{r['ratios'][f'{bome}/{plain}']:.2f}"
                for plain in ("supervised_tasks", "supervised_batch")
                for bome in ("bome_per_task", "bome_global")
            ]
            setting = [str(r["width"]), str(result["threads"]), result["clock"], str(r["images"])]
            lines.append("| " + " | ".join([*setting, *times, *ratios]) + " |")
    return "\n".join(lines)


def hardware_lines(results: Iterable[Result]) -> str:
    """The processor and the versions, each once."""
    found = {json.dumps(result["environment"], sort_keys=True) for result in results}
    environments = [json.loads(text) for text in sorted(found)]
    return "\n".join(
        f"{e['cores']} cores of {e['cpu']}; " + ", ".join(f"{name} {version}" for name, version in e["versions"].items())
        for e in environments
    )


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(argv).folder
    results: list[Result] = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    accuracies = [result for result in results if "accuracy" in result]
    ratios = [result for result in results if "results" in result]
    parts = [accuracy_table(accuracies)] if accuracies else []
    parts += [ratio_table(ratios)] if ratios else []
    text = "\n\n".join([*parts, hardware_lines(accuracies + ratios)])
    print(text)
    return text


if __name__ == "__main__":
    main()
