"""Data hyper-cleaning: BOME beside nine baselines, each tuned by as many trials, then over seeds at
equal gradient evaluations.

    OMP_NUM_THREADS=1 python -m benchmarks.hyper_cleaning --out results/cleaning

The searches are configs/tune/hyper_cleaning_*.yaml: `bomemeta tune FILE` makes the same trials on Ray; here they
run one after the other in this process, which is sooner done where a trial takes seconds. The best by accuracy
on selection samples is run on seeds 0 to 4, which draw the splits and the wrong labels too. Accuracy is shown
at the run's own y, and (`solved`) after 200 more steps of y on g alone: BOME's and the penalty methods' y takes
steps on the validation loss too, so only the second is of the weights alone. `--data` names data sets
on which the settings chosen on the first are used unchanged. `--full`: 50,000 training samples and five times the
steps. `--set problem.corruption=shift` is the public protocol's noise (every chosen label is wrong).

What is done is read and not run again. Several processes may share --out, with `--methods` of their own, `--no-tables` to leave
out what needs all. Writes OUT/runs/*.json, OUT/table.md and OUT/table.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bomemeta.compare.entries import Entry
from bomemeta.compare.statistics import compare
from bomemeta.compare.tables import as_json, markdown
from bomemeta.config import load_config
from bomemeta.environment import environment_line
from bomemeta.reproduce.experiment import Budget, PaperRun, Record
from bomemeta.reproduce.folder import Folder
from bomemeta.reproduce.runner import execute
from bomemeta.tune.search import sampled
from bomemeta.tune.spec import load_search, override_texts

PREFIX = "hyper_cleaning_"
FILES = {
    path.stem.removeprefix(PREFIX): path for path in sorted(Path("configs/tune").glob(f"{PREFIX}*"))
}
# What varies BOME itself, beside the ten methods: its T, its phi, its schedule.
VARIANTS = ("bome_cosine", "bome_norm", "bome_t10")
METHODS = [name for name in FILES if name not in VARIANTS]
GRADIENTS = 400  # of a run; a Hessian product counts as two
FULL_TRAIN, FULL_STEPS = 50_000, 5
METRICS = ("test_accuracy", "f1", "test_loss", "selection_accuracy")
SOLVE_STEPS = 200  # of y on g alone, at the weights that were learned
SHOWN = ("test_accuracy", "test_accuracy_solved", "f1", "time_to_best_s")


def budget(full: bool) -> float:
    return GRADIENTS * (FULL_STEPS if full else 1)


def full_keys(config: Mapping[str, Any]) -> list[str]:
    """Over a short run's config. A weight's gradient is 1/n of its loss, so x's step goes with n."""
    factor = FULL_TRAIN / config["problem"]["train"]
    return [
        f"problem.train={FULL_TRAIN}",
        f"steps={config['steps'] * FULL_STEPS}",
        f"solver.upper_lr={config['solver']['upper_lr'] * factor}",
    ]


def run_of(
    name: str, config: Mapping[str, Any], keys: Sequence[str], amount: float, points: int
) -> PaperRun:
    made = load_config(config, keys).to_dict()
    return PaperRun(
        name=name, label=name, config=made, budget=Budget("gradients", amount), points=points
    )


def recorded(folder: Folder, run: PaperRun) -> Record:
    """Its record; from the folder where it was run before."""
    record = folder.load(run)
    if record is None:
        record = execute(run)
        folder.save(record)
        last = {name: round(record.last.get(name) or 0.0, 4) for name in METRICS}
        print(run.name, last, f"{record.last['seconds']:.1f} CPU-s", flush=True)
    return record


def score(record: Record) -> float:
    return -1.0 if record.diverged is not None else record.last["selection_accuracy"]


def tuned(
    folder: Folder, method: str, data: str, full: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The best trial's config, and its values."""
    search = load_search(FILES[method])
    found = []
    for number, values in enumerate(sampled(search)):
        keys = [*override_texts(values), f"data.dataset={data}"]
        made = load_config(search.base, keys).to_dict()
        more = full_keys(made) if full else []
        run = run_of(f"{method}-{data}-trial_{number}", made, more, budget(full), points=1)
        found.append((score(recorded(folder, run)), number, run, values))
    _, _, run, values = max(found, key=lambda each: each[:2])
    return dict(run.config), values


def metrics_of(record: Record) -> dict[str, float]:
    """At the run's end, and the CPU time after which accuracy on selection samples was best."""
    best = max(record.curve, key=lambda point: point.get("selection_accuracy") or 0.0)
    last = {name: float(record.last[name]) for name in METRICS}
    solved = {"test_accuracy_solved": float(record.final["test_accuracy_solved"])}
    return last | solved | {"time_to_best_s": best["seconds"], "cpu_s": record.last["seconds"]}


def entry_of(
    folder: Folder, method: str, config: Mapping[str, Any], data: str, options: argparse.Namespace
) -> Entry:
    seeds: dict[int, dict[str, float]] = {}
    versions: Mapping[str, str] = {}
    noted = "".join(f"-{key}" for key in options.set)
    for seed in range(options.seeds):
        own = [f"data.dataset={data}", f"seed={seed}", f"evaluation.solve_steps={SOLVE_STEPS}"]
        keys = [*own, *options.set]
        name = f"{method}-{data}{noted}-seed_{seed}"
        run = run_of(name, config, keys, budget(options.full), points=20)
        record = recorded(folder, run)
        seeds[seed], versions = metrics_of(record), record.environment["versions"]
    return Entry(method, seeds, {}, versions)


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=sorted(FILES), default=list(FILES))
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion_mnist"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="after tuning")
    parser.add_argument("--no-tables", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    identity = {"experiment": "benchmarks.hyper_cleaning", "full": options.full}
    folder = Folder(options.out, identity)
    chosen = {
        method: tuned(folder, method, options.data[0], options.full) for method in options.methods
    }
    parts, results = [], {}
    for data in options.data:
        entries = [
            entry_of(folder, method, config, data, options)
            for method, (config, _) in chosen.items()
        ]
        if options.no_tables or len(entries) < 2:
            continue
        found = compare(entries, SHOWN, "bome" if "bome" in chosen else None)
        parts.append(f"## {data}\n\n{markdown(found)}")
        results[data] = json.loads(as_json(found))
    if not parts:
        return ""
    listed = [f"* {method}: {_text(values)}" for method, (_, values) in chosen.items()]
    text = "\n".join([*parts, "## Chosen values", "", *listed, "", _where(folder)]) + "\n"
    folder.write("table.md", text)
    values = {method: each for method, (_, each) in chosen.items()}
    folder.write("table.json", json.dumps({"tables": results, "chosen": values}, indent=1) + "\n")
    print(text)
    return text


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key.partition('.')[2]}` {value:.3g}" for key, value in values.items())


def _where(folder: Folder) -> str:
    record = json.loads(next((folder.path / "runs").glob("*.json")).read_text())
    return environment_line(record["environment"])


if __name__ == "__main__":
    main()
