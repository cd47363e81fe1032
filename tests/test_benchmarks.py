"""Every benchmark takes two steps and its result has what the table needs."""

from __future__ import annotations

import importlib
import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an Omniglot archive of random images: 8 characters of 20 drawings in each
    split.
    """
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
    small = (
        "--max-steps",
        "2",
        "--width",
        "4",
        "--tasks-per-step",
        "2",
        "--episodes",
        "3",
        "--curve-episodes",
        "2",
    )
    result: dict[str, Any] = run(
        "few_shot_accuracy",
        "--method",
        method,
        *small,
        "--data-root",
        data_root,
        "--json",
        str(out),
    )
    return result


@pytest.mark.parametrize(
    "method",
    ["bome", *(pytest.param(name, marks=needs.learn2learn) for name in ("maml", "fomaml", "anil"))],
)
def test_a_method_takes_its_steps_and_writes_its_result(
    method: str, data_root: str, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    result = accuracy(method, data_root, out)
    assert json.loads(out.read_text()) == result
    assert result["steps"] == 2
    assert 0 <= result["accuracy"] <= 1
    assert data_root not in out.read_text()


def test_the_learning_curve_is_measured_when_its_share_of_the_budget_is_used(
    data_root: str, tmp_path: Path
) -> None:
    few_shot_accuracy = importlib.import_module("benchmarks.few_shot_accuracy")

    class Instant:
        hyperparameters: dict[str, Any] = {}  # noqa: RUF012

        def __init__(self) -> None:
            self.elapsed: list[float] = []

        def step(self, task_ids: range, elapsed: float) -> None:
            self.elapsed.append(elapsed)

        def accuracy(self, split: str, episodes: int) -> Any:
            return importlib.import_module("benchmarks.methods").Accuracy(0.5, 0.0)

    keys = [
        "--cpu-minutes",
        "0.001",
        "--curve",
        "0.01",
        "0.02",
        "0.03",
        "9",
        "--json",
        str(tmp_path / "x"),
    ]
    options = few_shot_accuracy.arguments(["--method", "bome", *keys])
    method = Instant()
    trained = few_shot_accuracy.train(method, options, 2)
    assert method.elapsed == sorted(method.elapsed)
    assert 0 <= method.elapsed[-1] < 1
    assert len(method.elapsed) == trained["steps"]
    assert [
        point["cpu_s"] >= at for point, at in zip(trained["curve"], (0.01, 0.02, 0.03), strict=True)
    ] == [True] * 3


@needs.learn2learn
def test_the_step_and_the_table(data_root: str, tmp_path: Path) -> None:
    few_shot_step = importlib.import_module("benchmarks.few_shot_step")
    small = (
        "--filters",
        "4",
        "--rounds",
        "2",
        "--tasks",
        "2",
        "--inner-steps",
        "1",
        "3",
        "--peers",
        "learn2learn",
    )
    result = run(
        "few_shot_step", *small, "--data-root", data_root, "--json", str(tmp_path / "step.json")
    )
    assert json.loads((tmp_path / "step.json").read_text()) == result
    at_top = (
        "per_task_over_floor",
        "global_over_floor",
        "maml_second_order_over_ours",
        "maml_first_order_over_ours",
        "anil_over_ours",
    )
    assert all(result[key] > 0 for key in at_top)
    assert result["images"] == 60
    names = {
        "floor",
        "floor_nchw",
        "per_task_1",
        "global_3",
        "learn2learn_maml",
        "learn2learn_first_order_last",
        "learn2learn_anil",
    }
    assert (
        names
        < set(result["milliseconds"]["cpu"])
        == set(result["milliseconds"]["wall"])
        == set(result["peak_bytes"])
    )
    # MAML keeps the graphs of 5 inner steps of the whole network; heads keep nothing from one inner
    # step to the next
    assert result["peak_bytes"]["learn2learn_maml_last"] > 1.2 * result["peak_bytes"]["floor"]
    assert result["peak_bytes"]["per_task_3"] - result["peak_bytes"]["per_task_1"] <= 64
    times = {
        "floor": [1.0, 4.0],
        "per_task_1": [2.0, 4.0],
        "per_task_3": [3.0, 8.0],
        "global_1": [1.0, 1.0],
        "global_3": [2.0, 2.0],
    }
    assert few_shot_step.headline(times, [1, 3]) == {
        "per_task_over_floor": 2.5,
        "global_over_floor": 1.25,
    }

    accuracy("bome", data_root, tmp_path / "bome.json")
    text = run("table", str(tmp_path))
    assert "BOME, prototype head" in text
    assert "4 filters, 1 thread, cpu" in text
    assert "| `learn2learn_maml` |" in text


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
        assert (
            max(peaks) - min(peaks) <= 64
        )  # a few numbers of bookkeeping; y of the network form has 2,100 bytes
    # Of each inner step the graph keeps at least what the first layer's images became: 5 images, 4
    # filters of 28 x 28 floats.
    assert found["network", "itd"]["bytes_per_inner_step"] > 5 * 4 * 28 * 28 * 4


@needs.learn2learn
def test_sampling_counts_the_same_episodes_for_all(data_root: str, tmp_path: Path) -> None:
    result = run(
        "sampling",
        "--rounds",
        "2",
        "--data-root",
        data_root,
        "--json",
        str(tmp_path / "sampling.json"),
    )
    assert json.loads((tmp_path / "sampling.json").read_text()) == result
    for clock in ("cpu", "wall"):
        assert set(result["episodes_per_second"][clock]) == {
            "bomemeta",
            "learn2learn",
            "dataloader",
        }
        assert all(rate > 0 for rate in result["episodes_per_second"][clock].values())


def test_plain_hyper_cleaning_walks_the_same_path(tmp_path: Path) -> None:
    small = (
        "data.dataset=digits",
        "problem.train=301",
        "problem.validation=100",
        "problem.selection=0",
        "dtype=float32",
    )
    arguments = (
        "--inner-steps",
        "2",
        "--rounds",
        "3",
        "--json",
        str(tmp_path / "shared.json"),
        "--set",
        *small,
    )
    (result,) = run("shared_step", *arguments)["results"]
    assert set(result["over_plain"]) == {"cpu", "wall"}
    # x moves far within 6 steps of size 500; float32 and another order of additions leave some 1e-6
    # of it
    assert 0 < result["difference"] < 1e-4


def test_steps_of_a_stream_in_turn(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    result = run(
        "continual_steps",
        "--config",
        "configs/continual_quickstart.yaml",
        "--tasks",
        "0",
        "1",
        "3",
        "--repetitions",
        "2",
        "--json",
        str(out),
    )
    assert json.loads(out.read_text()) == result
    rows = result["rows"]
    assert [row["task"] for row in rows] == [0, 1, 3]
    assert [row["in_f"] for row in rows] == sorted(
        {row["in_f"] for row in rows}
    )  # some of every task so far
    assert rows[0]["in_g"] < rows[1]["in_g"] <= rows[2]["in_g"]
    assert rows[1]["over_second"] == 1


def test_curves_say_when_a_method_was_past_mamls_end(tmp_path: Path) -> None:
    common = {
        "ways": 5,
        "shots": 1,
        "seed": 0,
        "steps": 9,
        "hyperparameters": {"inner_lr": 0.1, "upper_lr": 0.003},
    }
    environment = {"cores": 2, "cpu": "one", "versions": {"torch": "2"}}
    ends = {
        "maml": (0.8, 100.0, []),
        "bome": (0.95, 20.0, [(5.0, 0.79), (10.0, 0.805), (15.0, 0.83)]),
        "anil": (0.7, 50.0, []),
    }
    for method, (accuracy, seconds, points) in ends.items():
        points = [{"cpu_s": at, "accuracy": value, "ci95": 0.01} for at, value in points]
        result = common | {
            "method": method,
            "accuracy": accuracy,
            "ci95": 0.01,
            "cpu_s": seconds,
            "curve": points,
        }
        (tmp_path / f"{method}.json").write_text(json.dumps(result | {"environment": environment}))
    text = run("few_shot_curves", str(tmp_path), "--figure", str(tmp_path / "curves.png"))
    rows = [line.split(" | ") for line in text.splitlines() if "5-way" in line]
    assert [row[-1] for row in rows] == [
        "15 CPU-s |",
        "- |",
        "- |",
    ]  # at 10 s its interval still holds MAML's accuracy
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_parts_of_a_step_by_the_clocks_of_driver_and_workers() -> None:
    timeline = importlib.import_module("benchmarks.ray_timeline")
    first = [
        timeline.Call(7, 0, 1.001, 1.010),
        timeline.Call(8, 0, 1.002, 1.008),
        timeline.Call(7, 0, 1.011, 1.015),
    ]
    found = timeline.parts(
        {0: (1.0, 1.016), 1: (1.020, 1.030)}, [*first, timeline.Call(8, 1, 1.021, 1.029)]
    )
    assert {name: times[0] for name, times in found.items()} == pytest.approx(
        {
            "the first worker begins": 1.0,
            "the last worker begins": 2.0,
            "between two of its calls": 1.0,
            "a worker computes": 13.0,
            "all calls": 19.0,
            "one worker is done before the last": 7.0,
            "the last answer comes": 1.0,
            "the round": 16.0,
            "between two rounds: x moves": 4.0,
            "the step": 14.0,
        }
    )


def test_calls_in_this_process_are_clocked() -> None:
    timeline = importlib.import_module("benchmarks.ray_timeline")
    config = {
        "problem": {"name": "analytic", "case": "quadratic", "tasks": 4},
        "solver": {"name": "bome", "upper_lr": 0.1, "barrier": "per_task"},
        "steps": 1000,
        "shards": 2,
    }
    rounds, calls = timeline.clocked(timeline.load_config(config, ["workers=0", *timeline.KEYS]), 3)
    assert list(rounds) == [timeline.WARM_UP + step for step in range(3)]
    found = timeline.parts(rounds, calls)
    assert len(found["between two of its calls"]) == 3
    assert all(0 < a <= b for a, b in zip(found["all calls"], found["the round"], strict=True))


def test_plain_processes_give_the_same_bits() -> None:
    scaling = importlib.import_module("benchmarks.ray_scaling")
    config = {
        "imports": ["toy"],
        "problem": {"name": "few_shot", "width": 4, "ways": 3, "queries": 2},
        "data": {"dataset": "toy"},
        "solver": {"name": "bome", "inner_steps": 2, "upper_lr": 0.01},
        "steps": 9,
        "tasks_per_step": 5,
        "shards": 3,
    }
    reported = []
    with ExitStack() as stack:
        for plain, workers in ((False, 0), (True, 2)):
            reported.append(scaling.course(config, [], workers, stack, plain).advance(3))
    times = {name for line in reported[0] for name in line if name.endswith("_s")}
    one, other = (
        [{name: line[name] for name in line if name not in times} for line in lines]
        for lines in reported
    )
    assert one == other


def test_counts_of_a_device_that_is_not_there(tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "analytic_quadratic.yaml")
    (row,) = run(
        "device_counts",
        "--config",
        config,
        "--set",
        "shards=2",
        "--json",
        str(tmp_path / "counts.json"),
    )["rows"]
    # Two rounds; in one of them the shards' y come back as well.
    assert (row["calls"], row["back"]) == (4, 6)
    assert row["operations"] > 100
    assert json.loads((tmp_path / "counts.json").read_text())["rows"] == [row]


@needs.learn2learn  # solver maml
def test_on_device_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    """Every part that needs neither a card nor another library does what it would there."""
    out, table = tmp_path / "device.json", tmp_path / "device.md"
    parts = ("bits", "trajectories", "steps", "two_on_one")
    files = ("--json", str(out), "--markdown", str(table))
    result = run("on_device", "--sizes", "tiny", "--here", "--parts", *parts, *files)
    assert json.loads(out.read_text()) == result
    found = result["parts"]
    assert all(row["equal"] for row in found["bits"]["rows"])
    assert all(row["difference"] < 1e-6 for row in found["trajectories"]["rows"])
    assert {row["network"] for row in found["steps"]["rows"] if "over_floor" in row} == {
        "conv4", "resnet12", "gpt", "resnet18",
    }  # fmt: skip
    assert [found[part]["ended"] for part in parts[:3]] == ["done"] * 3
    assert found["two_on_one"]["ended"].startswith(("done", "left out"))
    assert "| network |" in table.read_text()


def test_a_part_of_on_device_that_runs_over_its_box_is_recorded(tmp_path: Path) -> None:
    out = tmp_path / "device.json"
    arguments = ("--sizes", "tiny", "--minutes", "0.0001", "--parts", "steps", "--json", str(out))
    result = run("on_device", *arguments)
    assert "over its time box" in result["parts"]["steps"]["ended"]
    assert json.loads(out.read_text()) == result


def test_the_costs_in_the_docs_are_the_counted_ones() -> None:
    from benchmarks.solver_costs import table

    assert "\n".join(table()) in (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8")


def test_mixing_compares_learned_weights_with_fixed_ones(tmp_path: Path) -> None:
    out = tmp_path / "mixing.json"
    small = [
        "problem.width=8", "problem.layers=1", "problem.heads=2", "problem.context=8", "problem.blocks=1", "problem.test_sequences=4",
        "data.domain_bytes=5000", "shards=1", "solver.warm_start_steps=1", "solver.upper_every=1",
    ]  # fmt: skip
    sizes = (
        "--seeds",
        "2",
        "--steps",
        "8",
        "--mixtures",
        "2",
        "--larger",
        "problem.layers=2",
        "--json",
        str(out),
    )
    result = run("mixing", *sizes, "--set", *small)
    assert json.loads(out.read_text()) == result
    rows = result["comparison"]["rows"]["test_loss"]
    larger = {"larger, learned", "larger, uniform", "larger, proportional"}
    assert {row["label"] for row in rows if row["difference"]} == {
        "learned", "uniform", "proportional", "target_only", "mixture1", *larger,
    }  # fmt: skip
    first, second = result["runs"]["0"], result["runs"]["1"]
    assert first["uniform"]["weights"]["shuffled"] == pytest.approx(0.25)
    assert first["target_only"]["weights"]["english"] == pytest.approx(1, abs=1e-4)
    assert first["retrained"]["weights"] == pytest.approx(first["learned"]["weights"], rel=1e-4)
    assert first["learned"]["gradients"] > first["uniform"]["gradients"] == 8
    for each in first.values():  # at every step, the last with it
        assert len(each["test_losses"]) == 8
        assert each["test_losses"][-1] == each["test_loss"] >= each["best_test_loss"]
        assert each["best_test_loss"] == min(each["test_losses"])
    assert len(result["comparison"]["rows"]["best_test_loss"]) == len(rows)
    assert not {"mixture1", *larger} & {*second}
    # Nothing is run again.
    assert run("mixing", *sizes, "--set", *small)["runs"] == result["runs"]


def test_continual_methods_side_by_side(tmp_path: Path) -> None:
    small = ["data.dataset=digits", "problem.hidden=6", "problem.layers=1", "problem.replay=4"]
    sizes = ("--seeds", "1", "--samples", "20", "--memory", "20", "--default")
    arguments = ("--protocol", "seq", *sizes, "--out", str(tmp_path), "--set", *small)
    result = run("continual", *arguments)
    rows = result["tables"]["seq"]["rows"]
    methods = {"bome", "ctn", "er", "er_ace", "derpp", "agem", "ewc", "finetune"}
    assert {row["label"] for row in rows["acc"]} == methods
    assert sum(row["rank"] for row in rows["acc"]) == pytest.approx(36)  # 1 + ... + 8
    assert result["tables"]["seq"]["less_is_better"] == ["nbt", "fm", "cpu_s"]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert run("continual", *arguments)["tables"] == result["tables"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()} == before


def test_as_many_settings_for_every_continual_method() -> None:
    from benchmarks.continual import METHODS, settings_of

    assert {len(settings_of(grids)) for _, grids in METHODS.values()} == {8}


def test_hyper_cleaning_from_searches_to_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import hyper_cleaning

    assert len(hyper_cleaning.METHODS) == 10
    files = {}
    for name in ("bome", "soba"):
        search = hyper_cleaning.FILES[name].read_text(encoding="utf-8")
        size = "train: 200, validation: 100, selection: 100, blocks: 1"
        search = search.replace("train: 5000, blocks: 1", size).replace("trials: 8", "trials: 2")
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(search.replace("steps: 100", "steps: 4"), encoding="utf-8")
    monkeypatch.setattr(hyper_cleaning, "FILES", files)
    monkeypatch.setattr(hyper_cleaning, "GRADIENTS", 16)
    arguments = ("--data", "digits", "--seeds", "2", "--out", str(tmp_path / "out"))
    text = run("hyper_cleaning", *arguments)
    assert "### test_accuracy_solved: more is better; differences from bome" in text
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = record["tables"]["digits"]["rows"]["test_accuracy"]
    assert [(row["label"], row["mean"]["seeds"]) for row in rows] == [("bome", 2), ("soba", 2)]
    runs = sorted(file.stem for file in (tmp_path / "out" / "runs").iterdir())
    assert runs == sorted(
        f"{method}-digits-{kind}_{number}"
        for method in ("bome", "soba")
        for kind in ("trial", "seed")
        for number in (0, 1)
    )
    curve = json.loads((tmp_path / "out" / "runs" / "bome-digits-seed_0.json").read_text())["curve"]
    assert curve[-1]["gradients"] == 16


def test_every_benchmark_is_named_beside_its_table_or_is_a_part_of_one_that_is() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    code = {path: path.read_text(encoding="utf-8") for path in files}
    orphans = []
    for path in files:
        others = "\n".join(text for each, text in code.items() if each != path)
        named = re.search(rf"benchmarks[./]{path.stem}\b", pages)
        # `from benchmarks.x import`, `from benchmarks import x`, or its path as a config's import.
        used = re.search(rf"import .*\b{path.stem}\b|\.{path.stem} import|{path.name}", others)
        if path.stem != "__init__" and not named and not used:
            orphans.append(path.name)
    assert orphans == []
