"""Runs of problem `few_shot` beside nearest centroids of the features that they started from, episode by episode.

    python -m benchmarks.centroids RUN_DIR... [--episodes 1000] [--json FILE]

Each run is tested by its own evaluation, at its own y, on its first test episodes. The controls see the same episodes: the
backbone's features at the start of the run, without what was learned between them and the head, and each query goes to
the class with the nearest mean:

    cosine      of normalised features
    euclidean   distance of the plain features
    unit        distance of normalised features
    centred     cosine of normalised features less their mean over images of training classes (CL2N of SimpleShot,
                Wang et al., 2019)

The control of a kind of runs is the best of these on the runs' validation episodes. Differences are paired by episode;
their intervals are over episodes of a run, and over the runs of one kind (`problem`, `solver` and `data` alike, other
seeds) by Student's t.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.assembly import build_problem
from bomemeta.checkpoint import load_latest
from bomemeta.config import Config
from bomemeta.data.episodes import Split
from bomemeta.environment import environment, environment_line
from bomemeta.intervals import half_width
from bomemeta.page.examination import examine
from bomemeta.problems.few_shot import FewShot
from bomemeta.run_folder import RunFolder
from bomemeta.trust import config_of

CONTROLS = ("cosine", "euclidean", "unit", "centred")
AT_ONCE = 20  # episodes in memory
FOR_MEAN = 200  # training episodes whose images the mean of `centred` is over


def right(kind: str, support: Tensor, query: Tensor, ways: int, mean: Tensor) -> Tensor:
    """The share of right answers in each episode, `[B]`, of the nearest class mean. support
    `[B, ways * shots, d]` and query `[B, ways * queries, d]`, class after class; `mean` `[d]` is what
    `centred` takes away.
    """
    if kind != "euclidean":
        support, query = functional.normalize(support, dim=-1), functional.normalize(query, dim=-1)
    if kind == "centred":
        support, query = (functional.normalize(part - mean, dim=-1) for part in (support, query))
    means = support.unflatten(1, (ways, -1)).mean(2)
    near = query @ functional.normalize(means, dim=-1).mT
    if kind in ("euclidean", "unit"):
        near = -torch.cdist(query, means)
    labels = torch.arange(ways).repeat_interleave(query.shape[1] // ways)
    return (near.argmax(-1) == labels).double().mean(1)


def drawn(problem: FewShot, episodes: int, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """Features at the run's start of support sets and queries, AT_ONCE episodes at a time."""
    x = problem.init_upper(torch.Generator().manual_seed(problem.seed))
    for first in range(0, episodes, AT_ONCE):
        batch = problem.load(range(first, min(first + AT_ONCE, episodes)), 0, split)
        support, query = batch["support"], batch["query"]
        if support.ndim > 3:  # images, where features are not kept
            with torch.no_grad():
                support, query = (
                    torch.stack([problem.network.features(x, task) for task in images])
                    for images in (support, query)
                )
        yield support, query


def mean_of_training(problem: FewShot) -> Tensor:
    """`[d]`, of normalised features."""
    parts = [
        functional.normalize(torch.cat(both, 1), dim=-1).mean((0, 1))
        for both in drawn(problem, FOR_MEAN, "train")
    ]
    return torch.stack(parts).mean(0)


def controls(problem: FewShot, episodes: int, split: Split, mean: Tensor) -> dict[str, Tensor]:
    """Accuracies `[episodes]` of each control."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in CONTROLS}
    ways = problem.spec(split).ways
    for support, query in drawn(problem, episodes, split):
        for kind in CONTROLS:
            found[kind].append(right(kind, support, query, ways, mean))
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def interval(values: Tensor) -> list[float | None]:
    """The mean and the half-width of its 95 % interval."""
    variance = float(values.var()) if len(values) > 1 else 0.0
    return [float(values.mean()), half_width(variance, len(values))]


def of_run(
    settings: Config, checkpoint: Any, episodes: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Accuracies `[episodes]` of the run and of the controls on test episodes; of the controls on
    validation episodes.
    """
    tested = examine(settings, checkpoint, episodes, print).tested
    problem = build_problem(settings)
    if not isinstance(problem, FewShot) or problem.network.mixes:
        raise SystemExit("wanted runs of problem few_shot with batch_norm: running")
    run = torch.tensor([one.accuracy for one in tested], dtype=torch.float64)
    mean = mean_of_training(problem)
    test, validation = (
        controls(problem, episodes, split, mean) for split in ("test", "validation")
    )
    return {"run": run} | test, validation


def kind_of(settings: Config) -> str:
    """Runs of one kind differ in their seeds."""
    record = settings.to_dict()
    return json.dumps([record[part] for part in ("problem", "solver", "data", "steps")])


def best_control(alike: Sequence[dict[str, Any]]) -> str:
    """The control that is best on validation episodes of these runs."""
    return max(CONTROLS, key=lambda name: sum(run["validation"][name] for run in alike))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A line a run, and one for all of a kind."""

    def percent(pair: Sequence[float | None], sign: str = "") -> str:
        mean, width = pair
        return f"{100 * (mean or 0):{sign}.2f}" + (f" ± {100 * width:.2f}" if width else "")

    lines = [
        f"| episodes | seed | meta-trained, % | {' | '.join(CONTROLS)} | ahead of cosine by | ahead of validation's best by |",
        f"|---|---|---|{'---|' * len(CONTROLS)}---|---|",
    ]
    for kind in dict.fromkeys(run["kind"] for run in runs):
        alike = [run for run in runs if run["kind"] == kind]
        best = best_control(alike)

        def line(seed: str, found: dict[str, Any], what: dict[str, Any], best: str) -> str:
            cells = [percent(found[name]) for name in ("run", *CONTROLS)]
            cells += [percent(found["difference"]["cosine"], "+")]
            cells += [f"{percent(found['difference'][best], '+')} ({best})"]
            episodes = f"{what['ways']}-way {what['shots']}-shot"
            return f"| {episodes} | {seed} | {' | '.join(cells)} |"

        lines += [line(str(run["seed"]), run, run, best) for run in alike]
        if len(alike) > 1:
            found = {name: over_seeds([run[name] for run in alike]) for name in ("run", *CONTROLS)}
            differences = {
                name: over_seeds([run["difference"][name] for run in alike]) for name in CONTROLS
            }
            plain = {name: [pair[0], None] for name, pair in found.items()}
            both = plain | {"difference": differences}
            lines.append(line("all, over seeds", both, alike[0], best))
    return "\n".join(lines)


def over_seeds(pairs: Sequence[Sequence[float | None]]) -> list[float | None]:
    return interval(torch.tensor([pair[0] for pair in pairs], dtype=torch.float64))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    runs: list[dict[str, Any]] = []
    for path in options.runs:
        folder = RunFolder.open(path)
        settings = config_of(folder, (), {}, trust=False)
        checkpoint = load_latest(folder.checkpoints).checkpoint
        found, validation = of_run(settings, checkpoint, options.episodes)
        problem = settings.problem
        runs.append(
            {
                "kind": kind_of(settings),
                "seed": settings.seed,
                "ways": problem.test_ways or problem.ways,
                "shots": problem.shots,
                "steps": checkpoint.step,
                **{name: interval(values) for name, values in found.items()},
                "difference": {name: interval(found["run"] - found[name]) for name in CONTROLS},
                "validation": {name: float(values.mean()) for name, values in validation.items()},
            }
        )
    where = environment()
    print(f"{table(runs)}\n\n{options.episodes} test episodes a run; {environment_line(where)}")
    result = {"runs": runs, "episodes": options.episodes, "environment": where}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
