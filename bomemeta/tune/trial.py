"""One trial of a search: a bomemeta run in a folder of its own, whose every report carries all that
it takes to resume.
"""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import tune

from bomemeta import checkpoint as checkpoints
from bomemeta.checkpoint import Checkpoint
from bomemeta.config import Config, differing_keys, load_config
from bomemeta.document import apply_overrides, document_of, find_config, read_document
from bomemeta.errors import BomemetaError, ConfigError, DivergenceError
from bomemeta.imports import Import, is_file_entry, read_imports
from bomemeta.report import Quiet
from bomemeta.result import Result
from bomemeta.run_folder import RunFolder
from bomemeta.session import resume_one
from bomemeta.tune.locations import REPORT_FILE, folder_here, metrics_in
from bomemeta.tune.placement import bundles_of, check_placement
from bomemeta.tune.space import flat
from bomemeta.tune.spec import Search, override_texts, portable

# The name under which Tune knows the function; a resumed search is refused another one.
NAME = "bomemeta"
# Another try may go better: what the disk, the cluster or another process did. All else would fail
# again in the same way.
WORTH_ANOTHER_TRY = (BomemetaError, OSError, ray.exceptions.RayError)

Trainable = Callable[[dict[str, Any]], None]


class SearchError(ConfigError):
    """What is wrong with the search itself, and would be with any trial of it."""


@dataclass(frozen=True)
class TrialSpec:
    """What all trials of a search have in common, ready to travel."""

    base: Mapping[str, Any]  # as the file has it, with absolute paths
    imports: tuple[Import, ...]
    report_every_steps: int
    metric: (
        str | None
    )  # must be in every report; a trial that fails reports it as NaN. None: a failure is raised
    search: str | None = None  # the search's folder; None in a Tuner of the user's own
    # In the place of the base config's sections; travel by value.
    objects: Mapping[str, Any] = field(default_factory=dict)


def trainable(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    report_every_steps: int,
    metric: str | None = None,
    driver_cpus: float = 1.0,
) -> Trainable:
    """A function for `ray.tune.Tuner`: one call is one run of `config` with the trial's values set
    over it.

    A `param_space` has config keys, dotted or nested: `{"solver.upper_lr": tune.loguniform(1e-4,
    1e-1)}`. Every `report_every_steps` the metrics of that step and a complete checkpoint are
    reported; `steps` counts the steps of the run, for a scheduler's `time_attr`. The function
    brings its resources along: a bundle of `driver_cpus` for the trial and one for each of the
    config's `workers`.

    With `metric` a trial that diverges or fails ends with NaN there instead of an exception, which
    Tune would answer by trying again. Raises ConfigError where the config is wrong and, where Ray
    runs already, ClusterError where one trial has no room.
    """
    settings = load_config(config, overrides)
    if isinstance(config, str | Path):
        document = read_document(find_config(config))
    else:
        document = document_of(config.to_dict() if isinstance(config, Config) else config)
    document = apply_overrides(document, overrides)
    base = portable(document.data, document.folder)
    return _trainable(
        TrialSpec(base, tuple(read_imports(settings.imports)), report_every_steps, metric),
        settings,
        driver_cpus,
    )


def make_trainable(search: Search, location: str) -> Trainable:
    """The function for the trials of a search in the folder at `location`."""
    settings, config = search.settings, search.config
    plan = TrialSpec(
        search.base,
        tuple(read_imports(config.imports)),
        settings.report_every_steps,
        settings.metric,
        location,
        search.objects,
    )
    return _trainable(plan, config, settings.driver_cpus)


def _trainable(plan: TrialSpec, settings: Config, driver_cpus: float) -> Trainable:
    bundles = bundles_of(settings, driver_cpus)
    if ray.is_initialized():
        check_placement(bundles)

    def trial(config: dict[str, Any]) -> None:
        run_trial(plan, config)

    trial.__name__ = NAME
    wanted: Trainable = tune.with_resources(trial, tune.PlacementGroupFactory(bundles))
    return wanted


def run_trial(plan: TrialSpec, config: Mapping[str, Any]) -> None:
    """Begins the trial, or resumes it from the checkpoint that Tune hands it, and reports until the
    run's end.
    """
    # A process that is used again waits for the last trial to close its workers, which Tune would
    # give 2 s.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "60")
    values = {
        key: value.item() if hasattr(value, "item") else value
        for key, value in flat(config).items()
    }
    folder = folder_here(tune.get_context().get_storage(), plan.search)
    reporter = _Reporter(plan, values, folder)
    try:
        settings = _settings(plan, values, folder.path)
        saved = tune.get_checkpoint()
        if saved is not None:
            with saved.as_directory() as directory:
                reporter.take_over(_take_checkpoint(Path(directory), folder, settings))
        folder.write_config(settings)
        # A folder without a checkpoint begins at step 0, one whose process was killed before its
        # first report continues.
        reporter.finish(resume_one(settings, folder, reporter))
    except Exception as error:
        final = isinstance(error, DivergenceError | SearchError) or not isinstance(
            error, WORTH_ANOTHER_TRY
        )
        if plan.metric is None or not final:
            raise
        reporter.fail(error)


def _settings(plan: TrialSpec, values: Mapping[str, Any], location: Path) -> Config:
    """The trial's config: what changes the result comes from the plan and the values, what does not
    is the trial's own.
    """
    entries = _imports_here(plan, location)
    settings = load_config({**plan.base, "imports": entries}, override_texts(values), plan.objects)
    every = plan.report_every_steps
    return settings.model_copy(
        update={
            "address": None,  # the trial is in the cluster
            "output_dir": str(location),
            "log": settings.log.model_copy(
                update={"tensorboard": False}
            ),  # Tune writes what is reported
            "evaluation": settings.evaluation.model_copy(update={"every_steps": every}),
            "checkpoint": settings.checkpoint.model_copy(update={"every_steps": every, "keep": 1}),
            # Without a share of a GPU a trial would take the first one, as would all others.
            **(
                {"device": "cpu"}
                if settings.gpus_per_worker == 0 and settings.device == "auto"
                else {}
            ),
        }
    )


def _imports_here(plan: TrialSpec, location: Path) -> list[str]:
    """The config's `imports:`; files that this machine does not have are written beside the run
    from their text.
    """
    entries: list[str] = list(plan.base.get("imports") or [])
    texts = {entry.file: entry.source for entry in plan.imports if entry.source is not None}
    for index, entry in enumerate(entries):
        if is_file_entry(entry) and not Path(entry).is_file():
            copy = location / "imports" / Path(entry).name
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(texts[entry] or "", encoding="utf-8")
            entries[index] = str(copy)
    return entries


def _take_checkpoint(directory: Path, folder: RunFolder, settings: Config) -> dict[str, Any]:
    """Puts Tune's checkpoint in the place of the folder's own, as one of this config's. Returns
    what was reported with it.

    It is this trial's own, or under PBT another's: then x, y and the solver's state are taken over,
    and the step sizes are our own.
    """
    loaded = checkpoints.load_latest(directory)
    saved = loaded.checkpoint
    foreign = [
        difference
        for difference in differing_keys(saved.config, settings)
        if not difference.key.startswith("solver.")
    ]
    if foreign or _solver_of(saved.config) != _solver_of(settings.to_dict()):
        keys = ", ".join(difference.key for difference in foreign) or "solver.name"
        raise SearchError(
            f"{keys}: changed while the trial ran; a scheduler may change numbers of the solver alone"
        )
    for old in folder.checkpoints.glob("step_*.pt"):
        old.unlink()
    checkpoints.save(
        folder.checkpoints, Checkpoint(**saved._asdict() | {"config": settings.to_dict()}), keep=1
    )
    reported: dict[str, Any] = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
    return reported


def _solver_of(config: Mapping[str, Any]) -> Any:
    solver = config["solver"]
    return solver.get("name", solver.get("class"))


@dataclass
class _Reporter(Quiet):
    """Hears a run and reports to Tune: metrics with the checkpoint of the same step, and at the end
    the final metrics.
    """

    plan: TrialSpec
    values: dict[str, Any]
    folder: RunFolder
    steps: int = 0  # of the whole run
    done: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # of the step that was last committed
    notes: list[str] = field(default_factory=list)
    lineage: list[dict[str, Any]] = field(
        default_factory=list
    )  # from which step on which values held

    def take_over(self, reported: Mapping[str, Any]) -> None:
        """What was reported with the checkpoint that the run is resumed from."""
        self.metrics, self.lineage = metrics_in(reported), list(reported["lineage"])

    def start(
        self, run_dir: Path | str | None, first_step: int, steps: int, every_steps: int
    ) -> None:
        self.steps, self.done = steps, first_step
        if not self.lineage or self.lineage[-1]["values"] != self.values:
            self.lineage.append({"from_step": first_step, "values": self.values})

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.done = step + 1
        self.metrics = {name: float(value) for name, value in metrics.items()}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def saved(self, path: Path) -> None:
        # The end has a report of its own, with the final metrics: two of one step would be drawn
        # twice.
        if 0 < self.done < self.steps and self.done % self.plan.report_every_steps == 0:
            self._report({})

    def finish(self, result: Result) -> None:
        self.metrics |= result.metrics
        self._report({"ended": "done", "upper_sha256": result.upper_sha256, "done": True})

    def fail(self, error: Exception) -> None:
        """The last word of a trial that diverged, or that its own code or config made impossible."""
        ended = (
            "diverged"
            if isinstance(error, DivergenceError)
            else "wrong"
            if isinstance(error, SearchError)
            else "failed"
        )
        (self.folder.path / "error.txt").write_text(
            "".join(traceback.format_exception(error)), encoding="utf-8"
        )
        self.folder.publish(self.note)
        text = f"{type(error).__name__}: {error}"
        tune.report(
            {
                self.plan.metric: math.nan,
                "steps": self.done,
                "timesteps_total": self.done,
                "ended": ended,
                "reason": text,
                "done": True,
            }
        )

    def _report(self, more: Mapping[str, Any]) -> None:
        metric = self.plan.metric
        if metric is not None and metric not in self.metrics:
            raise SearchError(
                f"metric: got {metric!r}, wanted one of what is reported: {', '.join(self.metrics)}"
            )
        checkpoint = self.folder.checkpoints
        record = {"metrics": self.metrics, "lineage": self.lineage}
        (checkpoint / REPORT_FILE).write_text(json.dumps(record), encoding="utf-8")
        notes = {"notes": "\n".join(self.notes)} if self.notes else {}
        tune.report(
            # timesteps_total is where Tune's TensorBoard files have their x axis.
            {
                **self.metrics,
                "steps": self.done,
                "timesteps_total": self.done,
                "lineage": json.dumps(self.lineage),
                **notes,
                **more,
            },
            checkpoint=tune.Checkpoint.from_directory(str(checkpoint)),
        )
