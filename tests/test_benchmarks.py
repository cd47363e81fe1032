"""Every benchmark takes two steps and its result has what the table needs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an Omniglot archive of random images: 8 characters of 20 drawings in each split."""
    rng = np.random.default_rng(0)
    classes = 24
    folder = tmp_path_factory.mktemp("data")
    np.savez(
        folder / "omniglot28.npz",
        images=rng.integers(0, 256, (20 * classes, 28, 28), np.uint8),
        label=np.repeat(np.arange(classes), 20),
        class_name=np.array([f"alphabet/character{i:02d}" for i in range(classes)]),
        class_vinyals_split=np.repeat([0, 1, 2], 8),
    )
    return str(folder)


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def run(module: str, *arguments: str) -> Any:
    return importlib.import_module(f"benchmarks.{module}").main(arguments)


def accuracy(method: str, data_root: str, out: Path) -> dict[str, Any]:
    small = ("--max-steps", "2", "--width", "4", "--tasks-per-step", "2", "--episodes", "3", "--curve-episodes", "2")
    result: dict[str, Any] = run("few_shot_accuracy", "--method", method, *small, "--data-root", data_root, "--json", str(out))
    return result


@pytest.mark.parametrize("method", ["bome", "maml", "anil"])
def test_a_method_takes_its_steps_and_writes_its_result(method: str, data_root: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = accuracy(method, data_root, out)
    assert json.loads(out.read_text()) == result
    assert result["steps"] == 2
    assert 0 <= result["accuracy"] <= 1
    assert data_root not in out.read_text()


def test_the_learning_curve_is_measured_when_its_share_of_the_budget_is_used(data_root: str, tmp_path: Path) -> None:
    few_shot_accuracy = importlib.import_module("benchmarks.few_shot_accuracy")

    class Instant:
        hyperparameters: dict[str, Any] = {}  # noqa: RUF012

        def __init__(self) -> None:
            self.elapsed: list[float] = []

        def step(self, task_ids: range, elapsed: float) -> None:
            self.elapsed.append(elapsed)

        def accuracy(self, split: str, episodes: int) -> Any:
            return importlib.import_module("benchmarks.methods").Accuracy(0.5, 0.0)

    options = few_shot_accuracy.arguments(["--method", "bome", "--cpu-minutes", "0.001", "--json", str(tmp_path / "x")])
    method = Instant()
    trained = few_shot_accuracy.train(method, options, 2)
    assert method.elapsed == sorted(method.elapsed)
    assert 0 <= method.elapsed[-1] < 1
    assert len(method.elapsed) == trained["steps"]
    assert len(trained["curve"]) == len(few_shot_accuracy.CURVE)


def test_the_ratio_and_the_table(data_root: str, tmp_path: Path) -> None:
    ratio = ("--filters", "4", "--rounds", "2", "--tasks-per-step", "2", "--data-root", data_root)
    result = run("step_ratio", *ratio, "--json", str(tmp_path / "ratio.json"))
    assert all(value > 0 for value in result["results"][0]["ratios"].values())
    accuracy("bome", data_root, tmp_path / "bome.json")
    text = run("table", str(tmp_path))
    assert "BOME, prototype head" in text
    assert "| 4 | 1 | wall | 60 |" in text


def test_live_bytes_are_those_of_tensors_until_they_are_freed() -> None:
    live_bytes = importlib.import_module("benchmarks.memory").LiveBytes
    with live_bytes() as counted:
        a = torch.zeros(1000)
        b = a.view(10, 100)  # a view has no memory of its own
        c = b + 1
        assert (counted.live, counted.peak) == (8000, 8000)
        del a, b
        assert counted.live == 4000
        x = c.requires_grad_()
        y = x.sin().sin().sum()  # the graph keeps what its backward pass needs
        assert counted.live == 4000 + 4000 + 4
        y.backward()
        del y
        assert counted.live == 4000 + 4000  # x and its gradient
    assert counted.peak >= 12000


def test_bomes_memory_does_not_grow_with_the_inner_steps_and_itds_does(tmp_path: Path) -> None:
    sizes = ("--filters", "4", "--tasks", "1", "--inner-steps", "1", "4", "16")
    result = run("memory", *sizes, "--json", str(tmp_path / "memory.json"))
    assert json.loads((tmp_path / "memory.json").read_text()) == result
    found = {(r["form"], r["solver"]): r for r in result["results"]}
    for form in ("head", "network"):
        peaks = found[form, "bome"]["peak_bytes"].values()
        assert max(peaks) - min(peaks) <= 64  # a few numbers of bookkeeping; y of the network form has 2,100 bytes
    # Of each inner step the graph keeps at least what the first layer's images became: 5 images, 4 filters of 28 x 28 floats.
    assert found["network", "itd"]["bytes_per_inner_step"] > 5 * 4 * 28 * 28 * 4
