"""One run of an experiment, in this process: the engine's steps in stretches, with metrics in
between that no clock sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from bomemeta.assembly import trainer_of
from bomemeta.config import load_config
from bomemeta.core.tree import Params
from bomemeta.engine import State, Trainer
from bomemeta.environment import environment
from bomemeta.errors import DivergenceError
from bomemeta.evaluation import final_variables, own_metrics
from bomemeta.reproduce.experiment import Cost, PaperRun, Point, Record

# What a Hessian product costs in gradient evaluations: a double backward pass is about two of them.
PRODUCT_COST = 2
# Of a step's metrics what says how long it took or what was sent is not counted.
_NOT_FIGURES = ("_s", "reduces", "bytes_reduced", "gradient_evaluations", "hessian_products")


def execute(run: PaperRun) -> Record:
    """Runs it to its end and returns the record. A run that diverges has a record too, up to there."""
    started = time.perf_counter()
    config = load_config(run.config, ["workers=0"])
    notes: list[str] = []
    with trainer_of(config, notes.append, solver=run.plain) as trainer:
        loop = _Loop(trainer, run)
        diverged, final = None, {}
        try:
            loop.follow()
            final = trainer.evaluate(notes.append)
        except DivergenceError as error:
            diverged = str(error)
    return Record(
        name=run.name,
        settings=run.settings(),
        curve=loop.curve,
        final=_finite(final),
        diverged=diverged,
        notes=notes,
        environment=environment(),
        wall_s=time.perf_counter() - started,
    )


class _Loop:
    """A run on its way: its points so far, and what they cost."""

    def __init__(self, trainer: Trainer, run: PaperRun) -> None:
        self.curve: list[Point] = []
        self._trainer, self._state, self._run = trainer, trainer.state, run
        self._start = {name: tensor.clone() for name, tensor in trainer.state.upper.params.items()}
        self._metrics: Mapping[str, float] = {}
        self._seconds = self._wall_s = 0.0
        self._zero_steps = 0.0  # in which BOME's lambda was 0

    def follow(self) -> None:
        """Steps and points in turn, the first one before any step."""
        steps = self._trainer.steps
        cost: Cost
        cost, amount = self._run.budget if self._run.budget is not None else ("step", steps)
        self._take_point()
        for number in range(1, self._run.points + 1):
            goal = amount * number / self._run.points
            if self._state.step < steps and self._spent(cost) < goal * (1 - 1e-9):
                self._advance(cost, goal)
                self._take_point()

    def _advance(self, cost: Cost, goal: float) -> None:
        cpu, wall = time.process_time(), time.perf_counter()

        def stop() -> bool:
            spent = (
                self._seconds + time.process_time() - cpu
                if cost == "seconds"
                else self._spent(cost)
            )
            return spent >= goal * (1 - 1e-9)

        try:
            self._trainer.fit(
                log=self._log,
                save=_ignore,
                roll_back=_impossible,
                stop=stop,
            )
        finally:
            self._seconds += time.process_time() - cpu
            self._wall_s += time.perf_counter() - wall

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics = metrics
        self._zero_steps += metrics.get("multiplier_zero_share", 0.0)

    def _spent(self, cost: Cost) -> float:
        counts = self._state.metrics
        products = counts.get("hessian_products", 0.0)
        gradients = counts.get("gradient_evaluations", 0.0) + PRODUCT_COST * products
        return {
            "step": self._state.step,
            "gradients": gradients,
            "hessian_products": products,
            "seconds": self._seconds,
        }[cost]

    def _take_point(self) -> None:
        moved = _change(self._start, self._state.upper.params)
        reported = {
            name: value for name, value in self._metrics.items() if not name.endswith(_NOT_FIGURES)
        }
        point: Point = {
            name: self._spent(name) for name in ("step", "gradients", "hessian_products", "seconds")
        }
        point |= {"wall_s": self._wall_s, "upper_change": moved}
        point |= _finite(reported | own_metrics(self._trainer))
        if "multiplier_zero_share" in reported:
            point["multiplier_zero_steps"] = self._zero_steps
        if self._run.variables:
            point["variables"] = final_variables(self._trainer)
        self.curve.append(point)


def _change(before: Params, after: Params) -> float:
    """Root mean square of what the numbers of x have changed by."""
    squares = sum(float(((after[name] - tensor) ** 2).sum()) for name, tensor in before.items())
    return math.sqrt(squares / sum(tensor.numel() for tensor in before.values()))


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has neither NaN nor infinite numbers."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _ignore(state: State) -> None:
    """No checkpoints: a run is done again from its start."""


def _impossible(error: Exception) -> None:
    raise error  # lower states live in this process and are not lost
