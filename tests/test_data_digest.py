"""Data that is replaced under a run: a resumed run says what changed, whatever it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bomemeta
from bomemeta.errors import CheckpointError

N = 40
STREAM: dict[str, Any] = {
    "problem": {
        "name": "continual", "tasks": 2, "samples_per_task": 20, "test_samples_per_task": 10,
        "hidden": 4, "layers": 1, "method": "plain", "objective": "er",
    },
    "solver": {"name": "lower_only", "inner_lr": 0.05},
    "log": {"tensorboard": False},
}  # fmt: skip


def write(path: Path, **changes: Any) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.random((N, 4)).astype(np.float32)
    labels = np.arange(N) % 2
    arrays = {"x_train": inputs, "y_train": labels, "x_test": inputs, "y_test": labels}
    np.savez(path, **{**arrays, **changes})


def one_pixel() -> np.ndarray:
    inputs = np.random.default_rng(0).random((N, 4)).astype(np.float32)
    inputs[17, 2] += 1e-6
    return inputs


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "a number of one row": ({"x_train": one_pixel()}, r"train inputs: .* there, .* now"),
    "two labels swapped": (
        {"y_train": np.array([1, 0, *[i % 2 for i in range(2, N)]])},
        r"train labels: ",
    ),
    "another share of classes": (
        {"y_train": np.where(np.arange(N) < 13, 0, 1)},
        r"train rows of each class: \[20, 20\] there, \[13, 27\] now",
    ),
    "more classes": (
        {"y_train": np.arange(N) % 4, "y_test": np.arange(N) % 4},
        r"number of classes: 2 there, 4 now",
    ),
    "other names": (
        {"y_train": np.array(["a", "b"])[np.arange(N) % 2], "y_test": np.array(["a", "b"])[np.arange(N) % 2]},
        r'classes: \[0, 1\] there, \["a", "b"\] now',
    ),
    "test rows": ({"x_test": one_pixel()}, "test inputs: "),
    "another type": ({"x_train": one_pixel().astype(np.float64), "x_test": one_pixel().astype(np.float64)}, "train row: "),
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digest")
    write(folder / "data.npz")
    data = {"dataset": "labelled_array", "path": str(folder / "data.npz")}
    bomemeta.train(STREAM | {"data": data}, ["steps=4", f"output_dir={folder / 'run'}"])
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_named(change, begun):
    changes, message = CHANGES[change]
    write(begun / "data.npz", **changes)
    before = (begun / "run" / "config.yaml").read_text()
    with pytest.raises(
        CheckpointError, match=rf"(?s)up to step 4:.*{message}.*Put the earlier data"
    ):
        bomemeta.resume(begun / "run", ["steps=8"])
    assert (begun / "run" / "config.yaml").read_text() == before
    notes = bomemeta.evaluate(begun / "run").notes if change != "more classes" else []
    assert all("measured on other data than that of training" in note for note in notes[:1])


def test_the_same_data_written_again_resumes(begun, tmp_path):
    write(begun / "data.npz")
    straight = bomemeta.train(
        STREAM | {"data": {"dataset": "labelled_array", "path": str(begun / "data.npz")}},
        ["steps=8", f"output_dir={tmp_path / 'straight'}"],
    )
    write(begun / "data.npz")  # another time stamp
    resumed = bomemeta.resume(begun / "run", ["steps=8"])
    assert resumed.upper_sha256 == straight.upper_sha256
    record = json.loads((begun / "run" / "result.json").read_text())["data"]
    assert record["classes"] == [0, 1]
    assert record["train rows of each class"] == [20, 20]


def test_episodes_that_changed_are_named(tmp_path):
    config = {
        "imports": ["mixed_toy"],
        "problem": {"name": "few_shot", "ways": 3, "queries": 2, "test_queries": 2, "width": 4},
        "data": {"dataset": "mixed_toy"},
        "solver": {"name": "bome", "inner_steps": 1, "adapt_steps": 1, "barrier_steps": 1},
        "steps": 1, "tasks_per_step": 1, "evaluation": {"episodes": 2}, "log": {"tensorboard": False},
    }  # fmt: skip
    run = bomemeta.train(config, [f"output_dir={tmp_path / 'run'}"])
    from bomemeta.checkpoint import load_latest

    saved = load_latest(run.run_dir / "checkpoints").checkpoint
    assert set(saved.data) >= {"first train episodes", "first validation episodes", "image shape"}
    assert bomemeta.resume(run.run_dir, ["steps=2"]).steps == 2
