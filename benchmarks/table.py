"""The Markdown tables of docs/results.md and docs/performance.md from a folder of results.

    python -m benchmarks.table FOLDER

Takes every JSON file of `few_shot_accuracy` and of `few_shot_step` in the folder and prints what it
finds to standard output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "bome": "BOME, prototype head",
    "maml": "learn2learn MAML, second order",
    "fomaml": "learn2learn MAML, first order",
    "anil": "learn2learn ANIL",
}
Result = dict[str, Any]


def accuracy_table(results: Iterable[Result]) -> str:
    """One line per result: what was trained, its test accuracy in percent with the 95 % interval,
    and what it took.
    """
    lines = [
        "| episodes | filters | method | test accuracy, % | meta-steps | CPU minutes | step size | seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(
        results, key=lambda r: (r["dataset"], r["ways"], r["shots"], r["width"], -r["accuracy"])
    ):
        lines.append(
            f"| {r['dataset']} {r['ways']}-way {r['shots']}-shot | {r['width']} | {NAMES[r['method']]} "
            f"| {100 * r['accuracy']:.2f} ± {100 * r['ci95']:.2f} | {r['steps']:,} | {r['cpu_s'] / 60:.1f} "
            f"| {r['schedule']} | {r['seed']} |"
        )
    return "\n".join(lines)


def step_table(results: Sequence[Result]) -> str:
    """One line per contender of `few_shot_step`, one column per result: milliseconds, and in
    brackets how many strict floors that is.
    """
    results = sorted(results, key=lambda r: (r["threads"], r["filters"]))
    names = list(dict.fromkeys(name for r in results for name in r["over_floor"]))
    heads = [
        f"{r['filters']} filters, {r['threads']} {'thread' if r['threads'] == 1 else 'threads'}, {r['clock']}"
        for r in results
    ]
    lines = ["| contender | " + " | ".join(heads) + " |", "|" + "---|" * (len(heads) + 1)]
    for name in names:
        cells = [
            f"{r['milliseconds'][r['clock']][name]:.0f} ms ({r['over_floor'][name]:.2f})"
            if name in r["over_floor"]
            else "-"
            for r in results
        ]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    spreads = [f"±{100 * max(r['spread'][r['clock']].values()):.0f} %" for r in results]
    return "\n".join([*lines, "| largest spread | " + " | ".join(spreads) + " |"])


def hardware_lines(results: Iterable[Result]) -> str:
    """The processor and the versions, each once."""
    found = {json.dumps(result["environment"], sort_keys=True) for result in results}
    environments = [json.loads(text) for text in sorted(found)]
    return "\n".join(
        f"{e['cores']} cores of {e['cpu']}; "
        + ", ".join(f"{name} {version}" for name, version in e["versions"].items())
        for e in environments
    )


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(argv).folder
    results: list[Result] = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    accuracies = [result for result in results if "accuracy" in result]
    steps = [result for result in results if "over_floor" in result]
    parts = [accuracy_table(accuracies)] if accuracies else []
    parts += [step_table(steps)] if steps else []
    text = "\n\n".join([*parts, hardware_lines(accuracies + steps)])
    print(text)
    return text


if __name__ == "__main__":
    main()
