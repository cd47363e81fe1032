"""One config with several seeds: independent runs, side by side where there are workers, and the
mean of their results.

Each seed is a run like any other, serial, in a folder of its own below the common one. A worker
runs a seed from begin to end; one that is lost has its seed resumed elsewhere, from the seed's
last checkpoint and to the same bits.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bomemeta.assembly import imports_of, open_transport, worker_range
from bomemeta.config import Config
from bomemeta.distributed.transport import ShardCall
from bomemeta.imports import Imports, is_file_entry
from bomemeta.intervals import mean_and_half_width
from bomemeta.report import Listener, Quiet
from bomemeta.result import Result
from bomemeta.run_folder import RunFolder
from bomemeta.session import evaluate_one, resume_one, train_one
from bomemeta.storage import below

# A seed is a whole run: no answer for a long time says nothing.
NEVER_S = 1e9


class SeedRequest(NamedTuple):
    """What a worker is asked for one seed: exactly one of training, resuming and evaluating."""

    seed: int
    location: str  # of its folder: a path or a URI
    evaluates: bool


class SeedAnswer(NamedTuple):
    seed: int
    steps: int
    metrics: dict[str, float]
    upper_sha256: str
    notes: list[str]
    interrupted: bool
    signal: int | None


@dataclass(frozen=True)
class BuildSeedWorker:
    """Makes a worker for seeds in whatever process it is called in. The config's objects travel by
    value, and user files as text.
    """

    imports: Imports
    config: Config

    def __call__(self, device: str) -> SeedWorker:
        # Imported files have just been executed from their text, and need not exist here. Where
        # they do, a seed's folder can be used alone.
        files = [entry for entry in self.config.imports if is_file_entry(entry)]
        here = all(Path(entry).is_file() for entry in files)
        return SeedWorker(self.config if here else self.config.model_copy(update={"imports": []}))


class SeedWorker:
    """Runs one seed per call."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def execute(
        self, request: SeedRequest, broadcast: np.ndarray, *states: np.ndarray
    ) -> tuple[SeedAnswer]:
        own = {"seed": request.seed, "seeds": 1, "workers": 0, "output_dir": request.location}
        settings = self._config.model_copy(update=own)
        if request.evaluates:
            result = evaluate_one(settings, RunFolder.open(request.location), Quiet())
        elif (
            begun := RunFolder.find(request.location)
        ) is not None:  # by an earlier call, or by a worker that was lost
            result = resume_one(settings, begun, Quiet())
        else:
            result = train_one(settings, "", Quiet())
        notes = [f"seed {request.seed}: {note}" for note in result.notes]
        return (
            SeedAnswer(
                request.seed,
                result.steps,
                result.metrics,
                result.upper_sha256,
                notes,
                result.interrupted,
                result.signal,
            ),
        )


def run_seeds(
    config: Config, folder: RunFolder, listener: Listener, evaluates: bool = False
) -> Result:
    """All seeds of the config, begun, resumed or evaluated, `workers` at a time; result.json
    unless `evaluates`.

    `metrics` has the mean of every metric over the seeds and, as NAME_ci95, the half-width of its
    95 % interval by Student's t. `upper` is empty and `upper_sha256` that of the seeds' own hashes,
    in order.
    """
    with nullcontext() if evaluates else folder.held(listener.note):
        return _run(config, folder, listener, evaluates)


def _run(config: Config, folder: RunFolder, listener: Listener, evaluates: bool) -> Result:
    started = time.perf_counter()
    if folder.kept:
        listener.note(f"run folder: {folder.location}")
    if not evaluates:
        folder.write_config(config)
    jobs = [
        SeedRequest(seed, str(below(folder.location, f"seed-{seed}")), evaluates)
        for seed in range(config.seed, config.seed + config.seeds)
    ]
    answers: list[SeedAnswer] = []
    factory = BuildSeedWorker(imports_of(config), config)
    at_once = max(worker_range(config)[1], 1)
    patient = config.model_copy(update={"step_timeout_s": NEVER_S})
    with closing(open_transport(patient, listener.note, factory)) as transport:
        for first in range(0, len(jobs), at_once):
            calls = [ShardCall(job) for job in jobs[first : first + at_once]]
            answers += [
                reply.reply for reply in transport.run(np.empty(0, np.float32), calls).replies
            ]
            listener.note(f"{len(answers)} of {len(jobs)} seeds are done")
            if any(answer.interrupted for answer in answers):
                break
    interrupted = any(answer.interrupted for answer in answers)
    metrics = {} if interrupted else over_seeds([answer.metrics for answer in answers])
    digest = hashlib.sha256("".join(answer.upper_sha256 for answer in answers).encode()).hexdigest()
    notes = [note for answer in answers for note in answer.notes]
    uri = folder.mirror.uri if folder.mirror is not None else None
    result = Result(
        folder.path if folder.kept else None,
        min(answer.steps for answer in answers),
        metrics,
        {},
        digest,
        interrupted,
        notes,
        uri,
        next((answer.signal for answer in answers if answer.interrupted), None),
    )
    if not (interrupted or evaluates):
        runs = [
            {"seed": answer.seed, "upper_sha256": answer.upper_sha256, "metrics": answer.metrics}
            for answer in answers
        ]
        record = {
            "steps": result.steps,
            "seed": config.seed,
            "upper_sha256": digest,
            "wall_s": time.perf_counter() - started,
        }
        folder.write_result(
            record | {"metrics": metrics, "runs": runs, "notes": notes, "config": config.to_dict()}
        )
    return result


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric that all runs have, followed by NAME_ci95; an interval has no
    interval of its own.
    """
    found: dict[str, float] = {}
    for name in runs[0]:
        if not all(name in run for run in runs):
            continue
        found[name], width = mean_and_half_width([run[name] for run in runs])
        if width is not None and not name.endswith("ci95"):
            found[f"{name}_ci95"] = width
    return found
