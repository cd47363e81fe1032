"""A run's folder as what Ray's own libraries read: a checkpoint, and a trial with its result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.train.constants import CHECKPOINT_DIR_NAME
from ray.tune.result import EXPR_PARAM_FILE, EXPR_RESULT_FILE

from bomemeta.checkpoint import judged_upper, load_latest, upper_sha256
from bomemeta.config import load_config
from bomemeta.errors import ConfigError
from bomemeta.metrics import read_metrics
from bomemeta.paths import absolute, real
from bomemeta.result import Result
from bomemeta.run_folder import RunFolder, finite
from bomemeta.storage import below
from bomemeta.trust import check

CHECKPOINT = "checkpoint_000000"  # as Tune calls a trial's first


def as_checkpoint(run_dir: str | Path) -> Any:
    """A run's checkpoints as a `ray.tune.Checkpoint`, which is a `ray.train.Checkpoint`; nothing is
    copied. `run_dir` is a run's folder or URI.

    Raises ConfigError where it is no run's, CheckpointError where it has no readable checkpoint.
    """
    folder = RunFolder.open(run_dir)
    load_latest(folder.checkpoints)
    location = (
        folder.checkpoints if folder.mirror is None else below(folder.location, "checkpoints")
    )
    return tune.Checkpoint(str(location))


def from_checkpoint(checkpoint: Any, *, trust: bool = False) -> Result:
    """The result that the run of a Ray checkpoint has so far: x and the config; `metrics` is empty.
    It may be of `as_checkpoint`, or of a trial of `bomemeta.tune.trainable`.

    Raises CheckpointError where no checkpoint of ours is in it, ConfigError where its config would
    execute what this user never did and does not `trust`.
    """
    with checkpoint.as_directory() as directory:
        loaded = load_latest(Path(directory))
    check(loaded.checkpoint.config, checkpoint.path, trust=trust)
    config = load_config(loaded.checkpoint.config)
    upper = judged_upper(loaded.checkpoint)
    step, digest = loaded.checkpoint.step, upper_sha256(upper)
    return Result(None, step, {}, upper, digest, notes=loaded.notes, config=config)


def as_trial(run_dir: str | Path, output_dir: str | Path) -> Any:
    """Writes a run as a trial of Ray Tune into a new folder, and opens it: `ray.tune.Result`, with
    each step's metrics, the final ones, the config and the newest checkpoint.
    `ray.tune.Result.from_path` opens the folder again.

    Raises ConfigError where `run_dir` is no run's or `output_dir` is not empty, CheckpointError
    where there is no readable checkpoint.
    """
    folder, trial = RunFolder.open(run_dir), real(absolute(output_dir, what="output_dir"))
    loaded = load_latest(folder.checkpoints)
    if trial.exists() and (not trial.is_dir() or any(trial.iterdir())):
        raise ConfigError(f"output_dir: {trial} exists and is not empty; give a new one")
    record, _ = folder.read_result()
    config, final = loaded.checkpoint.config, record["metrics"] if record is not None else {}
    lines = [_reported(line) for line in read_metrics(folder.metrics_file)]
    last = {**(lines[-1] if lines else {"steps": loaded.checkpoint.step}), **final}
    last |= {"done": record is not None, "config": config, CHECKPOINT_DIR_NAME: CHECKPOINT}
    (trial / CHECKPOINT).mkdir(parents=True)
    for path in folder.checkpoints.glob("step_*.pt"):
        shutil.copy2(path, trial / CHECKPOINT)
    (trial / EXPR_PARAM_FILE).write_text(json.dumps(finite(config)), encoding="utf-8")
    text = "".join(json.dumps(finite(line)) + "\n" for line in [*lines[:-1], last])
    (trial / EXPR_RESULT_FILE).write_text(text, encoding="utf-8")
    return tune.Result.from_path(str(trial))


def _reported(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl as Tune would have it: steps that are done, not the step's number."""
    done = line["step"] + 1
    rest = {name: value for name, value in line.items() if name != "step"}
    return {"steps": done, "training_iteration": done, "timesteps_total": done, **rest}
