"""Experiment trackers that a run's numbers go to beside metrics.jsonl and TensorBoard: `log.to`.

Where they are is said by their own environment variables: MLFLOW_TRACKING_URI (unset: the folder
`mlruns` here) and MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT, WANDB_MODE and the like.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from bomemeta.boundary import reason
from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.extras import require
from bomemeta.run_folder import RunFolder

# What both call a project that nobody named.
PROJECT = "bomemeta"
# In the run folder: which of the tracker's runs it is, for a resumed run.
FILE = "trackers.json"
# MLflow's own limits on one request.
METRICS_AT_ONCE, PARAMS_AT_ONCE, LONGEST_PARAM = 1000, 100, 6000

Ended = Literal["done", "interrupted", "failed"]


class Tracker(Protocol):
    """One run at a tracker. Made with its id there, or None for a new one."""

    id: str

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step's finite numbers. A step may come again, where a run goes back to a checkpoint."""
        ...

    def end(self, step: int, metrics: Mapping[str, float], how: Ended) -> None:
        """The final numbers, after `step` steps; nothing follows."""
        ...


class Trackers:
    """Those of a run. One that fails on the way is noted and left out: it is no reason to lose a run."""

    def __init__(
        self,
        names: Sequence[str],
        folder: RunFolder,
        config: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        """Raises MissingExtra where a package is not installed, ConfigError where a tracker refuses."""
        self._note = note
        self._open: dict[str, Tracker] = {}
        self._step = 0
        file = folder.path / FILE
        known = _ids(file) if names else {}
        for name in dict.fromkeys(names):
            try:
                self._open[name] = _KINDS[name](known.get(name), str(folder.location), config)
            except Exception as error:
                self.end({}, "failed")
                if isinstance(error, BomemetaError):
                    raise
                raise ConfigError(f"log.to: {name} cannot be used: {reason(error)}") from error
        if self._open:
            ids = {name: tracker.id for name, tracker in self._open.items()}
            folder.write_file(FILE, json.dumps(known | ids).encode())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step's numbers."""
        self._step = step + 1
        self._all(lambda tracker: tracker.write(step, _finite(metrics)))

    def end(self, metrics: Mapping[str, float], how: Ended) -> None:
        """The final numbers. May be called again, which does nothing."""
        self._all(lambda tracker: tracker.end(self._step, _finite(metrics), how))
        self._open.clear()

    def _all(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                do(tracker)
            except Exception as error:
                del self._open[name]
                self._note(
                    f"log.to: {name} cannot be written to any more: {reason(error)}. The run continues without it; "
                    "metrics.jsonl has every step"
                )


class MLflow:
    """A run at an MLflow server, or in a folder. Lines go out together, as many as one request takes
    or those of two seconds.
    """

    def __init__(self, id: str | None, location: str, config: Mapping[str, Any]) -> None:
        mlflow = require("mlflow", "mlflow", "log.to: mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or Path("mlruns").absolute().as_uri()
        if uri.startswith("file:") or "://" not in uri:
            # MLflow wants to be told that a folder is meant, since it will not develop it further.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._entities = mlflow.entities
        self._client = client = mlflow.MlflowClient(tracking_uri=uri)
        self._waiting: list[Any] = []
        self._sent = time.monotonic()
        if id is not None:
            try:
                client.update_run(id, status="RUNNING")
                self.id = id
                return
            except mlflow.exceptions.MlflowException:
                pass  # it was deleted, or is at another server
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        there = client.get_experiment_by_name(project)
        experiment = client.create_experiment(project) if there is None else there.experiment_id
        tags = {"bomemeta.run": location}
        self.id = client.create_run(experiment, tags=tags, run_name=_name(location)).info.run_id
        params = [
            mlflow.entities.Param(key, str(value)[:LONGEST_PARAM]) for key, value in _flat(config)
        ]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            client.log_batch(self.id, params=params[first : first + PARAMS_AT_ONCE])

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        if len(self._waiting) + len(metrics) > METRICS_AT_ONCE or time.monotonic() > self._sent + 2:
            self._send()
        self._waiting += [
            self._entities.Metric(name, value, now, step) for name, value in metrics.items()
        ]

    def end(self, step: int, metrics: Mapping[str, float], how: Ended) -> None:
        self.write(step, metrics)
        self._send()
        status = {"done": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[how]
        self._client.set_terminated(self.id, status)

    def _send(self) -> None:
        for first in range(0, len(self._waiting), METRICS_AT_ONCE):
            some = self._waiting[first : first + METRICS_AT_ONCE]
            self._client.log_batch(self.id, metrics=some)
        self._waiting, self._sent = [], time.monotonic()


class WandB:
    """A run at Weights & Biases, or with WANDB_MODE=offline in the folder `wandb` here."""

    def __init__(self, id: str | None, location: str, config: Mapping[str, Any]) -> None:
        wandb = require("wandb", "wandb", "log.to: wandb")
        self.id = id or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_name(location),
            notes=location,
            id=self.id,
            resume="allow",
            config=dict(config),
            reinit="create_new",  # the caller may have a run of their own
            settings=wandb.Settings(console="off", silent=True),
        )
        # Its own count of steps may not go back, as a run does that is resumed from a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def end(self, step: int, metrics: Mapping[str, float], how: Ended) -> None:
        self._run.summary.update(dict(metrics))
        self._run.finish(exit_code={"done": 0, "interrupted": 130, "failed": 1}[how])


_KINDS: dict[str, Callable[[str | None, str, Mapping[str, Any]], Tracker]] = {
    "mlflow": MLflow,
    "wandb": WandB,
}


def _name(location: str) -> str:
    """The folder's name; with the one above it where all seeds, or all trials, have the same."""
    *_, above, name = f"/{location.partition('?')[0].strip('/')}".split("/")
    return f"{above}/{name}" if name == "run" or name.startswith("seed-") else name


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{before}{key}.")
        else:
            found.append((before + key, value))
    return found


def _ids(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not there, or damaged: runs of their own begin
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {name: id for name, id in entries if isinstance(id, str)}
