"""One run in its folder: begun, resumed or evaluated, with everything that a run says and
leaves behind.
"""

from __future__ import annotations

import functools
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from bomemeta import checkpoint as checkpoints
from bomemeta import engine
from bomemeta.assembly import build_problem, build_solver, looked_at, trainer_of
from bomemeta.checkpoint import (
    Checkpoint,
    check_same_run,
    load_latest,
    upper_sha256,
)
from bomemeta.checkpoint_content import check_fits
from bomemeta.config import Config
from bomemeta.continuation import longer_notes
from bomemeta.contract import check_at_start
from bomemeta.core.problem import Problem
from bomemeta.core.solver import Solver
from bomemeta.data.digest import as_texts, check_same_data, other_data
from bomemeta.engine import State, Trainer
from bomemeta.environment import restarts_before
from bomemeta.errors import (
    DivergenceError,
    LowerStateLost,
)
from bomemeta.evaluation import final_variables
from bomemeta.extras import versions
from bomemeta.files import naming
from bomemeta.health import HealthMonitor
from bomemeta.heartbeat import Heartbeat
from bomemeta.limits import within_memory
from bomemeta.metrics import MetricsLog
from bomemeta.recorded import standing
from bomemeta.report import Listener
from bomemeta.result import Result
from bomemeta.run_folder import RunFolder
from bomemeta.signals import stop_on_signal
from bomemeta.stages import grown, stage_of, stages_of
from bomemeta.trackers import Trackers


def train_one(settings: Config, name: str | None, listener: Listener) -> Result:
    """Trains from scratch in a new folder: output_dir, or runs/NAME; without either nothing is kept.

    Raises before anything is written where problem and solver cannot be had.
    """
    if settings.output_dir is None and name is None:
        quiet = settings.log.model_copy(update={"tensorboard": False})  # nobody would see it
        settings = settings.model_copy(update={"log": quiet})
    stages = stages_of(settings)
    for later in reversed(stages[1:]):  # what is wrong with its data is said now
        build_problem(later)
    problem = build_problem(stages[0])
    solver = build_solver(settings, problem)
    data = looked_at(settings, problem)
    check_at_start(problem, vmap=settings.task_map == "vmap")

    def run(folder: RunFolder) -> Result:
        session = _Session(stages[0], folder, listener, data)
        result = session.run(problem, solver, None, ends=len(stages) == 1)
        return _later_stages(stages[1:], folder, listener, result, session.notes)

    if settings.output_dir is None and name is None:
        with RunFolder.passing(settings) as passing:
            return run(passing)
    folder = RunFolder.create(settings.output_dir, name or "run", settings)
    try:
        with folder.held(listener.note):
            return run(folder)
    except Exception:  # of a library too
        if (
            checkpoints.latest(folder.checkpoints) is None
        ):  # it never began: the next try may have this folder
            folder.abandon()
        raise


def resume_one(
    settings: Config, folder: RunFolder, listener: Listener, reported: Sequence[str] = ()
) -> Result:
    """Resumes from the folder's newest readable checkpoint. `reported`: notes that the listener has heard,
    for the result.
    """
    stages = stages_of(settings)
    at = 0
    with folder.held(listener.note):
        saved = None
        loaded = standing(folder)
        early = (
            loaded.notes
            if loaded is not None  # else it died before its first step, or somebody cleared up
            else [f"no checkpoint in {folder.checkpoints}: the run begins again at step 0"]
        )
        for note in early:
            listener.note(note)
        if loaded is not None:
            saved = loaded.checkpoint
            as_now = saved._replace(config={**saved.config, "steps": settings.steps})
            at = stage_of(as_now, stages)
            check_same_run(as_now, stages[at])
        problem = build_problem(stages[at])
        solver = build_solver(settings, problem)
        data = looked_at(settings, problem)
        session = _Session(stages[at], folder, listener, data, [*reported, *early])
        if saved is not None:
            check_same_data(saved.data, data, saved.step)
            for note in longer_notes(solver, saved, settings.steps):
                session.note(note)
        check_at_start(problem, vmap=settings.task_map == "vmap")
        folder.write_config(settings)
        later = stages[at + 1 :]
        if saved is not None and later and saved.step == engine.run_length(stages[at], problem):
            result = None  # that stage is done
        else:
            result = session.run(problem, solver, saved, ends=not later)
        return _later_stages(later, folder, listener, result, session.notes)


def _later_stages(
    stages: Sequence[Config],
    folder: RunFolder,
    listener: Listener,
    result: Result | None,
    notes: Sequence[str],
) -> Result:
    """The result after the stages that are left; `result` is that of the one before them, None where it
    was done long ago, and `notes` what was said so far.
    """
    for left, settings in enumerate(stages, start=1 - len(stages)):
        if result is not None and result.interrupted:
            return result
        problem = build_problem(settings)
        solver = build_solver(settings, problem)
        session = _Session(settings, folder, listener, looked_at(settings, problem), notes)
        notes = session.notes
        check_at_start(problem, vmap=settings.task_map == "vmap")
        saved = load_latest(folder.checkpoints).checkpoint
        result = session.run(problem, solver, saved, grows=True, ends=left == 0)
    assert result is not None, "a stage that is done has another after it"
    return result


def evaluate_one(settings: Config, folder: RunFolder, listener: Listener) -> Result:
    """Evaluates the folder's newest checkpoint."""
    loaded = load_latest(folder.checkpoints)
    stages = stages_of(settings)
    settings = stages[stage_of(loaded.checkpoint, stages)]
    problem = build_problem(settings)
    session = _Session(settings, folder, listener, data := looked_at(settings, problem))
    for note in [*loaded.notes, *other_data(loaded.checkpoint.data, data)]:
        session.note(note)
    return session.evaluate(problem, build_solver(settings, problem), loaded.checkpoint)


class _Session:
    """One process's work on one run folder."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        listener: Listener,
        data: dict[str, Any],
        notes: Sequence[str] = (),
    ) -> None:
        self._config, self._folder, self._listener = config, folder, listener
        self._data = data  # its digest
        self._health = HealthMonitor()
        self.notes = [*notes]
        self._log: MetricsLog | None = None
        self._trackers: Trackers | None = None
        self._saving = threading.Lock()
        self._saved_step = 0
        self._identity = folder.identity()

    def run(
        self,
        problem: Problem,
        solver: Solver,
        saved: Checkpoint | None,
        *,
        grows: bool = False,
        ends: bool = True,
    ) -> Result:
        """From `saved` (None: from the start) to the stream's end. `grows`: `saved` is of the stage before.
        `ends`: the run ends there too, and is judged.
        """
        started = time.perf_counter()
        first_step = self._saved_step = saved.step if saved is not None else 0
        steps = engine.run_length(self._config, problem)
        location = self._folder.location if self._folder.kept else None
        self._listener.start(location, first_step, steps, self._config.log.every_steps)
        for made in (problem.data, problem):  # what they left out, in sentences
            notes = getattr(made, "notes", ())  # a user's class may mean something else by it
            for text in notes if isinstance(notes, list | tuple) else ():
                self.note(str(text))
        record = self._config.to_dict()
        self._trackers = Trackers(self._config.log.to, self._folder, record, self.note)
        with (
            within_memory(self._config.to_dict(), limited=False),
            closing(self),
            self._trainer(problem, solver, saved, grows) as trainer,
        ):
            state = trainer.state
            if saved is None or grows:
                self._save(trainer)  # what a lost node or a kill in the first steps goes back to
            if state.step < steps:  # the result is of a shorter run, which this one takes further
                with naming(self._folder.result_file):
                    self._folder.result_file.unlink(missing_ok=True)
            self._log = MetricsLog(self._folder, self._config.log.tensorboard, from_step=state.step)
            if saved is not None and (fault := self._log.fault(saved.files.get("metrics.jsonl"))):
                self.note(fault)
            save_kept = functools.partial(self._save_kept, trainer)
            with stop_on_signal(self._listener.note, save_kept) as stop:
                trainer.transport.guard(lambda: stop.save_now(self.note, save_kept))
                try:
                    trainer.fit(
                        log=functools.partial(self._log_step, trainer),
                        save=lambda state: self._save(trainer),
                        roll_back=functools.partial(self._roll_back, trainer),
                        stop=stop,
                        keep=lambda state: stop.keep(engine.copy_of(state)),
                    )
                except DivergenceError as error:
                    raise DivergenceError(self._diverged(error)) from error
            interrupted = state.step < steps
            judged = ends and not interrupted
            metrics = self._evaluated(trainer) if judged else {}
            self._listener.close()
            result = self._result(state, metrics, stop.signal if interrupted else None, interrupted)
            self._trackers.end(metrics, "interrupted" if interrupted else "done")
            if judged:
                self._folder.check_there(self._identity)
                seconds = time.perf_counter() - started
                for name, content in problem.artefacts(state.history, metrics).items():
                    self._folder.write_file(name, content)
                    if name.endswith(".png"):
                        self._log.image(name.removesuffix(".png"), content, state.step - 1)
                self._folder.write_result(self._record(trainer, result, first_step, seconds))
        return result

    def evaluate(self, problem: Problem, solver: Solver, saved: Checkpoint) -> Result:
        with (
            within_memory(self._config.to_dict(), limited=False),
            self._trainer(problem, solver, saved) as trainer,
        ):
            return self._result(trainer.state, self._evaluated(trainer))

    def _evaluated(self, trainer: Trainer) -> dict[str, float]:
        with Heartbeat(self._listener.note) as life:  # no part of the result's notes
            return trainer.evaluate(self.note, life.doing)
        raise AssertionError("unreachable")

    def close(self) -> None:
        self._listener.close()
        if self._trackers is not None:
            self._trackers.end({}, "failed")  # nothing where it has ended
            self._trackers = None  # it knows `note`, which is ours: a circle would keep the folder
        if self._log is not None:
            self._log.close()

    def _trainer(
        self, problem: Problem, solver: Solver, saved: Checkpoint | None, grows: bool = False
    ) -> Trainer:
        trainer = trainer_of(self._config, self.note, problem=problem, solver=solver)
        if saved is not None:
            try:
                saved = grown(saved, trainer) if grows else saved
                per_step, state = self._config.tasks_per_step, trainer.state
                check_fits(saved, problem, state.upper, state.memory, per_step)
                trainer.restore(saved)
            except BaseException:
                trainer.close()
                raise
        return trainer

    def _save(self, trainer: Trainer) -> None:
        with self._saving:
            self._write(trainer, trainer.state)

    def _save_kept(self, trainer: Trainer, state: State) -> None:
        """For a signal in the middle of a step; the loop may be saving a later state, or have saved
        it.
        """
        with self._saving:
            if state.step > self._saved_step:
                self._write(trainer, state)

    def _write(self, trainer: Trainer, state: State) -> None:
        self._folder.check_there(self._identity)
        now = trainer.checkpoint_of(state)._replace(data=as_texts(self._data))
        if self._log is not None:
            now = now._replace(files={"metrics.jsonl": self._log.digest()})
        path = checkpoints.save(self._folder.checkpoints, now, self._config.checkpoint.keep)
        self._saved_step = state.step
        if self._log is not None:
            self._log.flush()
        self._folder.publish(self.note)
        self._listener.saved(path)

    def _roll_back(self, trainer: Trainer, error: LowerStateLost) -> None:
        loaded = load_latest(self._folder.checkpoints)
        self.note(
            f"step {trainer.state.step}: {error} Going back to the checkpoint of step {loaded.checkpoint.step}."
        )
        for note in loaded.notes:
            self.note(note)
        trainer.restore(loaded.checkpoint)
        self._saved_step = trainer.state.step
        if self._log is not None:
            self._log.go_back(trainer.state.step)

    def _log_step(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        self._folder.check_there(self._identity)
        if self._log is not None:
            self._log.write(step, metrics)
        if self._trackers is not None:
            self._trackers.write(step, metrics)
        name = str(self._folder.location) if self._folder.kept else "run"
        counted = {"step": step + 1.0, "restarts": restarts_before()}
        trainer.transport.show(name, {**metrics, **counted})
        if (workers := trainer.transport.workers) is not None:
            # Listeners may hear of workers; those of users, which are older than that, need not.
            getattr(self._listener, "workers", lambda alive, wanted: None)(*workers)
        self._listener.step(step, metrics)
        for finding in self._health.update(step, metrics):
            self.note(finding)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._listener.note(text)

    def _diverged(self, error: DivergenceError) -> str:
        advice = "Try smaller solver.upper_lr, lower_lr or inner_lr in a new run"
        if not self._folder.kept:
            return (
                f"{error}. {advice}; output_dir=DIR keeps checkpoints and the metrics of each step"
            )
        last = checkpoints.latest(self._folder.checkpoints)
        good = f"{self._folder.location}/checkpoints/{last.name}" if last is not None else None
        return (
            f"{error}. The last good checkpoint is {good}. {advice}; "
            f"metrics.jsonl in {self._folder.location} shows which loss grew first"
        )

    def _result(
        self,
        state: State,
        metrics: dict[str, float],
        signal: int | None = None,
        interrupted: bool = False,
    ) -> Result:
        upper = {name: tensor.clone() for name, tensor in state.upper.averaged.items()}
        uri = self._folder.mirror.uri if self._folder.mirror is not None else None
        return Result(
            self._folder.path if self._folder.kept else None,
            state.step,
            metrics,
            upper,
            upper_sha256(upper),
            interrupted,
            list(self.notes),
            uri,
            signal,
            self._config,
        )

    def _record(
        self, trainer: Trainer, result: Result, first_step: int, seconds: float
    ) -> dict[str, Any]:
        return {
            "steps": result.steps,
            "seed": self._config.seed,
            "upper_sha256": result.upper_sha256,
            "wall_s": seconds,  # of this process, from opening the transport
            "first_step": first_step,  # where this process began: not 0 after a resume
            "versions": _versions(),
            "data": self._data,
            "metrics": result.metrics,
            "final": final_variables(trainer),
            "health": self._health.summary(),
            "notes": result.notes,
            "config": self._config.to_dict(),
        }


def _versions() -> dict[str, str]:
    packages = ("bomemeta", "torch", "torchvision", "ray", "numpy", "learn2learn")
    return {"python": platform.python_version(), **versions(*packages)}
