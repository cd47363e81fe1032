"""Run folders that were changed, moved, removed or half-written: said, and nothing wrong is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import bomemeta
from bomemeta.checkpoint import Checkpoint
from bomemeta.config import differing_keys, load_config
from bomemeta.continuation import longer_notes
from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.report import Quiet

CONFIG: dict[str, Any] = {
    "problem": {"name": "analytic", "case": "quadratic", "tasks": 2},
    "solver": {"name": "bome", "inner_steps": 1},
    "steps": 4,
    "checkpoint": {"every_steps": 2, "keep": 2},
    "log": {"tensorboard": False},
}


class Notes(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "run"
    bomemeta.train(CONFIG, output_dir=str(folder))
    return folder


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done, tmp_path / "run")
    return tmp_path / "run"


def again(run: Path) -> tuple[Any, list[str]]:
    listener = Notes()
    result = bomemeta.train(CONFIG, output_dir=str(run), auto_resume=True, listener=listener)
    return result, [*listener.notes, *result.notes]


def test_a_config_edited_by_hand_is_said_with_the_keys(run: Path) -> None:
    path = run / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("steps: 4\n", "steps: 20\n", 1))
    for function in (bomemeta.resume, bomemeta.evaluate):
        with pytest.raises(
            ConfigError, match=r"was changed after .*: steps: 4 written, 20 there\. Set keys"
        ):
            function(run)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")  # as the message says
    assert bomemeta.resume(run).steps == 20


@pytest.mark.parametrize("content", [b"", b"steps: [", b"imports: null\n", b"\xff", b"- a\n"])
def test_auto_resume_over_a_half_written_config(run: Path, done: Path, content: bytes) -> None:
    text = (run / "config.yaml").read_bytes()
    (run / "config.yaml").write_bytes(content + text[-30:])
    result, notes = again(run)
    assert result.steps == 4
    assert any(
        "config.yaml" in note and "newest checkpoint's config" in note for note in notes
    ) or (content == b"imports: null\n")
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(BomemetaError):
        bomemeta.resume(run, ["steps=a"])


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"null", b'{"config": null}', b"\xff\xfe", b"[" * 100000, b"half", b"digit"],
)  # fmt: skip
def test_auto_resume_over_a_damaged_result(run: Path, done: Path, content: bytes) -> None:
    path = run / "result.json"
    whole = path.read_bytes()
    before = json.loads(whole)
    if content == b"half":
        content = whole[: len(whole) // 2]
    elif content == b"digit":
        figure = (
            json.dumps(before["metrics"]["upper_loss"])
            if "upper_loss" in before["metrics"]
            else "4"
        )
        at = whole.index(figure.encode())
        content = whole[:at] + bytes([48 + (whole[at] - 47) % 10]) + whole[at + 1 :]
    path.write_bytes(content)
    result, notes = again(run)
    assert result.upper_sha256 == before["upper_sha256"]
    assert any("result.json" in note and "it is made again" in note for note in notes)
    assert json.loads(path.read_text())["metrics"].keys() == before["metrics"].keys()


def test_a_changed_metrics_file_is_said_on_resume(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("0.", "1.", 1)
    path.write_text("\n".join(lines) + "\n" + '{"step": ' + "9" * 6000 + "}\n" + "[" * 100000)
    notes = bomemeta.resume(run, ["steps=6"]).notes
    assert any("metrics.jsonl is not as the run wrote it" in note for note in notes)
    assert bomemeta.resume(run, ["steps=7"]).notes == []
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(7))


def test_fewer_steps_than_were_done_write_nothing(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"steps: got 3; the run has done 4"):
        bomemeta.resume(run, ["steps=3"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


class Moves(Quiet):
    def __init__(self, run: Path, remove: bool) -> None:
        self.run, self.remove = run, remove

    def step(self, step: int, metrics: Any) -> None:
        if step == 0 and self.remove:
            shutil.rmtree(self.run)
        elif step == 0:
            self.run.rename(self.run.with_name("moved"))


@pytest.mark.parametrize("remove", [True, False])
def test_a_folder_that_is_taken_away_stops_the_run(tmp_path: Path, remove: bool) -> None:
    run = tmp_path / "run"
    with pytest.raises(BomemetaError, match=r"run folder .*run was moved or removed while"):
        bomemeta.train(CONFIG, output_dir=str(run), listener=Moves(run, remove))
    assert not run.exists()
    if not remove:
        assert bomemeta.resume(tmp_path / "moved").steps == 4


def test_a_user_s_copy_is_neither_newest_nor_deleted(run: Path) -> None:
    best = run / "checkpoints" / "step_best.pt"
    shutil.copy(run / "checkpoints" / "step_00000002.pt", best)
    assert bomemeta.resume(run, ["steps=6"]).notes == []
    assert torch.load(best, weights_only=True)["step"] == 2


def test_junk_beside_tensorboard_s_files(tmp_path: Path) -> None:
    board = tmp_path / "run" / "tensorboard"
    bomemeta.train(CONFIG, output_dir=str(tmp_path / "run"))
    board.mkdir()
    for name in ("foo", "", "99x.y", "9" * 30):
        (board / f"events.out.tfevents.{name}").write_text("")
    bomemeta.resume(tmp_path / "run", ["steps=5", "log.tensorboard=true"])


def test_a_run_without_checkpoints_says_that_it_begins_again(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    listener = Notes()
    assert bomemeta.resume(run, ["steps=5"], listener=listener).steps == 5
    assert f"no checkpoint in {run / 'checkpoints'}: the run begins again at step 0" in (
        listener.notes
    )


def test_folders_in_the_place_of_files(run: Path) -> None:
    (run / "checkpoints" / "step_00000050.pt").mkdir()
    (run / "checkpoints" / "step_00000060.pt").symlink_to("nowhere")
    assert bomemeta.resume(run, ["steps=5"]).steps == 5
    (run / "result.json").unlink()
    (run / "result.json").mkdir()
    with pytest.raises(BomemetaError, match=r"result.json could not be written: Is a directory"):
        bomemeta.resume(run, ["steps=6"])


def test_a_link_to_itself_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("loop", "loop.py", "loop.yaml"):
        (tmp_path / name).symlink_to(name)
    with pytest.raises(ConfigError, match=r"imports: cannot read .*loop.py: Too many levels"):
        bomemeta.train(CONFIG, imports=["loop.py"])
    with pytest.raises(ConfigError, match=r"output_dir: .*loop.* cannot be written"):
        bomemeta.train(CONFIG, output_dir="loop/run")
    for function, name in ((bomemeta.train, "loop.yaml"), (bomemeta.resume, "loop")):
        with pytest.raises(ConfigError, match="loop"):
            function(name)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"folder.yaml is no file; wanted a .yaml file"):
        bomemeta.train("folder.yaml")


@pytest.mark.parametrize(("step", "noted"), [(0, False), (2, True)])
def test_a_stretched_schedule_is_said_where_steps_were_taken(step: int, noted: bool) -> None:
    values = {**CONFIG, "solver": {**CONFIG["solver"], "upper_schedule": "cosine"}}
    settings = load_config(values)
    saved = Checkpoint(step, {}, {}, {}, settings.to_dict())
    notes = longer_notes(settings.solver, saved, 8)
    assert bool(notes) is noted


def test_keys_that_an_older_version_had_not_are_no_difference() -> None:
    settings = load_config(CONFIG)
    older = settings.to_dict()
    for key in ("lower_optimizer", "lower_decay", "weight_decay", "step_every"):
        del older["solver"][key]
    assert differing_keys(older, settings) == []
