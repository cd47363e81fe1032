"""A run's folder as Ray's own libraries read it. No cluster is started."""

from __future__ import annotations

from typing import Any

import pytest
import ray
import ray.train
from ray import tune

import bomemeta
import bomemeta.tune
from bomemeta.errors import CheckpointError, ConfigError
from bomemeta.metrics import read_metrics

JOB: dict[str, Any] = {
    "problem": {"name": "analytic", "case": "quadratic", "tasks": 3},
    "solver": {"name": "bome", "inner_steps": 2, "upper_lr": 0.05},
    "steps": 4, "dtype": "float64", "log": {"tensorboard": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> bomemeta.Result:
    folder = tmp_path_factory.mktemp("exchange") / "run"
    return bomemeta.train(JOB, [f"output_dir={folder}"])


@pytest.mark.parametrize("uri", [False, True])
def test_a_run_is_a_ray_checkpoint_and_back(run, uri, tmp_path):
    location: Any = run.run_dir
    if uri:
        location = (tmp_path / "there").as_uri()
        bomemeta.train(JOB, [f"output_dir={location}"])
    checkpoint = bomemeta.tune.as_checkpoint(location)
    assert isinstance(checkpoint, ray.train.Checkpoint)
    checkpoint.to_directory(str(tmp_path / "copy"))
    for each in (checkpoint, tune.Checkpoint.from_directory(str(tmp_path / "copy"))):
        back = bomemeta.tune.from_checkpoint(each)
        assert back.upper_sha256 == run.upper_sha256
        assert back.steps == 4
        assert back.config is not None
        assert back.config.solver.upper_lr == 0.05
    assert not ray.is_initialized()


def test_tune_opens_a_run(run, tmp_path):
    bomemeta.tune.as_trial(run.run_dir, tmp_path / "trial")
    result = tune.Result.from_path(str(tmp_path / "trial"))
    lines = read_metrics(run.run_dir / "metrics.jsonl")
    assert list(result.metrics_dataframe["steps"]) == [1, 2, 3, 4]
    assert list(result.metrics_dataframe["gap"]) == [line["gap"] for line in lines]
    assert result.metrics["upper_error"] == run.metrics["upper_error"]
    assert result.metrics["done"] is True
    assert result.config["solver"]["upper_lr"] == 0.05
    assert result.error is None
    ((checkpoint, metrics),) = result.best_checkpoints
    assert metrics["steps"] == 4
    assert bomemeta.tune.from_checkpoint(checkpoint).upper_sha256 == run.upper_sha256
    assert bomemeta.tune.from_checkpoint(result.checkpoint).upper_sha256 == run.upper_sha256
    with pytest.raises(ConfigError, match="exists and is not empty"):
        bomemeta.tune.as_trial(run.run_dir, tmp_path / "trial")


def test_what_cannot_be_opened_is_said(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        bomemeta.tune.from_checkpoint(tune.Checkpoint.from_directory(str(tmp_path / "empty")))
    with pytest.raises(ConfigError, match="is not a run's folder"):
        bomemeta.tune.as_checkpoint(tmp_path / "empty")


def test_a_checkpoint_from_elsewhere_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    code = tmp_path / "code.py"
    code.write_text("")
    made = bomemeta.train(JOB | {"imports": [str(code)]}, [f"output_dir={tmp_path / 'run'}"])
    checkpoint = bomemeta.tune.as_checkpoint(made.run_dir)
    assert bomemeta.tune.from_checkpoint(checkpoint).upper_sha256 == made.upper_sha256
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    code.write_text("raise SystemExit('executed')")
    with pytest.raises(ConfigError, match="comes from elsewhere, and would execute: imports"):
        bomemeta.tune.from_checkpoint(checkpoint)
    code.write_text("")
    assert bomemeta.tune.from_checkpoint(checkpoint, trust=True).steps == 4
