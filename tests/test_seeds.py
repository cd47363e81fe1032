"""Several seeds of one config: the same runs as one by one, whoever computes them, and what they
come to together.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import bomemeta
from bomemeta.errors import ConfigError
from bomemeta.seeds import over_seeds

JOB: dict[str, Any] = {
    "imports": ["toy"],
    "problem": {"name": "few_shot", "ways": 3, "queries": 2, "test_queries": 2, "width": 4},
    "data": {"dataset": "toy"},
    "solver": {"name": "bome", "inner_steps": 2, "inner_lr": 0.2, "lower_lr": 0.2, "adapt_steps": 1, "barrier_steps": 1},
    "seed": 4, "seeds": 3, "steps": 2, "tasks_per_step": 2, "evaluation": {"episodes": 4}, "log": {"tensorboard": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> bomemeta.Result:
    return bomemeta.train(JOB, [f"output_dir={tmp_path_factory.mktemp('seeds') / 'run'}"])


def record(folder: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return written


def test_each_seed_is_the_run_of_that_seed(serial, tmp_path):
    runs = record(serial.run_dir)["runs"]
    assert [run["seed"] for run in runs] == [4, 5, 6]
    assert len({run["upper_sha256"] for run in runs}) == 3
    alone = bomemeta.train(JOB, [f"output_dir={tmp_path / 'alone'}", "seed=5", "seeds=1"])
    assert (alone.upper_sha256, alone.metrics) == (runs[1]["upper_sha256"], runs[1]["metrics"])
    assert record(serial.run_dir / "seed-5")["upper_sha256"] == alone.upper_sha256


def test_metrics_are_means_with_students_interval(serial):
    runs = record(serial.run_dir)["runs"]
    values = [run["metrics"]["test_accuracy"] for run in runs]
    mean = sum(values) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 2)
    assert serial.metrics["test_accuracy"] == pytest.approx(mean)
    assert serial.metrics["test_accuracy_ci95"] == pytest.approx(
        4.302653 * deviation / math.sqrt(3), rel=1e-6
    )
    assert "test_ci95_ci95" not in serial.metrics


def test_a_figure_that_not_all_runs_have_is_left_out():
    assert over_seeds([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {
        "a": 2.0,
        "a_ci95": pytest.approx(12.7062, rel=1e-5),
    }


def test_workers_take_seeds_side_by_side_to_the_same_bits(serial, tmp_path):
    result = bomemeta.train(
        JOB, [f"output_dir={tmp_path / 'run'}", "workers=2", "cpus_per_worker=0.5"]
    )
    assert (result.upper_sha256, result.metrics) == (serial.upper_sha256, serial.metrics)


def test_resume_runs_what_is_missing_and_keeps_what_is_done(serial, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(serial.run_dir, folder)
    shutil.rmtree(folder / "seed-5")
    (folder / "result.json").unlink()
    result = bomemeta.resume(folder, ["workers=0"])
    assert (result.upper_sha256, result.metrics) == (serial.upper_sha256, serial.metrics)
    assert [record(folder / f"seed-{seed}")["first_step"] for seed in (4, 5, 6)] == [2, 0, 2]


def test_evaluate_repeats_the_metrics_and_writes_nothing(serial):
    before = (serial.run_dir / "result.json").read_bytes()
    assert bomemeta.evaluate(serial.run_dir).metrics == serial.metrics
    assert (serial.run_dir / "result.json").read_bytes() == before


def test_a_second_run_never_overwrites_the_first(serial):
    with pytest.raises(ConfigError, match="never overwrites"):
        bomemeta.train(JOB, [f"output_dir={serial.run_dir}"])
