"""The three things one does with a run: train it, resume it, evaluate it. The command line and Ray Tune call these too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bomemeta.assembly import build_problem, build_solver
from bomemeta.config import Config, load_config
from bomemeta.errors import ConfigError
from bomemeta.metrics import RunFolder
from bomemeta.report import Listener, Quiet
from bomemeta.seeds import run_seeds
from bomemeta.session import Result, evaluate_one, resume_one, train_one

__all__ = ["Result", "evaluate", "resume", "train"]


def train(
    config: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = (), *, listener: Listener | None = None
) -> Result:
    """Trains from scratch in a new run folder, then evaluates; all seeds where the config has several.

    `config` is a file, a mapping like one, or a checked config; `overrides` are `key.sub=value` texts. Raises a BomemetaError that
    says what to do; nothing is written before the config, the data and the solver have been checked.
    """
    settings = load_config(config, overrides)
    name = Path(config).stem if isinstance(config, str | Path) else settings.problem.name
    listener = listener or Quiet()
    if settings.seeds == 1:
        return train_one(settings, name, listener)
    build_solver(settings, build_problem(settings))  # what is wrong is said before a folder is made
    return run_seeds(settings, RunFolder.create(settings.output_dir, name, settings), listener)


def resume(run_dir: str | Path, overrides: Sequence[str] = (), *, listener: Listener | None = None) -> Result:
    """Goes on from the folder's newest readable checkpoint, to the bits that an undisturbed run would have reached.

    Overrides may change whatever does not change the result (workers, address, logging ...) and `steps`, to train longer; a schedule
    over the run is then stretched from here on, and the bits are those of no undisturbed run. Raises CheckpointError where another
    key differs from the checkpoint's.
    """
    folder = RunFolder.open(run_dir)
    settings = load_config(folder.config_file, overrides)
    if any(override.partition("=")[0].strip() == "output_dir" for override in overrides):
        raise ConfigError(f"output_dir: a run goes on in its own folder, {folder.path}; leave the override out")
    listener = listener or Quiet()
    return resume_one(settings, folder, listener) if settings.seeds == 1 else run_seeds(settings, folder, listener, overrides)


def evaluate(run_dir: str | Path, overrides: Sequence[str] = (), *, listener: Listener | None = None) -> Result:
    """Evaluates the folder's newest checkpoint and writes nothing.

    Overrides may change the protocol (`evaluation.episodes=1000`, `problem.ways=20`, another data set) as long as x keeps its shape.
    """
    folder = RunFolder.open(run_dir)
    settings = load_config(folder.config_file, overrides)
    listener = listener or Quiet()
    if settings.seeds == 1:
        return evaluate_one(settings, folder, listener)
    return run_seeds(settings, folder, listener, overrides, evaluates=True)
