"""The three things one does with a run: train it, resume it, evaluate it. The command line and Ray
Tune call these too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bomemeta.assembly import build_problem, build_solver
from bomemeta.config import Config, load_config
from bomemeta.errors import ConfigError
from bomemeta.report import Listener, Quiet
from bomemeta.run_folder import RunFolder
from bomemeta.seeds import run_seeds
from bomemeta.session import Result, check_continues, evaluate_one, finished, resume_one, train_one

__all__ = ["Result", "evaluate", "resume", "train"]


def train(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    auto_resume: bool = False,
    listener: Listener | None = None,
) -> Result:
    """Trains from scratch in a new run folder, then evaluates; all seeds where the config has
    several.

    `config` is a file, a mapping like one, or a checked config; `overrides` are `key.sub=value`
    texts. Raises a BomemetaError that says what to do; nothing is written before the config, the
    data and the solver have been checked.

    `auto_resume`: the same call again goes on with the run in output_dir from its newest
    checkpoint, to the same bits, and returns what it came to where it is finished. Raises
    ConfigError without an output_dir, and where the run there differs in a key that changes
    results.
    """
    settings = load_config(config, overrides)
    name = Path(config).stem if isinstance(config, str | Path) else settings.problem.name
    listener = listener or Quiet()
    if auto_resume and (result := _continued(settings, listener)) is not None:
        return result
    if settings.seeds == 1:
        return train_one(settings, name, listener)
    build_solver(settings, build_problem(settings))  # what is wrong is said before a folder is made
    return run_seeds(settings, RunFolder.create(settings.output_dir, name, settings), listener)


def resume(
    run_dir: str | Path, overrides: Sequence[str] = (), *, listener: Listener | None = None
) -> Result:
    """Goes on from the folder's newest readable checkpoint, to the bits that an undisturbed run
    would have reached.

    `run_dir` may be a URI, as output_dir may. Overrides may change whatever does not change the
    result (workers, address, logging ...) and `steps`, to train longer; a schedule over the run is
    then stretched from here on, and the bits are those of no undisturbed run. Raises
    CheckpointError where another key differs from the checkpoint's.
    """
    folder = RunFolder.open(run_dir)
    settings = load_config(folder.config_file, overrides)
    if any(override.partition("=")[0].strip() == "output_dir" for override in overrides):
        raise ConfigError(
            f"output_dir: a run goes on in its own folder, {folder.location}; leave the override out"
        )
    return _go_on(settings, folder, listener or Quiet())


def evaluate(
    run_dir: str | Path, overrides: Sequence[str] = (), *, listener: Listener | None = None
) -> Result:
    """Evaluates the folder's newest checkpoint and writes nothing.

    `run_dir` may be a URI. Overrides may change the protocol (`evaluation.episodes=1000`,
    `problem.ways=20`, another data set) as long as x keeps its shape.
    """
    folder = RunFolder.open(run_dir)
    settings = load_config(folder.config_file, overrides)
    listener = listener or Quiet()
    if settings.seeds == 1:
        return evaluate_one(settings, folder, listener)
    return run_seeds(settings, folder, listener, evaluates=True)


def _continued(settings: Config, listener: Listener) -> Result | None:
    """What --auto-resume comes to where the run was begun before; None where it is to be begun."""
    if settings.output_dir is None:
        raise ConfigError(
            "output_dir: missing; --auto-resume finds the run again by it. Give a folder or a URI, as in output_dir=DIR"
        )
    folder = RunFolder.find(settings.output_dir)
    if folder is None:
        return None
    check_continues(settings, folder)
    result = finished(settings, folder)
    if result is None:
        return _go_on(settings, folder, listener)
    listener.note(f"run folder: {folder.location}, where this run is finished")
    return result


def _go_on(settings: Config, folder: RunFolder, listener: Listener) -> Result:
    return (
        resume_one(settings, folder, listener)
        if settings.seeds == 1
        else run_seeds(settings, folder, listener)
    )
