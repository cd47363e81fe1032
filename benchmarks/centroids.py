"""Runs of problem `few_shot` beside nearest centroids of the features that they started from, episode by episode.

    python -m benchmarks.centroids RUN_DIR... [--episodes 1000] [--json FILE]

Each run is tested by its own evaluation, at its own y, on its first test episodes. The controls see the same episodes: the
backbone's features at the start of the run, without what was learned between them and the head, and each query goes to
the class with the nearest mean: by cosine of normalised features, or by distance of the plain ones. Differences are
paired by episode; their intervals are over episodes of a run, and over the runs of one kind (`problem`, `solver` and
`data` alike, other seeds) by Student's t.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.assembly import build_problem
from bomemeta.checkpoint import load_latest
from bomemeta.config import Config
from bomemeta.environment import environment, environment_line
from bomemeta.intervals import half_width
from bomemeta.page.examination import examine
from bomemeta.problems.few_shot import FewShot
from bomemeta.run_folder import RunFolder
from bomemeta.trust import config_of

CONTROLS = ("cosine", "euclidean")
AT_ONCE = 20  # episodes in memory


def right(kind: str, support: Tensor, query: Tensor, ways: int) -> Tensor:
    """The share of right answers in each episode, `[B]`, of the nearest class mean. support
    `[B, ways * shots, d]` and query `[B, ways * queries, d]`, class after class.
    """
    if kind == "cosine":
        support, query = functional.normalize(support, dim=-1), functional.normalize(query, dim=-1)
    means = support.unflatten(1, (ways, -1)).mean(2)
    near = query @ functional.normalize(means, dim=-1).mT
    if kind == "euclidean":
        near = -torch.cdist(query, means)
    labels = torch.arange(ways).repeat_interleave(query.shape[1] // ways)
    return (near.argmax(-1) == labels).double().mean(1)


def controls(problem: FewShot, episodes: int) -> dict[str, Tensor]:
    """Accuracies `[episodes]` of each control on the run's test episodes."""
    x = problem.init_upper(torch.Generator().manual_seed(problem.seed))
    found: dict[str, list[Tensor]] = {kind: [] for kind in CONTROLS}
    ways = problem.spec("test").ways
    for first in range(0, episodes, AT_ONCE):
        batch = problem.load(range(first, min(first + AT_ONCE, episodes)), 0, "test")
        support, query = batch["support"], batch["query"]
        if support.ndim > 3:  # images, where features are not kept
            with torch.no_grad():
                support, query = (
                    torch.stack([problem.network.features(x, task) for task in images])
                    for images in (support, query)
                )
        for kind in CONTROLS:
            found[kind].append(right(kind, support, query, ways))
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def interval(values: Tensor) -> list[float | None]:
    """The mean and the half-width of its 95 % interval."""
    variance = float(values.var()) if len(values) > 1 else 0.0
    return [float(values.mean()), half_width(variance, len(values))]


def of_run(settings: Config, checkpoint: Any, episodes: int) -> dict[str, Tensor]:
    """Accuracies `[episodes]` of the run and of the controls."""
    tested = examine(settings, checkpoint, episodes, print).tested
    problem = build_problem(settings)
    if not isinstance(problem, FewShot) or problem.network.mixes:
        raise SystemExit("wanted runs of problem few_shot with batch_norm: running")
    run = torch.tensor([one.accuracy for one in tested], dtype=torch.float64)
    return {"run": run} | controls(problem, episodes)


def kind_of(settings: Config) -> str:
    """Runs of one kind differ in their seeds."""
    record = settings.to_dict()
    return json.dumps([record[part] for part in ("problem", "solver", "data", "steps")])


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A line a run, and one for all of a kind."""

    def percent(pair: Sequence[float | None], sign: str = "") -> str:
        mean, width = pair
        return f"{100 * (mean or 0):{sign}.2f}" + (f" ± {100 * width:.2f}" if width else "")

    lines = [
        "| episodes | seed | meta-trained, % | nearest centroid, cosine | nearest centroid, distance | difference from cosine |",
        "|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(run["kind"] for run in runs):
        alike = [run for run in runs if run["kind"] == kind]
        for run in alike:
            cells = [percent(run[name]) for name in ("run", *CONTROLS)]
            lines.append(
                f"| {run['ways']}-way {run['shots']}-shot | {run['seed']} | {' | '.join(cells)} | {percent(run['difference'], '+')} |"
            )
        if len(alike) > 1:
            means = {
                name: interval(torch.tensor([run[name][0] for run in alike], dtype=torch.float64))
                for name in ("run", *CONTROLS, "difference")
            }
            cells = [percent([means[name][0], None]) for name in ("run", *CONTROLS)]
            what = f"{alike[0]['ways']}-way {alike[0]['shots']}-shot | all, over seeds"
            lines.append(f"| {what} | {' | '.join(cells)} | {percent(means['difference'], '+')} |")
    return "\n".join(lines)


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
        found = of_run(settings, checkpoint, options.episodes)
        problem = settings.problem
        runs.append(
            {
                "kind": kind_of(settings),
                "seed": settings.seed,
                "ways": problem.test_ways or problem.ways,
                "shots": problem.shots,
                "steps": checkpoint.step,
                **{name: interval(values) for name, values in found.items()},
                "difference": interval(found["run"] - found["cosine"]),
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
