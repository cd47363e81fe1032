"""Hyper-cleaning: losses against the equations on uncut data, closed forms against autograd, wrong
labels, what is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from toy import Bench, Toy, one_thread

from bomemeta.core import tree
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Term
from bomemeta.core.tree import Params
from bomemeta.data import archives
from bomemeta.data.labelled import FashionMnist, LabelledArray, LabelledArrays, Mnist
from bomemeta.errors import ConfigError, DataError
from bomemeta.problems.hyper_cleaning import HyperCleaning
from bomemeta.registry import solvers

CLASSES, SHAPE, TRAIN, TEST = 4, (2, 3), 60, 14


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def assert_tight(got: torch.Tensor | Params, wanted: torch.Tensor | Params) -> None:
    # Float64 sums in another order differ by about 1e-15 of their size.
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "x_train": rng.integers(0, 256, (TRAIN, *SHAPE), np.uint8),
        "y_train": (rng.permutation(TRAIN) % CLASSES).astype(np.uint8),
        "x_test": rng.integers(0, 256, (TEST, *SHAPE), np.uint8),
        "y_test": (np.arange(TEST) % CLASSES).astype(np.uint8),
    }


def written(folder: Path, **changes: np.ndarray) -> LabelledArray:
    path = folder / "arrays.npz"
    archives.write(path, arrays() | changes, compress=False)
    return LabelledArray(path=str(path))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledArray:
    return written(tmp_path_factory.mktemp("labelled"))


def attached(
    data: Any, dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any
) -> HyperCleaning:
    problem = HyperCleaning(
        **({"train": 23, "validation": 10, "selection": 5, "ridge": 0.03} | fields)
    )
    problem.attach(seed=seed, dtype=dtype, data=data)
    return problem


def some_lower(problem: HyperCleaning, generator: torch.Generator | None = None) -> Params:
    """A y that is nobody's optimum."""
    encoded = {"weights": torch.zeros(1, dtype=problem.dtype)}
    generator = generator or torch.Generator().manual_seed(3)
    return {
        name: torch.randn(tensor.shape, generator=generator, dtype=problem.dtype)
        for name, tensor in problem.init_lower(encoded, {}).items()
    }


def some_upper(problem: HyperCleaning) -> Params:
    return {
        "weights": torch.rand(
            problem.train, generator=torch.Generator().manual_seed(4), dtype=problem.dtype
        )
    }


def repeated(lower: Params, blocks: int) -> Params:
    return {name: tensor.expand(blocks, *tensor.shape) for name, tensor in lower.items()}


def oracle_of(problem: HyperCleaning, upper: Params, split: Any = "train") -> LocalOracle:
    return LocalOracle(problem, upper, problem.load(range(problem.blocks), 0, split), "loop")


def corrupted(problem: HyperCleaning) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels after corruption and which of them are wrong, in the order of x, read off the
    blocks.
    """
    given, wrong = (
        torch.zeros(problem.train, dtype=torch.int64),
        torch.zeros(problem.train, dtype=torch.bool),
    )
    training, testing = (
        problem.load(range(problem.blocks), 0, split) for split in ("train", "test")
    )
    real = training["train_scale"] > 0
    given[training["rows"][real]] = training["train_labels"][real]
    wrong[testing["rows"][real]] = testing["wrong"][real]
    return given, wrong


# The losses


@pytest.mark.parametrize("blocks", [1, 4, 7])  # 23 and 10 samples: blocks of unequal size
@pytest.mark.parametrize("weights", ["clamp", "sigmoid"])
def test_mean_over_blocks_is_the_equation_on_uncut_data(
    data: LabelledArray, blocks: int, weights: Any
) -> None:
    problem = attached(data, blocks=blocks, weights=weights, shuffle=False)
    upper, lower = some_upper(problem), some_lower(problem)
    oracle = oracle_of(problem, upper)
    f = oracle.total(Term("upper", repeated(lower, blocks)))
    g = oracle.total(Term("lower", repeated(lower, blocks)))

    x, y = tree.leaves(upper), tree.leaves(lower)
    stored = arrays()
    inputs = torch.from_numpy(stored["x_train"].reshape(TRAIN, -1)).double() / 255
    logits = inputs @ y["weight"].T + y["bias"]
    given, _ = corrupted(problem)
    losses = functional.cross_entropy(logits[:23], given, reduction="none")
    weight = x["weights"] if weights == "clamp" else x["weights"].sigmoid()
    wanted_g = (weight * losses).mean() + 0.03 * ((y["weight"] ** 2).sum() + (y["bias"] ** 2).sum())
    wanted_f = functional.cross_entropy(
        logits[23:33], torch.from_numpy(stored["y_train"]).long()[23:33]
    )
    for got, wanted in ((f, wanted_f), (g, wanted_g)):
        in_x, in_weight, in_bias = torch.autograd.grad(
            wanted,
            [x["weights"], y["weight"], y["bias"]],
            retain_graph=True,
            materialize_grads=True,
        )
        assert_tight(got.values[0].mean(), wanted.detach())
        assert_tight(got.upper["weights"] / blocks, in_x)
        assert_tight(got.lowers[0]["weight"].mean(0), in_weight)
        assert_tight(got.lowers[0]["bias"].mean(0), in_bias)


@pytest.mark.parametrize("loss", ["upper", "lower"])
def test_closed_form_is_autograds(data: LabelledArray, loss: Any) -> None:
    problem = attached(data, blocks=4)
    generator = torch.Generator().manual_seed(3)
    stacks = [some_lower(problem, generator) for _ in range(4)]
    lower = {name: torch.stack([each[name] for each in stacks]) for name in stacks[0]}
    oracle = oracle_of(problem, some_upper(problem))
    closed = problem.loss_gradient(loss, oracle.encoded, lower, oracle.batch, False)
    assert closed is not None
    by_autograd = oracle.total(Term(loss, lower))
    assert_tight(closed.value, by_autograd.values[0])
    assert_tight(closed.lower, by_autograd.lowers[0])


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_mlp_losses_are_the_equation(data: LabelledArray, activation: Any) -> None:
    problem = attached(data, model="mlp", hidden=5, activation=activation, blocks=3, shuffle=False)
    y = some_lower(problem)
    oracle = oracle_of(problem, some_upper(problem))
    stored = arrays()
    inputs = torch.from_numpy(stored["x_train"].reshape(TRAIN, -1)).double()[23:33] / 255
    units = getattr(torch, activation)(inputs @ y["hidden.weight"].T + y["hidden.bias"])
    wanted = functional.cross_entropy(
        units @ y["weight"].T + y["bias"], torch.from_numpy(stored["y_train"]).long()[23:33]
    )
    assert_tight(oracle.upper(repeated(y, 3)).value.mean(), wanted)


def test_mlp_is_smooth_and_starts_alike_everywhere(data: LabelledArray) -> None:
    problem, again = (attached(data, model="mlp", hidden=5, blocks=2) for _ in range(2))
    oracle = oracle_of(problem, some_upper(problem))
    start = oracle.init_lower()
    assert {name: list(tensor.shape[1:]) for name, tensor in start.items()} == {
        "hidden.weight": [5, 6], "hidden.bias": [5], "weight": [CLASSES, 5], "bias": [CLASSES],
    }  # fmt: skip
    for name, tensor in oracle_of(again, some_upper(again)).init_lower().items():
        assert torch.equal(tensor, start[name])
        assert torch.equal(tensor[0], tensor[1])
    gradient = oracle.lower(start)
    direction = {name: torch.ones_like(tensor) for name, tensor in start.items()}
    step = 1e-6
    moved = oracle.lower(tree.axpy(step, direction, start))
    difference = {name: (moved.lower[name] - gradient.lower[name]) / step for name in start}
    # A forward difference of step 1e-6: errors of the order of the step.
    torch.testing.assert_close(oracle.hessian(start)(direction), difference, rtol=1e-4, atol=1e-5)


def test_start_and_projection_of_x(data: LabelledArray) -> None:
    outside = {"weights": torch.tensor([-1.0, 0.25, 2.0])}
    clamp, sigmoid = attached(data, weights="clamp"), attached(data, weights="sigmoid")
    assert clamp.project_upper(outside)["weights"].tolist() == [0.0, 0.25, 1.0]
    assert sigmoid.project_upper(outside)["weights"].tolist() == [-1.0, 0.25, 2.0]
    for problem in (clamp, sigmoid):
        oracle = oracle_of(problem, problem.init_upper(torch.Generator()), "test")
        assert (oracle.encoded["weights"] == 0.5).all()
        metrics = oracle.evaluate(repeated(some_lower(problem), problem.blocks))
        assert (
            metrics["kept"].sum() == problem.train
        )  # an x that was never moved declares nothing wrong


# Corruption and the cut


def test_redraw_leaves_some_labels_right(tmp_path: Path) -> None:
    labels = np.arange(4002) % CLASSES
    many = written(
        tmp_path,
        x_train=np.zeros((4002, 1), np.uint8),
        y_train=labels,
        x_test=np.zeros((4, 1), np.uint8),
        y_test=labels[:4],
    )
    problem = attached(many, train=4000, validation=1, selection=1)
    _, wrong = corrupted(problem)
    # A redrawn label is wrong with chance 3/4: 1,500 of 4,000 on average, with a standard deviation
    # of 19.
    assert abs(int(wrong.sum()) - 1500) < 4 * 19


@pytest.mark.parametrize(
    ("noise", "count"), [(0.0, 0), (0.8, 18), (1.0, 23)]
)  # round(0.8 * 23) = 18
def test_shift_makes_wrong_what_it_touches(data: LabelledArray, noise: float, count: int) -> None:
    _, wrong = corrupted(attached(data, corruption="shift", noise=noise))
    assert int(wrong.sum()) == count


@pytest.mark.parametrize("corruption", ["redraw", "shift"])
def test_corruption_is_the_seeds_and_not_the_blocks(data: LabelledArray, corruption: Any) -> None:
    given, wrong = corrupted(attached(data, corruption=corruption, blocks=1))
    for blocks in (2, 5):
        torch.testing.assert_close(
            corrupted(attached(data, corruption=corruption, blocks=blocks)), (given, wrong)
        )
    assert not torch.equal(corrupted(attached(data, corruption=corruption, seed=1))[0], given)
    unshuffled = attached(data, corruption=corruption, shuffle=False)
    true = torch.from_numpy(arrays()["y_train"]).long()[:23]
    torch.testing.assert_close(corrupted(unshuffled)[1], corrupted(unshuffled)[0] != true)


@pytest.mark.parametrize("shuffle", [True, False])
def test_parts_do_not_share_samples(data: LabelledArray, shuffle: bool) -> None:
    problem = attached(data, shuffle=shuffle, blocks=3, train=40, validation=12, selection=8)
    training, testing = problem.load(range(3), 0, "train"), problem.load(range(3), 0, "test")
    parts = {"train": training, "validation": training, "selection": testing}
    rows = torch.cat(
        [batch[f"{part}_inputs"][batch[f"{part}_scale"] > 0] for part, batch in parts.items()]
    )
    stored = torch.from_numpy(arrays()["x_train"].reshape(TRAIN, -1)).double() / 255
    assert torch.equal(rows, stored) == (not shuffle)
    assert sorted(rows.tolist()) == sorted(stored.tolist())


def test_validation_from_all_rows(data: LabelledArray) -> None:
    problem = attached(
        data,
        shuffle=False,
        blocks=1,
        train=30,
        validation=20,
        selection=8,
        validation_from="all",
        noise=1.0,
    )
    training, testing = problem.load([0], 0, "train"), problem.load([0], 0, "test")
    rows = {
        part: {tuple(row) for row in batch[f"{part}_inputs"][0].tolist()}
        for part, batch in {"train": training, "validation": training, "selection": testing}.items()
    }
    assert len(rows["validation"]) == 20 == len(training["validation_labels"][0])
    assert 0 < len(rows["validation"] & rows["train"]) < 20
    assert not rows["validation"] & rows["selection"]
    # With their right labels, whatever the training samples' are.
    right = {
        tuple(row.reshape(-1) / 255): label
        for row, label in zip(arrays()["x_train"], arrays()["y_train"], strict=True)
    }
    for row, label in zip(
        training["validation_inputs"][0].tolist(),
        training["validation_labels"][0].tolist(),
        strict=True,
    ):
        assert right[tuple(row)] == label
    again = attached(
        data,
        shuffle=False,
        blocks=1,
        train=30,
        validation=20,
        selection=8,
        validation_from="all",
        seed=1,
    )
    assert not torch.equal(
        again.load([0], 0, "train")["validation_labels"], training["validation_labels"]
    )


def test_standardise_by_given_moments(data: LabelledArray) -> None:
    raw, scaled = (
        attached(data, blocks=1, **keys).load([0], 0, "train")
        for keys in ({}, {"standardise": (0.5, 0.25)})
    )
    assert_tight(scaled["train_inputs"], (raw["train_inputs"] - 0.5) / 0.25)


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_standardise(tmp_path: Path, dtype: type[np.generic]) -> None:
    stored = arrays()
    x = stored["x_train"].astype(dtype) if dtype == np.uint8 else stored["x_train"] / 255
    problem = attached(
        written(tmp_path, x_train=x),
        standardise=True,
        shuffle=False,
        blocks=1,
        train=TRAIN - 2,
        validation=2,
        selection=0,
    )
    unit = stored["x_train"].reshape(TRAIN, -1) / 255
    wanted = torch.from_numpy((unit - unit.mean()) / unit.std())
    assert_tight(problem.load([0], 0, "train")["train_inputs"][0], wanted[: TRAIN - 2])
    # The test part by the training part's moments.
    tested = torch.from_numpy((stored["x_test"].reshape(TEST, -1) / 255 - unit.mean()) / unit.std())
    assert_tight(problem.load([0], 0, "test")["test_inputs"][0], tested)


def test_nothing_to_standardise(tmp_path: Path) -> None:
    flat = written(tmp_path, x_train=np.ones((TRAIN, *SHAPE)))  # as uint8 of 255 is read
    with pytest.raises(DataError, match=r"problem\.standardise: all training inputs"):
        attached(flat, standardise=True)


def test_load_gives_views_of_one_stack(data: LabelledArray) -> None:
    problem = attached(data, blocks=4, train=24)
    whole = problem.load(range(4), 0, "train")
    part = problem.load([1, 2], 7, "train")
    assert problem.load((1, 2), 8, "train") is part
    assert (
        part["train_inputs"].untyped_storage().data_ptr()
        == whole["train_inputs"].untyped_storage().data_ptr()
    )
    for ids in ([1, 2], [3, 0]):
        for name, tensor in problem.load(ids, 0, "train").items():
            assert torch.equal(tensor, whole[name][ids])


# Figures


def test_f1_of_a_case_made_by_hand(data: LabelledArray) -> None:
    # Two blocks of 2 and 3 samples, so that one is filled up; samples 1 and 4 have wrong labels, 3
    # and 4 are kept.
    problem = attached(data, train=5, blocks=2, noise=0.0)
    upper = {"weights": torch.tensor([0.1, 0.2, 0.49, 0.5, 1.0], dtype=torch.float64)}
    batch = dict(problem.load(range(2), 0, "test"))
    batch["wrong"] = torch.tensor([False, True, False, False, True])[batch["rows"]]
    metrics = LocalOracle(problem, upper, batch, "loop").evaluate(repeated(some_lower(problem), 2))
    assert {name: float(metrics[name].sum()) for name in ("right", "kept", "both")} == {
        "right": 3,
        "kept": 2,
        "both": 1,
    }
    means = {name: float(value.mean()) for name, value in metrics.items()}
    # Declared wrong are 0, 1 and 2, of which 1 is; wrong are 1 and 4.
    detection = {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "f1_wrong": 2 / 5}
    others = {name: means[name] for name in ("test_accuracy", "test_loss", "selection_accuracy")}
    assert problem.summary(means) == pytest.approx(others | detection)


def test_accuracies_are_those_of_the_uncut_test_part(data: LabelledArray) -> None:
    problem = attached(data, blocks=4, selection=0)
    lower = some_lower(problem)
    metrics = oracle_of(problem, some_upper(problem), "test").evaluate(repeated(lower, 4))
    logits = (
        torch.from_numpy(arrays()["x_test"].reshape(TEST, -1)).double() / 255 @ lower["weight"].T
        + lower["bias"]
    )
    labels = torch.from_numpy(arrays()["y_test"]).long()
    assert_tight(metrics["test_accuracy"].mean(), (logits.argmax(1) == labels).double().mean())
    assert_tight(metrics["test_loss"].mean(), functional.cross_entropy(logits, labels))
    assert "selection_accuracy" not in metrics


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ((10, 10, 10), (1, 1, 1, 0)),  # nothing is wrong, nothing declared wrong
        ((10, 0, 0), (0, 0, 0, 0)),  # nothing kept
        ((0, 10, 0), (0, 0, 0, 0)),  # nothing is right, all kept
        ((8, 4, 4), (1, 1 / 2, 2 / 3, 1 / 2)),
    ],
)
def test_summary_from_counts(
    data: LabelledArray, counts: tuple[float, ...], wanted: tuple[float, ...]
) -> None:
    problem = attached(data, train=20, blocks=2)  # 10 a block
    summary = problem.summary(
        {"test_accuracy": 0.5, **dict(zip(("right", "kept", "both"), counts, strict=True))}
    )
    assert [summary[name] for name in ("precision", "recall", "f1", "f1_wrong")] == pytest.approx(
        list(wanted)
    )
    assert summary["test_accuracy"] == 0.5


# Training


def separable(folder: Path) -> LabelledArray:
    rng = np.random.default_rng(1)
    centres = 2 * rng.standard_normal((3, 8))
    y_train, y_test = rng.integers(0, 3, 260), rng.integers(0, 3, 60)
    x_train, x_test = (
        centres[y] + 0.5 * rng.standard_normal((len(y), 8)) for y in (y_train, y_test)
    )
    return written(folder, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


CLEANERS: dict[str, dict[str, Any]] = {
    "bome": {"inner_steps": 1, "inner_lr": 0.1, "lower_lr": 0.1, "upper_lr": 100.0, "phi": "gap"},
    "lancbio": {"inner_steps": 1, "inner_lr": 0.1, "upper_lr": 100.0},
}


@pytest.mark.parametrize("name", CLEANERS)
def test_wrong_labels_of_separated_classes_are_found(name: str, tmp_path: Path) -> None:
    weights = "clamp" if name == "bome" else "sigmoid"
    uppers = []
    for blocks in (1, 3):
        problem = attached(
            separable(tmp_path), train=200, validation=60, selection=0, corruption="shift", noise=0.4, ridge=0.01,
            blocks=blocks, weights=weights,
        )  # fmt: skip
        bench = Bench(problem, solvers.get(name)(**CLEANERS[name]), steps=60)
        bench.finish()
        encoded = bench.x() if weights == "clamp" else bench.x().sigmoid()
        _, wrong = corrupted(problem)
        # Classes are many standard deviations apart: nearly every wrong label is told from the
        # right ones.
        assert ((encoded < 0.5) == wrong).double().mean() > 0.95
        uppers.append(bench.x())
    # The same sums in another order, over 60 steps.
    torch.testing.assert_close(uppers[0], uppers[1], rtol=1e-6, atol=1e-6)


# What is refused


def test_too_few_samples(data: LabelledArray) -> None:
    with pytest.raises(DataError, match=r"40 \+ 20 \+ 1 = 61 samples; .* has 60"):
        attached(data, train=40, validation=20, selection=1)


def test_episodes_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.dataset: hyper_cleaning wants labelled rows .* Toy"
    ):
        attached(Toy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"y_test": np.array([0, 1] * 6 + [2, 4])},
            r"y_test has 1 class that y_train has not: 4 \(1 rows\)",
        ),
        ({"y_train": np.full(TRAIN, -1)}, "y_train has one class alone, -1"),
        ({"y_train": np.zeros(TRAIN, np.int64)}, "y_train has one class alone"),
        ({"y_train": np.linspace(0, 1, TRAIN)}, r"y_train has a label 0\.0169.* \(float64\)"),
        ({"y_train": np.arange(3)}, r"y_train is int64 \[3\] for 60 rows"),
        (
            {"x_test": np.zeros((TEST, 5), np.uint8)},
            r"a row of x_train is \[2, 3\], one of x_test \[5\]",
        ),
        ({"x_train": np.full((TRAIN, *SHAPE), np.nan)}, "x_train has numbers that are NaN"),
        ({"x_train": np.zeros(TRAIN, np.uint8)}, r"x_train is uint8 \[60\]"),
        ({"x_train": np.zeros((TRAIN, 2), np.int64)}, "x_train is int64"),
    ],
)
def test_arrays_that_are_no_labelled_rows(
    changes: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        written(tmp_path, **changes).prepare()


def test_missing_files_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"mnist: .*mnist\.npz does not exist .*`bomemeta data prepare mnist"
    ):
        Mnist(root=str(tmp_path)).prepare()
    with pytest.raises(
        DataError, match=r"labelled_array: .*nothing\.npz \(data\.path\) does not exist"
    ):
        LabelledArray(path=str(tmp_path / "nothing.npz")).prepare()
    np.savez(tmp_path / "half.npz", x_train=np.zeros((2, 2)))
    with pytest.raises(DataError, match="is not a readable archive"):
        LabelledArray(path=str(tmp_path / "half.npz")).prepare()


# The data sets


@pytest.mark.parametrize(
    "source",
    [Mnist(), FashionMnist(), LabelledArray(path="a.npz")],
    ids=lambda source: type(source).__name__,
)
def test_data_sets_keep_the_protocol(source: object) -> None:
    # The class, because properties of the instance would read files.
    assert all(
        hasattr(type(source), name) for name in ("features", "classes", "prepare", "examples")
    )


@pytest.mark.parametrize(
    ("kind", "first"), [(Mnist, [5, 0, 4, 1, 9]), (FashionMnist, [9, 0, 0, 3, 0])]
)
def test_real_images(kind: type[Mnist | FashionMnist], first: list[int]) -> None:
    data = kind()
    try:
        data.prepare()
    except DataError as error:
        pytest.skip(str(error))  # says what is missing and how to get it
    assert isinstance(data, LabelledArrays)
    assert (data.features, data.classes) == (784, 10)
    assert [len(data.examples(part).labels) for part in ("train", "test")] == [60_000, 10_000]
    assert data.examples("train").labels[:5].tolist() == first
    problem = attached(data, torch.float32, train=5000, validation=5000, selection=0, blocks=2)
    batch = problem.load(range(2), 0, "train")
    assert batch["train_inputs"].shape == batch["validation_inputs"].shape == (2, 2500, 784)
    assert (float(batch["train_inputs"].min()), float(batch["train_inputs"].max())) == (0.0, 1.0)
    # Half of 5,000 redrawn from ten classes: 2,250 wrong on average, with a standard deviation of
    # 15.
    assert abs(int(corrupted(problem)[1].sum()) - 2250) < 4 * 15
    assert problem.load(range(2), 0, "test")["test_inputs"].shape == (2, 5000, 784)
