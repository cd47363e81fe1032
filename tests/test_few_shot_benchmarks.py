"""The benchmarks that take run folders, or a few seconds of CPU time, run to their end and count right."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bomemeta

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def test_sinusoids_by_every_method(tmp_path: Path) -> None:
    sinusoid = importlib.import_module("benchmarks.sinusoid")
    small = ["--cpu-s", "0.01", "--seeds", "1", "--shots", "5", "10", "--episodes", "3"]
    result = sinusoid.main([*small, "--out", str(tmp_path)])
    assert [run["method"] for run in result["runs"]] == ["ridge", "bome", "maml"] * 2
    assert all(run["steps"] >= 10 and run["mse"] > 0 for run in result["runs"])
    assert json.loads((tmp_path / "runs.json").read_text()) == result["runs"]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in lines[2:5]] == ["ridge", "bome", "maml"]


def test_nearest_centroids() -> None:
    right = importlib.import_module("benchmarks.centroids").right
    support = torch.tensor(
        [[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]
    )  # means (2, 0), (0, 1)
    query = torch.tensor([[[0.6, 0.3], [9.0, 1.0], [0.4, 0.6], [0.0, 5.0]]])
    mean = torch.zeros(2)
    assert right("cosine", support, query, 2, mean).tolist() == [1.0]
    assert right("unit", support, query, 2, mean).tolist() == [1.0]
    # (.6, .3) is nearer to (0, 1)
    assert right("euclidean", support, query, 2, mean).tolist() == [0.75]
    assert right("centred", support, query, 2, mean).tolist() == [1.0]
    # from (0.95, 0), close to (1, 0), the first two lie in the direction of (0, 1)
    assert right("centred", support, query, 2, torch.tensor([0.95, 0.0])).tolist() == [0.5]


def test_runs_beside_centroids(tmp_path: Path) -> None:
    centroids = importlib.import_module("benchmarks.centroids")
    config: dict[str, Any] = {
        "imports": [str(Path(__file__).with_name("toy.py"))],
        "problem": {"name": "few_shot", "ways": 3, "queries": 2, "test_queries": 4, "neck": "linear",
                    "backbone": "test_few_shot_benchmarks:net", "batch_norm": "running", "trainable": "none"},
        "data": {"dataset": "toy"},
        "solver": {"name": "bome", "barrier": "per_task"},
        "steps": 2, "tasks_per_step": 2, "workers": 0,
        "evaluation": {"episodes": 5, "examine_steps": 0},
    }  # fmt: skip
    folders = [tmp_path / str(seed) for seed in (0, 1)]
    runs = [bomemeta.train(config, seed=s, output_dir=str(f)) for s, f in enumerate(folders)]
    file = tmp_path / "out.json"
    result = centroids.main([*map(str, folders), "--episodes", "5", "--json", str(file)])
    assert json.loads(file.read_text()) == result
    for run, found in zip(runs, result["runs"], strict=True):
        assert found["run"][0] == pytest.approx(run.metrics["test_accuracy"])
        for control, (mean, _) in found["difference"].items():
            assert mean == pytest.approx(found["run"][0] - found[control][0])
    chosen = result["runs"]
    for run in chosen:
        run["validation"] = {"cosine": 0.5, "euclidean": 0.5, "unit": 0.9, "centred": 0.5}
    lines = centroids.table(chosen).splitlines()
    assert lines[-1].startswith("| 3-way 1-shot | all, over seeds |")
    assert all(line.endswith("(unit) |") for line in lines[2:])


def test_settings_compared_by_folds_of_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    folds = importlib.import_module("benchmarks.class_folds")
    monkeypatch.setattr(folds, "EPISODES", 20)
    generator = torch.Generator().manual_seed(0)
    # What tells the 24 classes apart lies in 6 features; the other 6 are noise, and louder.
    means = torch.randn(24, 1, 6, generator=generator)
    inside = means + 0.5 * torch.randn(24, 25, 6, generator=generator)
    noise = 2 * torch.randn(24, 25, 6, generator=generator)
    table = torch.cat([inside, noise], -1).flatten(0, 1)
    classes = list(torch.arange(24 * 25).split(25))
    held = [set(fold.held.tolist()) for fold in folds.folds_of(classes)]
    assert sum(map(len, held)) == len(set().union(*held)) == 24 * 25
    lines = folds.compared(table, classes, ["scale:adam:0.02:10:10:5:80"])
    centred, learned = (float(line.split("|")[4].split("±")[0]) for line in lines[2:])
    assert learned > centred + 5  # points: the loud half has to go


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 8))
