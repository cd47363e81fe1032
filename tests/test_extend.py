"""A finished stream that continues with new data: the bits of a run that had the data from its start, what
grows and what stays, and what is refused.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bomemeta as bm
from bomemeta.assembly import trainer_of
from bomemeta.checkpoint import load_latest
from bomemeta.config import load_config
from bomemeta.errors import ConfigError, DataError
from bomemeta.report import Quiet
from bomemeta.stages import grown, stages_of

SIDE = 4
SMALL: dict[str, Any] = {
    "samples_per_task": 12, "test_samples_per_task": 6, "hidden": 5, "embedding": 3, "batch": 4, "memory_per_task": 5,
    "semantic_per_task": 2, "replay": 6, "fisher_samples": 5, "blocks": 2,
}  # fmt: skip
STEPS = 12 // 4 * 2  # of a task: three batches, two rounds each
QUICK: dict[str, Any] = {"log": {"tensorboard": False}, "evaluation": {"examine_steps": 0}}
BOME: dict[str, Any] = {"name": "bome", "inner_steps": 2, "upper_lr": 0.1}


def write(path: Path, classes: list[Any], side: int = SIDE) -> str:
    """Pictures with a bright pixel where their class is."""
    rng = np.random.default_rng(len(classes))
    arrays = {}
    for part, each in (("train", 30), ("test", 20)):
        labels = np.repeat(np.asarray(classes), each)
        pictures = rng.integers(0, 120, (len(labels), side, side), dtype=np.uint8)
        for i, name in enumerate(classes):
            pictures[labels == name, hash_of(name) % side, i % side] = 250
        order = rng.permutation(len(labels))
        arrays |= {f"x_{part}": pictures[order], f"y_{part}": labels[order]}
    np.savez(path, **arrays)
    return str(path)


def hash_of(name: Any) -> int:
    return sum(str(name).encode())


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {
        "first": write(tmp_path / "first.npz", [0, 1, 2, 3]),
        "new": write(tmp_path / "new.npz", [4, 5, 6, 7]),
        "again": write(tmp_path / "again.npz", [0, 1, 2, 3]),
    }


def source(files: dict[str, str], solver: dict[str, Any], **problem: Any) -> dict[str, Any]:
    return {
        "problem": {"name": "continual", "stream": "split", "tasks": 2, **SMALL, **problem},
        "solver": solver,
        "data": {"dataset": "labelled_array", "path": files["first"]},
        **QUICK,
    }


PLAIN = {"method": "plain"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bome": (BOME, {}),
    "bome, adam and a mean of x": ({**BOME, "upper_optimizer": "adam", "upper_average": 0.9}, {}),
    "bome, momentum of y": ({**BOME, "lower_momentum": 0.5}, {}),
    "ctn": ({"name": "ctn"}, {"memory": "ring"}),
    "sl_bamm": ({"name": "sl_bamm"}, {}),
    "derpp, class-incremental": (
        {"name": "lower_only"},
        {**PLAIN, "objective": "derpp", "protocol": "class_incremental"},
    ),
    "derpp, one memory": (
        {"name": "lower_only"},
        {**PLAIN, "objective": "derpp", "protocol": "class_incremental", "memory_total": 7},
    ),
    "ewc": ({"name": "lower_only"}, {**PLAIN, "objective": "ewc"}),
    "a-gem, permuted": ({"name": "agem"}, {**PLAIN, "objective": "finetune", "stream": "permuted"}),
    "bome, rotated": (BOME, {"stream": "rotated"}),
    "er, shuffled classes": (
        {"name": "lower_only"},
        {**PLAIN, "objective": "er", "shuffle_classes": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_that_continues_has_the_bits_of_a_longer_one(
    case: str, files: dict[str, str], tmp_path: Path
) -> None:
    solver, problem = CASES[case]
    config = source(files, solver, **problem)
    new = files["new" if config["problem"]["stream"] == "split" else "again"]
    short = bm.train(config, output_dir=str(tmp_path / "run"))
    result = bm.extend(tmp_path / "run", new)
    appended = [{"path": new, "tasks": 2 if config["problem"]["stream"] == "split" else 1}]
    config["problem"]["appended"] = appended
    longer = bm.train(config)
    assert short.steps == 2 * STEPS
    assert result.steps == longer.steps == (2 + appended[0]["tasks"]) * STEPS
    assert result.upper_sha256 == longer.upper_sha256
    same = {name for name in longer.metrics if not name.endswith("_s")}
    assert {n: result.metrics[n] for n in same} == {n: longer.metrics[n] for n in same}
    # And it learned from the new data.
    assert bm.evaluate(tmp_path / "run").upper_sha256 == result.upper_sha256
    if case.startswith("bome"):
        assert result.upper_sha256 != short.upper_sha256


class StopsAt(Quiet):
    """Interrupts after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self._at = step

    def step(self, step: int, metrics: Any) -> None:
        if step == self._at:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "at", [STEPS, 2 * STEPS, 3 * STEPS], ids=["first stage", "its end", "second"]
)
def test_interrupted_anywhere_and_resumed(at: int, files: dict[str, str], tmp_path: Path) -> None:
    config = source(files, BOME, appended=[{"path": files["new"], "tasks": 2}])
    whole = bm.train(config)
    with pytest.raises(KeyboardInterrupt):
        bm.train(config, output_dir=str(tmp_path / "run"), listener=StopsAt(at))
    assert bm.resume(tmp_path / "run").upper_sha256 == whole.upper_sha256


def test_more_than_once_and_on_workers(files: dict[str, str], tmp_path: Path) -> None:
    later = write(tmp_path / "later.npz", ["8", "9"])
    texts = [
        write(tmp_path / f"{name}.npz", classes)
        for name, classes in (("a", list("abcd")), ("b", list("ef")))
    ]
    config = source({"first": texts[0]}, BOME)
    bm.train(config, output_dir=str(tmp_path / "run"))
    bm.extend(tmp_path / "run", texts[1])
    result = bm.extend(tmp_path / "run", later, workers=1)
    config["problem"]["appended"] = [{"path": path, "tasks": 1} for path in (texts[1], later)]
    assert result.upper_sha256 == bm.train(config).upper_sha256
    assert result.steps == 4 * STEPS


def test_what_was_there_stays_and_what_is_new_is_as_at_a_start(
    files: dict[str, str], tmp_path: Path
) -> None:
    solver = {**BOME, "upper_optimizer": "adam", "lower_momentum": 0.5}
    config = source(files, solver, appended=[{"path": files["new"], "tasks": 2}])
    first, second = stages_of(load_config(config))
    bm.train(first, output_dir=str(tmp_path / "run"))
    saved = load_latest(tmp_path / "run" / "checkpoints").checkpoint
    with trainer_of(second) as trainer:
        start = trainer.state.upper.params
        found = grown(saved, trainer)
    tasks = SMALL["embedding"]
    assert saved.upper["embedding"].shape == (2, tasks)
    assert found.upper["embedding"].shape == (4, tasks)
    assert torch.equal(found.upper["embedding"][:2], saved.upper["embedding"])
    assert torch.equal(found.upper["embedding"][2:], start["embedding"][2:])
    moments = found.solver["optimizer"]["exp_avg"]
    assert len(moments) == sum(tensor.numel() for tensor in found.upper.values())
    assert torch.equal(moments[: 2 * tasks], saved.solver["optimizer"]["exp_avg"][: 2 * tasks])
    assert (moments[2 * tasks : 4 * tasks] == 0).all()
    shapes = {(group, name): shape for group, name, shape in found.solver["lower_layout"]}
    assert shapes["y", "head.weight"] == (8, SMALL["hidden"])
    assert {group for group, _ in shapes} > {"y"}  # the momentum of y too
    assert found.solver["memory"]["soft_targets"].shape == (4 * 3, 8)


def test_accuracies_that_nobody_measured_are_no_numbers(
    files: dict[str, str], tmp_path: Path
) -> None:
    bm.train(source(files, BOME), output_dir=str(tmp_path / "run"))
    bm.extend(tmp_path / "run", files["new"])
    matrix = json.loads((tmp_path / "run" / "accuracy_matrix.json").read_text())["matrix"]
    assert [[value is None for value in row] for row in matrix] == [
        [False, False, True, True]
    ] * 2 + [[False] * 4] * 2


def test_what_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    config, run = source(files, BOME), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        bm.train(config, output_dir=str(run), listener=StopsAt(3))
    with pytest.raises(
        ConfigError, match=rf"has done 5 of its stream's {2 * STEPS} steps. `bomemeta resume`"
    ):
        bm.extend(run, files["new"])
    bm.resume(run)
    before = (run / "config.yaml").read_bytes()
    large = write(tmp_path / "large.npz", [4, 5], side=5)
    for data, message in (
        (files["again"], "the stream has classes 0, 1, 2, 3 already"),
        (large, "rows of x_train are 25 of torch.uint8; the stream's are 16"),
        (str(tmp_path / "none.npz"), "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            bm.extend(run, data)
    odd = write(tmp_path / "odd.npz", [4, 5, 6])
    with pytest.raises(
        ConfigError,
        match="has 3 classes, and a task of this stream has 2: wanted a multiple, or --tasks 1",
    ):
        bm.extend(run, odd)
    with pytest.raises(ConfigError, match="steps: got 5 with data that was appended"):
        bm.train(source(files, BOME, appended=[{"path": files["new"], "tasks": 2}]), steps=5)
    assert (run / "config.yaml").read_bytes() == before
    permuted = source(files, BOME, stream="permuted")
    bm.train(permuted, output_dir=str(tmp_path / "permuted"))
    with pytest.raises(
        DataError, match="the stream has no classes 4, 5, 6, 7; it has classes 0, 1"
    ):
        bm.extend(tmp_path / "permuted", files["new"])
    few = {"steps": 1, "workers": 0, "evaluation": {"episodes": 2}}
    bm.train("quickstart", output_dir=str(tmp_path / "few"), **few)
    with pytest.raises(ConfigError, match="problem few_shot is no stream that could continue"):
        bm.extend(tmp_path / "few", files["new"])


def test_data_that_was_replaced_is_said(files: dict[str, str], tmp_path: Path) -> None:
    """Of the appended part too."""
    run = tmp_path / "run"
    bm.train(source(files, BOME), output_dir=str(run))
    with pytest.raises(KeyboardInterrupt):
        bm.extend(run, files["new"], listener=StopsAt(3 * STEPS))
    write(Path(files["new"]), [4, 5, 6, 8])
    with pytest.raises(bm.errors.CheckpointError, match="appended 0: classes"):
        bm.resume(run)
