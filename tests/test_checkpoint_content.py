"""Checkpoints without a digest that were changed by hand: a run says what does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bomemeta
from bomemeta.errors import CheckpointError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("content") / "run"
    bomemeta.train(
        {
            "problem": {"name": "analytic", "case": "quadratic", "tasks": 3},
            "solver": {"name": "bome", "inner_steps": 1, "upper_optimizer": "adam"},
            "steps": 2,
            "log": {"tensorboard": False},
            "output_dir": str(folder),
        }
    )
    return folder


def _lower(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    return lambda values: values["lower"].update({1: change(values["lower"][1])})


def _solver(**entries: Any) -> Callable[[Any], None]:
    return lambda values: values["solver"].update(entries)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a task": (lambda v: v["lower"].pop(1), r"2 tasks, wanted 0 to 2; missing: 1"),
    "a new task": (lambda v: v["lower"].update({9: v["lower"][1]}), r"unknown: 9"),
    "dtype of y": (_lower(torch.Tensor.double), r"lower\.1: torch\.float64, wanted torch\.float32"),
    "shape of y": (_lower(lambda t: t[:1]), r"lower\.1 has the shape \[1\], wanted \[4\]"),
    "dtype of x": (
        lambda v: v["upper"].update(x=v["upper"]["x"].double()),
        r"upper\.x: checkpoint float64 \[3\], config float32 \[3\]",
    ),
    "name of x": (
        lambda v: v["upper"].update(z=v["upper"].pop("x")),
        r"upper\.x: checkpoint missing",
    ),
    "optimizer": (_solver(optimizer=None), r"solver\.optimizer: None, wanted a mapping"),
    "no moments": (_solver(optimizer={}), r"optimizer: has \[\], wanted"),
    "a moment": (
        lambda v: v["solver"]["optimizer"].pop("exp_avg"),
        r"solver\.optimizer: no step can be taken with it|optimizer: has",
    ),
    "layout": (_solver(lower_layout=[3]), r"lower_layout has 3, wanted \(group, name, shape\)"),
    "memory": (_solver(memory={"m": torch.zeros(2)}), r"memory\.m: checkpoint float32 \[2\]"),
    "metrics": (_solver(metrics={"reduces": None}), r"metrics\.reduces: None, wanted a number"),
    "history": (_solver(history=[None]), r"solver\.history: a list, wanted a list of mappings"),
    "no history": (lambda v: v["solver"].pop("history"), r"solver\.history: missing"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_entry_changed_by_hand_is_said(run: Path, tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "step_00000000.pt").unlink()
    path = copy / "checkpoints" / "step_00000002.pt"
    values = torch.load(path, weights_only=True)
    del values["format"]  # as an older version wrote it
    change(values)
    torch.save(values, path)
    with pytest.raises(CheckpointError, match=message):
        bomemeta.resume(copy, ["steps=4"])


def test_a_checkpoint_of_an_older_version_is_resumed(run: Path, tmp_path: Path) -> None:
    """It calls the run's metrics "figures", and has no digest."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "checkpoints" / "step_00000002.pt"
    values = torch.load(path, weights_only=True)
    del values["format"]
    values["solver"]["figures"] = values["solver"].pop("metrics")
    torch.save(values, path)
    resumed = bomemeta.resume(copy, ["steps=4"])
    assert resumed.metrics["reduces"] == bomemeta.resume(run, ["steps=4"]).metrics["reduces"]
