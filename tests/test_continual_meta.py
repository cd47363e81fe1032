"""Continual meta-learning: the online pass against plain SGD, gradients against finite differences,
BOME and ITD against OML's gradient, figures over lengths, what is refused, the same bits.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from toy import Bench, Toy, one_thread

import bomemeta
from bomemeta.core import tree
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Oracle
from bomemeta.core.tree import Params
from bomemeta.data.labelled import LabelledArrays
from bomemeta.errors import ConfigError, DataError
from bomemeta.nets.sample_conv import SampleConv
from bomemeta.problems import continual_meta_report as report
from bomemeta.problems.continual_meta import LOG_SHARPNESS, LOG_STEP, ContinualMeta, online_pass
from bomemeta.registry import solvers

SMALL: dict[str, Any] = {
    "classes": 4, "shots": 3, "queries": 2, "lengths": [2, 3, 6], "test_queries": 2, "width": 3, "step": 0.5, "sharpness": 8.0,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def attached(**fields: Any) -> ContinualMeta:
    problem = ContinualMeta(**(SMALL | fields))
    data = Toy(noise=0.2)
    data.prepare()
    problem.attach(seed=3, dtype=torch.float64, data=data)
    return problem


def start_of(problem: ContinualMeta) -> Params:
    return problem.init_upper(torch.Generator().manual_seed(1))


def oracle_of(
    problem: ContinualMeta, x: Params, split: Any = "train", task_map: Any = "loop", tasks: int = 2
) -> LocalOracle:
    return LocalOracle(problem, x, problem.load(range(tasks), 0, split), task_map)


def features_of(problem: ContinualMeta, x: Params, images: Tensor) -> Tensor:
    backbone = {name: tensor for name, tensor in x.items() if name not in (LOG_STEP, LOG_SHARPNESS)}
    return functional.normalize(
        torch.func.functional_call(problem._skeleton, backbone, (images,)), dim=1
    )


def trained_online(features: Tensor, labels: Tensor, outputs: int, lr: float) -> Tensor:
    """The same pass by torch's own parts: a linear layer, cross-entropy, backward, plain SGD."""
    layer = nn.Linear(features.shape[1], outputs, bias=False, dtype=features.dtype)
    nn.init.zeros_(layer.weight)
    for row, label in zip(features, labels, strict=True):
        layer.weight.grad = None
        functional.cross_entropy(layer(row[None]), label[None]).backward()
        with torch.no_grad():
            layer.weight -= lr * layer.weight.grad
    return layer.weight.detach().T


# The pass


def test_the_pass_is_sgd_on_one_image_after_another() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 7, generator=generator, dtype=torch.float64)
    labels = torch.arange(5).repeat_interleave(6)
    head = online_pass(
        torch.zeros(7, 9, dtype=torch.float64),
        features,
        labels,
        torch.tensor(0.7, dtype=torch.float64),
    )
    torch.testing.assert_close(
        head, trained_online(features, labels, 9, 0.7), rtol=1e-12, atol=1e-12
    )
    other = online_pass(
        torch.zeros(7, 9, dtype=torch.float64), features.flip(0), labels.flip(0), torch.tensor(0.7)
    )
    assert (
        head - other
    ).abs().max() > 0.1  # the order matters, or there would be nothing to learn from it


@pytest.mark.parametrize("split", ["train", "test"])
def test_y_starts_at_the_end_of_the_pass_over_the_trajectory(split: Any) -> None:
    problem = attached(test_step_factor=0.4)
    x = start_of(problem)
    oracle = oracle_of(problem, x, split)
    images, labels = oracle.batch["images"][1], oracle.batch["labels"][1]
    assert labels.tolist() == sorted(labels.tolist())
    lr = 0.5 * (1.0 if split == "train" else 0.4)
    wanted = trained_online(features_of(problem, x, images[: len(labels)]), labels, 6, lr)
    torch.testing.assert_close(oracle.init_lower()["head"][1], wanted, rtol=1e-11, atol=1e-12)


def test_an_image_s_features_depend_on_that_image_alone() -> None:
    net = SampleConv(1, 4, torch.Generator().manual_seed(0)).double()
    images = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    # Equal but for how torch cuts the work: a batch of another size may add in another order.
    torch.testing.assert_close(net(images)[2:4], net(images[2:4]), rtol=1e-12, atol=1e-12)


def test_one_inner_step_of_size_1_solves_g_from_anywhere() -> None:
    problem = attached()
    oracle = oracle_of(problem, start_of(problem))
    anywhere = {"head": torch.randn(oracle.init_lower()["head"].shape, dtype=torch.float64)}
    g = oracle.lower(anywhere)
    solved = tree.axpy(-1.0, g.lower, anywhere)
    torch.testing.assert_close(solved, oracle.init_lower(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        oracle.lower(solved).value, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-24
    )


# Gradients


def test_closed_forms_are_autograd_s() -> None:
    problem = attached()
    oracle = oracle_of(problem, start_of(problem))
    at = {"head": oracle.init_lower()["head"] + 0.1}
    closed = oracle.gradients(("upper", at), ("lower", at))
    problem.loss_gradient = lambda *_: None  # type: ignore[method-assign,assignment]
    for got, wanted in zip(closed, oracle.gradients(("upper", at), ("lower", at)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


def outer_loss(problem: ContinualMeta, x: Params) -> float:
    """F(x): f at the end of the pass, mean over two trajectories."""
    oracle = oracle_of(problem, x)
    return float(oracle.upper(oracle.init_lower()).value.mean())


def oml_gradient(problem: ContinualMeta, x: Params) -> Params:
    """dF/dx by autograd through a pass written with torch's own cross-entropy, and no part of the
    problem but its network.
    """
    batch = problem.load(range(2), 0, "train")
    leaves = tree.leaves(x)
    losses = []
    for images, labels, query_labels in zip(
        batch["images"], batch["labels"], batch["query_labels"], strict=True
    ):
        features = features_of(problem, leaves, images)
        head = torch.zeros(
            features.shape[1], problem.outputs, dtype=torch.float64, requires_grad=True
        )
        for row, label in zip(features[: len(labels)], labels, strict=True):
            loss = functional.cross_entropy((row @ head)[None], label[None])
            (slope,) = torch.autograd.grad(loss, head, create_graph=True)
            head = head - leaves[LOG_STEP].exp() * slope
        logits = leaves[LOG_SHARPNESS].exp() * features[len(labels) :] @ head
        losses.append(functional.cross_entropy(logits, query_labels))
    return dict(
        zip(
            leaves,
            torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values())),
            strict=True,
        )
    )


def test_the_gradient_through_the_pass_is_that_of_finite_differences() -> None:
    problem = attached(width=2)
    x = start_of(problem)
    gradient = oml_gradient(problem, x)
    generator = torch.Generator().manual_seed(4)
    along = {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for name, tensor in x.items()
    }
    size = (
        1e-6  # the error of central differences is of the order of its square, and of 1e-16 / size
    )
    ends = [outer_loss(problem, tree.axpy(sign * size, along, x)) for sign in (1.0, -1.0)]
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(
        float(tree.dot(gradient, along)), rel=1e-5
    )
    assert abs(float(gradient[LOG_STEP])) > 1e-4
    assert abs(float(gradient[LOG_SHARPNESS])) > 1e-4


def direction_of(problem: ContinualMeta, name: str, **fields: Any) -> Tensor:
    """What a first step of plain gradient descent of size 1 takes off x."""
    bench = Bench(problem, solvers.get(name)(**fields, upper_lr=1.0), 1)
    before = bench.x().clone()
    bench.advance(range(2))
    return before - bench.x()


EXACT: list[tuple[str, dict[str, Any], float]] = [
    # ITD: y is at the solution already, and one step of size 1 forgets where it was.
    ("itd", {"inner_steps": 1, "inner_lr": 1.0}, 1e-9),
    # BOME: f at a y which is lower_lr along -grad f, and lambda (y - S) = (1 + eta lower_lr) grad
    # f: an error of the order of lower_lr.
    ("bome", {"adapt_steps": 0, "inner_steps": 1, "inner_lr": 1.0, "barrier_steps": 1, "lower_lr": 1e-4, "barrier": "per_task"}, 2e-2),
    ("sl_bamm", {"schedule": "constant", "mu": 0.0, "adapt_steps": 1, "lower_lr": 1.0, "aux_steps": 1}, 1e-9),
    ("aid_cg", {"inner_steps": 1, "inner_lr": 1.0, "aux_steps": 1}, 1e-9),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "error"), EXACT, ids=[name for name, _, _ in EXACT])
def test_solvers_move_x_along_oml_s_gradient(
    name: str, fields: dict[str, Any], error: float
) -> None:
    problem = attached()
    x = Bench(problem, solvers.get("itd")(), 1).upper.params
    wanted = tree.flatten(oml_gradient(problem, x))
    got = direction_of(problem, name, **fields)
    assert float((got - wanted).norm() / wanted.norm()) < error


@pytest.mark.parametrize("name", ["lancbio", "subbio", "soba", "aid_neumann", "f2sa", "vpbgd"])
def test_other_solvers_take_a_step(name: str) -> None:
    assert float(direction_of(attached(), name).norm()) > 1e-3


# Figures


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_metrics_are_those_of_a_pass_of_each_length(order: Any) -> None:
    problem = attached(order=order)
    x = start_of(problem)
    oracle = oracle_of(problem, x, "test")
    metrics = oracle.evaluate(oracle.init_lower())
    for i in range(2):
        images, labels, wanted = (
            oracle.batch["images"][i],
            oracle.batch["labels"][i],
            oracle.batch["query_labels"][i],
        )
        seen, queries = features_of(problem, x, images).split([len(labels), len(wanted)])
        for length in problem.lengths:
            rows = oracle.batch[f"order_{length}"][i]
            assert sorted(rows.tolist()) == list(range(3 * length))
            assert (rows.tolist() == sorted(rows.tolist())) == (order == "sequential")
            head = trained_online(seen[rows], labels[rows], problem.outputs, 0.5)[:, :length]
            for prefix, inputs, truth in (("", queries, wanted), ("trajectory_", seen, labels)):
                hits = (inputs[truth < length] @ head).argmax(1) == truth[truth < length]
                assert float(metrics[f"{prefix}accuracy_classes_{length:03d}"][i]) == pytest.approx(
                    float(hits.double().mean())
                )
    assert metrics["accuracy"].tolist() == metrics["accuracy_classes_006"].tolist()


def test_a_test_trajectory_has_classes_of_its_own_split_and_the_same_bits_every_time() -> None:
    problem, again = attached(), attached()
    first, second = problem.load([5, 2], 0, "test"), again.load([2], 7, "test")
    assert all(torch.equal(first[name][1], second[name][0]) for name in first)
    assert first["images"].shape == (2, 6 * (3 + 2), 1, 16, 16)
    assert "judged" not in problem.load([0], 0, "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_vmap_equals_loop(split: Any) -> None:
    problem = attached()
    x = start_of(problem)
    loop, vmap = (oracle_of(problem, x, split, task_map) for task_map in ("loop", "vmap"))
    # The order of sums within a convolution differs.
    torch.testing.assert_close(loop.encoded, vmap.encoded, rtol=1e-9, atol=1e-11)


def test_files_of_the_curve() -> None:
    assert report.files({"test_accuracy": 0.5}, {}, None) == {}
    metrics = {
        "test_accuracy_classes_010": 0.9, "test_ci95_classes_010": 0.01, "test_accuracy_classes_100": 0.5,
        "test_trajectory_accuracy_classes_010": 0.95, "test_trajectory_accuracy_classes_100": 0.7, "test_accuracy_shuffled": 0.6,
    }  # fmt: skip
    files = report.files(metrics, {"order": "sequential"}, "test_accuracy_shuffled")
    written = json.loads(files["accuracy_classes.json"])
    assert written["curves"]["held-out images"] == [
        {"classes": 10, "accuracy": 0.9, "ci95": 0.01}, {"classes": 100, "accuracy": 0.5, "ci95": None},
    ]  # fmt: skip
    assert (written["order"], written["shuffled_accuracy"]) == ("sequential", 0.6)
    assert files["accuracy_classes.png"].startswith(b"\x89PNG")


# What is refused


@pytest.mark.parametrize("lengths", [[], [10, 5], [4, 4]])
def test_lengths_must_grow(lengths: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"problem\.lengths"):
        ContinualMeta(lengths=lengths)


def test_too_few_classes_or_images_are_named_with_the_keys_to_lower(tmp_path: Path) -> None:
    config = run_config(tmp_path) | {"data": {"dataset": "glyphs"}}
    with pytest.raises(
        DataError, match=r"glyphs: the validation split has \d+ classes.*the last of `lengths`"
    ):
        bomemeta.train(config, ["problem.lengths=[10, 5000]"])
    with pytest.raises(DataError, match=r"glyphs: class .* faces.*its shots `test_shots`"):
        bomemeta.train(config, ["problem.test_shots=12"])
    with pytest.raises(DataError, match=r"the train split are `classes`"):
        bomemeta.train(config, ["problem.classes=3000"])


def test_data_without_classes_to_draw_and_small_images_are_refused() -> None:
    problem = ContinualMeta()
    with pytest.raises(ConfigError, match="draws classes"):
        problem.attach(seed=0, dtype=torch.float32, data=LabelledArrays)
    data = Toy()
    type_with_small_images = type("Small", (Toy,), {"image_shape": (1, 8, 8)})
    data.__class__ = type_with_small_images
    with pytest.raises(ConfigError, match="8x8"):
        problem.attach(seed=0, dtype=torch.float32, data=data)


# Runs


def run_config(folder: Path) -> dict[str, Any]:
    return {
        "problem": {"name": "continual_meta", **SMALL},
        "data": {"dataset": "toy"},
        "solver": {
            "name": "bome", "barrier": "per_task", "adapt_steps": 0, "inner_steps": 1, "inner_lr": 1.0, "barrier_steps": 1,
            "lower_lr": 0.1, "upper_lr": 0.01, "upper_optimizer": "adam",
        },
        "steps": 4, "tasks_per_step": 3, "shards": 2, "evaluation": {"episodes": 4}, "checkpoint": {"every_steps": 2},
        "log": {"tensorboard": False}, "output_dir": str(folder / "run"),
    }  # fmt: skip


def test_a_run_resumed_has_the_same_bits_and_its_curve(tmp_path: Path) -> None:
    whole = bomemeta.train(run_config(tmp_path))
    bomemeta.train(run_config(tmp_path), ["steps=2", f"output_dir={tmp_path / 'half'}"])
    resumed = bomemeta.resume(tmp_path / "half", ["steps=4"])
    assert resumed.upper_sha256 == whole.upper_sha256
    assert resumed.metrics == whole.metrics
    names = {
        f"test_{kind}_classes_{length:03d}" for kind in ("accuracy", "ci95") for length in (2, 3, 6)
    }
    assert names | {
        "test_accuracy",
        "test_ci95",
        "test_accuracy_shuffled",
        "baseline_accuracy",
    } <= set(whole.metrics)
    assert {"accuracy_classes.json", "accuracy_classes.png"} <= {
        path.name for path in whole.run_dir.iterdir()
    }


def test_x_learns_to_be_learned_on(tmp_path: Path) -> None:
    """Accuracy after six classes in sequence, 40 trajectories, before and after 60 steps."""
    few = ["problem.width=8", "data.noise=0.3", "evaluation.episodes=40", "problem.classes=6"]
    before, after = (
        bomemeta.train(
            run_config(tmp_path), [*few, f"steps={steps}", f"output_dir={tmp_path / str(steps)}"]
        ).metrics
        for steps in (1, 60)
    )
    assert after["test_accuracy"] > before["test_accuracy"] + 0.15


@pytest.mark.parametrize(
    "method",
    [["--method", "untrained"], ["--method", "few_shot"], ["--method", "classify"], ["--run"]],
)
def test_the_benchmark_judges_every_representation(
    method: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    if method == ["--run"]:
        glyphs = {"data": {"dataset": "glyphs"}, "steps": 1}
        method = [
            "--run",
            str(bomemeta.train(run_config(tmp_path) | glyphs, ["problem.width=4"]).run_dir),
        ]
    small = "--max-steps 2 --width 4 --ways 3 --shots 1 --lengths 2 4 --test-shots 2 --trajectories 2 --validation 1 --dataset glyphs"
    out = tmp_path / "out.json"
    result = importlib.import_module("benchmarks.continual_meta").main(
        [*method, *small.split(), "--json", str(out)]
    )
    assert json.loads(out.read_text()) == result
    assert set(result["test"]) >= {
        "accuracy",
        "accuracy_classes_002",
        "trajectory_accuracy_classes_004",
    }
    assert result["steps"] == {"untrained": 0, "continual_meta": 1}.get(result["method"], 2)


def test_oracle_is_used_without_a_graph_in_evaluation() -> None:
    problem = attached()
    oracle: Oracle = LocalOracle(
        problem, start_of(problem), problem.load([0], 0, "test"), "loop", differentiable=False
    )
    assert not any(tensor.requires_grad for tensor in oracle.evaluate(oracle.init_lower()).values())
