"""What an experiment is: runs, and how their records become tables and a figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from bomemeta.config import load_config
from bomemeta.reproduce.plain import PlainDescent

Length = Literal["short", "full"]
# What a run's length can be measured in. `gradients`: evaluations of a gradient, a Hessian product
# counting as two. `seconds`: CPU time of the steps, without metrics taken on the way.
Cost = Literal["step", "gradients", "hessian_products", "seconds"]
Point = dict[str, Any]


class Budget(NamedTuple):
    cost: Cost
    amount: float


@dataclass(frozen=True, kw_only=True)
class PaperRun:
    """One training run. `config` is what `bomemeta.train` takes, its `steps` the most that are
    taken.
    """

    name: str  # of its file
    label: str  # in tables and legends
    config: Mapping[str, Any]
    budget: Budget | None = None  # the run ends with the step that spends it
    points: int = 25  # how often metrics are taken, evenly over the steps or the budget
    variables: bool = False  # keep x and y at each point: small problems
    plain: PlainDescent | None = None  # trains y alone, in place of the config's solver

    def settings(self) -> dict[str, Any]:
        """Everything that decides what is in the record, as JSON values."""
        own: dict[str, Any] = {
            "budget": list(self.budget) if self.budget is not None else None,
            "points": self.points,
            "variables": self.variables,
        }
        config = load_config(self.config)
        keys = config.result_keys()
        if self.plain is not None:
            keys = {key: value for key, value in keys.items() if not key.startswith("solver.")}
            own["plain"] = dataclasses.asdict(self.plain)
        return own | {"solve_steps": config.evaluation.solve_steps, "config": keys}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run left. A point of `curve` has the costs so far, the last step's metrics, and the
    problem's metrics at that y.
    """

    name: str
    settings: dict[str, Any]
    curve: list[Point]
    final: dict[str, Any] = field(
        default_factory=dict
    )  # as a run's result.json has them under `metrics`
    diverged: str | None = None
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0  # all of it, metrics and loading included

    @property
    def last(self) -> Point:
        return self.curve[-1]

    def at(self, cost: Cost, amount: float) -> Point:
        """The last point that costs no more than this."""
        return [point for point in self.curve if point[cost] <= amount * (1 + 1e-9)][-1]

    def series(self, cost: Cost, figure: str) -> tuple[list[float], list[float]]:
        """The curve of a figure over a cost, where the figure was measured."""
        known = [point for point in self.curve if point.get(figure) is not None]
        return [point[cost] for point in known], [point[figure] for point in known]


Records = Mapping[str, Record]  # by the run's name, those that are done


class Column(NamedTuple):
    name: str
    format: str = (
        "s"  # of a cell that is a number; percentages as in ".2%" stand without their sign
    )


Cell = str | float | int | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A None in a row is a value that there is not: a dash."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """`tables` and `draw` get the records that there are, in the runs' order: any number of them
    may be missing.
    """

    name: str
    title: str
    source: str  # the paper
    runs: Sequence[PaperRun]
    tables: Callable[[Records], list[Table]]
    draw: Callable[[Any, Records], None]  # on an empty matplotlib figure
    notes: Sequence[str] = ()  # what a reader of the tables has to know


def merged(base: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The config with these keys; a mapping is merged into the section of that name, but a `solver`
    takes its place.
    """
    result = dict(base)
    for key, value in changes.items():
        below = (
            key != "solver" and isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        )
        result[key] = {**result[key], **value} if below else value
    return result
