"""One run in its folder: begun, gone on with or evaluated, with everything that a run says and leaves behind."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bomemeta import checkpoint as checkpoints
from bomemeta import engine
from bomemeta.assembly import build_problem, build_solver, open_transport, torch_threads
from bomemeta.checkpoint import Checkpoint, check_same_run, load_latest, upper_sha256
from bomemeta.config import Config
from bomemeta.core.solver import LowerStates
from bomemeta.engine import Job, State
from bomemeta.errors import BomemetaError, CheckpointError, DivergenceError, LowerStateLost
from bomemeta.health import HealthMonitor
from bomemeta.metrics import MetricsLog, RunFolder
from bomemeta.report import Listener


@dataclass(frozen=True)
class Result:
    """What a run came to. `metrics` are the final figures, `upper` is x on the CPU, `upper_sha256` identifies its bits."""

    run_dir: Path
    steps: int
    metrics: dict[str, float]
    upper: dict[str, Tensor]
    upper_sha256: str
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)


def train_one(settings: Config, name: str, listener: Listener) -> Result:
    """Trains from scratch in a new folder. Raises before anything is written where problem and solver cannot be had."""
    problem = build_problem(settings)
    solver = build_solver(settings, problem)
    folder = RunFolder.create(settings.output_dir, name, settings)
    try:
        return _Session(settings, folder, listener).run(problem, solver, None)
    except BomemetaError:
        if checkpoints.latest(folder.checkpoints) is None:  # it never began: the next try may have this folder
            folder.abandon()
        raise


def resume_one(settings: Config, folder: RunFolder, listener: Listener) -> Result:
    """Goes on from the folder's newest readable checkpoint."""
    saved = None
    if checkpoints.latest(folder.checkpoints) is not None:  # else the run died before its first checkpoint: begin again
        loaded = load_latest(folder.checkpoints)
        for note in loaded.notes:
            listener.note(note)
        saved = loaded.checkpoint
        check_same_run(saved._replace(config={**saved.config, "steps": settings.steps}), settings)
    problem = build_problem(settings)
    solver = build_solver(settings, problem)
    folder.write_config(settings)
    return _Session(settings, folder, listener).run(problem, solver, saved)


def evaluate_one(settings: Config, folder: RunFolder, listener: Listener) -> Result:
    """Evaluates the folder's newest checkpoint."""
    loaded = load_latest(folder.checkpoints)
    problem = build_problem(settings)
    session = _Session(settings, folder, listener)
    for note in loaded.notes:
        session.note(note)
    return session.evaluate(problem, build_solver(settings, problem), loaded.checkpoint)


class _Session:
    """One process's work on one run folder."""

    def __init__(self, config: Config, folder: RunFolder, listener: Listener) -> None:
        self._config, self._folder, self._listener = config, folder, listener
        self._health = HealthMonitor()
        self._notes: list[str] = []
        self._log: MetricsLog | None = None

    def run(self, problem: Any, solver: Any, saved: Checkpoint | None) -> Result:
        started = time.perf_counter()
        first_step = saved.step if saved is not None else 0
        steps = engine.run_length(self._config, problem)
        self._listener.start(self._folder.path, first_step, steps, self._config.log.every_steps)
        with torch_threads(self._config.threads), closing(self), closing(open_transport(self._config, self.note)) as transport:
            job = Job(self._config, problem, solver, transport)
            state = self._state(job, saved)
            if saved is None:
                self._save(job, state)  # what a lost node or a kill in the first steps goes back to
            if state.step < steps:
                self._folder.result_file.unlink(missing_ok=True)  # of a shorter run, which this one takes further
            self._log = MetricsLog(self._folder, self._config.log.tensorboard, from_step=state.step)
            with engine.stop_on_signal(self._listener.note) as stop:
                try:
                    engine.fit(
                        job,
                        state,
                        log=self._log_step,
                        save=lambda state: self._save(job, state),
                        roll_back=self._roll_back,
                        stop=stop,
                    )
                except DivergenceError as error:
                    raise DivergenceError(self._diverged(error)) from error
            interrupted = state.step < steps
            metrics = {} if interrupted else engine.final_metrics(job, state, self.note)
            self._listener.close()
            result = self._result(state, metrics, interrupted)
            if not interrupted:
                seconds = time.perf_counter() - started
                for name, content in problem.artefacts(state.history).items():
                    self._folder.write_file(name, content)
                self._folder.write_result(self._record(job, state, result, first_step, seconds))
        return result

    def evaluate(self, problem: Any, solver: Any, saved: Checkpoint) -> Result:
        with torch_threads(self._config.threads), closing(open_transport(self._config, self.note)) as transport:
            job = Job(self._config, problem, solver, transport)
            state = self._state(job, saved)
            return self._result(state, engine.final_metrics(job, state, self.note), interrupted=False)

    def close(self) -> None:
        self._listener.close()
        if self._log is not None:
            self._log.close()

    def _state(self, job: Job, saved: Checkpoint | None) -> State:
        upper = job.problem.init_upper(torch.Generator().manual_seed(self._config.seed))
        state = State(0, job.solver.start(upper, job.steps), LowerStates.none(), job.problem.init_memory())
        if saved is not None:
            _check_shapes(state.upper.params, saved)
            engine.restore(state, saved)
        return state

    def _save(self, job: Job, state: State) -> None:
        checkpoints.save(self._folder.checkpoints, engine.to_checkpoint(job, state), self._config.checkpoint.keep)

    def _roll_back(self, state: State, error: LowerStateLost) -> None:
        loaded = load_latest(self._folder.checkpoints)
        self.note(f"step {state.step}: {error} Going back to the checkpoint of step {loaded.checkpoint.step}.")
        for note in loaded.notes:
            self.note(note)
        engine.restore(state, loaded.checkpoint)
        if self._log is not None:
            self._log.go_back(state.step)

    def _log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._log is not None:
            self._log.write(step, metrics)
        self._listener.step(step, metrics)
        for finding in self._health.update(step, metrics):
            self.note(finding)

    def note(self, text: str) -> None:
        self._notes.append(text)
        self._listener.note(text)

    def _diverged(self, error: DivergenceError) -> str:
        last = checkpoints.latest(self._folder.checkpoints)
        return (
            f"{error}. The last good checkpoint is {last}. Try smaller solver.upper_lr, lower_lr or "
            f"inner_lr in a new run; metrics.jsonl in {self._folder.path} shows which loss grew first"
        )

    def _result(self, state: State, metrics: dict[str, float], interrupted: bool) -> Result:
        upper = {name: tensor.clone() for name, tensor in state.upper.params.items()}
        return Result(self._folder.path, state.step, metrics, upper, upper_sha256(upper), interrupted, list(self._notes))

    def _record(self, job: Job, state: State, result: Result, first_step: int, seconds: float) -> dict[str, Any]:
        return {
            "steps": result.steps,
            "seed": self._config.seed,
            "upper_sha256": result.upper_sha256,
            "wall_s": seconds,  # of this process, from opening the transport
            "first_step": first_step,  # where this process began: not 0 after a resume
            "versions": _versions(),
            "metrics": result.metrics,
            "final": engine.final_variables(job, state),
            "health": self._health.summary(),
            "notes": result.notes,
            "config": self._config.to_dict(),
        }


def _check_shapes(upper: Mapping[str, Tensor], saved: Checkpoint) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in upper.items()}
    got = {name: tuple(tensor.shape) for name, tensor in saved.upper.items()}
    if wanted != got:
        different = sorted(name for name in {**wanted, **got} if wanted.get(name) != got.get(name))
        lines = [f"  {name}: checkpoint {got.get(name)}, config {wanted.get(name)}" for name in different]
        raise CheckpointError("the checkpoint's upper variable has another shape than the config's problem:\n" + "\n".join(lines))


def _versions() -> dict[str, str]:
    packages = ("bomemeta", "torch", "torchvision", "ray", "numpy", "learn2learn")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
