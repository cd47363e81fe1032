"""Few-shot regression: sinusoids, arrays of a user's own, closed forms, MAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import bomemeta
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Term
from bomemeta.data.regression import RegressionArrays, Sinusoid
from bomemeta.errors import CheckpointError, ConfigError, DataError
from bomemeta.problems.few_shot_heads import ridge_regression
from bomemeta.problems.few_shot_regression import FewShotRegression


def attached(data: Any, **keys: Any) -> FewShotRegression:
    problem = FewShotRegression(hidden=[8], test_queries=5, **keys)
    problem.attach(seed=0, dtype=torch.float64, data=data)
    return problem


def test_sinusoids_are_sinusoids_and_follow_from_the_key() -> None:
    task = Sinusoid().task("train", 5, 200, (0, 0, 1))
    again = Sinusoid().task("train", 5, 200, (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(task, again, strict=True))
    x, y = task.query.double(), task.query_targets.double()
    # a sin(x - p) is linear in sin x and cos x
    design = torch.cat([x.sin(), x.cos()], 1)
    fit = design @ torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(fit, y, atol=1e-5, rtol=0)
    assert 0.1 <= y.abs().max() <= 5


def test_the_ridge_head_is_scikit_learns() -> None:
    problem = attached(Sinusoid(), shots=6, regularisation=0.3)
    x = problem.init_upper(torch.Generator().manual_seed(1))
    batch = {name: rows[0] for name, rows in problem.load([0], 0, "train").items()}
    encoded = problem.encode(x, batch)
    lower = problem.init_lower(encoded, batch)
    # the bias is the weight of a constant feature, and counts in the penalty
    theirs = Ridge(alpha=0.3, fit_intercept=False).fit(
        encoded["support"].numpy(), batch["support_targets"].numpy()
    )
    found = problem.predictions(encoded, lower, batch, "query")
    wanted = theirs.predict(encoded["query"].numpy()).reshape(-1, 1)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)  # x holds log 0.3 in float32


@pytest.mark.parametrize(
    "keys", [{"head": "ridge"}, {"head": "linear"}, {"form": "network"}], ids=lambda k: str(k)
)
def test_gradients_by_differences_under_loop_and_vmap(keys: dict[str, Any], tmp_path: Path) -> None:
    problem = attached(arrays(tmp_path), shots=4, queries=3, **keys)
    x = problem.init_upper(torch.Generator().manual_seed(1))
    batch = problem.load(range(3), 0, "train")

    def total(x: dict[str, torch.Tensor], how: Any) -> Any:
        oracle = LocalOracle(problem, x, batch, how)
        at = {name: tensor + 0.1 for name, tensor in start.items()}
        return oracle.total(Term("upper", at), Term("lower", at, 0.7))

    start = LocalOracle(problem, x, batch, "loop").init_lower()
    loop, vmap = total(x, "loop"), total(x, "vmap")
    torch.testing.assert_close(loop.upper, vmap.upper)
    generator = torch.Generator().manual_seed(2)
    along = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in x.items()}
    ends = [total({n: t + s * 1e-6 * along[n] for n, t in x.items()}, "loop") for s in (1, -1)]
    values = [float(end.values[0].sum() + 0.7 * end.values[1].sum()) for end in ends]
    slope = sum(float((loop.upper[n] * along[n]).sum()) for n in x)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def arrays(folder: Path, tasks: int = 9) -> RegressionArrays:
    """Three inputs, two outputs; each task linear."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((tasks, 12, 3))
    targets = inputs @ rng.standard_normal((tasks, 3, 2))
    path = folder / "tasks.npz"
    np.savez(path, inputs=inputs, targets=targets, split=np.arange(tasks) % 3)
    return RegressionArrays(str(path))


def test_arrays_of_a_user_s_own(tmp_path: Path) -> None:
    data = arrays(tmp_path)
    assert (data.inputs, data.outputs) == (3, 2)
    task = data.task("test", 4, 5, (0, 2, 0))
    assert task.support.shape == (4, 3)
    assert task.query_targets.shape == (5, 2)
    rows = torch.cat([task.support, task.query])
    assert len(torch.unique(rows, dim=0)) == 9
    with pytest.raises(DataError, match=r"tasks have 12 rows; shots \+ queries needs 13"):
        data.check_task("test", 13)
    np.savez(tmp_path / "bad.npz", inputs=np.zeros((2, 3)), targets=np.zeros((2, 3)), split=[0, 1])
    with pytest.raises(DataError, match=r"wanted inputs \[tasks, rows, d\]"):
        RegressionArrays(str(tmp_path / "bad.npz")).prepare()
    with pytest.raises(ConfigError, match="which object does not have; use sinusoid"):
        attached(object())


@pytest.mark.parametrize("problem", [{"head": "ridge"}, {"form": "network"}], ids=["ridge", "maml"])
def test_short_runs(problem: dict[str, Any], tmp_path: Path) -> None:
    solver = (
        {"name": "maml", "inner_steps": 1, "inner_lr": 0.01}
        if "form" in problem
        else {"name": "bome", "barrier": "per_task", "adapt_steps": 0, "inner_steps": 1, "barrier_steps": 0}
    )  # fmt: skip
    config = {
        "problem": {"name": "few_shot_regression", "test_queries": 50, **problem},
        "data": {"dataset": "sinusoid"},
        "solver": {**solver, "upper_lr": 0.005, "upper_optimizer": "adam"},
        "steps": 3 if "form" in problem else 60, "tasks_per_step": 10, "task_map": "vmap", "evaluation": {"episodes": 100},
        "log": {"tensorboard": False}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    metrics = bomemeta.train(config).metrics
    if "form" in problem:  # MAML needs thousands
        assert 0 < metrics["test_loss"] < 100
    else:
        assert metrics["test_loss"] < metrics["baseline_loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": np.array([0, 1, 7, 0, 1, 2])}, "split is int64 with 0, 1, 2, 7; wanted whole numbers, 0 train"),
        ({"split": np.array(["a"] * 6)}, "split is <U1 with a; wanted"),
        ({"inputs": np.full((6, 20, 3), 1e300)}, "too large numbers, the first in task 0, row 0"),
        ({"inputs": np.ones((6, 20, 3), complex)}, "inputs are complex128; wanted floats or integers"),
        ({"targets": np.zeros((6, 20), "U4")}, "targets are <U4; wanted floats or integers"),
        ({"targets": np.zeros((6, 20), "M8[s]")}, r"targets are datetime64\[s\]; wanted floats"),
        ({"inputs": np.zeros((6, 20, 0))}, r"wanted inputs \[tasks, rows, d\].* got inputs \[6, 20, 0\]"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_tasks_are_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sound = {"inputs": np.ones((6, 20, 3)), "targets": np.ones((6, 20)), "split": np.arange(6) % 3}
    np.savez(tmp_path / "tasks.npz", **{**sound, **change})
    with pytest.raises(DataError, match=message):
        RegressionArrays(str(tmp_path / "tasks.npz")).prepare()


class Drawn(Sinusoid):
    def __init__(self, change: Any) -> None:
        super().__init__()
        object.__setattr__(self, "change", change)

    def task(self, split: Any, shots: int, queries: int, key: tuple[int, ...]) -> Any:
        task = super().task(split, shots, queries, key)
        return self.change(task) if split == "test" else task


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, r"task\(\) failed: TypeError"),
        (lambda t: t[:3], r"task\(\) failed: ValueError"),
        (lambda t: t._replace(query=t.query[1:]), r"query: got torch.float32 \[4, 1\]; wanted floats \[5, 1\]"),
        (lambda t: t._replace(query=t.query.int()), r"query: got torch.int32 \[5, 1\]"),
        (lambda t: t._replace(support_targets=t.support_targets / 0), "support targets: NaN or infinite numbers"),
        (lambda t: t._replace(support=t.support + torch.rand(1)), "support: two draws with one key differ"),
    ],
)  # fmt: skip
def test_first_tasks_of_each_split_are_looked_at(change: Any, message: str) -> None:
    problem = attached(Drawn(change))
    with pytest.raises(DataError, match=rf"^Drawn, split test, task 0: {message}"):
        problem.check_data()


def test_tasks_that_are_replaced_under_a_run_are_named(tmp_path: Path) -> None:
    arrays(tmp_path)
    settings = {
        "problem": {"name": "few_shot_regression", "hidden": [4], "shots": 4, "queries": 3, "test_queries": 3},
        "data": {"dataset": "regression_arrays", "path": str(tmp_path / "tasks.npz")},
        "solver": {"name": "bome", "inner_steps": 1}, "steps": 2, "tasks_per_step": 2,
        "evaluation": {"episodes": 2}, "log": {"tensorboard": False}, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    bomemeta.train(settings)
    with np.load(tmp_path / "tasks.npz") as file:
        changed = {**file, "targets": file["targets"] + 1}
    np.savez(tmp_path / "tasks.npz", **changed)
    with pytest.raises(CheckpointError, match=r"(?s)data is not what .*first train tasks: .* now"):
        bomemeta.resume(tmp_path / "run", ["steps=3"])


def test_numbers_that_no_ridge_can_be_solved_for_are_a_divergence() -> None:
    huge = torch.full((3, 4), 1e30)
    assert ridge_regression(huge, torch.ones(3, 1), torch.ones(1)).isnan().all()
    singular = ridge_regression(torch.ones(3, 4), torch.ones(3, 1), torch.zeros(1))
    assert singular.isnan().all()
