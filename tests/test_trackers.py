"""`log.to`: the numbers of metrics.jsonl at MLflow and at W&B, one line where that cannot be, and a
run that continues without a tracker that fails.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import bomemeta
from bomemeta import trackers
from bomemeta.errors import ConfigError, DivergenceError, MissingExtra
from bomemeta.metrics import read_metrics

JOB: dict[str, Any] = {
    "problem": {"name": "analytic", "case": "quadratic", "tasks": 3},
    "solver": {"name": "bome", "inner_steps": 2},
    "steps": 3, "dtype": "float64", "log": {"tensorboard": False},
}  # fmt: skip


def train(folder: Path, to: str, *keys: str) -> bomemeta.Result:
    return bomemeta.train(JOB, [f"output_dir={folder / 'run'}", f"log.to=[{to}]", *keys])


def test_mlflow_has_every_step_and_resumes_in_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason='uv pip install -e ".[mlflow]" brings it')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    train(tmp_path, "mlflow")
    result = bomemeta.resume(tmp_path / "run", ["steps=5"])

    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    experiment = client.get_experiment_by_name("bomemeta")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == f"{tmp_path.name}/run"
    assert run.data.tags["bomemeta.run"] == str(tmp_path / "run")
    assert run.data.params["solver.inner_steps"] == "2"
    assert run.data.metrics["upper_error"] == result.metrics["upper_error"]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 5
    for name in ("gap", "multiplier", "step_s"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(each.step, each.value) for each in history] == [
            (line["step"], line[name]) for line in lines
        ]


def test_a_stopped_and_a_failed_run_are_no_finished_ones(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason='uv pip install -e ".[mlflow]" brings it')
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    with pytest.raises(DivergenceError):
        train(tmp_path, "mlflow", "solver.upper_lr=1e308", "solver.lower_lr=1e308")
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    experiment = client.get_experiment_by_name("bomemeta")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    stopped = trackers.MLflow(run.info.run_id, "run", {})
    assert client.get_run(stopped.id).info.status == "RUNNING"
    stopped.end(3, {}, "interrupted")
    assert client.get_run(stopped.id).info.status == "KILLED"


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason='uv pip install -e ".[wandb]" brings it')
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    result = train(tmp_path, "wandb")
    run = json.loads((tmp_path / "run" / trackers.FILE).read_text())["wandb"]
    (file,) = tmp_path.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb")
    wanted = [b"multiplier", b"inner_steps", str(result.metrics["upper_error"]).encode()]
    deadline = time.monotonic() + 60  # wandb's own process writes it
    while not all(word in (content := file.read_bytes()) for word in wanted):
        assert time.monotonic() < deadline, content
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_extra_is_said_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra) as raised:
        train(tmp_path, name)
    assert str(raised.value) == (
        f"log.to: {name} needs the package {name}, which is not installed. "
        f'Install it: pip install "bomemeta[{name}]"'
    )
    assert not (tmp_path / "run").exists()  # the next try may have it


class Failing:
    id = "7"

    def __init__(self, id: str | None, location: str, config: Any) -> None:
        if location.endswith("refused"):
            raise OSError("no\nserver")

    def write(self, step: int, metrics: Any) -> None:
        if step == 1:
            raise OSError("the server is gone")

    def end(self, step: int, metrics: Any, how: str) -> None:
        raise AssertionError("it was left out")


def test_a_tracker_that_fails_on_the_way_costs_no_run(tmp_path, monkeypatch):
    plain = bomemeta.train(JOB, [f"output_dir={tmp_path / 'plain'}"])
    monkeypatch.setitem(trackers._KINDS, "mlflow", Failing)
    result = train(tmp_path, "mlflow")
    assert result.notes == [
        "log.to: mlflow cannot be written to any more: OSError: the server is gone. The run continues without it; "
        "metrics.jsonl has every step"
    ]
    assert result.upper_sha256 == plain.upper_sha256
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


def test_a_tracker_that_refuses_ends_the_run_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._KINDS, "wandb", Failing)
    with pytest.raises(ConfigError, match=r"^log\.to: wandb cannot be used: OSError: no server$"):
        bomemeta.train(JOB, [f"output_dir={tmp_path / 'refused'}", "log.to=[wandb]"])


def test_a_wrong_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"log\.to"):
        train(tmp_path, "tensorbord")


def test_a_damaged_file_begins_runs_of_its_own(tmp_path):
    file = tmp_path / trackers.FILE
    for content in (b"\xff", b"[1]", b'{"mlflow": 3, "wandb": "ab"}', b"{"):
        file.write_bytes(content)
        assert trackers._ids(file) == ({"wandb": "ab"} if b"ab" in content else {})


def test_names_tell_runs_apart():
    names = {
        "/shared/runs/a": "a", "s3://b/a/?scheme=http": "a", "a": "a",
        "/shared/runs/a/seed-3": "a/seed-3", "/x/trial_1/run": "trial_1/run", "run": "/run",
    }  # fmt: skip
    assert {location: trackers._name(location) for location in names} == names
