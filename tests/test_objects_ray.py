"""Objects whose class can be imported, where a real cluster runs them: several seeds, a search, a job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import test_submit
import yaml
from house import Heated
from ray_head import ray_head
from test_submit import TESTS, run

import bomemeta as bm
from bomemeta import submit
from bomemeta.errors import ConfigError

KEYS: dict[str, Any] = {"steps": 4, "log": {"tensorboard": False}, "cpus_per_worker": 0.5}


def problem() -> Heated:
    return Heated(rooms=4, curvature=0.5)


def solver(upper_lr: float = 0.3) -> bm.BOME:
    return bm.BOME(inner_steps=5, upper_lr=upper_lr)


@pytest.mark.slow  # two workers of a cluster of its own, and a run of each seed: half a minute
def test_seeds_of_objects_are_the_runs_of_each_seed(tmp_path: Path) -> None:
    folder = tmp_path / "seeds"
    found = bm.train(problem(), solver(), seeds=2, workers=2, output_dir=str(folder), **KEYS)
    runs = json.loads((folder / "result.json").read_text())["runs"]
    alone = [bm.train(problem(), solver(), seed=seed, **KEYS).upper_sha256 for seed in (0, 1)]
    assert [one["upper_sha256"] for one in runs] == alone
    assert alone[0] != alone[1]
    again = bm.train(problem(), solver(), seeds=2, workers=0, **KEYS)
    assert (found.upper_sha256, found.metrics) == (again.upper_sha256, again.metrics)
    assert bm.evaluate(folder).metrics == found.metrics  # the class by its module


@pytest.mark.slow  # Ray Tune with two trials on a cluster of its own: a minute
def test_a_search_over_objects_finds_what_train_repeats(tmp_path: Path) -> None:
    found = bm.tune(
        problem(),
        solver(),
        space={"solver.upper_lr": {"grid": [0.05, 0.3]}, "problem.curvature": {"grid": [0.7]}},
        metric="upper_loss",
        mode="min",
        report_every_steps=2,
        search={"trials": 1, "scheduler": "none", "driver_cpus": 0.5},
        output_dir=str(tmp_path / "search"),
        **KEYS,
    )
    assert [row.ended for row in found.rows] == ["done", "done"]
    for row in found.rows:
        lr = row.values["solver.upper_lr"]
        alone = bm.train(Heated(4, curvature=0.7), solver(lr), **KEYS)
        assert row.upper_sha256 == alone.upper_sha256
    assert found.best is not None
    best = bm.train(str(found.best_config))
    assert best.upper_sha256 == found.best.upper_sha256
    folder = tmp_path / "search" / found.best.run_dir
    assert bm.load(folder).upper_sha256 == found.best.upper_sha256


def made_folder(folder: Path) -> Path:
    """A project with the class's module, and the config of a run that was made of objects."""
    folder.mkdir()
    shutil.copy(TESTS / "house.py", folder)
    bm.train(problem(), solver(), output_dir=str(folder / "first"), **KEYS)
    return folder


def test_a_job_has_the_module_of_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `house` was imported is this process's; a job's is the one that is sent."""
    folder = made_folder(tmp_path / "project")
    monkeypatch.chdir(folder)
    section = yaml.safe_load(Path("first/config.yaml").read_text())["problem"]
    assert section["class"] == "house:Heated"
    made = submit.prepare("first/config.yaml", ["output_dir=/a"])
    assert made.entrypoint.startswith("bomemeta train first/config.yaml output_dir=/a")
    for left_out in ({"excludes": ["house.py"]}, {}):
        if not left_out:
            Path("house.py").unlink()
        with pytest.raises(ConfigError, match=r"problem\.class: house:Heated is not sent: .*house"):
            submit.prepare("first/config.yaml", ["output_dir=/a"], **left_out)


@pytest.mark.slow  # a Ray head with its dashboard, and a job on it: a minute
def test_a_run_of_objects_as_a_job_reaches_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_submit, "JOB_S", 900.0)  # a guard against a job that hangs
    project, out = made_folder(tmp_path / "project"), tmp_path / "out"
    first = json.loads((project / "first" / "result.json").read_text())
    arguments = ["bomemeta", "submit", "first/config.yaml", f"output_dir={out}", "workers=1"]
    with ray_head("disabled") as head:
        done = run(head, project, *arguments, "--address", head.dashboard)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["upper_sha256"] == first["upper_sha256"]
    assert result["metrics"] == first["metrics"]
