"""A search from its file to its best config: sampled, checked, run by Ray Tune in a folder of its
own, and resumed.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ray import tune as ray_tune
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.variant_generator import generate_variants

from bomemeta.assembly import build_problem, build_solver
from bomemeta.distributed import cluster
from bomemeta.distributed.by_value import send_modules_by_value
from bomemeta.distributed.cluster import MAX_OVERSUBSCRIPTION, RayOptions
from bomemeta.engine import run_length
from bomemeta.environment import usable_cores
from bomemeta.errors import ClusterError, ConfigError
from bomemeta.paths import absolute, real
from bomemeta.storage import Store, below, is_uri
from bomemeta.trust import ask, entry_of_search, record
from bomemeta.tune.locations import TRIALS
from bomemeta.tune.outcome import SearchResult, check_any, rows_of, write_outcome
from bomemeta.tune.placement import bundles_of, check_placement
from bomemeta.tune.progress import Ends, Progress, spoken, trial_folder, tune_settings, values_text
from bomemeta.tune.schedulers import Halving, population
from bomemeta.tune.space import Domain, flat
from bomemeta.tune.spec import RESULT_NEUTRAL, Search, load_search, written
from bomemeta.tune.trial import make_trainable
from bomemeta.yaml_text import parse

# PBT takes checkpoints of trials that continue meanwhile; else the one before the last is for a last
# one that was cut short.
KEPT = {"pbt": 4, "asha": 2, "none": 2}


def tune(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    resume: str | Path | None = None,
    trust: bool = False,
    say: Callable[[str], None] = lambda text: None,
    objects: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Searches as the tune file says, and writes results.md, results.json and best.yaml into the
    search's folder.

    `overrides` are `key=value` texts over the tune file, `objects` stand in the place of its base
    config's sections. `resume` is the folder of an interrupted
    or killed search of the same file; an `output_dir` that holds one is resumed too. Raises a
    BomemetaError that says what to do; nothing is written before the file, every trial's config and
    the cluster's room have been checked.
    """
    search = load_search(source, overrides, objects=objects)
    send_modules_by_value(search.objects)
    steps = _check_run(search)
    values = sampled(search)
    _check_trials(search, values)
    folder = _Folder.of(search, resume)
    if folder.resumes and folder.location is not None:
        ask([entry_of_search(folder.location)], folder.location, trust=trust)
    bundles = bundles_of(search.config, search.settings.driver_cpus)
    with _cluster(search, bundles, len(values), say) as concurrent:
        check_placement(bundles)
        location = folder.claim(search)
        say(f"search folder: {location}")
        trainable = make_trainable(search, str(location))
        with _quiet(), tune_settings(), spoken(say) as live:
            tuner = _tuner(search, trainable, location, steps, concurrent, len(values))
            results = tuner.fit()
            interrupted = live.interrupted
        rows = rows_of(results, search, interrupted)
    if interrupted:
        return SearchResult(location, rows, None, None, interrupted=True)
    result = write_outcome(location, search, rows)
    check_any(result)
    return result


def sampled(search: Search) -> list[dict[str, Any]]:
    """The values of all trials, in order: drawn with the search's seed as Tune will draw them."""
    rng = np.random.default_rng(search.settings.seed)
    spec = {"config": _param_space(search.space)}
    drawn = [
        found["config"]
        for _ in range(search.settings.trials)
        for _, found in generate_variants(spec, random_state=rng)
    ]
    return [
        {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
        for values in drawn
    ]


def _param_space(space: Mapping[str, Domain]) -> dict[str, Any]:
    """Ray Tune's domains."""
    made: dict[str, Any] = {}
    for key, domain in space.items():
        if domain.kind == "grid":
            made[key] = ray_tune.grid_search(list(domain.arguments))
        elif domain.kind == "choice":
            made[key] = ray_tune.choice(list(domain.arguments))
        else:
            made[key] = getattr(ray_tune, domain.kind)(*domain.arguments)
    return made


def _check_run(search: Search) -> int:
    """How long a trial is. Raises where data or solver cannot be had, or the run's length does not
    fit the reports.
    """
    problem = build_problem(search.config)
    build_solver(search.config, problem)
    steps, every = run_length(search.config, problem), search.settings.report_every_steps
    if steps % every:
        raise ConfigError(
            f"report_every_steps: got {every}, wanted a divisor of the run's steps, {steps}"
        )
    for key, first in (
        ("asha.grace_steps", search.settings.asha.grace_steps),
        ("pbt.every_steps", search.settings.pbt.every_steps),
    ):
        if first is not None and first > steps:
            raise ConfigError(f"{key}: got {first}, wanted at most the run's steps, {steps}")
    return steps


def _check_trials(search: Search, values: Sequence[Mapping[str, Any]]) -> None:
    for number, drawn in enumerate(values, start=1):
        try:
            search.trial_config(drawn)
        except ConfigError as error:
            raise ConfigError(
                f"trial {number} ({values_text(drawn)}) would have no valid config:\n{error}"
            ) from error


def _tuner(
    search: Search, trainable: Any, location: Path | str, steps: int, concurrent: int, trials: int
) -> Any:
    """A new Tuner, or the one of the search that was begun in this folder."""
    settings = search.settings
    notes = Store.at(below(location, TRIALS))
    if _begun(notes):
        return ray_tune.Tuner.restore(
            notes.location, trainable=trainable, resume_unfinished=True, resume_errored=True
        )
    notes.clear()  # of a search that was killed before it had noted a trial
    every = settings.report_every_steps
    scheduler = None
    if settings.scheduler == "asha":
        scheduler = Halving(steps, settings.asha.grace_steps or every, settings.asha.reduction)
    elif settings.scheduler == "pbt":
        scheduler = population(search.space, settings.pbt, _param_space(search.space), every)
    return ray_tune.Tuner(
        trainable,
        param_space=_param_space(search.space),
        tune_config=ray_tune.TuneConfig(
            metric=settings.metric,
            mode=settings.mode,
            num_samples=settings.trials,
            scheduler=scheduler,
            # A population is trained side by side, or takes turns: its size is not limited here but
            # by the cluster's room.
            search_alg=BasicVariantGenerator(
                max_concurrent=0 if settings.scheduler == "pbt" else concurrent,
                random_state=settings.seed,
            ),
            trial_name_creator=trial_folder,
            trial_dirname_creator=trial_folder,
            reuse_actors=True,  # a trial's process takes several seconds to import what it needs
        ),
        run_config=ray_tune.RunConfig(
            name=TRIALS,
            storage_path=str(location),
            stop=Ends(),
            callbacks=[Progress(settings.metric, trials)],
            failure_config=ray_tune.FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=ray_tune.CheckpointConfig(num_to_keep=KEPT[settings.scheduler]),
            verbose=0,
        ),
    )


def _begun(notes: Store) -> bool:
    """Whether Tune has noted a trial there. Without one it would begin anew by itself, and say
    nothing.
    """
    states = [name for name in notes.names() if re.fullmatch(r"experiment_state-[^/]*\.json", name)]
    return bool(states) and bool(json.loads(notes.read(states[-1]) or b"")["trial_data"])


class _Folder(NamedTuple):
    """The search's folder, not yet made: a location that must be free, the first free of runs/NAME,
    ..., or one to resume in.
    """

    location: Path | str | None
    resumes: bool

    @classmethod
    def of(cls, search: Search, resume: str | Path | None) -> _Folder:
        """Raises ConfigError where the folder is another search's, or is finished."""
        wanted = resume if resume is not None else search.settings.output_dir
        if wanted is None:
            return cls(None, False)
        location = str(wanted).rstrip("/") if is_uri(wanted) else real(absolute(wanted))
        store = Store.at(location)
        if _is_free(location, store):
            if resume is not None:
                raise ConfigError(
                    f"{location} is not a search's folder: it is not there, or empty. Leave --resume out to begin one"
                )
            return cls(location, False)
        there = store.read("search.yaml")
        if there is None:
            raise ConfigError(
                f"output_dir: {location} exists and is not a search's folder; a search never overwrites anything. Choose another"
            )
        changed = _changed(
            parse(there.decode(errors="replace"), f"{location}/search.yaml")[1] or {},
            search.to_dict(),
        )
        if changed:
            raise ConfigError(
                f"{location} holds another search, with other {', '.join(changed)}. Set these back to resume, or choose another output_dir"
            )
        if store.read("results.json") is not None:
            raise ConfigError(
                f"{location} holds this search, finished: see results.md there. Choose another output_dir to repeat it"
            )
        return cls(location, True)

    def claim(self, search: Search) -> Path | str:
        """Makes the folder, with the search in it."""
        location = self.location
        try:
            if location is None:
                location = _first_free(Path("runs") / search.name).resolve()
            elif isinstance(location, Path):
                location.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"output_dir: {error.filename} cannot be written: {error.strerror}"
            ) from error
        if not self.resumes:
            record([entry_of_search(location)])
            Store.at(location).put("search.yaml", written(search).encode())
        return location


def _is_free(location: Path | str, store: Store) -> bool:
    """Whether nothing is there; a folder may be, as long as it is empty."""
    if isinstance(location, Path):
        return not location.exists() or (location.is_dir() and not any(location.iterdir()))
    return not store.names()


def _first_free(path: Path) -> Path:
    number, candidate = 1, path
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys that differ, but for those that may: where the folder is, and where the cluster."""
    mine, theirs = (
        flat({key: value for key, value in each.items() if key not in RESULT_NEUTRAL})
        for each in (old, new)
    )
    return [
        key
        for key in {**mine, **theirs}
        if mine.get(key) != theirs.get(key) and key != "base.address"
    ]


@contextmanager
def _cluster(
    search: Search, bundles: Sequence[Mapping[str, float]], trials: int, say: Callable[[str], None]
) -> Iterator[int]:
    """The cluster that the base config names, or one of this machine. Yields how many trials may
    run at a time, 0 for as many as fit.
    """
    config, settings = search.config, search.settings
    each = sum(bundle.get("CPU", 0.0) for bundle in bundles)
    gpus = config.gpus_per_worker
    if not cluster.must_start(RayOptions(workers=1, address=config.address)):
        if (
            settings.scheduler == "pbt"
            and settings.concurrent is not None
            and settings.concurrent < trials
        ):
            raise ConfigError(
                f"concurrent: got {settings.concurrent}, wanted at least {trials} or nothing: pbt compares trials that run side by side"
            )
        with cluster.joined(RayOptions(workers=1, address=config.address)):
            yield settings.concurrent or 0
        return
    cores = usable_cores()
    most = MAX_OVERSUBSCRIPTION * cores
    if each > most or each * (settings.concurrent or 1) > most:
        number = settings.concurrent or 1
        raise ClusterError(
            f"{number} {'trials' if number > 1 else 'trial'} of {each:g} CPU ({settings.driver_cpus:g}, and {len(bundles) - 1} workers of "
            f"{config.cpus_per_worker:g}) got no location: this machine has {cores}, and more than {MAX_OVERSUBSCRIPTION} times that would "
            f"only wait. Use fewer workers, a smaller cpus_per_worker or driver_cpus, a smaller concurrent, or address of a larger cluster"
        )
    # A population that takes turns starts its processes anew at every turn: rather all of it, on
    # shares of the cores.
    room = (most if settings.scheduler == "pbt" else cores) / each if each else math.inf
    concurrent = settings.concurrent or max(1, int(min(room, trials)))
    busy = min(concurrent, trials) * max(len(bundles) - 1, 1) * config.threads
    if busy > cores:
        say(
            f"{busy} threads of {min(concurrent, trials)} trials share {cores} cores: results stay the same, speed suffers"
        )
    whole = RayOptions(workers=1, cpus_per_worker=max(1.0, concurrent * each), gpus_per_worker=gpus)
    with cluster.local(whole, lambda text: None):
        yield concurrent


@contextmanager
def _quiet() -> Iterator[None]:
    """Tune's log and two warnings that mean nothing here; what matters is said by `Progress`."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # ASHA takes a percentile of the metric at a rung, where a trial that diverged has NaN:
            # with NaN alone nobody is stopped.
            warnings.filterwarnings(
                "ignore", message="All-NaN slice encountered", category=RuntimeWarning
            )
            yield
    finally:
        logger.setLevel(before)
