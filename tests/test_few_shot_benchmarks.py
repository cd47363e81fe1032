"""The benchmarks that take run folders, or a few seconds of CPU time, run to their end and count right."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

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


def test_sinusoids_with_settings_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinusoid = importlib.import_module("benchmarks.sinusoid")
    own = sinusoid.SETTINGS
    first = next(iter(own["bome"]))
    bad = {**own["bome"], first: [*own["bome"][first], "solver.inner_lr=1e6"]}
    monkeypatch.setattr(sinusoid, "SETTINGS", {**own, "bome": bad})
    small = ["--cpu-s", "0.01", "--seeds", "1", "--shots", "5", "--episodes", "3"]
    result = sinusoid.main([*small, "--tune-s", "0.01", "--out", str(tmp_path)])
    for method in ("bome", "maml"):
        tries = {one["setting"]: one["mse"] for one in result["tries"] if one["method"] == method}
        assert list(tries) == list(sinusoid.SETTINGS[method])  # as many of each
        run = next(run for run in result["runs"] if run["method"] == method)
        assert tries[run["setting"]] == min(tries.values())
        assert method == "maml" or tries[first] == float("inf")  # it diverged
    assert "Settings tried: 8 (bome weight 100" in (tmp_path / "table.md").read_text()


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


@pytest.mark.parametrize("backbone", ["conv4", "resnet12"])
def test_a_backbone_trained_by_classes_then_meta_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str
) -> None:
    pretraining = importlib.import_module("benchmarks.pretraining")
    monkeypatch.setattr(pretraining, "EPISODES", 4)
    draw = np.random.default_rng(0)
    for name, colour in {f"c{i}": draw.integers(40, 216, 3) for i in range(18)}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = (colour + draw.integers(-20, 20, (16, 16, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    file = tmp_path / f"{backbone}.safetensors"
    settings = [
        "problem={name: few_shot, head: cosine, neck: linear, trainable: none, batch_norm: running, width: 4, "
        f"backbone: {backbone}, weights: {file}}}",
        f"data={{dataset: image_folder, root: {tmp_path}/photos, size: 16, cache: {tmp_path}/cache, split: [6, 6, 6]}}",
        "solver={name: bome, barrier: per_task, inner_steps: 1, adapt_steps: 0, barrier_steps: 0}",
        "steps=2", "tasks_per_step=2", "shards=1", "workers=0", "threads=1",
        "evaluation={episodes: 5, validation_episodes: 5}",
    ]  # fmt: skip
    command = ["caltech101_pretrained", *settings, "--epochs", "2"]
    found = pretraining.main(command)
    assert found["validation_5shot"] > 0.3  # of colours alone; chance is 0.2
    weights = load_file(file)
    assert not any(torch.all(t == 0) for name, t in weights.items() if "running_mean" in name)

    # The same bits where the first command ends after an epoch.
    file.unlink()
    file.with_name(f"{file.name}.state").unlink()
    with monkeypatch.context() as patched:
        epoch = pretraining.Training.run_epoch

        def once(self: Any) -> float:
            if self.epoch == 1:
                raise KeyboardInterrupt
            loss: float = epoch(self)
            return loss

        patched.setattr(pretraining.Training, "run_epoch", once)
        with pytest.raises(KeyboardInterrupt):
            pretraining.main(command)
    assert not file.exists()
    pretraining.main(command)
    again = load_file(file)
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    with pytest.raises(SystemExit, match="is of another config"):
        pretraining.main([*command, "--lr", "0.2"])

    result = bomemeta.train("caltech101_pretrained", settings, output_dir=str(tmp_path / "run"))
    assert result.metrics["test_accuracy"] > 0.3
    # The features are the network's in eval mode: an image's do not depend on the others.
    module = result.module().eval()
    images = torch.randn(3, 3, 16, 16)
    apart = torch.cat([module(image[None]) for image in images])
    torch.testing.assert_close(module(images), apart, rtol=1e-4, atol=1e-5)  # rounding
    assert {name for name, _ in module.named_buffers()} == {
        name for name in weights if "running" in name or "tracked" in name
    }
