"""One run of an experiment, in this process: the engine's steps in stretches, with figures in
between that no clock sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import closing

from bomemeta import engine
from bomemeta.assembly import build_problem, build_solver, open_transport, torch_threads
from bomemeta.config import load_config
from bomemeta.core.inner import evaluate
from bomemeta.core.problem import SharedProblem, Split
from bomemeta.core.randomness import generator
from bomemeta.core.solver import LowerStates
from bomemeta.core.tree import Params
from bomemeta.engine import Job, State
from bomemeta.environment import environment
from bomemeta.errors import DivergenceError
from bomemeta.reproduce.experiment import Cost, Point, Record, Run

# What a Hessian product costs in gradient evaluations: a double backward pass is about two of them.
PRODUCT_COST = 2
# Of a step's metrics what says how long it took or what was sent is no figure.
_NOT_FIGURES = ("_s", "reduces", "bytes_reduced", "gradient_evaluations", "hessian_products")


def execute(run: Run) -> Record:
    """Runs it to its end and returns the record. A run that diverges has a record too, up to there."""
    started = time.perf_counter()
    config = load_config(run.config, ["workers=0"])
    problem = build_problem(config)
    solver = run.plain if run.plain is not None else build_solver(config, problem)
    notes: list[str] = []
    with torch_threads(config.threads), closing(open_transport(config, notes.append)) as transport:
        job = Job(config, problem, solver, transport)
        upper = problem.init_upper(generator(config.seed))
        state = State(0, solver.start(upper, job.steps), LowerStates.none())
        course = _Course(job, state, run)
        diverged, final = None, {}
        try:
            course.follow()
            final = engine.final_metrics(job, state, notes.append)
        except DivergenceError as error:
            diverged = str(error)
    return Record(
        name=run.name,
        settings=run.settings(),
        curve=course.curve,
        final=_finite(final),
        diverged=diverged,
        notes=notes,
        environment=environment(),
        wall_s=time.perf_counter() - started,
    )


class _Course:
    """A run on its way: its points so far, and what they cost."""

    def __init__(self, job: Job, state: State, run: Run) -> None:
        self.curve: list[Point] = []
        self._job, self._state, self._run = job, state, run
        self._start = {name: tensor.clone() for name, tensor in state.upper.params.items()}
        self._metrics: Mapping[str, float] = {}
        self._seconds = self._wall_s = 0.0
        self._zero_steps = 0.0  # in which BOME's lambda was 0

    def follow(self) -> None:
        """Steps and points in turn, the first one before any step."""
        steps = self._job.steps
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
            engine.fit(
                self._job,
                self._state,
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
        counts = self._state.figures
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
        told = {
            name: value for name, value in self._metrics.items() if not name.endswith(_NOT_FIGURES)
        }
        point: Point = {
            name: self._spent(name) for name in ("step", "gradients", "hessian_products", "seconds")
        }
        point |= {"wall_s": self._wall_s, "upper_change": moved}
        point |= _finite(told | _figures(self._job, self._state))
        if "multiplier_zero_share" in told:
            point["multiplier_zero_steps"] = self._zero_steps
        if self._run.variables:
            point["variables"] = engine.final_variables(self._job, self._state)
        self.curve.append(point)


def _figures(job: Job, state: State) -> dict[str, float]:
    """The problem's figures at the y that the run carries."""
    shared = isinstance(job.problem, SharedProblem)
    split: Split = "test" if shared else "train"
    run = job.run_on(
        range(job.problem.num_tasks or 0),
        job.config.shards,
        step=state.step,
        split=split,
        differentiable=False,
    )
    sums, _ = run(evaluate, job.solver, state.upper.params, state.lower, steps=0)
    means = {
        name.removeprefix("sum/"): float(value) / run.tasks
        for name, value in sums.items()
        if name.startswith("sum/")
    }
    return job.problem.summary(means)


def _change(before: Params, after: Params) -> float:
    """Root mean square of what the numbers of x have changed by."""
    squares = sum(float(((after[name] - tensor) ** 2).sum()) for name, tensor in before.items())
    return math.sqrt(squares / sum(tensor.numel() for tensor in before.values()))


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has neither NaN nor infinite numbers."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _ignore(state: State) -> None:
    """No checkpoints: a run is done again from its start."""


def _impossible(state: State, error: Exception) -> None:
    raise error  # lower states live in this process and are not lost
