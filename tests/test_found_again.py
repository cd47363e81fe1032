"""Faults of the kinds in docs/faults.md that a second round of hostile inputs found; each as it was given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_extend import BOME, SMALL, source, write
from test_predict import CONFIG, trained
from typer.testing import CliRunner

import bomemeta as bm
from bomemeta.cli import app
from bomemeta.data import glyphs
from bomemeta.errors import BomemetaError, ConfigError, DataError

RUN: dict[str, Any] = {
    "steps": 2,
    "log": {"tensorboard": False},
    "evaluation": {"examine_steps": 0},
}


def test_glyphs_are_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process reads what the first one wrote."""
    glyphs.Glyphs().prepare()  # writes the cache where it is not there
    monkeypatch.setattr(glyphs, "render", lambda fonts: pytest.fail("it is in the cache"))
    glyphs._glyphs.cache_clear()
    glyphs.Glyphs().prepare()


class Plain(bm.Problem):
    @property
    def num_tasks(self) -> int:
        return 4

    def init_upper(self, generator: torch.Generator) -> Any:
        return {"x": torch.zeros(3)}

    def load(self, task_ids: Any, step: int, split: str) -> Any:
        return {"t": torch.tensor(list(task_ids)).float()}

    def init_lower(self, encoded: Any, batch: Any) -> Any:
        return {"y": torch.zeros(3)}

    def upper_loss(self, encoded: Any, lower: Any, batch: Any) -> Any:
        return ((lower["y"] - 1) ** 2).sum()

    def lower_loss(self, encoded: Any, lower: Any, batch: Any) -> Any:
        return ((lower["y"] - encoded["x"]) ** 2).sum()


class ImpureEncode(Plain):
    def encode(self, upper: Any, batch: Any) -> Any:
        return {"x": upper["x"] + torch.from_numpy(np.random.default_rng().random(3, np.float32))}


class ImpureEvaluate(Plain):
    def evaluate(self, encoded: Any, lower: Any, batch: Any) -> Any:
        return {"loss": torch.tensor(np.random.default_rng().random())}


@pytest.mark.parametrize(
    ("problem", "method"), [(ImpureEncode, "encode"), (ImpureEvaluate, "evaluate")]
)
def test_numbers_from_elsewhere_are_refused(problem: type[Plain], method: str) -> None:
    with pytest.raises(ConfigError, match=rf"{method}: got other values when it was called again"):
        bm.train(problem(), bm.BOME(), **RUN)
    assert bm.train(Plain(), bm.BOME(), **RUN).steps == 2


class Bug(Plain):
    def load(self, task_ids: Any, step: int, split: str) -> Any:
        if step == 1:
            _one, _two = [1, 2, 3]
        return super().load(task_ids, step, split)


def test_a_users_bug_is_no_lack_of_memory() -> None:
    with pytest.raises(ValueError, match="too many values to unpack"):
        bm.train(Bug(), bm.BOME(), **RUN)


def rows(path: Path, **changes: Any) -> str:
    arrays = dict(np.load(write(path, [0, 1, 2, 3])))
    np.savez(path, **arrays | {name: change(arrays) for name, change in changes.items()})
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x_test": lambda a: a["x_test"].astype(np.float32)},
            "x_train is uint8 and x_test float32, with floats from 0 to 250",
        ),
        (
            {n: lambda a, n=n: a[n].astype(float) * 1e200 for n in ("x_train", "x_test")},
            r"numbers up to 2.5e\+202 in .* rows \(first in row 0\); the run's dtype float32 holds 3.4e\+38",
        ),
    ],
    ids=["two kinds", "1e200"],
)
def test_rows_that_would_be_read_wrongly(tmp_path: Path, changes: Any, message: str) -> None:
    path = rows(tmp_path / "rows.npz", **changes)
    with pytest.raises(DataError, match=message):
        bm.train(source({"first": path}, BOME))


def folded(path: str, shape: tuple[int, ...]) -> None:
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {n: arrays[n].reshape(-1, *shape) for n in ("x_train", "x_test")})


def test_the_same_bytes_as_other_pictures_are_other_data(tmp_path: Path) -> None:
    path, run = write(tmp_path / "first.npz", [0, 1, 2, 3]), tmp_path / "run"
    config = source({"first": path}, BOME, stream="rotated")
    bm.train(config, output_dir=str(run))
    other = write(tmp_path / "other.npz", [0, 1, 2, 3])
    folded(other, (2, 8))
    with pytest.raises(
        DataError,
        match=r"a row is a picture \[C, H, W\] = \[1, 2, 8\]; the stream's are \[1, 4, 4\]",
    ):
        bm.extend(run, other)
    folded(path, (2, 8))
    with pytest.raises(
        BomemetaError, match=r"picture: \[1, 4, 4, false\] there, \[1, 2, 8, false\] now"
    ):
        bm.resume(run)


def test_flat_rows_of_a_stream_of_pictures_can_be_extended(tmp_path: Path) -> None:
    path, more = (write(tmp_path / f"{n}.npz", [0, 1, 2, 3]) for n in "ab")
    folded(path, (16,))
    folded(more, (16,))
    config = source({"first": path}, BOME, stream="rotated")
    config["data"]["image_shape"] = [4, 4]
    bm.train(config, output_dir=str(tmp_path / "run"))
    assert bm.extend(tmp_path / "run", more).steps == 18


def test_a_default_device_is_no_fault_of_the_data() -> None:
    config = {**CONFIG, "data": {"dataset": "glyphs"}, "evaluation": {"episodes": 2}}
    wanted = bm.train(config).upper_sha256
    torch.set_default_device("meta")
    try:
        assert bm.train(config).upper_sha256 == wanted
        assert torch.empty(1).device.type == "meta"
    finally:
        torch.set_default_device(None)


def test_python_hears_what_was_damaged(tmp_path: Path) -> None:
    run = tmp_path / "run"
    bm.train(Plain(), bm.BOME(), **RUN, output_dir=str(run))
    newest = sorted((run / "checkpoints").glob("*.pt"))[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (run / "result.json").write_text('{"half')
    assert any("result.json" in note for note in bm.load(run, problem=Plain()).notes)
    result = bm.resume(run, problem=Plain())
    assert any("passed over a damaged checkpoint" in note for note in result.notes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": 0}, "tasks: got 0, wanted a whole number"),
        ({"tasks": True}, "tasks: got True"),
        ({"data": None}, "data: got NoneType, wanted the path"),
        ({"tasks": 10**9}, "problem.tasks: 1000000000 tasks of that many samples take"),
        ({"steps": 5}, "steps: an extended run has its own folder, and its stream's length"),
        ({"output_dir": "x"}, "output_dir: an extended run has its own folder"),
    ],
    ids=str,
)
def test_what_extend_is_given(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    path, run = write(tmp_path / "first.npz", [0, 1, 2, 3]), tmp_path / "run"
    bm.train(source({"first": path}, BOME, stream="permuted"), output_dir=str(run))
    with pytest.raises(ConfigError, match=message):
        bm.extend(run, given.pop("data", path), **given)


def test_layers_without_end(tmp_path: Path) -> None:
    path = write(tmp_path / "first.npz", [0, 1, 2, 3])
    with pytest.raises(ConfigError, match=r"problem\.layers: 10000000000 layers of 5 units take"):
        bm.train(source({"first": path}, BOME, **SMALL | {"layers": 10**10}))


def test_pipes_and_folders_in_the_place_of_a_runs_files(tmp_path: Path) -> None:
    run = tmp_path / "run"
    bm.train(Plain(), bm.BOME(), **RUN, output_dir=str(run))
    (run / "result.json").unlink()
    os.mkfifo(run / "result.json")
    assert any("is a pipe" in note for note in bm.load(run, problem=Plain()).notes)
    (run / "result.json").unlink()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(BomemetaError, match=r"metrics\.jsonl is a folder, a pipe or a device"):
        bm.resume(run, problem=Plain(), steps=4)


def test_a_classifier_of_a_stream_is_refused_in_words(tmp_path: Path) -> None:
    path = write(tmp_path / "first.npz", [0, 1, 2, 3])
    bm.train(source({"first": path}, BOME), output_dir=str(tmp_path / "run"))
    done = CliRunner().invoke(
        app, ["fit", str(tmp_path / "run"), str(tmp_path), "--out", str(tmp_path / "c")]
    )
    assert done.exit_code == 2, done.output
    assert "problem continual classifies no images" in done.stderr


def test_requests_without_end(tmp_path: Path) -> None:
    run = trained(tmp_path).run_dir
    for size in ("inf", "1e400"):
        done = CliRunner().invoke(app, ["serve", str(run), "--max-mb", size])
        assert done.exit_code == 2, done.output
