"""Learned weights of domains beside fixed mixtures, at equal tokens: problem `data_mixing` with a solver that
moves x, and with `lower_only` at uniform, proportional and drawn mixtures.

    python -m benchmarks.mixing --seeds 5 --steps 400 --json OUT.json

| run | what it is |
|---|---|
| learned | the config: w weighs as many sequences of each domain |
| retrained | from the start again, sequences drawn by the weights that were learned |
| uniform, proportional | the mixtures that need no choice, drawn likewise |
| target_only, mixture1 .. | fixed mixtures: (nearly) all of the target's domain, and others drawn evenly (Dirichlet) |
| larger, NAME | a larger network (`--larger KEY=VALUE`) at the learned weights, uniform, proportional |

`test_loss` is at the end; `best_test_loss` is the least of ten points along the way, which no user can have: it is
there because papers report it.

Every run of a seed starts at the same y, moves it by the same rule and sees as many sequences. `gradients` counts a
Hessian product as two. Means and differences seed by seed are `bomemeta compare`'s. A run is written to OUT.json when it
has ended, and the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bomemeta
from bomemeta.compare.entries import Entry
from bomemeta.compare.statistics import Comparison, compare
from bomemeta.compare.tables import as_json, markdown
from bomemeta.config import load_config
from bomemeta.environment import environment, environment_line
from bomemeta.files import written_whole
from bomemeta.solvers.lower_only import LowerOnly

CONFIG = "configs/mixing_quickstart.yaml"
POINTS = 10  # of a run's way, at which its test loss is taken
FIGURES = ("test_loss", "best_test_loss")
LITTLE = 1e-6  # of what target_only leaves to the other domains
Run = dict[str, Any]


def trained(keys: Sequence[str], seed: int, steps: int) -> Run:
    """Test loss at the end and the least along the way, weights at the end, gradients and CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        own = (f"output_dir={folder}/run", f"seed={seed}", f"steps={steps}", "workers=0")
        looked = (f"evaluation.every_steps={max(steps // POINTS, 1)}", "log.tensorboard=false")
        started = time.process_time()
        result = bomemeta.train(CONFIG, [*keys, *own, *looked])
        cpu_s = time.process_time() - started
        written = json.loads((Path(folder) / "run" / "result.json").read_text())
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    way = [line["test_loss"] for line in map(json.loads, lines) if "test_loss" in line]
    metrics = result.metrics
    spent = metrics["gradient_evaluations"] + 2 * metrics.get("hessian_products", 0.0)
    return {
        "test_loss": metrics["test_loss"],
        "best_test_loss": min(metrics["test_loss"], *way),
        "test_losses": way,
        "weights": written["final"]["domain_weights"],
        "gradients": spent,
        "cpu_s": cpu_s,
    }


def fixed(mixture: Any, keys: Sequence[str]) -> list[str]:
    """The keys of a run on sequences drawn by a mixture, with y's step as the config's solver has it."""
    solver = load_config(CONFIG, [*keys, "workers=0"]).solver
    names = [field.name for field in dataclasses.fields(LowerOnly)]
    of_y = {name: getattr(solver, name) for name in names if hasattr(solver, name)}
    others = [key for key in keys if not key.startswith("solver")]
    given = json.dumps({"name": "lower_only", **of_y})
    drawn = ["problem.sampled=true", f"problem.mixture={json.dumps(mixture)}"]
    return [*others, *drawn, f"solver={given}"]


def mixtures(domains: Sequence[str], target: str, count: int) -> dict[str, dict[str, float]]:
    """The target's domain alone, and drawn ones: the same for every seed."""
    draw = np.random.default_rng(0)
    found = {"target_only": {name: 1.0 if name == target else LITTLE for name in domains}}
    for number in range(1, count):
        shares = draw.dirichlet(np.ones(len(domains))).tolist()
        found[f"mixture{number}"] = dict(zip(domains, shares, strict=True))
    return dict(list(found.items())[:count])


class Record:
    """What has been run, by seed and name, in a file."""

    def __init__(self, file: Path, asked: Mapping[str, Any]) -> None:
        self._file = file
        there = json.loads(file.read_text()) if file.exists() else {"asked": asked, "runs": {}}
        if there["asked"] != asked:
            raise SystemExit(
                f"--json: {file} was made with {there['asked']}; this asks for {asked}: take another file"
            )
        self.runs: dict[str, dict[str, Run]] = there["runs"]
        self._asked = dict(asked)

    def __call__(self, seed: int, name: str, make: Callable[[], Run]) -> Run:
        of_seed = self.runs.setdefault(str(seed), {})
        if name not in of_seed:
            of_seed[name] = make()
            self.write({})
            run = of_seed[name]
            weights = {domain: round(share, 3) for domain, share in run["weights"].items()}
            print(
                f"seed {seed} {name}: {run['test_loss']:.4f} {weights} {run['cpu_s']:.0f} CPU-s",
                flush=True,
            )
        return of_seed[name]

    def write(self, more: Mapping[str, Any]) -> dict[str, Any]:
        whole = {"asked": self._asked, "runs": self.runs, "environment": environment(), **more}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self._file) as stream:
            stream.write(f"{json.dumps(whole, indent=1)}\n".encode())
        return whole


def of_seed(record: Record, options: argparse.Namespace, seed: int) -> None:
    keys, steps = options.set, options.steps

    def at(name: str, mixture: Any, given: Sequence[str] = keys) -> None:
        record(seed, name, lambda: trained(fixed(mixture, given), seed, steps))

    learned = record(seed, "learned", lambda: trained(keys, seed, steps))["weights"]
    for name, mixture in (
        ("uniform", "uniform"),
        ("proportional", "proportional"),
        ("retrained", learned),
    ):
        at(name, mixture)
    if seed < options.mixture_seeds:
        target = load_config(CONFIG, [*keys, "workers=0"]).problem
        drawn = mixtures(sorted(learned), str(getattr(target, "target", "")), options.mixtures)
        for name, mixture in drawn.items():
            at(name, mixture)
    if options.larger and seed < options.larger_seeds:
        for name, mixture in (
            ("learned", learned),
            ("uniform", "uniform"),
            ("proportional", "proportional"),
        ):
            at(f"larger, {name}", mixture, [*keys, *options.larger])


def compared(runs: Mapping[str, Mapping[str, Run]]) -> Comparison:
    """All runs beside `retrained`; a name has the seeds that it was run with."""
    names = {name: None for of_seed in runs.values() for name in of_seed}
    entries = [
        Entry(
            name,
            {
                int(seed): {figure: each[name][figure] for figure in FIGURES}
                for seed, each in runs.items()
                if name in each
            },
            {},
            {},
        )
        for name in names
    ]
    return compare(entries, FIGURES, "retrained")


def facts(runs: Mapping[str, Mapping[str, Run]]) -> list[str]:
    """The least of the fixed mixtures beside the learned weights on the same seeds, and gradients."""
    fixed_ones = {
        name: [(seed, run["test_loss"]) for seed, each in runs.items() if (run := each.get(name))]
        for name in next(iter(runs.values()))
        if name == "target_only" or name.startswith("mixture")
    }
    lines = [
        "shuffled domain at the end, largest of all seeds: "
        f"{max(each['learned']['weights'].get('shuffled', 0.0) for each in runs.values()):.2%}"
    ]
    if fixed_ones:
        means = {name: sum(x for _, x in each) / len(each) for name, each in fixed_ones.items()}
        best = min(means, key=lambda name: means[name])
        for name in ("learned", "retrained"):
            same = [runs[seed][name]["test_loss"] for seed, _ in fixed_ones[best]]
            ratio = sum(same) / len(same) / means[best] - 1
            lines.append(f"{name}: {ratio:+.2%} against {best}, the best of {len(means)} fixed")
        spent = sum(runs["0"][name]["gradients"] for name in fixed_ones)
        own = runs["0"]["learned"]["gradients"], runs["0"]["retrained"]["gradients"]
        lines.append(
            f"gradients: learned {own[0]:,.0f}, retrained {own[1]:,.0f} more; {len(means)} fixed mixtures {spent:,.0f}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--mixtures", type=int, default=0, help="fixed ones")
    parser.add_argument("--mixture-seeds", type=int, default=1, help="of the seeds, for these")
    parser.add_argument(
        "--larger", nargs="*", default=[], metavar="KEY=VALUE", help="a larger network"
    )
    parser.add_argument("--larger-seeds", type=int, default=1, help="of the seeds, for it")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    asked = {"points": POINTS, "steps": options.steps, "set": options.set, "larger": options.larger}
    record = Record(options.json, asked)
    for seed in range(options.seeds):
        of_seed(record, options, seed)
    table, found = compared(record.runs), facts(record.runs)
    result = record.write({"comparison": json.loads(as_json(table)), "facts": found})
    lines = "\n".join(f"* {line}" for line in found)
    text = f"{markdown(table)}{lines}\n* {options.steps} steps; {environment_line(result['environment'])}\n"
    options.json.with_suffix(".md").write_text(text)
    print(text)
    return result


if __name__ == "__main__":
    main()
