"""Learned weights of domains beside fixed mixtures, at equal tokens: problem `data_mixing` with a solver that
moves x, and with `lower_only` at the uniform, the proportional and (`--mixtures N`) N drawn mixtures.

    python -m benchmarks.mixing --seeds 5 --steps 300 --json OUT.json

Every run of a seed starts at the same y and sees the same sequences of every domain; they differ in
the weights. `retrained`: from the start again at the weights that were learned. Means, differences seed by seed and ranks
are `bomemeta compare`'s.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bomemeta
from bomemeta.compare.entries import Entry
from bomemeta.compare.statistics import Comparison, compare
from bomemeta.compare.tables import as_json, markdown
from bomemeta.environment import environment

CONFIG = "configs/mixing_quickstart.yaml"


def trained(keys: Sequence[str], seed: int, steps: int) -> dict[str, Any]:
    """The result's metrics, with `weights` as the run has them at its end."""
    with tempfile.TemporaryDirectory() as folder:
        own = [
            f"output_dir={folder}/run",
            f"seed={seed}",
            f"steps={steps}",
            "log.tensorboard=false",
        ]
        result = bomemeta.train(CONFIG, [*own, "workers=0", *keys])
        written = json.loads((Path(folder) / "run" / "result.json").read_text())
    return {**result.metrics, "weights": written["final"]["domain_weights"]}


def fixed(mixture: Any, keys: Sequence[str], seed: int, steps: int) -> dict[str, Any]:
    rate = [key for key in keys if key.startswith("solver.inner_lr")]
    others = [key for key in keys if not key.startswith("solver.")]
    given = [f"problem.mixture={json.dumps(mixture)}", "solver.name=lower_only", *rate, *others]
    return trained(given, seed, steps)


def of_seed(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    keys, steps = options.set, options.steps
    runs = {"learned": trained(keys, seed, steps)}
    names = sorted(runs["learned"]["weights"])
    for mixture in ("uniform", "proportional"):
        runs[mixture] = fixed(mixture, keys, seed, steps)
    runs["retrained"] = fixed(runs["learned"]["weights"], keys, seed, steps)
    draw = np.random.default_rng(0)  # the same mixtures for every seed
    for number in range(options.mixtures):
        mixture = dict(zip(names, draw.dirichlet(np.ones(len(names))).tolist(), strict=True))
        runs[f"mixture{number}"] = fixed(mixture, keys, seed, steps)
    for name, run in runs.items():
        weights = {domain: round(weight, 4) for domain, weight in run["weights"].items()}
        print(f"seed {seed} {name}: {run['test_loss']:.4f} {weights}", flush=True)
    return runs


def compared(runs: Sequence[Mapping[str, Any]]) -> Comparison:
    """All mixtures beside the learned weights, seed by seed."""
    entries = [
        Entry(
            name,
            {seed: {"test_loss": run[name]["test_loss"]} for seed, run in enumerate(runs)},
            {},
            {},
        )
        for name in runs[0]
    ]
    return compare(entries, ["test_loss"], "learned")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--mixtures", type=int, default=0, help="fixed ones, drawn evenly")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    runs = [of_seed(options, seed) for seed in range(options.seeds)]
    table = compared(runs)
    result = {
        "comparison": json.loads(as_json(table)),
        "runs": runs,
        "options": {"seeds": options.seeds, "steps": options.steps, "set": options.set},
        "environment": environment(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(table))
    return result


if __name__ == "__main__":
    main()
