"""Continual learning: BOME beside the field's methods on several streams, each method tuned by as many
settings, then over seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.continual --data-root DATA --out results/continual            CTN's protocol
    OMP_NUM_THREADS=1 python -m benchmarks.continual --protocol perm rot seq --out results/protocols     Mammoth's streams, cut short

`ctn` is permuted MNIST, 20 tasks in one pass, as CTN's authors have it: BOME beside CTN's own first-order
update and experience replay. `perm`, `rot` and `seq` are the streams of configs/continual_mammoth_*.yaml, task-incremental,
with `--tasks` tasks of `--samples` samples; all methods have the same network, batches and `--memory` samples in memory: one
reservoir of the whole stream, and for CTN's objective an equal share for each task.

Settings are tried on one seed that is not reported (100), and the best by ACC is run on seeds 0, 1, ..., the same for all
methods; where one of them diverges, the next best. `--default` takes each method's first setting that diverges on no seed,
untuned. What is done already is read and not run again, so the command can be stopped and given again. Writes
OUT/runs/*.json, OUT/table.md and OUT/table.json; means, differences and ranks are `bomemeta compare`'s.
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
from bomemeta.compare.entries import Entry
from bomemeta.compare.statistics import compare
from bomemeta.compare.tables import as_json, markdown
from bomemeta.environment import environment, environment_line
from bomemeta.errors import DivergenceError
from bomemeta.files import written_whole

TUNING_SEED = 100
Grids = list[dict[str, list[float]]]
STEP = "solver.inner_lr"
STEPS: Grids = [{STEP: [0.1, 0.03, 0.06, 0.2, 0.15, 0.3, 0.02, 0.01]}]
PLAIN = ["solver.name=lower_only"]
CONTROLLED = [
    "problem.method=ctn",
    "problem.objective=ctn",
    "problem.memory_total=null",
    "problem.rounds=1",
]
# By method of CTN's protocol: the config, and grids whose every combination of values is tried.
CTN_GRIDS: dict[str, tuple[str, Grids]] = {
    "bome": (
        "continual_pmnist_bome",
        [
            {"solver.lower_lr": [0.03, 0.06, 0.1], "solver.eta": [0.5, 2.0]},
            {"solver.lower_lr": [0.06], "solver.eta": [2.0], "solver.upper_lr": [0.01, 0.03]},
        ],
    ),
    "er": ("continual_pmnist_er", [{STEP: [0.03, 0.06, 0.1, 0.15, 0.2, 0.3]}]),
    "ctn": (
        "continual_pmnist_ctn",
        [{STEP: [0.03, 0.06, 0.1, 0.15], "solver.upper_lr": [0.01, 0.03, 0.1]}],
    ),
}
# By method of the other streams: keys over the stream's config, and eight settings, the first the default.
METHODS: dict[str, tuple[list[str], Grids]] = {
    "bome": (
        [*CONTROLLED, "solver.name=bome", "solver.inner_steps=2", "solver.inner_lr=0.03"],
        [
            {
                "solver.lower_lr": [0.06, 0.1],
                "solver.eta": [2.0, 1.0],
                "solver.upper_lr": [0.1, 0.01],
            }
        ],
    ),
    "ctn": (
        [*CONTROLLED, "solver.name=ctn"],
        [{STEP: [0.1, 0.03, 0.06, 0.2], "solver.upper_lr": [0.1, 0.01]}],
    ),
    "er": (["problem.objective=er", *PLAIN], STEPS),
    "er_ace": (["problem.objective=er_ace", *PLAIN], STEPS),
    "derpp": (
        ["problem.objective=derpp", *PLAIN],
        [{STEP: [0.1, 0.03, 0.06, 0.2], "problem.der_alpha": [0.5, 1.0]}],
    ),
    "agem": (["problem.objective=finetune", "solver.name=agem"], STEPS),
    "ewc": (
        ["problem.objective=ewc", *PLAIN],
        [{STEP: [0.1, 0.03, 0.06, 0.2], "problem.ewc_weight": [100.0, 10.0]}],
    ),
    "finetune": (["problem.objective=finetune", *PLAIN], STEPS),
}
PROTOCOLS = ("ctn", "perm", "rot", "seq")
SCORES = ("acc", "nbt", "ft", "fm")
COUNTS = ("gradient_evaluations", "hessian_products")


def settings_of(grids: Sequence[Mapping[str, Sequence[float]]]) -> list[dict[str, float]]:
    return [
        dict(zip(grid, values, strict=True))
        for grid in grids
        for values in itertools.product(*grid.values())
    ]


def method_of(
    protocol: str, method: str, options: argparse.Namespace
) -> tuple[str, list[str], list[dict[str, float]]]:
    """The config, the keys over it, and the settings to try."""
    if protocol == "ctn":
        config, grids = CTN_GRIDS[method]
        return config, [f"problem.tasks={options.tasks or 20}"], settings_of(grids)
    keys, grids = METHODS[method]
    tasks = 5 if protocol == "seq" else options.tasks or 5
    size = [
        f"problem.tasks={tasks}",
        f"problem.samples_per_task={options.samples}",
        f"problem.test_samples_per_task={options.samples}",
        f"problem.memory_total={options.memory}",
        f"problem.memory_per_task={options.memory // tasks}",
        f"problem.semantic_per_task={max(options.memory // tasks // 5, 1)}",
        "problem.protocol=task_incremental",
        "problem.batch=10",
        "problem.replay=64",
    ]
    return f"continual_mammoth_{protocol}_mnist", [*size, *keys], settings_of(grids)


def measured(
    out: Path, name: str, config: str, keys: Sequence[str], setting: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """One run's scores; from its file where it was run before."""
    reported = [f"{key.partition('.')[2]}_{value:g}" for key, value in setting.items()]
    name = "-".join([name, *reported, f"seed_{seed}"])
    file = out / "runs" / f"{name}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    overrides = [f"{key}={value}" for key, value in setting.items()]
    folder = out / "folders" / f"{name}-{time.time_ns()}"
    cpu = time.process_time()
    own = [f"seed={seed}", f"output_dir={folder}"]
    record: dict[str, Any] = {"setting": dict(setting), "seed": seed, "environment": environment()}
    try:
        result = api.train(f"configs/{config}.yaml", [*keys, *overrides, *own])
        if result.interrupted:
            raise SystemExit(f"{name} was stopped; the same command resumes it")
        record |= {key: value for key, value in result.metrics.items() if key in SCORES + COUNTS}
    except DivergenceError as error:
        record["diverged"] = str(error)
    record["cpu_s"] = time.process_time() - cpu
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as stream:
        stream.write(json.dumps(record, indent=1).encode())
    scores = ", ".join(f"{key} {100 * record[key]:.2f}" for key in SCORES if key in record)
    print(f"{name}: {scores or 'diverged'}, {record['cpu_s']:.0f} CPU-s", flush=True)
    return record


def entry_of(
    protocol: str, method: str, options: argparse.Namespace, common: Sequence[str]
) -> tuple[Entry, dict[str, float]]:
    """The method's figures by seed, and its setting."""
    config, keys, settings = method_of(protocol, method, options)
    name, keys = f"{protocol}-{method}", [*keys, *common]
    order = settings
    if not options.default:
        tried = [measured(options.out, name, config, keys, each, TUNING_SEED) for each in settings]
        tried.sort(key=lambda run: float(run.get("acc", -1)), reverse=True)
        order = [run["setting"] for run in tried]
    for setting in order:  # the best, but where a seed diverges with it the next best
        runs = []
        for seed in range(options.seeds):
            runs.append(measured(options.out, name, config, keys, setting, seed))
            if "diverged" in runs[-1]:
                break
        else:
            break
    else:
        raise SystemExit(f"{name}: diverged with every setting; the last: {runs[-1]['diverged']}")
    seeds = {
        seed: {key: 100 * run[key] for key in SCORES}
        | {key: run[key] for key in (*COUNTS, "cpu_s") if key in run}
        for seed, run in enumerate(runs)
    }
    return Entry(method, seeds, {}, runs[0]["environment"]["versions"]), setting


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, default=["ctn"])
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=None)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=None, help="ctn: 20, perm and rot: 5")
    parser.add_argument("--samples", type=int, default=500, help="of a task, perm, rot and seq")
    parser.add_argument("--memory", type=int, default=200, help="slots, perm, rot and seq")
    parser.add_argument("--default", action="store_true", help="nothing is tuned")
    parser.add_argument(
        "--data-root", default=None, help="folder of mnist.npz; default: BOMEMETA_DATA"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for every run")
    options = parser.parse_args(argv)
    common = ["log.tensorboard=false", *options.set]
    if options.data_root is not None:
        common.append(f"data.root={options.data_root}")
    parts, tables, chosen = [], {}, {}
    for protocol in options.protocol:
        there = CTN_GRIDS if protocol == "ctn" else METHODS
        methods = [name for name in options.methods or there if name in there]
        found = {method: entry_of(protocol, method, options, common) for method in methods}
        chosen[protocol] = {method: setting for method, (_, setting) in found.items()}
        if len(found) > 1:
            table = compare([entry for entry, _ in found.values()], (*SCORES, "cpu_s"))
            parts.append(f"## {protocol}\n\n{markdown(table)}")
            tables[protocol] = json.loads(as_json(table))
    where = environment()
    result = {"tables": tables, "settings": chosen, "environment": where}
    with written_whole(options.out / "table.json") as stream:
        stream.write(json.dumps(result, indent=1).encode())
    lines = [
        f"* {protocol}, {method}: {', '.join(f'`{key}` {value:g}' for key, value in setting.items())}"
        for protocol, settings in chosen.items()
        for method, setting in settings.items()
    ]
    text = "\n".join([*parts, *lines, f"* {environment_line(where)}"]) + "\n"
    with written_whole(options.out / "table.md") as stream:
        stream.write(text.encode())
    print(text)
    return result


if __name__ == "__main__":
    main()
