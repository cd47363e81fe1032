"""The run folder and its log: nothing is overwritten, and a resumed log has every step once."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from pathlib import Path

import pytest

from bomemeta.config import Config, load_config
from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.metrics import MetricsLog, RunFolder, read_metrics
from bomemeta.registry import problems, solvers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fake:
    upper_lr: float = 1e-5


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    monkeypatch.chdir(tmp_path)
    for registry in (solvers, problems):
        monkeypatch.setattr(registry, "_loaded", True)
        monkeypatch.setattr(registry, "_classes", {"fake": Fake})
    return load_config({"steps": 5, "problem": {"name": "fake"}, "solver": {"name": "fake"}})


def test_default_folders_are_numbered_and_absolute(config: Config, tmp_path: Path) -> None:
    folders = [RunFolder.create(None, "quickstart", config) for _ in range(3)]
    assert [folder.path for folder in folders] == [
        tmp_path / "runs" / name for name in ("quickstart", "quickstart-2", "quickstart-3")
    ]
    assert load_config(folders[0].config_file) == config
    assert RunFolder.open("runs/quickstart") == folders[0]


def test_a_chosen_folder_is_never_overwritten(config: Config, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = RunFolder.create("empty", "a", config)
    with pytest.raises(ConfigError, match="bomemeta resume empty"):
        RunFolder.create("empty", "a", config)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="output_dir"):
        RunFolder.create("file", "a", config)
    with pytest.raises(ConfigError, match=r"output_dir: .* cannot be written"):
        RunFolder.create("file/below", "a", config)
    assert load_config(folder.config_file) == config


def test_what_is_not_a_run_is_refused_with_the_runs_there_are(
    config: Config, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"it has no config.yaml. `bomemeta train` prints"):
        RunFolder.open(tmp_path)
    RunFolder.create(None, "a", config)
    with pytest.raises(ConfigError, match="Runs here: runs/a"):
        RunFolder.open(tmp_path / "none")


def test_results_are_valid_json(config: Config) -> None:
    folder = RunFolder.create(None, "a", config)
    folder.write_result(
        {"metrics": {"x": math.nan, "y": 1.5}, "final": {"upper": {"w": [1.0, math.inf]}}}
    )
    result = json.loads(folder.result_file.read_text(), parse_constant=pytest.fail)
    assert len(result.pop("digest")) == 64
    assert result == {"metrics": {"x": None, "y": 1.5}, "final": {"upper": {"w": [1.0, None]}}}


def test_one_line_a_step_is_on_the_disk_at_once(config: Config) -> None:
    folder = RunFolder.create(None, "a", config)
    with MetricsLog(folder, tensorboard=False) as log:
        for step in range(3):
            log.write(step, {"upper_loss": step + 0.5, "gap": math.nan})
            lines = folder.metrics_file.read_text().splitlines()
            assert json.loads(lines[-1], parse_constant=pytest.fail) == {
                "step": step,
                "upper_loss": step + 0.5,
                "gap": None,
            }
    assert len(lines) == 3


@pytest.mark.parametrize("torn", ["", '{"step": 5, "upper_lo', "7", "\x00\x00"])
def test_resuming_drops_the_steps_to_be_computed_again_and_a_torn_line(
    config: Config, torn: str
) -> None:
    folder = RunFolder.create(None, "a", config)
    with MetricsLog(folder, tensorboard=False) as log:
        for step in range(5):
            log.write(step, {"upper_loss": float(step)})
    with folder.metrics_file.open("a") as file:
        file.write(torn)
    with MetricsLog(folder, tensorboard=False, from_step=3) as log:
        assert [line["step"] for line in read_metrics(folder.metrics_file)] == [0, 1, 2]
        log.write(3, {"upper_loss": 30.0})
    assert read_metrics(folder.metrics_file)[-1] == {"step": 3, "upper_loss": 30.0}
    assert len(folder.metrics_file.read_text().splitlines()) == 4


def test_a_run_that_goes_back_has_every_step_once(config: Config) -> None:
    folder = RunFolder.create(None, "a", config)
    with MetricsLog(folder, tensorboard=False) as log:
        for step in range(4):
            log.write(step, {"upper_loss": 1.0})
        log.go_back(2)
        log.write(2, {"upper_loss": 2.0})
    assert [line["step"] for line in read_metrics(folder.metrics_file)] == [0, 1, 2]


def test_a_full_disk_is_named(config: Config) -> None:
    folder = RunFolder.create(None, "a", config)
    log = MetricsLog(folder, tensorboard=False)
    log._file.close()
    log._file = Path("/dev/full").open("w")  # noqa: SIM115  # the log closes it
    with pytest.raises(
        BomemetaError, match=r"metrics.jsonl could not be written: No space left on device"
    ):
        log.write(0, {"upper_loss": 1.0})
    log.close()


def test_a_result_on_a_full_disk_leaves_the_old_one(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(None, "a", config)
    folder.write_result({"a": 1})

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        BomemetaError, match=r"result.json could not be written: No space left on device"
    ):
        folder.write_result({"a": 2})
    assert json.loads(folder.result_file.read_text())["a"] == 1
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "result.json"]


def test_tensorboard_shows_each_step_once_after_a_resume(config: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder.create(None, "a", config)
    with MetricsLog(folder, tensorboard=True) as log:
        for step in range(4):
            log.write(step, {"upper_loss": float(step), "own": 1.0, "gap": math.nan})
    with MetricsLog(folder, tensorboard=True, from_step=2) as log:
        log.write(2, {"upper_loss": 20.0, "own": 1.0})
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/upper")] == [
        (0, 0.0),
        (1, 1.0),
        (2, 20.0),
    ]
    assert set(events.Tags()["scalars"]) == {"loss/upper", "own"}
