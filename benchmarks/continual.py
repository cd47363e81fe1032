"""Permuted MNIST, 20 tasks in one pass: BOME beside CTN's own first-order update and experience
replay, each tuned.

    OMP_NUM_THREADS=1 python -m benchmarks.continual --data-root DATA --out results/continual

Replay has 6 settings, CTN 12 and BOME 8; they are tried on one seed that is not reported (100), and
the best by ACC is run on seeds 0 to 9. Seeds are the same for all, so differences are taken seed by
seed. What is done already is read and not run again, so the command can be stopped and given again.
Writes OUT/runs/*.json and OUT/table.json, and prints the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bomemeta import api
from bomemeta.environment import environment
from bomemeta.files import written_whole
from bomemeta.seeds import over_seeds

TUNING_SEED = 100
# By method: the config, and grids whose every combination of values is tried.
GRIDS: dict[str, tuple[str, list[dict[str, list[float]]]]] = {
    "er": ("continual_pmnist_er", [{"solver.inner_lr": [0.03, 0.06, 0.1, 0.15, 0.2, 0.3]}]),
    "ctn": (
        "continual_pmnist_ctn",
        [{"solver.inner_lr": [0.03, 0.06, 0.1, 0.15], "solver.upper_lr": [0.01, 0.03, 0.1]}],
    ),
    "bome": (
        "continual_pmnist_bome",
        [
            {"solver.lower_lr": [0.03, 0.06, 0.1], "solver.eta": [0.5, 2.0]},
            {"solver.lower_lr": [0.06], "solver.eta": [2.0], "solver.upper_lr": [0.01, 0.03]},
        ],
    ),
}
SCORES = ("acc", "nbt", "ft", "fm")
COUNTS = ("gradient_evaluations", "hessian_products")


def settings_of(grids: Sequence[Mapping[str, Sequence[float]]]) -> list[dict[str, float]]:
    return [
        dict(zip(grid, values, strict=True))
        for grid in grids
        for values in itertools.product(*grid.values())
    ]


def measured(
    out: Path, method: str, setting: Mapping[str, float], seed: int, common: Sequence[str]
) -> dict[str, Any]:
    """One run's scores; from its file where it was run before."""
    name = "-".join(
        [
            method,
            *(f"{key.partition('.')[2]}_{value:g}" for key, value in setting.items()),
            f"seed_{seed}",
        ]
    )
    file = out / "runs" / f"{name}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    overrides = [f"{key}={value}" for key, value in setting.items()]
    folder = out / "folders" / f"{name}-{time.time_ns()}"
    cpu = time.process_time()
    result = api.train(
        f"configs/{GRIDS[method][0]}.yaml",
        [*overrides, *common, f"seed={seed}", f"output_dir={folder}"],
    )
    if result.interrupted:
        raise SystemExit(f"{name} was stopped; the same command goes on with it")
    wanted = {key: value for key, value in result.metrics.items() if key in SCORES + COUNTS}
    record = {
        "method": method,
        "setting": dict(setting),
        "seed": seed,
        "cpu_s": time.process_time() - cpu,
        **wanted,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as stream:
        stream.write(json.dumps(record | {"environment": environment()}, indent=1).encode())
    print(
        f"{name}: "
        + ", ".join(f"{key} {100 * record[key]:.2f}" for key in SCORES)
        + f", {record['cpu_s']:.0f} CPU-s",
        flush=True,
    )
    return record


def differences(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """BOME minus each other method, seed by seed: means with 95 % half-widths, in per cent points."""
    found = {}
    for method in sorted(set(runs) - {"bome"}):
        pairs = zip(runs.get("bome", ()), runs[method], strict=False)
        each = [{key: 100 * (bome[key] - other[key]) for key in SCORES} for bome, other in pairs]
        if len(each) > 1:
            found[f"bome - {method}"] = over_seeds(each)
    return found


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| method | chosen | ACC | NBT | FT | FM | CPU-s |", "|---|---|---|---|---|---|---|"]
    for method, row in rows.items():
        chosen = ", ".join(
            f"{key.partition('.')[2]} {value:g}" for key, value in row["setting"].items()
        )
        cells = " | ".join(
            f"{100 * row['scores'][key]:.2f} ± {100 * row['scores'][f'{key}_ci95']:.2f}"
            for key in SCORES
        )
        lines.append(f"| {method} | {chosen} | {cells} | {row['scores']['cpu_s']:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=sorted(GRIDS), default=list(GRIDS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument(
        "--data-root", default=None, help="folder of mnist.npz; default: BOMEMETA_DATA"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="config keys for every run, as for bomemeta train",
    )
    options = parser.parse_args(argv)
    common = [f"problem.tasks={options.tasks}", "log.tensorboard=false", *options.set]
    if options.data_root is not None:
        common.append(f"data.root={options.data_root}")
    rows, all_runs = {}, {}
    for method in options.methods:
        tried = [
            measured(options.out, method, setting, TUNING_SEED, common)
            for setting in settings_of(GRIDS[method][1])
        ]
        best = max(tried, key=lambda run: float(run["acc"]))["setting"]
        runs = [measured(options.out, method, best, seed, common) for seed in range(options.seeds)]
        all_runs[method] = runs
        numbers = [
            {
                key: value
                for key, value in run.items()
                if isinstance(value, int | float) and key != "seed"
            }
            for run in runs
        ]
        rows[method] = {"setting": best, "scores": over_seeds(numbers), "tried": tried}
    gaps = differences(all_runs)
    about = {"tasks": options.tasks, "seeds": options.seeds, "environment": environment()}
    result = {**about, "methods": rows, "differences": gaps}
    with written_whole(options.out / "table.json") as stream:
        stream.write(json.dumps(result, indent=1).encode())
    print(table(rows))
    for name, scores in gaps.items():
        print(
            f"{name}: "
            + ", ".join(
                f"{key.upper()} {scores[key]:+.2f} ± {scores[f'{key}_ci95']:.2f}" for key in SCORES
            )
        )
    return result


if __name__ == "__main__":
    main()
