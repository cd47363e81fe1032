"""An experiment from start to end: the runs that are not done yet, then tables and the figure,
after an interruption too.
"""

from __future__ import annotations

import difflib
import functools
import time
from collections.abc import Callable
from pathlib import Path

from bomemeta.errors import ConfigError
from bomemeta.reproduce import (
    bamm_toy,
    bome_cleaning,
    bome_l2,
    bome_toys,
    lancbio_cleaning,
    lancbio_synthetic,
    tables,
)
from bomemeta.reproduce.experiment import Experiment, Length, PaperRun, Record
from bomemeta.reproduce.folder import Folder
from bomemeta.reproduce.runner import execute

Say = Callable[[str], None]
Make = Callable[[Length, int], Experiment]

EXPERIMENTS: dict[str, Make] = {
    "bome_toys": bome_toys.make,
    "hyper_cleaning_mnist": functools.partial(bome_cleaning.make, "mnist"),
    "hyper_cleaning_fashion": functools.partial(bome_cleaning.make, "fashion_mnist"),
    "l2_newsgroups": bome_l2.make,
    "bamm_toy": bamm_toy.make,
    "lancbio_synthetic": lancbio_synthetic.make,
    "lancbio_mnist": functools.partial(lancbio_cleaning.make, "mnist"),
    "lancbio_fashion": functools.partial(lancbio_cleaning.make, "fashion_mnist"),
}


def reproduce(
    name: str,
    *,
    full: bool = False,
    out: str | Path | None = None,
    seed: int = 0,
    say: Say = lambda text: None,
    change: Callable[[PaperRun], PaperRun] = lambda run: run,
) -> Path:
    """Runs the experiment's runs that its folder does not hold yet, and returns the folder:
    table.md, table.json, figure.png, runs/.

    `out`: by default reproduced/NAME, with -full and -seedN where these are not the defaults. `say`
    hears one line per run; `change` sees every run before it starts, as tests do that cut it down.
    Raises ConfigError for an unknown name or a folder that holds something else.
    """
    experiment = _made(name, full, seed)
    identity = {"experiment": name, "length": "full" if full else "short", "seed": seed}
    runs = [change(run) for run in experiment.runs]
    settings = [
        run.settings() for run in runs
    ]  # what is wrong with a config is said before the first run
    folder = Folder(Path(out) if out is not None else _default_out(name, full, seed), identity)
    records: dict[str, Record] = {
        run.name: record for run in runs if (record := folder.load(run)) is not None
    }
    left = [run for run in runs if run.name not in records]
    say(f"{name}: {len(settings)} runs, {len(records)} of them done before, into {folder.path}")
    started = time.perf_counter()
    try:
        for number, run in enumerate(left, 1):
            record = execute(run)
            folder.save(record)
            records = {
                each.name: records.get(each.name, record)
                for each in runs
                if each.name in records or each is run
            }
            say(
                _progress(run, record, len(left) - number, (time.perf_counter() - started) / number)
            )
    except KeyboardInterrupt:
        say(
            f"{len(records)} of {len(runs)} runs are done and kept; the same command resumes from there"
        )
        tables.write(folder, experiment, records, identity)
        raise
    tables.write(folder, experiment, records, identity)
    return folder.path


def _made(name: str, full: bool, seed: int) -> Experiment:
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{name} is not an experiment. {hint}There are: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]("full" if full else "short", seed)


def _default_out(name: str, full: bool, seed: int) -> Path:
    return Path("reproduced") / (
        name + ("-full" if full else "") + (f"-seed{seed}" if seed != 0 else "")
    )


def _progress(run: PaperRun, record: Record, left: int, each_s: float) -> str:
    steps = f"{record.last['step']} steps" + (", diverged" if record.diverged is not None else "")
    rest = f"{left} left, about {left * each_s:.0f} s" if left > 0 else "all done"
    return f"{run.label}: {steps}, {record.wall_s:.1f} s; {rest}"
