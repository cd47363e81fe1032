"""Learned weights of samples beside what a user could do without them: problem `reweighting` by its config's
solver, and its honest controls, at equal steps of the network.

    python -m benchmarks.reweighting --seeds 5 --steps 1000 --out OUT [--set problem.labels=random1]

| run | what it is |
|---|---|
| learned | the config |
| mwn | Meta-Weight-Net as in its paper: a net on a sample's loss, ITD through one step |
| plain | every weight 1 |
| stopped | plain, at the point of its way that is best on the clean set |
| clean | the clean set alone |
| fine_tuned | plain, and then steps on the clean set alone from there |

`--control-steps` gives plain and the clean set alone more steps, where a step with learned weights costs more gradients
than theirs. What is done is read and not run again.

Every run of a seed has the same samples and starts at the same y. `last_*` is at the end (of `stopped`: where it
stopped), `best_*` is the best along the way, which no user can have: it is there because papers report it. `f1` is of
the labels declared wrong: by their weights, and in the runs that have none by their losses, as many of the largest as
there are wrong ones, a number that a user would have to guess. A second table gives every run that number: the F1 of
the samples that stand first by loss, by the mean of their losses over the run's points, by weight (the least), by the
mean of their weights, and by loss times 2 - weight. Differences are taken seed by seed from `learned`, by `bomemeta
compare`'s statistics. The histogram is of the weights of `learned` at its end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bomemeta.assembly import trainer_of
from bomemeta.compare import Comparison, Entry, compare
from bomemeta.compare.tables import as_json, markdown
from bomemeta.config import Config, load_config
from bomemeta.core.problem import Batch, Encoded
from bomemeta.core.solver import LowerStates
from bomemeta.core.tree import Params
from bomemeta.distributed.packing import PackedTasks, unpack_tasks
from bomemeta.engine import Trainer
from bomemeta.environment import environment, environment_line
from bomemeta.evaluation import own_metrics
from bomemeta.files import written_whole
from bomemeta.problems.reweighting import Reweighting

CONFIG = "configs/reweighting_cifar10n.yaml"
# Meta-Weight-Net's own optimiser of its net (Shu et al., NeurIPS 2019).
MWN = ("solver.upper_optimizer=adam", "solver.upper_lr=0.001")
FIGURES = ("test_accuracy", "test_loss", "f1")
SIGNALS = ("loss", "mean_loss", "weight", "mean_weight", "product")
TENTHS = 10  # bars of the histogram
Point = dict[str, float]


@dataclasses.dataclass(kw_only=True)
class CleanAlone(Reweighting):
    """The same with the clean set as what g is made of, and no other sample."""

    @classmethod
    def of(cls, config: Config) -> Config:
        """The config with its problem changed to this one."""
        problem = config.problem
        assert isinstance(problem, Reweighting), "a config of problem reweighting"
        fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
        return config.model_copy(update={"problem": cls(**fields)})

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        square = torch.stack([(tensor**2).sum() for tensor in lower.values()]).sum()
        return self.upper_loss(encoded, lower, batch) + batch["share"] * self.decay / 2 * square


def walked(trainer: Trainer, steps: int, every: int, weighted: bool = False) -> list[Point]:
    """The problem's figures at every so many steps and at the end; `f1` by the samples' losses where
    they are not weighted. The last point has the `SIGNALS`.
    """
    points: list[Point] = []
    losses, weights = torch.zeros(()), torch.zeros(())
    while trainer.state.step < steps:
        trainer.advance(min(every, steps - trainer.state.step))
        loss, weight, wrong = of_samples(trainer)
        losses, weights = losses + loss, weights + weight
        found = own_metrics(trainer) | ({} if weighted else {"f1": first_wrong(loss, wrong)})
        points.append({"step": float(trainer.state.step), **found})
    by = {"loss": loss, "mean_loss": losses}
    if weighted:
        by |= {"weight": -weight, "mean_weight": -weights, "product": loss * (2 - weight)}
    points[-1] |= {f"f1_{name}": first_wrong(scores, wrong) for name, scores in by.items()}
    return points


def shared_y(trainer: Trainer) -> Params:
    """The run's y."""
    rows = torch.tensor(trainer.transport.fetch(list(trainer.state.lower.handles.values())[:1])[0])
    tasks = unpack_tasks(PackedTasks(trainer.state.lower.layout, rows[None]))["y"]
    return {name: tensor[0] for name, tensor in tasks.items()}


def of_samples(trainer: Trainer) -> tuple[Tensor, Tensor, Tensor]:
    """Of every training sample its loss at the run's y, its weight, and whether its label is wrong."""
    problem, lower = trainer.problem, shared_y(trainer)
    upper = trainer.state.upper.averaged
    assert isinstance(problem, Reweighting)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for block in range(problem.num_blocks):
            stacked = problem.load([block], trainer.state.step, "test")
            batch = {name: tensor[0] for name, tensor in stacked.items()}
            losses, weights = problem.losses_and_weights(problem.encode(upper, batch), lower, batch)
            real = batch["scale"] > 0  # filling is no sample
            found.append((losses[real], weights[real], batch["wrong"][real]))
    losses, weights, wrong = (torch.cat(each) for each in zip(*found, strict=True))
    return losses, weights, wrong


def first_wrong(scores: Tensor, wrong: Tensor) -> float:
    """F1 of the largest scores, as many as there are wrong labels (so precision is recall is F1)."""
    count = int(wrong.sum())
    return float(wrong[scores.topk(count).indices].double().mean()) if count else 0.0


def signals_table(seeds: Sequence[Mapping[str, Sequence[Point]]]) -> str:
    """F1 with the true share given, the mean over the seeds and every seed's."""
    lines = ["| run | F1 with the true share, by | mean | each seed |", "|---|---|---|---|"]
    for name in seeds[0]:
        for signal in SIGNALS:
            values = [runs[name][-1].get(f"f1_{signal}") for runs in seeds]
            there = [value for value in values if value is not None]
            if there:
                each = ", ".join(f"{value:.3f}" for value in there)
                cells = (name, signal.replace("_", " "), f"{sum(there) / len(there):.3f}", each)
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def histogram(trainer: Trainer) -> Point:
    """`right_0` .. `right_9`, `wrong_0` ..: the shares of the right and of the wrong samples whose weight is in
    each tenth of [0, 2].
    """
    _, weights, wrong = of_samples(trainer)
    found: Point = {}
    for name, which in (("right", ~wrong), ("wrong", wrong)):
        counts = torch.histc(weights[which], TENTHS, 0, 2)
        found |= {
            f"{name}_{tenth}": float(count / counts.sum()) for tenth, count in enumerate(counts)
        }
    return found


def histogram_table(lasts: Sequence[Point]) -> str:
    """The mean over the seeds, in per cent."""
    lines = [
        f"| weights of learned, % | {' | '.join(f'{k / 5:.1f}-{(k + 1) / 5:.1f}' for k in range(TENTHS))} |",
        f"|{'---|' * (TENTHS + 1)}",
    ]
    for name in ("right", "wrong"):
        shares = [sum(last[f"{name}_{k}"] for last in lasts) / len(lasts) for k in range(TENTHS)]
        lines.append(f"| {name} labels | {' | '.join(f'{100 * share:.1f}' for share in shares)} |")
    return "\n".join(lines) + "\n\n"


def metrics(points: Sequence[Point], last: Point | None = None) -> Point:
    """`last_*` of the last point or of the one given, `best_*` over all; of a loss the least."""
    found: Point = {"step": (last or points[-1])["step"]}
    for name in FIGURES:
        if name in points[0]:
            values = [point[name] for point in points]
            found[f"last_{name}"] = (last or points[-1])[name]
            found[f"best_{name}"] = min(values) if name.endswith("loss") else max(values)
    return found


class Record:
    """Every run's points by seed and name, in a file if there is one: what it has is not run again."""

    def __init__(self, file: Path | None = None, asked: Mapping[str, Any] | None = None) -> None:
        self._file, self._asked = file, dict(asked or {})
        there: dict[str, Any] = {"asked": self._asked, "curves": {}}
        if file is not None and file.exists():
            there = json.loads(file.read_text())
        if there["asked"] != self._asked:
            raise SystemExit(
                f"--out: {file} was made with {there['asked']}; this asks for {self._asked}: take another folder"
            )
        self.curves: dict[str, dict[str, list[Point]]] = there["curves"]

    def __call__(self, seed: int, name: str, make: Callable[[], dict[str, list[Point]]]) -> None:
        of_seed = self.curves.setdefault(str(seed), {})
        if name in of_seed:
            return
        began = time.process_time()
        made = make()
        of_seed.update(made)
        if self._file is None:
            return
        with written_whole(self._file) as stream:
            stream.write(json.dumps({"asked": self._asked, "curves": self.curves}).encode())
        for run, points in made.items():
            spent = time.process_time() - began
            print(f"seed {seed} {run}: {metrics(points)} {spent:.0f} CPU-s", flush=True)


class Plan(NamedTuple):
    """Steps of the runs: `steps` is the config's; `control` those of plain and of the clean set alone."""

    steps: int
    control: int
    every: int
    fine: int
    rate: float | None = None  # of fine-tuning; none: the config's


def of_seed(
    source: Any, keys: Sequence[str], seed: int, plan: Plan, record: Record
) -> dict[str, list[Point]]:
    """Every run's points; of runs that the record has, those."""

    def settings(*more: str) -> Config:
        own = (f"seed={seed}", "workers=0", "evaluation.every_steps=null")
        # A run that leaves x where it is has no step of x.
        given = [key for key in keys if more[:2] != descent or not key.startswith("solver.upper_")]
        return load_config(source, [*given, *own, *more])

    descent = ("problem.weights=sample", "solver.name=lower_only")
    base = settings(f"steps={plan.steps}")
    inner = int(getattr(base.solver, "inner_steps", 1))
    alone = [] if plan.rate is None else [f"solver.inner_lr={plan.rate}"]
    every = max(plan.every * plan.control // plan.steps, 1)

    def learned() -> dict[str, list[Point]]:
        with trainer_of(base) as trainer:
            points = walked(trainer, plan.steps, plan.every, weighted=True)
            points[-1] |= histogram(trainer)
        return {"learned": points}

    def mwn() -> dict[str, list[Point]]:
        steps = plan.steps * inner  # one step of y each
        one = ("solver.name=itd", "solver.inner_steps=1", f"steps={steps}")
        with trainer_of(settings("problem.weights=loss_net", *one, *MWN)) as trainer:
            return {"mwn": walked(trainer, steps, plan.every * inner, weighted=True)}

    def plain() -> dict[str, list[Point]]:
        config = settings(*descent, f"steps={plan.control}")
        with trainer_of(config) as trainer:
            points = walked(trainer, plan.control, every)
            at = trainer.state.lower
        tuned = settings(*descent, f"steps={plan.fine}", *alone)
        with trainer_of(CleanAlone.of(tuned)) as trainer:
            trainer.state.lower = LowerStates(at.layout, dict(at.handles))
            more = walked(trainer, plan.fine, min(every, plan.fine))
        later = [{**point, "step": plan.control + point["step"]} for point in more]
        return {"plain": points, "fine_tuned": points + later}

    def clean() -> dict[str, list[Point]]:
        config = settings(*descent, f"steps={plan.control}")
        with trainer_of(CleanAlone.of(config)) as trainer:
            return {"clean": walked(trainer, plan.control, every)}

    for make in (learned, mwn, plain, clean):
        record(seed, make.__name__, make)
    return record.curves[str(seed)]


def summaries(runs: Mapping[str, list[Point]]) -> dict[str, Point]:
    """Each run's figures, with `stopped` made of `plain`: best on the clean set, the earliest of such."""
    found = {name: metrics(points) for name, points in runs.items()}
    chosen = max(runs["plain"], key=lambda point: point["clean_accuracy"])
    return found | {"stopped": metrics(runs["plain"], chosen)}


def compared(seeds: Mapping[int, Mapping[str, Point]], config: Mapping[str, Any]) -> Comparison:
    """All runs beside `learned`, seed by seed."""
    names = next(iter(seeds.values())).keys()
    entries = [
        Entry(name, {seed: runs[name] for seed, runs in seeds.items()}, config, {})
        for name in names
    ]
    shown = [f"{when}_{name}" for name in FIGURES for when in ("last", "best")]
    return compare(entries, shown, "learned")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--control-steps", type=int, default=None, help="of plain and clean; default: steps"
    )
    parser.add_argument("--every", type=int, default=50, help="steps between two points")
    parser.add_argument("--fine-steps", type=int, default=None, help="default: steps / 4")
    parser.add_argument("--fine-rate", type=float, default=None, help="default: the config's")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args(argv)
    control = options.control_steps or options.steps
    fine = options.fine_steps or max(options.steps // 4, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(options.steps, control, options.every, fine, options.fine_rate)
    asked = {"config": options.config, "set": options.set, "plan": list(plan)}
    record = Record(options.out / "curves.json", asked)
    curves = {
        seed: of_seed(options.config, options.set, seed, plan, record)
        for seed in range(options.seeds)
    }
    seeds = {seed: summaries(runs) for seed, runs in curves.items()}
    table = compared(seeds, load_config(options.config, options.set).to_dict())
    where = environment()
    weights = histogram_table([runs["learned"][-1] for runs in curves.values()])
    signals = signals_table(list(curves.values()))
    spent = f"{options.steps} steps, {control} of plain and of the clean set alone, {fine} of fine-tuning"
    text = f"{markdown(table)}\n{signals}{weights}* {spent}; {environment_line(where)}\n"
    (options.out / "table.md").write_text(text)
    result = {"comparison": json.loads(as_json(table)), "seeds": seeds, "environment": where}
    (options.out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    print(text)
    return result


if __name__ == "__main__":
    main()
