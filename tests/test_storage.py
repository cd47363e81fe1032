"""Runs at a URI: what is there is always a run that can be resumed, on whatever machine, and nothing is
lost where it cannot be written.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_auto_resume import terminate_then_kill
from test_promises import QUADRATIC, struck, wait_for

import bomemeta
from bomemeta import storage
from bomemeta.checkpoint import load_latest
from bomemeta.errors import ConfigError, StorageError
from bomemeta.metrics import read_metrics
from bomemeta.report import Quiet
from bomemeta.storage import Store, below, is_uri


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where local copies are; nothing may be left of them."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0, 0.0))
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bomemeta.Result:
    return bomemeta.train(QUADRATIC, [f"output_dir={tmp_path_factory.mktemp('reference') / 'run'}"])


def go(location: Path, *overrides: str, **options: Any) -> bomemeta.Result:
    return bomemeta.train(
        QUADRATIC, [f"output_dir={location.as_uri()}", *overrides], auto_resume=True, **options
    )


def files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def test_what_is_a_uri() -> None:
    assert [is_uri(location) for location in ("s3://b/a", "gs://b", "file:///a")] == [True] * 3
    assert [is_uri(location) for location in ("/a/b", "a", "~/a", "a:b", Path("/a"))] == [False] * 5
    assert [
        below(location, "b/c") for location in ("s3://a", "s3://a/?region=x/y", "/a", Path("a?"))
    ] == [
        "s3://a/b/c",
        "s3://a/b/c?region=x/y",
        Path("/a/b/c"),
        Path("a?/b/c"),
    ]


def test_a_run_is_there_whole_and_nothing_is_left_here(tmp_path, scratch, reference):
    result = go(tmp_path / "run", "log.tensorboard=true")
    assert (result.upper_sha256, result.metrics) == (reference.upper_sha256, reference.metrics)
    assert result.uri == (tmp_path / "run").as_uri()
    there = files(tmp_path / "run")
    events = [name for name in there if name.startswith("tensorboard/")]
    assert len(events) == 1
    expected = [
        "checkpoints/step_00000006.pt",
        "checkpoints/step_00000008.pt",
        "config.yaml",
        "metrics.jsonl",
        "result.json",
    ]
    assert sorted(set(there) - set(events)) == expected
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 8
    assert (
        json.loads((tmp_path / "run" / "result.json").read_text())["upper_sha256"]
        == reference.upper_sha256
    )
    assert list(scratch.glob("bomemeta-*")) == []

    again = go(tmp_path / "run", "log.tensorboard=true")
    assert (again.upper_sha256, again.metrics, again.steps) == (
        result.upper_sha256,
        result.metrics,
        8,
    )
    assert bomemeta.evaluate(result.uri).metrics == result.metrics
    assert files(tmp_path / "run") == there
    longer = bomemeta.resume(result.uri, ["steps=9"])
    assert longer.steps == 9
    assert "checkpoints/step_00000009.pt" in files(tmp_path / "run")
    with pytest.raises(
        ConfigError, match="exists and is not empty; a run never overwrites another"
    ):
        bomemeta.train(QUADRATIC, [f"output_dir={result.uri}"])
    assert list(scratch.glob("bomemeta-*")) == []


def command(location: Path, scratch: Path, *overrides: str) -> subprocess.Popen[str]:
    """A machine whose temporary folder is `scratch`."""
    scratch.mkdir()
    config = location.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(QUADRATIC))
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent),
        "TMPDIR": str(scratch),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [
        "train",
        str(config),
        f"output_dir={location.as_uri()}",
        *overrides,
        "--auto-resume",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "bomemeta", *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_another_machine_resumes_to_the_same_bits(ending, tmp_path, reference):
    """SIGKILL: from the last checkpoint that was due. SIGTERM, at most three seconds before SIGKILL:
    from the last committed step.
    """
    location, mark = tmp_path / "run", tmp_path / "mark"
    armed = struck("sleep", mark)
    process = command(location, tmp_path / "one", *armed)
    wait_for(mark.exists, process)
    if ending == signal.SIGTERM:
        terminate_then_kill(process)
    else:
        process.kill()
        process.communicate()
    step = 3 if ending == signal.SIGKILL else 4
    assert load_latest(location / "checkpoints").checkpoint.step == step
    assert len(read_metrics(location / "metrics.jsonl")) == step
    assert len(files(location / "checkpoints")) == 2

    process = command(location, tmp_path / "two", *armed)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    lines = output.splitlines()
    assert lines[0] == f"run folder: {location.as_uri()}"
    assert lines[-1] == f"done after 8 steps; run folder: {location.as_uri()}"
    result = json.loads((location / "result.json").read_text())
    assert (result["upper_sha256"], result["first_step"]) == (reference.upper_sha256, step)
    assert [line["step"] for line in read_metrics(location / "metrics.jsonl")] == list(range(8))
    assert list((tmp_path / "two").glob("bomemeta-*")) == []


def test_seeds_have_places_of_their_own(tmp_path, scratch):
    whole = bomemeta.train(QUADRATIC, [f"output_dir={tmp_path / 'whole'}", "seeds=2"])
    result = go(tmp_path / "run", "seeds=2")
    assert (result.upper_sha256, result.metrics) == (whole.upper_sha256, whole.metrics)
    assert {"config.yaml", "result.json", "seed-0/result.json", "seed-1/result.json"} <= set(
        files(tmp_path / "run")
    )
    (tmp_path / "run" / "result.json").unlink()
    assert go(tmp_path / "run", "seeds=2").upper_sha256 == whole.upper_sha256
    assert list(scratch.glob("bomemeta-*")) == []


class Heard(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def failing(monkeypatch: pytest.MonkeyPatch, fails: Any) -> list[str]:
    """Uploads of `name` fail while `fails(name)`; returns the names that were tried."""
    tried: list[str] = []
    put = Store._put

    def refuse(self: Store, name: str, content: Path | bytes) -> None:
        tried.append(name)
        if fails(name):
            raise OSError("the bucket is away")
        put(self, name, content)

    monkeypatch.setattr(Store, "_put", refuse)
    return tried


def test_an_upload_is_tried_again(tmp_path, monkeypatch, reference):
    tried = failing(monkeypatch, lambda name: tried.count(name) in (1, 2, 3))
    reported = Heard()
    assert go(tmp_path / "run", listener=reported).upper_sha256 == reference.upper_sha256
    assert reported.notes == []
    assert tried.count("checkpoints/step_00000008.pt") == 4


def test_a_store_that_is_away_for_a_while_is_a_note(tmp_path, scratch, monkeypatch, reference):
    tried = failing(
        monkeypatch, lambda name: name.endswith("00000003.pt") and tried.count(name) <= 4
    )
    reported = Heard()
    assert go(tmp_path / "run", listener=reported).upper_sha256 == reference.upper_sha256
    (note,) = [note for note in reported.notes if "cannot be written to" in note]
    assert (
        "run cannot be written to (checkpoints/step_00000003.pt), in 4 tries: the bucket is away. Nothing is lost"
        in note
    )
    assert "checkpoints/step_00000006.pt" in files(tmp_path / "run")
    assert list(scratch.glob("bomemeta-*")) == []


def test_a_store_that_stays_away_is_an_error_and_everything_is_here(
    tmp_path, scratch, monkeypatch, reference
):
    failing(
        monkeypatch,
        lambda name: (
            name != "config.yaml" and not name.endswith(("00000000.pt", "00000003.pt", ".jsonl"))
        ),
    )
    with pytest.raises(
        StorageError,
        match=r"in 4 tries: the bucket is away\. Nothing is lost: the run as it is now is in (.*)$",
    ) as error:
        go(tmp_path / "run")
    here = Path(str(error.value).rpartition(" is in ")[2])
    assert json.loads((here / "result.json").read_text())["upper_sha256"] == reference.upper_sha256
    assert (
        load_latest(tmp_path / "run" / "checkpoints").checkpoint.step == 3
    )  # the older one is not removed before the newer is there
    assert "result.json" not in files(tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    assert go(tmp_path / "run").upper_sha256 == reference.upper_sha256


def test_places_that_cannot_be_are_refused_at_once(tmp_path, scratch):
    with pytest.raises(
        ConfigError, match=r"output_dir: 'nowhere://a' is no location where a run can be kept"
    ):
        bomemeta.train(QUADRATIC, ["output_dir=nowhere://a"])
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be"):
        bomemeta.train(QUADRATIC, [f"output_dir={(tmp_path / 'file' / 'run').as_uri()}"])
    with pytest.raises(ConfigError, match=r"is not a run's folder: it has no config\.yaml"):
        bomemeta.resume((tmp_path / "none").as_uri())
    assert list(scratch.glob("bomemeta-*")) == []


def test_a_half_written_upload_is_not_taken_for_a_checkpoint(tmp_path, reference):
    go(tmp_path / "run", "steps=4")
    (tmp_path / "run" / "checkpoints" / ".step_00000009.pt.tmp").write_bytes(b"half")
    assert bomemeta.resume((tmp_path / "run").as_uri(), ["steps=5"]).steps == 5
