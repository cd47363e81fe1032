"""A run from a checked config, in the folder that it names: trained, resumed, evaluated.

The command line, Ray Tune and the Python interface (`api.py`) call these. A run that a signal
stopped returns with `interrupted`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bomemeta.assembly import build_problem, build_solver
from bomemeta.checkpoint import load_latest
from bomemeta.config import Config, Source, load_config
from bomemeta.continuation import check_continues
from bomemeta.core.problem import StreamProblem
from bomemeta.errors import ConfigError
from bomemeta.heartbeat import hearing
from bomemeta.paths import absolute
from bomemeta.recorded import finished
from bomemeta.report import Listener, Quiet
from bomemeta.result import Result
from bomemeta.run_folder import RunFolder
from bomemeta.sections import label
from bomemeta.seeds import run_seeds
from bomemeta.session import evaluate_one, resume_one, train_one
from bomemeta.trust import config_of

__all__ = ["Result", "evaluate", "extend", "name_of", "resume", "train"]


def train(
    config: Source,
    overrides: Sequence[str] = (),
    *,
    auto_resume: bool = False,
    listener: Listener | None = None,
) -> Result:
    """As `bomemeta.train`, in runs/NAME where the config names no output_dir."""
    settings = load_config(config, overrides)
    return train_config(settings, name_of(config, settings), auto_resume, listener or Quiet())


def train_config(
    settings: Config, name: str | None, auto_resume: bool, listener: Listener
) -> Result:
    """Trains from scratch in a new folder, then evaluates; all seeds where there are several.

    Without an output_dir the folder is runs/NAME; without a `name` too, nothing is kept.
    """
    if auto_resume and (result := _continued(settings, listener)) is not None:
        return result
    with hearing(listener.note):
        if settings.seeds == 1:
            return train_one(settings, name, listener)
        # What is wrong is said before a folder is made.
        build_solver(settings, build_problem(settings))
        if settings.output_dir is None and name is None:
            with RunFolder.passing(settings) as folder:
                return run_seeds(settings, folder, listener)
        folder = RunFolder.create(settings.output_dir, name or "run", settings)
        return run_seeds(settings, folder, listener)


def name_of(config: object, settings: Config) -> str:
    """What a run's default folder is called after: the config's file, or the problem."""
    return Path(config).stem if isinstance(config, str | Path) else label(settings.problem)


def resume(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    keys: Mapping[str, Any] | None = None,
    trust: bool = False,
    listener: Listener | None = None,
) -> Result:
    """As `bomemeta.resume`."""
    folder = RunFolder.open(run_dir)
    settings = config_of(folder, overrides, keys, trust=trust)
    named = [override.partition("=")[0].strip() for override in overrides]
    if "output_dir" in [*named, *(keys or ())]:
        raise ConfigError(
            f"output_dir: a run resumes in its own folder, {folder.location}; leave the override out"
        )
    return _resumed(settings, folder, listener or Quiet())


def extend(
    run_dir: str | Path,
    data: str | Path,
    tasks: int | None = None,
    overrides: Sequence[str] = (),
    *,
    keys: Mapping[str, Any] | None = None,
    trust: bool = False,
    listener: Listener | None = None,
) -> Result:
    """As `bomemeta.extend`."""
    if not isinstance(data, str | Path):
        raise ConfigError(f"data: got {type(data).__name__}, wanted the path of an .npz file")
    if tasks is not None and (isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1):
        raise ConfigError(f"tasks: got {tasks!r}, wanted a whole number >= 1, or None")
    folder = RunFolder.open(run_dir)
    named = {override.partition("=")[0].strip() for override in overrides} | {*(keys or ())}
    for key in ("output_dir", "steps", "problem.appended"):
        if key in named:
            raise ConfigError(
                f"{key}: an extended run has its own folder, and its stream's length; leave the override out"
            )
    settings = config_of(folder, overrides, keys, trust=trust)
    if settings.seeds > 1:
        raise ConfigError(
            f"{folder.location} is of {settings.seeds} seeds; extend the folder of each seed below it"
        )
    problem = build_problem(settings)
    if not isinstance(problem, StreamProblem):
        raise ConfigError(
            f"{folder.location}: problem {label(problem)} is no stream that could continue; `bomemeta train` begins a run on other data"
        )
    done, length = load_latest(folder.checkpoints).checkpoint.step, problem.length
    if done < length:
        raise ConfigError(
            f"{folder.location}: the run has done {done} of its stream's {length} steps. `bomemeta resume` it to the end first"
        )
    longer = problem.appending(str(absolute(data, what="--data")), tasks)
    settings = settings.model_copy(update={"problem": longer, "steps": None})
    build_problem(settings)  # what is wrong with the data is said before anything is written
    return resume_one(settings, folder, listener or Quiet())


def evaluate(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    keys: Mapping[str, Any] | None = None,
    trust: bool = False,
    listener: Listener | None = None,
) -> Result:
    """As `bomemeta.evaluate`."""
    folder = RunFolder.open(run_dir)
    settings = config_of(folder, overrides, keys, trust=trust)
    listener = listener or Quiet()
    with hearing(listener.note):
        if settings.seeds == 1:
            return evaluate_one(settings, folder, listener)
        return run_seeds(settings, folder, listener, evaluates=True)


def _continued(settings: Config, listener: Listener) -> Result | None:
    """The result of --auto-resume where the run was begun before; None where it is to be begun."""
    if settings.output_dir is None:
        raise ConfigError(
            "output_dir: missing; --auto-resume finds the run again by it. Give a folder or a URI, as in output_dir=DIR"
        )
    folder = RunFolder.find(settings.output_dir)
    if folder is None:
        return None
    notes = [note for note in (folder.recorded_config()[1], folder.read_result()[1]) if note]
    for note in notes:
        listener.note(note)
    check_continues(settings, folder)
    result = finished(settings, folder)
    if result is None:
        return _resumed(settings, folder, listener, notes)
    listener.note(f"run folder: {folder.location}, where this run is finished")
    return result


def _resumed(
    settings: Config, folder: RunFolder, listener: Listener, reported: Sequence[str] = ()
) -> Result:
    with hearing(listener.note):
        if settings.seeds == 1:
            return resume_one(settings, folder, listener, reported)
        return run_seeds(settings, folder, listener)
