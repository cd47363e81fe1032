"""The Python interface: train, resume, evaluate and load a run; objects or the names of a config.
What looks into a run without training it is in `inquiries.py`.

bm.train(Mine(tasks=16), bm.BOME(inner_steps=20, upper_lr=0.3), steps=100, workers=4)
bm.train("quickstart", steps=100)
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from bomemeta import runs
from bomemeta.config import Config, Source, load_config
from bomemeta.core.problem import Problem
from bomemeta.core.solver import Solver
from bomemeta.errors import ConfigError
from bomemeta.keys import RunKeys, with_keys
from bomemeta.recorded import loaded
from bomemeta.report import Listener, heard
from bomemeta.result import Result
from bomemeta.run_folder import RunFolder
from bomemeta.trust import config_of

__all__ = ["Result", "evaluate", "extend", "load", "resume", "train"]


@with_keys
def train(
    config: Source | Problem,
    solver: Solver | Sequence[str] | None = None,
    *,
    data: Any = None,
    overrides: Sequence[str] = (),
    auto_resume: bool = False,
    listener: Listener | None = None,
    **keys: Unpack[RunKeys],
) -> Result:
    """Trains from scratch, then evaluates; all seeds where there are several.

    `config` is a problem, with a `solver` and, where the problem needs it, `data`; or a config's
    file, the name of one, or a mapping like one. `keys` are the config's keys, set over it; as in a
    config, `overrides` are `key.sub=value` texts over all. A second argument that is no solver is
    taken as `overrides`.

    With `output_dir` the run is in a new folder there, at a path or a URI; without, nothing is kept
    on the disk and `Result.run_dir` is None. Raises a BomemetaError that says what to do; nothing is
    written before config, data and solver have been checked. A signal stops the run after the step
    in hand, saves, and is then raised: KeyboardInterrupt for SIGINT, SystemExit for SIGTERM.

    `auto_resume`: the same call again resumes the run in output_dir from its newest checkpoint, to
    the same bits, and returns its result where it is finished. Raises ConfigError without an
    output_dir, and where the run there differs in a key that changes results.
    """
    settings = settings_of(config, solver, data, overrides, keys)
    return _raised(
        runs.train_config(settings, None, auto_resume, heard(listener)), settings.output_dir
    )


@with_keys
def resume(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    problem: Problem | type[Problem] | None = None,
    solver: Solver | type[Solver] | None = None,
    data: Any = None,
    trust: bool = False,
    listener: Listener | None = None,
    **keys: Unpack[RunKeys],
) -> Result:
    """Resumes from the folder's newest readable checkpoint, to the bits that an undisturbed run
    would have reached.

    `run_dir` may be a URI, as output_dir may. A run that was made of objects of your own classes
    takes the class or the object again; without, the class is imported by its module. Keys and
    `overrides` may change whatever does not change the result (workers, address, logging ...) and
    `steps`, to train longer; a schedule over the run is then stretched from here on, and the bits
    are those of no undisturbed run. Raises CheckpointError where another key differs from the
    checkpoint's, ConfigError where a class cannot be found, or where the folder comes from elsewhere
    and would execute something; `trust` says that it may (docs/operations.md, "What a folder may execute").
    """
    given = objects_of(problem, solver, data)
    return _raised(
        runs.resume(
            run_dir, overrides, keys=given | dict(keys), trust=trust, listener=heard(listener)
        ),
        str(run_dir),
    )


@with_keys
def extend(
    run_dir: str | Path,
    data: str | Path,
    *,
    tasks: int | None = None,
    overrides: Sequence[str] = (),
    problem: Problem | type[Problem] | None = None,
    solver: Solver | type[Solver] | None = None,
    trust: bool = False,
    listener: Listener | None = None,
    **keys: Unpack[RunKeys],
) -> Result:
    """Appends the tasks of one more file to a finished stream and trains on them, with the same memory
    and to the bits that a run has which had the file in `problem.appended` from its beginning.

    `data` is an .npz as of data set `labelled_array`, with rows like the stream's. With `stream: split`
    its classes are new ones; else they are the stream's. `tasks`: how many are made of it; None: one,
    or with `split` as many as its classes give. Objects, keys and `trust` as for `resume`.

    Raises ConfigError where the run is no stream or not at its end, DataError where the file does not
    continue the stream; nothing is then written.
    """
    given = objects_of(problem, solver, None)
    return _raised(
        runs.extend(
            run_dir,
            data,
            tasks,
            overrides,
            keys=given | dict(keys),
            trust=trust,
            listener=heard(listener),
        ),
        str(run_dir),
    )


@with_keys
def evaluate(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    problem: Problem | type[Problem] | None = None,
    solver: Solver | type[Solver] | None = None,
    data: Any = None,
    trust: bool = False,
    listener: Listener | None = None,
    **keys: Unpack[RunKeys],
) -> Result:
    """Evaluates the folder's newest checkpoint and writes nothing.

    `run_dir` may be a URI. Objects, classes and `trust` as for `resume`. Keys and `overrides` may change the
    protocol (`evaluation={"episodes": 1000}`, `problem.ways=20`, other data) as long as x keeps its
    shape.
    """
    given = objects_of(problem, solver, data)
    return _raised(
        runs.evaluate(
            run_dir, overrides, keys=given | dict(keys), trust=trust, listener=heard(listener)
        ),
        str(run_dir),
    )


def load(
    run_dir: str | Path,
    *,
    problem: Problem | type[Problem] | None = None,
    solver: Solver | type[Solver] | None = None,
    data: Any = None,
    trust: bool = False,
) -> Result:
    """The result that the run in a folder has so far: x of its newest checkpoint and, where the run
    is finished, its metrics. Computes nothing and writes nothing.

    Objects, classes and `trust` as for `resume`. Raises ConfigError where the folder is no run's,
    CheckpointError where it has no readable checkpoint.
    """
    folder = RunFolder.open(run_dir)
    settings = config_of(folder, (), objects_of(problem, solver, data), trust=trust)
    return loaded(settings, folder)


def settings_of(
    config: Source | Problem,
    solver: Solver | Sequence[str] | None,
    data: Any,
    overrides: Sequence[str],
    keys: Mapping[str, Any],
) -> Config:
    """The checked config of a call. Raises ConfigError where an argument is none of what is wanted."""
    if isinstance(solver, Sequence):
        overrides = [*_texts(solver), *overrides]
        solver = None
    if isinstance(config, Problem):
        source: Source = {"problem": config}
    elif isinstance(config, str | Path | Mapping | Config):
        source = config
    else:
        got = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
        raise ConfigError(
            f"got {got}, wanted a problem (an object of a class that derives from bomemeta.Problem), "
            "a config's file or its name, or a mapping"
        )
    given = objects_of(None, solver, data)
    for key, value in given.items():
        if isinstance(value, type):
            raise ConfigError(
                f"{key}: got the class {value.__name__}, wanted an object: {value.__name__}(...)"
            )
    return load_config(source, overrides, given | dict(keys))


def objects_of(problem: Any, solver: Any, data: Any) -> dict[str, Any]:
    """The sections that objects or classes stand for, without those that are None."""
    for name, value, base in (("problem", problem, Problem), ("solver", solver, Solver)):
        cls = value if isinstance(value, type) else type(value)
        if value is not None and not issubclass(cls, base):
            raise ConfigError(
                f"{name}: got an object of {cls.__name__}, wanted one whose class derives from "
                f"bomemeta.{base.__name__}"
            )
    given = {"problem": problem, "solver": solver, "data": data}
    return {key: value for key, value in given.items() if value is not None}


def _texts(overrides: Sequence[Any]) -> list[str]:
    if isinstance(overrides, str) or not all(isinstance(each, str) for each in overrides):
        raise ConfigError(
            f"got {overrides!r}, wanted a solver, or a list of key=value texts as in ['steps=100']"
        )
    return list(overrides)


def _raised(result: Result, location: str | None) -> Result:
    """The result of a run that came to its end; raises the signal that stopped another."""
    if not result.interrupted:
        return result
    how = (
        f"bomemeta.resume({location!r}) resumes it"
        if location is not None
        else "nothing was kept: output_dir=DIR keeps a run that can be resumed"
    )
    text = f"interrupted after {result.steps} steps; {how}"
    if result.signal == signal.SIGTERM:
        # The code that shells give a process which SIGTERM ended, and the text for who catches it.
        error = SystemExit(128 + signal.SIGTERM)
        error.add_note(text)
        raise error
    raise KeyboardInterrupt(text)
