"""What the bilevel solver adds to a few-shot head: BOME beside heads that need no solver, differentiation through
the steps, ANIL and MAML, each with the same CPU seconds, the same number of settings tried, the same episodes.

    python -m benchmarks.heads --task omniglot --cpu-s 90 --out OUT
    python -m benchmarks.heads --task mixed --cpu-s 90 --out OUT_MIXED

| task | |
|---|---|
| omniglot | 20-way 1-shot |
| tiny_imagenet | 5-way 1-shot |
| mixed | 5-way 15-shot, a class being three characters thrown together: its mean is no character |
| glyphs | 5-way 1-shot without a download, for a try |

A method's Adam step is the best of `--rates` on 100 validation episodes after a quarter of the budget; its number of
steps is its budget over the CPU time that a step took in those trials. Differences are paired by test episode, with 95 %
intervals and Holm's correction over the table. The same command again resumes: what OUT has is not run anew.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from bomemeta.assembly import trainer_of
from bomemeta.compare import Comparison, Entry, compare
from bomemeta.config import Config, load_config
from bomemeta.core.inner import evaluate
from bomemeta.core.solver import KernelResult, LowerStates
from bomemeta.data.class_images import episode_of
from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.data.omniglot import Omniglot
from bomemeta.engine import Trainer
from bomemeta.environment import environment, environment_line
from bomemeta.errors import DataError
from bomemeta.evaluation import EVALUATION_SHARD, validate

RATES = (0.003, 0.006, 0.012)  # of Adam
TOGETHER = 3  # characters in a class of task `mixed`
WARM_UP, TIMED = 3, 10  # steps before the clock of a step's cost starts, and on it

SOLVED = ("solver.inner_steps=1", "solver.adapt_steps=0", "solver.barrier_steps=0")
# Far from the start, so with more steps: W begins at 0, and little holds it there.
RIDGE = (
    "problem.regularisation=0.1",
    *(f"solver.{name}=20" for name in ("inner_steps", "adapt_steps", "barrier_steps")),
)
NETWORK = ("problem.form=network", "solver.inner_steps=5", "solver.inner_lr=0.1")
ADAM = ("solver.upper_optimizer=adam", "solver.upper_schedule=cosine")
METHODS: dict[str, tuple[str, ...]] = {
    "BOME, prototype head": (),
    "prototypes alone": ("problem.head=protonet", *SOLVED),
    "ridge (R2D2)": ("problem.head=r2d2", *SOLVED),
    "SVM (MetaOptNet)": ("problem.head=svm", *SOLVED),
    "logistic regression": ("problem.head=logistic", *SOLVED),
    "BOME, ridge head": ("problem.head=ridge", *RIDGE),
    "ITD, prototype head": (
        "solver.name=itd",
        "solver.inner_steps=5",
        "solver.inner_lr=0.2",
        *ADAM,
    ),
    "ANIL": ("solver.name=anil", *NETWORK, *ADAM),
    "BOME, whole network": NETWORK,
    "MAML, first order": ("solver.name=fomaml", *NETWORK, *ADAM),
    "MAML, second order": ("solver.name=maml", *NETWORK, *ADAM),
}
REFERENCE = "BOME, prototype head"


@dataclass(frozen=True, kw_only=True)
class Mixed(Omniglot):
    """Omniglot with TOGETHER characters thrown together in every class, drawn anew in every episode."""

    def check(self, split: Split, spec: EpisodeSpec) -> None:
        super().check(split, _apart(spec))

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        # Images lie class after class, so that joining neighbours is giving them one label.
        drawn = super().episode(split, _apart(spec), key)
        return episode_of(drawn.support, drawn.query, spec)

    def class_numbers(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> NoReturn:
        raise DataError("task mixed: a class is several characters; use problem.auxiliary_weight=0")


def _apart(spec: EpisodeSpec) -> EpisodeSpec:
    return EpisodeSpec(spec.ways * TOGETHER, spec.shots // TOGETHER, spec.queries // TOGETHER)


# A task: the config that it starts from, keys of its problem, and its data where the config has others.
TASKS: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "omniglot": ("omniglot_20w1s", (), None),
    "tiny_imagenet": ("tiny_imagenet_5w1s", ("problem.width=32",), None),
    "mixed": (
        "omniglot_20w1s",
        ("problem.ways=5", "problem.shots=15", "problem.queries=15"),
        Mixed(),
    ),
    "glyphs": ("omniglot_20w1s", ("problem.ways=5", "data={dataset: glyphs}"), None),
}


def settings(task: str, method: str, keys: Sequence[str]) -> Config:
    """The config of one run; steps are set when its cost is known."""
    name, of_task, data = TASKS[task]
    own = ("workers=0", "threads=1", "evaluation.every_steps=null")
    solver = METHODS[method]
    if any(key.startswith("solver.name") for key in solver):  # BOME's own keys do not belong to it
        own_name = next(key for key in solver if key.startswith("solver.name")).partition("=")[2]
        solver = (f"solver={{name: {own_name}}}", *solver)
    config = load_config(name, [*of_task, *own, *solver, *keys])
    return config if data is None else config.model_copy(update={"data": data})


def step_cost(task: str, method: str) -> float:
    """CPU seconds of one step."""
    with trainer_of(settings(task, method, ())) as trainer:
        trainer.advance(WARM_UP)
        start = time.process_time()
        trainer.advance(TIMED)
        return (time.process_time() - start) / TIMED


def trained(
    task: str, method: str, rate: float, steps: int, seed: int, episodes: int
) -> dict[str, Any]:
    """One run: what it cost, and either (`episodes` 0) its validation accuracy or that of each test episode."""
    config = settings(task, method, (f"solver.upper_lr={rate}", f"steps={steps}", f"seed={seed}"))
    with trainer_of(config) as trainer:
        start = time.process_time()
        trainer.advance(steps)
        found: dict[str, Any] = {"cpu_s": time.process_time() - start, "steps": steps, "rate": rate}
        if episodes == 0:
            return found | {"validation": validate(trainer)["validation_accuracy"]}
        found["accuracy"] = per_episode(trainer, episodes)
        if method == REFERENCE:
            found["unadapted"] = per_episode(trainer, episodes, steps=0)
        return found


def per_episode(trainer: Trainer, episodes: int, steps: int | None = None) -> list[float]:
    """The accuracy of each of the first test episodes, y adapted by so many steps (None: the solver's)."""
    seen: list[Tensor] = []

    def kernel(solver: Any, oracle: Any, lower: Any, *, steps: int | None) -> KernelResult:
        at = solver.adapt(oracle, steps)
        seen.append(oracle.evaluate(at)["accuracy"])
        return evaluate(solver, oracle, {"y": at}, steps=steps)

    shards = -(-episodes // EVALUATION_SHARD)
    run = trainer.run_on(
        range(episodes), shards, step=0, persistent=False, split="test", differentiable=False
    )
    run(kernel, trainer.solver, trainer.state.upper.averaged, LowerStates.none(), steps=steps)
    return [float(value) for value in torch.cat(seen)]


def of_method(options: argparse.Namespace, method: str) -> dict[str, Any]:
    """The rate that a quarter of the budget chose, and a run with it for each seed."""
    quarter = max(round(options.cpu_s / 4 / step_cost(options.task, method)), 1)
    trials = [trained(options.task, method, rate, quarter, 100, 0) for rate in options.rates]
    cost = sum(trial["cpu_s"] for trial in trials) / (quarter * len(trials))
    steps = max(round(options.cpu_s / cost), 1)
    tried = {trial["rate"]: trial["validation"] for trial in trials}
    best = max(tried, key=lambda rate: tried[rate])
    runs = [
        trained(options.task, method, best, steps, seed, options.episodes)
        for seed in range(options.seeds)
    ]
    means = [sum(run["accuracy"]) / len(run["accuracy"]) for run in runs]
    print(f"{method}: rate {best} of {tried}, {steps} steps, accuracy {means}", flush=True)
    return {"step_cpu_s": cost, "tried": tried, "rate": best, "runs": runs}


def compared(found: dict[str, dict[str, Any]]) -> Comparison:
    """By test episode, over all seeds: an episode of a seed takes the place that a seed has in `compare`."""
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for method, each in found.items():
        for name, key in (
            (method, "accuracy"),
            (f"{method}, its x without adaptation", "unadapted"),
        ):
            for seed, run in enumerate(each["runs"]):
                for number, value in enumerate(run.get(key, ())):
                    rows.setdefault(name, {})[seed * len(run[key]) + number] = {"accuracy": value}
    entries = [Entry(name, episodes, {}, {}) for name, episodes in rows.items()]
    return compare(entries, ["accuracy"], REFERENCE)


def table(found: dict[str, dict[str, Any]], comparison: Comparison) -> str:
    """Markdown."""
    lines = [
        "| method | Adam's step | meta-steps | CPU-s | test accuracy, % | minus BOME, points | p (Holm) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in comparison.rows["accuracy"]:
        of = found.get(row.label)
        runs = of["runs"] if of else []
        cells = [
            row.label,
            f"{of['rate']:g}" if of else "",
            f"{runs[0]['steps']:,}" if runs else "",
            f"{sum(run['cpu_s'] for run in runs) / len(runs):.0f}" if runs else "",
            f"{100 * row.mean.value:.2f} ± {100 * (row.mean.half_width or 0):.2f}",
        ]
        if row.difference is None:
            cells += ["", ""]
        else:
            mean, p = row.difference.mean, row.difference.p
            cells += [
                f"{100 * mean.value:+.2f} ± {100 * (mean.half_width or 0):.2f}",
                "" if p is None else f"{p:.2g}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--cpu-s", type=float, default=90.0, help="of training, for each run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=1000, help="test episodes")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="tried for each method"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME"
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    asked = {
        name: getattr(options, name) for name in ("task", "cpu_s", "seeds", "episodes", "rates")
    }
    asked["rates"] = list(asked["rates"])
    file, where = options.out / "heads.json", environment()
    record = json.loads(file.read_text()) if file.exists() else {"asked": asked, "methods": {}}
    if record["asked"] != asked:
        parser.error(
            f"--out: {file} was made with {record['asked']}; this asks for {asked}: take another folder"
        )
    found: dict[str, dict[str, Any]] = record["methods"]
    for method in options.methods:
        if method not in found:
            found[method] = of_method(options, method)
            record["environment"] = where
            file.write_text(json.dumps(record, indent=1) + "\n")
    if REFERENCE not in found:
        parser.error(f"--methods: the table compares with {REFERENCE!r}, which {file} has not")
    text = table(found, compared(found))
    tried = f"{options.seeds} seeds, {options.episodes} test episodes, {len(options.rates)} steps of Adam tried"
    text += f"\n{tried}; {environment_line(where)}\n"
    (options.out / "heads.md").write_text(text)
    print(text)
    return record


if __name__ == "__main__":
    main()
