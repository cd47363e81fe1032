"""What bomemeta promises its users, bit for bit: the same x for any number of workers, any deaths,
any interruption.

Real processes, real signals, real Ray. The reference of every comparison is the undisturbed serial
run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import bomemeta
from bomemeta.distributed import cluster
from bomemeta.distributed.cluster import RayOptions
from bomemeta.metrics import read_metrics

MORTAL = str(Path(__file__).with_name("mortal.py"))
STEPS = 8

FEW_SHOT: dict[str, Any] = {
    "imports": [MORTAL],
    "problem": {"name": "mortal_few_shot", "ways": 3, "queries": 2, "test_queries": 2, "width": 8},
    "data": {"dataset": "toy"},
    "solver": {
        "name": "bome", "inner_steps": 3, "inner_lr": 0.2, "lower_lr": 0.2, "adapt_steps": 2, "barrier_steps": 2,
        "barrier": "per_task", "upper_lr": 0.01, "upper_optimizer": "adam", "diagnose_every": 3,
    },
    "steps": STEPS, "tasks_per_step": 5, "shards": 3,
    "evaluation": {"episodes": 10}, "checkpoint": {"every_steps": 3}, "log": {"tensorboard": False},
}  # fmt: skip
# Lower variables that persist, with momentum: everything that a checkpoint must hold.
QUADRATIC: dict[str, Any] = {
    "imports": [MORTAL],
    "problem": {"name": "mortal_analytic", "case": "quadratic", "tasks": 5},
    "solver": {
        "name": "bome", "inner_steps": 4, "upper_optimizer": "momentum", "lower_momentum": 0.5, "upper_schedule": "cosine",
        "upper_lr": 0.01, "lower_lr": 0.05,
    },
    "steps": STEPS, "tasks_per_step": 4, "shards": 3, "dtype": "float64",
    "checkpoint": {"every_steps": 3}, "log": {"tensorboard": False},
}  # fmt: skip
# One lower variable, its data in five uneven blocks on the workers; the Krylov basis is part of its
# state.
SHARED: dict[str, Any] = {
    "imports": [MORTAL],
    "problem": {
        "name": "mortal_hyper_cleaning", "train": 62, "validation": 33, "selection": 10, "weights": "sigmoid", "blocks": 5,
    },
    "data": {"dataset": "toy_labelled"},
    "solver": {"name": "lancbio", "subspace": 3, "inner_steps": 2, "inner_lr": 0.1, "upper_lr": 10.0},
    "steps": STEPS, "shards": 3, "dtype": "float64",
    "checkpoint": {"every_steps": 3}, "log": {"tensorboard": False},
}  # fmt: skip
# A stream: what it keeps of the first task is written at step 3 and replayed from step 4 on.
STREAM: dict[str, Any] = {
    "imports": [MORTAL],
    "problem": {
        "name": "mortal_continual", "tasks": 2, "samples_per_task": 40, "test_samples_per_task": 20, "batch": 10, "rounds": 1, "hidden": 8,
        "memory_per_task": 9, "semantic_per_task": 3, "blocks": 3,
    },
    "data": {"dataset": "digits"},
    "solver": {"name": "bome", "inner_steps": 2, "inner_lr": 0.03, "lower_lr": 0.03, "lower_momentum": 0.5, "upper_lr": 0.1},
    "shards": 3, "checkpoint": {"every_steps": 3}, "log": {"tensorboard": False},
}  # fmt: skip
JOBS = {"few_shot": FEW_SHOT, "quadratic": QUADRATIC, "shared": SHARED, "stream": STREAM}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bomemeta.Result]:
    """Each job's undisturbed serial run."""
    folder = tmp_path_factory.mktemp("reference")
    return {
        name: bomemeta.train(job, [f"output_dir={folder / name}"]) for name, job in JOBS.items()
    }


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One local cluster for the whole file, started as a run would; `workers=N` runs join it."""
    options = RayOptions(workers=3, cpus_per_worker=0.5)
    with cluster.local(options, print):
        yield


def struck(signal_name: str, mark: Path) -> list[str]:
    """Overrides that arm mortal.py at step 4."""
    return [
        "problem.strike_step=4",
        f"problem.strike_signal={signal_name}",
        f"problem.strike_mark={mark}",
    ]


# Two, for every job: below, with one of them killed.
@pytest.mark.parametrize(("job", "workers"), [("few_shot", 1), ("shared", 3)])
def test_same_bits_for_any_number_of_workers(job, workers, reference, ray_cluster, tmp_path):
    result = bomemeta.train(
        JOBS[job], [f"output_dir={tmp_path / 'run'}", f"workers={workers}", "cpus_per_worker=0.5"]
    )
    assert result.upper_sha256 == reference[job].upper_sha256
    assert result.metrics == reference[job].metrics


@pytest.mark.parametrize("job", JOBS)
def test_same_bits_when_a_worker_is_killed_in_the_middle_of_a_step(
    job, reference, ray_cluster, tmp_path
):
    mark = tmp_path / "mark"
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        "workers=2",
        "cpus_per_worker=0.5",
        *struck("SIGKILL", mark),
    ]
    result = bomemeta.train(JOBS[job], overrides)
    assert mark.exists()
    assert any("died" in note for note in result.notes), result.notes
    assert result.upper_sha256 == reference[job].upper_sha256


# One y for each task on a tree, with a member killed: tests/test_leaders.py.
@pytest.mark.parametrize(
    ("job", "reduce"),
    [
        ("shared", "tree"),
        ("shared", "collective"),
        ("stream", "collective"),
    ],
)
def test_same_bits_wherever_shards_are_added_with_a_worker_killed(
    job, reduce, reference, ray_cluster, tmp_path
):
    mark = tmp_path / "mark"
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        "workers=2",
        "cpus_per_worker=0.5",
        f"reduce={reduce}",
        *struck("SIGKILL", mark),
    ]
    result = bomemeta.train(JOBS[job], overrides)
    assert mark.exists()
    assert any("died" in note for note in result.notes), result.notes
    assert result.upper_sha256 == reference[job].upper_sha256
    assert result.metrics == reference[job].metrics


def test_same_bits_when_a_member_of_all_workers_together_hangs(reference, ray_cluster, tmp_path):
    mark = tmp_path / "mark"
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        "workers=2",
        "cpus_per_worker=0.5",
        "reduce=collective",
        "step_timeout_s=8",
    ]
    result = bomemeta.train(SHARED, [*overrides, *struck("SIGSTOP", mark)])
    assert any("did not answer" in note for note in result.notes), result.notes
    assert result.upper_sha256 == reference["shared"].upper_sha256


def test_same_bits_with_as_many_workers_as_there_is_room_for(reference, ray_cluster, tmp_path):
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        "workers=auto",
        "max_workers=3",
        "cpus_per_worker=0.5",
        "backup_after=1.5",
    ]
    result = bomemeta.train(SHARED, overrides)
    assert result.upper_sha256 == reference["shared"].upper_sha256


def test_same_bits_when_a_worker_hangs(reference, ray_cluster, tmp_path):
    mark = tmp_path / "mark"
    overrides = [
        f"output_dir={tmp_path / 'run'}",
        "workers=2",
        "cpus_per_worker=0.5",
        "step_timeout_s=8",
    ]
    result = bomemeta.train(FEW_SHOT, [*overrides, *struck("SIGSTOP", mark)])
    assert mark.exists()
    assert any("did not answer" in note for note in result.notes), result.notes
    assert result.upper_sha256 == reference["few_shot"].upper_sha256


def start(job: dict[str, Any], folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """The job as a user's process; who loads step 4 stops itself there until it is dealt with."""
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(job))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    arm = struck("SIGSTOP", folder.with_suffix(".mark"))
    command = [
        sys.executable,
        "-m",
        "bomemeta",
        "train",
        str(config),
        f"output_dir={folder}",
        *arm,
        *overrides,
    ]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(condition, process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not get there in time"
        time.sleep(0.05)


def stopped(process: int) -> list[int]:
    """Which of a process and those below it are stopped."""
    states: dict[int, str] = {}
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # After the name, which may hold anything: state and parent.
            state, parent = entry.read_text().rpartition(") ")[2].split()[:2]
            number = int(entry.parent.name)
            states[number] = state
            below.setdefault(int(parent), []).append(number)
    found = [process]
    for number in found:
        found += below.get(number, [])
    return [number for number in found if states.get(number) == "T"]


# The quadratic: tests/test_storage.py.
@pytest.mark.parametrize("job", ["few_shot", "shared", "stream"])
def test_same_bits_after_kill_9_of_the_driver_and_resume(job, reference, tmp_path):
    folder = tmp_path / "run"
    process = start(JOBS[job], folder)
    wait_for(
        lambda: folder.with_suffix(".mark").exists(), process
    )  # stopped in the middle of step 4
    process.kill()
    process.communicate()
    assert len(read_metrics(folder / "metrics.jsonl")) == 4
    assert not (folder / "result.json").exists()

    result = bomemeta.resume(folder)
    assert result.upper_sha256 == reference[job].upper_sha256
    assert result.metrics == reference[job].metrics
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(STEPS))
    assert (
        json.loads((folder / "result.json").read_text())["first_step"] == 3
    )  # the checkpoint before the kill


@pytest.mark.parametrize("workers", [0, 1])
def test_same_bits_after_ctrl_c_and_resume(workers, reference, tmp_path):
    folder = tmp_path / "run"
    process = start(FEW_SHOT, folder, f"workers={workers}", "step_timeout_s=60")
    wait_for(lambda: folder.with_suffix(".mark").exists(), process)
    # Who stops itself, right after the mark, is the process that loads: the driver, or its worker.
    wait_for(lambda: stopped(process.pid), process)
    process.send_signal(signal.SIGINT)
    for number in stopped(process.pid):
        os.kill(number, signal.SIGCONT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert f"bomemeta resume {folder}" in output
    assert (
        len(read_metrics(folder / "metrics.jsonl")) == 5
    )  # the step in hand was finished, no further one begun

    result = bomemeta.resume(folder, ["workers=0"])
    assert result.upper_sha256 == reference["few_shot"].upper_sha256
    assert json.loads((folder / "result.json").read_text())["first_step"] == 5


def test_a_second_run_never_overwrites_the_first(reference):
    folder = reference["quadratic"].run_dir
    before = (folder / "result.json").read_bytes()
    with pytest.raises(bomemeta.errors.ConfigError, match="never overwrites"):
        bomemeta.train(QUADRATIC, [f"output_dir={folder}"])
    assert (folder / "result.json").read_bytes() == before


def test_longer_training_resumes_from_a_finished_run(tmp_path):
    job = {**QUADRATIC, "solver": {**QUADRATIC["solver"], "upper_schedule": "constant"}}
    short = bomemeta.train(job, [f"output_dir={tmp_path / 'short'}"])
    longer = bomemeta.resume(short.run_dir, ["steps=12"])
    straight = bomemeta.train(job, [f"output_dir={tmp_path / 'long'}", "steps=12"])
    assert longer.upper_sha256 == straight.upper_sha256


def test_resume_refuses_another_config(reference):
    with pytest.raises(
        bomemeta.errors.CheckpointError, match=r"solver\.inner_steps: checkpoint 4, config 7"
    ):
        bomemeta.resume(reference["quadratic"].run_dir, ["solver.inner_steps=7"])


def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path):
    job = {
        **QUADRATIC,
        "problem": {"name": "analytic", "case": "quadratic"},
        "tasks_per_step": None,
        "steps": 2000,
    }
    solver = {"name": "bome", "inner_lr": 50.0, "upper_lr": 100.0, "lower_lr": 50.0}
    with pytest.raises(
        bomemeta.errors.DivergenceError,
        match=r"step \d+: not finite: .*last good checkpoint is .*step_\d+\.pt",
    ):
        bomemeta.train({**job, "solver": solver}, [f"output_dir={tmp_path / 'run'}"])


def test_evaluate_repeats_the_final_metrics(reference):
    for result in reference.values():
        assert bomemeta.evaluate(result.run_dir).metrics == result.metrics
