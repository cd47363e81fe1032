"""The same command again resumes by itself, and a SIGTERM loses no committed step, however long the
step in hand takes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import test_promises
import torch
import yaml
from test_promises import FEW_SHOT, JOBS, QUADRATIC, stopped, struck, wait_for

import bomemeta
from bomemeta import checkpoint, runs
from bomemeta.errors import CheckpointError, ConfigError
from bomemeta.metrics import read_metrics

KILLED_AFTER_S = 3.0  # by `ray job stop`, after its SIGTERM


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bomemeta.Result]:
    """Undisturbed serial runs."""
    folder = tmp_path_factory.mktemp("reference")
    return {
        name: bomemeta.train(JOBS[name], [f"output_dir={folder / name}"])
        for name in ("quadratic", "stream", "few_shot")
    }


def go(job: dict[str, Any], folder: Path, *overrides: str) -> bomemeta.Result:
    return bomemeta.train(job, [f"output_dir={folder}", *overrides], auto_resume=True)


def record(folder: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return written


def stopped_after(
    steps: int, job: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill in the middle of step `steps` leaves."""

    def strike(self: Any, task_ids: Any, step: int, split: str) -> Any:
        if split == "train" and step == steps:
            raise KeyboardInterrupt
        return load(self, task_ids, step, split)

    with monkeypatch.context() as patch:
        from bomemeta.problems.analytic import Analytic

        load = Analytic.load
        patch.setattr(Analytic, "load", strike)
        with pytest.raises(KeyboardInterrupt):
            go(job, folder)


# The same call again


def test_it_begins_resumes_and_shows_what_is_finished(reference, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    stopped_after(7, QUADRATIC, folder, monkeypatch)
    result = go(QUADRATIC, folder, "workers=0", "log.every_steps=1")
    assert result.upper_sha256 == reference["quadratic"].upper_sha256
    assert result.metrics == reference["quadratic"].metrics
    assert record(folder)["first_step"] == 6
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = go(QUADRATIC, folder)
    assert {
        path: path.stat().st_mtime_ns for path in folder.rglob("*")
    } == before  # nothing was run
    assert (again.upper_sha256, again.metrics, again.steps) == (
        result.upper_sha256,
        result.metrics,
        result.steps,
    )
    assert all(torch.equal(again.upper[name], result.upper[name]) for name in result.upper)


def test_an_output_dir_is_required_and_an_empty_one_will_do(tmp_path):
    with pytest.raises(
        ConfigError, match=r"output_dir: missing; --auto-resume finds the run again by it"
    ):
        bomemeta.train(QUADRATIC, auto_resume=True)
    (tmp_path / "empty").mkdir()
    assert go(QUADRATIC, tmp_path / "empty").steps == 8


@pytest.mark.parametrize("ended", [True, False])
def test_another_run_is_refused_with_the_keys(reference, tmp_path, monkeypatch, ended):
    folder = tmp_path / "run"
    if ended:
        go(QUADRATIC, folder)
    else:
        stopped_after(4, QUADRATIC, folder, monkeypatch)
    with pytest.raises(ConfigError) as error:
        go(QUADRATIC, folder, "solver.inner_steps=7", "steps=9", "seeds=2")
    lines = str(error.value).splitlines()
    assert {line.strip() for line in lines[1:-1]} == {
        "solver.inner_steps: there 4, config 7",
        "steps: there 8, config 9",
        "seeds: there 1, config 2",
    }
    assert f"output_dir: {folder} holds another run" in lines[0]
    (folder / "config.yaml").unlink()
    with pytest.raises(
        ConfigError, match="exists and is not empty; a run never overwrites another"
    ):
        go(QUADRATIC, folder)


def test_what_a_crash_may_leave_is_gone_on_with(reference, tmp_path, monkeypatch):
    wanted = reference["quadratic"].upper_sha256
    # A config that was half written, one without anything else, one with a start that cannot be
    # read.
    for number, leave in enumerate(
        (
            lambda folder: (folder / "config.yaml").rename(folder / ".config.yaml.tmp"),
            lambda folder: None,
            lambda folder: (
                (folder / "checkpoints").mkdir(),
                (folder / "checkpoints/step_00000000.pt").write_bytes(b"half"),
            ),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        bomemeta.run_folder.RunFolder(folder).write_config(
            bomemeta.config.load_config(QUADRATIC, [f"output_dir={folder}"])
        )
        leave(folder)
        assert go(QUADRATIC, folder).upper_sha256 == wanted
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
            "step_00000006.pt",
            "step_00000008.pt",
        ]

    folder = tmp_path / "torn"
    stopped_after(7, QUADRATIC, folder, monkeypatch)
    (folder / "checkpoints" / "step_00000006.pt").write_bytes(b"half")
    result = go(QUADRATIC, folder)
    assert result.upper_sha256 == wanted
    assert record(folder)["first_step"] == 3

    # Where steps would be lost that may still be saved by hand, nothing is begun.
    folder = tmp_path / "lost"
    stopped_after(7, QUADRATIC, folder, monkeypatch)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"half")
    with pytest.raises(CheckpointError, match="can be read"):
        go(QUADRATIC, folder)


def test_a_longer_run_that_was_stopped_is_not_taken_for_finished(reference, tmp_path, monkeypatch):
    job = {**QUADRATIC, "solver": {**QUADRATIC["solver"], "upper_schedule": "constant"}}
    straight = go(job, tmp_path / "straight", "steps=12")
    folder = tmp_path / "run"
    go(job, folder)
    config = bomemeta.config.load_config(job, [f"output_dir={folder}", "steps=12"])
    bomemeta.run_folder.RunFolder(folder).write_config(
        config
    )  # `bomemeta resume` with steps=12, killed here
    assert go(job, folder, "steps=12").upper_sha256 == straight.upper_sha256


def test_seeds_resume_too(tmp_path, monkeypatch):
    whole = go(QUADRATIC, tmp_path / "whole", "seeds=2")
    folder = tmp_path / "run"
    stopped_after(5, {**QUADRATIC, "seeds": 2}, folder, monkeypatch)
    assert not (folder / "seed-1").exists()
    result = go(QUADRATIC, folder, "seeds=2")
    assert (result.upper_sha256, result.metrics) == (whole.upper_sha256, whole.metrics)
    assert record(folder / "seed-0")["first_step"] == 3
    again = go(QUADRATIC, folder, "seeds=2")
    assert (again.upper_sha256, again.metrics, again.upper) == (
        whole.upper_sha256,
        whole.metrics,
        {},
    )


def test_two_processes_do_not_share_a_folder(tmp_path, monkeypatch):
    from bomemeta import run_folder

    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.0)
    folder = tmp_path / "run"
    go(QUADRATIC, folder, "steps=2")
    with (
        run_folder.RunFolder.open(folder).held(print),
        pytest.raises(ConfigError, match="another process is at work"),
    ):
        bomemeta.resume(folder, ["steps=4"])
    assert bomemeta.resume(folder, ["steps=4"]).steps == 4


# Signals


def command(job: dict[str, Any], folder: Path, how: str, *overrides: str) -> subprocess.Popen[str]:
    """The job as a user's process, which is slow once, in step 4."""
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(job))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    arguments = [
        "train",
        str(config),
        f"output_dir={folder}",
        *struck(how, folder.with_suffix(".mark")),
        *overrides,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "bomemeta", *arguments, "--auto-resume"],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def terminate_then_kill(process: subprocess.Popen[str]) -> str:
    """As `ray job stop`, or sooner: killed once it says that it has saved. What it printed."""
    assert process.stdout is not None
    lines = []
    process.terminate()
    in_time = threading.Timer(KILLED_AFTER_S, process.kill)
    in_time.start()
    for line in process.stdout:
        lines.append(line)
        if line.endswith(
            "SIGTERM: the state before this step is saved; stopping after this step\n"
        ):
            process.kill()
    in_time.cancel()
    process.communicate()
    return "".join(lines)


@pytest.mark.parametrize(
    ("job", "how", "workers"),
    [("quadratic", "compute", 0), ("stream", "sleep", 0), ("quadratic", "sleep", 1)],
)
def test_sigterm_in_a_long_step_loses_no_committed_step(job, how, workers, reference, tmp_path):
    folder = tmp_path / "run"
    process = command(JOBS[job], folder, how, f"workers={workers}", "cpus_per_worker=0.5")
    wait_for(lambda: folder.with_suffix(".mark").exists(), process)
    output = terminate_then_kill(process)
    assert process.returncode == -signal.SIGKILL, output
    assert "SIGTERM: the state before this step is saved" in output
    assert checkpoint.load_latest(folder / "checkpoints").checkpoint.step == 4
    assert len(read_metrics(folder / "metrics.jsonl")) == 4

    result = go({**JOBS[job], "problem": {**JOBS[job]["problem"], **armed(folder, how)}}, folder)
    assert result.upper_sha256 == reference[job].upper_sha256
    assert result.metrics == reference[job].metrics
    assert record(folder)["first_step"] == 4


def armed(folder: Path, how: str) -> dict[str, Any]:
    return {"strike_step": 4, "strike_signal": how, "strike_mark": str(folder.with_suffix(".mark"))}


def test_sigterm_in_a_short_step_ends_well(reference, tmp_path):
    folder = tmp_path / "run"
    process = command(FEW_SHOT, folder, "SIGSTOP")
    wait_for(lambda: stopped(process.pid), process)
    process.terminate()
    process.terminate()  # `uv run` passes it on, and Ray sends it to every process of a job
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == "interrupted after 5 steps; resume with the same command"
    assert output.splitlines()[0] == f"run folder: {folder}"
    assert checkpoint.load_latest(folder / "checkpoints").checkpoint.step == 5


def test_sigterm_while_the_loop_saves_is_no_step_back(tmp_path, monkeypatch):
    """The kept state is older than what the loop has just saved, and must not take its location."""
    saved = []
    save = checkpoint.save

    def save_and_strike(folder: Path, state: checkpoint.Checkpoint, keep: int) -> Path:
        saved.append(state.step)
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(folder, state, keep)

    monkeypatch.setattr(checkpoint, "save", save_and_strike)
    result = runs.train(QUADRATIC, [f"output_dir={tmp_path / 'run'}"])
    assert result.interrupted
    assert (saved, result.steps) == ([0, 3, 3], 3)


def test_a_state_that_cannot_be_saved_is_said(tmp_path, monkeypatch):
    from bomemeta import report

    reported: list[str] = []
    save = checkpoint.save

    def full(folder: Path, state: checkpoint.Checkpoint, keep: int) -> Path:
        if state.step == 5:  # the kept state: step 4 is logged when step 5 is on its way
            raise CheckpointError("the disk is full")
        return save(folder, state, keep)

    class Loud(report.Quiet):
        def step(self, step: int, metrics: Any) -> None:
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
                while not reported:
                    time.sleep(0.01)

        def note(self, text: str) -> None:
            reported.append(text)

    monkeypatch.setattr(checkpoint, "save", full)
    result = runs.train(QUADRATIC, [f"output_dir={tmp_path / 'run'}"], listener=Loud())
    assert (result.interrupted, result.steps) == (True, 6)
    assert reported[0] == "SIGTERM: the state before this step could not be saved: the disk is full"


assert test_promises  # its jobs import mortal.py, which registers the problems
