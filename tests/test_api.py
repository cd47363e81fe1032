"""What a run leaves behind, what it says, and what it refuses, through the Python interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

import bomemeta
from bomemeta.assembly import build_problem
from bomemeta.checkpoint import upper_sha256
from bomemeta.config import load_config
from bomemeta.errors import ConfigError, DataError
from bomemeta.metrics import read_metrics

__all__ = ["toy"]

FEW_SHOT: dict[str, Any] = {
    "problem": {"name": "few_shot", "ways": 3, "queries": 2, "test_queries": 2, "width": 4},
    "data": {"dataset": "toy"},
    "solver": {
        "name": "bome",
        "inner_steps": 2,
        "inner_lr": 0.2,
        "lower_lr": 0.2,
        "adapt_steps": 1,
        "barrier_steps": 1,
    },
    "steps": 3,
    "tasks_per_step": 2,
    "evaluation": {"episodes": 6, "every_steps": 2, "validation_episodes": 4},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> bomemeta.Result:
    return bomemeta.train(FEW_SHOT, [f"output_dir={tmp_path_factory.mktemp('api') / 'run'}"])


def test_a_run_leaves_config_metrics_result_checkpoints_and_tensorboard(finished):
    folder = finished.run_dir
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "result.json",
        "checkpoints",
        "tensorboard",
    }
    assert any((folder / "tensorboard").iterdir())
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    always = {
        "upper_loss",
        "lower_loss",
        "gap",
        "multiplier",
        "multiplier_zero_share",
        "grad_upper_gap_norm",
        "grad_lower_gap_norm",
    }
    always |= {
        "stationarity_gradient",
        "stationarity_gap",
        "broadcast_s",
        "compute_s",
        "reduce_s",
        "update_s",
        "step_s",
    }
    assert all(always <= line.keys() for line in lines)
    assert ["validation_accuracy" in line for line in lines] == [False, True, False]
    # the four parts of a step are its whole
    for line in lines:
        assert sum(
            line[part] for part in ("broadcast_s", "compute_s", "reduce_s", "update_s")
        ) == pytest.approx(line["step_s"])


def test_result_json_carries_what_was_promised(finished):
    result = json.loads((finished.run_dir / "result.json").read_text())
    assert {
        "steps",
        "seed",
        "upper_sha256",
        "wall_s",
        "versions",
        "metrics",
        "final",
        "config",
    } <= result.keys()
    assert result["upper_sha256"] == upper_sha256(finished.upper)
    assert result["config"]["problem"]["batch_norm"] == "transductive"
    metrics = result["metrics"]
    assert {
        "test_accuracy",
        "test_ci95",
        "test_loss",
        "baseline_accuracy",
        "test_accuracy_inductive",
    } <= metrics.keys()
    assert "test_accuracy_transductive" not in metrics  # that is the plain one
    assert (
        result["final"]["upper"].keys() == finished.upper.keys()
    )  # a network of under 1,000 numbers
    assert result["final"]["lower"] == {}  # fresh episodes leave nothing behind


def test_confidence_interval_is_that_of_the_mean_over_episodes(finished):
    """The two numbers again, episode by episode, from the parts."""
    from bomemeta.core.local_oracle import LocalOracle
    from bomemeta.problems.few_shot import FewShot
    from bomemeta.solvers.bome import BOME

    problem = FewShot(ways=3, queries=2, test_queries=2, width=4)
    toy.attached(problem, dtype=torch.float32)
    solver = BOME(inner_steps=2, inner_lr=0.2, lower_lr=0.2, adapt_steps=1, barrier_steps=1)
    accuracies = []
    for task in range(6):
        oracle = LocalOracle(
            problem, finished.upper, problem.load([task], 0, "test"), "loop", False
        )
        accuracies.append(float(oracle.evaluate(solver.adapt(oracle, None))["accuracy"][0]))
    values = torch.tensor(accuracies, dtype=torch.float64)
    assert finished.metrics["test_accuracy"] == pytest.approx(float(values.mean()), abs=1e-6)
    assert finished.metrics["test_ci95"] == pytest.approx(
        2.570582 * float(values.std()) / 6**0.5,
        abs=1e-5,  # Student's t of 5 degrees of freedom
    )


def test_final_variables_of_small_problems(tmp_path):
    config = Path(__file__).parents[1] / "configs" / "analytic_degenerate.yaml"
    result = bomemeta.train(
        config, [f"output_dir={tmp_path / 'run'}", "steps=800", "log.tensorboard=false"]
    )
    final = json.loads((result.run_dir / "result.json").read_text())["final"]
    assert final["upper"]["x"] == pytest.approx([1.0], abs=1e-12)
    assert final["lower"]["y"] == pytest.approx([1.0, 1.0], abs=1e-12)
    assert result.metrics["upper_error"] < 1e-12


def test_final_variables_of_several_tasks_have_a_task_axis(tmp_path):
    config = {
        "problem": {"name": "analytic", "case": "quadratic", "tasks": 3},
        "solver": {"name": "bome", "lower_momentum": 0.5},
        "steps": 2,
        "log": {"tensorboard": False},
    }
    result = bomemeta.train(config, [f"output_dir={tmp_path / 'run'}"])
    final = json.loads((result.run_dir / "result.json").read_text())["final"]
    assert torch.tensor(final["lower"]["y"]).shape == (3, 4)


def test_a_run_says_when_the_bilevel_problem_is_not_being_solved(tmp_path):
    """Untuned on purpose: y moves so slowly that <grad f, grad q> always exceeds phi, lambda is 0
    on every step and x drifts.
    """
    config = {
        "problem": {"name": "analytic", "case": "quadratic", "dim_lower": 2, "start": [50.0, 50.0]},
        "solver": {
            "name": "bome",
            "eta": 0.001,
            "lower_lr": 1e-6,
            "upper_lr": 1e-9,
            "inner_steps": 1,
        },
        "steps": 60,
        "dtype": "float64",
        "log": {"tensorboard": False},
    }
    result = bomemeta.train(config, [f"output_dir={tmp_path / 'run'}"])
    assert any(
        "lambda was 0 in 100%" in note and "solver.inner_steps" in note for note in result.notes
    ), result.notes
    assert any("x has not moved" in note and "solver.upper_lr" in note for note in result.notes), (
        result.notes
    )
    health = json.loads((result.run_dir / "result.json").read_text())["health"]
    assert health["multiplier_zero_share"] == 1.0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": None}, ConfigError, "wants a `data:` section"),
        ({"problem": {"name": "analytic", "case": "minimax"}}, ConfigError, "reads no data set"),
        (
            {"problem": {"name": "analytic", "case": "minimax", "tasks": 3}, "data": None},
            ConfigError,
            "minimax is one task",
        ),
        (
            {"data": {"dataset": "omniglot", "root": "/nowhere"}},
            DataError,
            "bomemeta data prepare omniglot",
        ),
        ({"device": "cuda"}, ConfigError, "torch sees no GPU here"),
        ({"device": "cuda", "workers": 1}, ConfigError, "gpus_per_worker: 0"),
        (
            {"device": "cpu", "workers": 1, "gpus_per_worker": 0.5},
            ConfigError,
            "take one of the two out",
        ),
    ],
)
def test_refusals_leave_no_folder(changes, error, message, tmp_path):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so the message under test cannot come")
    folder = tmp_path / "run"
    with pytest.raises(error, match=message):
        bomemeta.train({**FEW_SHOT, **changes, "output_dir": str(folder)})
    assert not folder.exists()


def test_a_checkpoint_of_another_shape_is_refused(finished):
    with pytest.raises(
        bomemeta.errors.CheckpointError,
        match=r"convolutions.0.weight: checkpoint float32 \[4, 1, 3, 3\], config float32 \[8, 1, 3, 3\]",
    ):
        bomemeta.evaluate(finished.run_dir, ["problem.width=8"])


def test_evaluation_may_change_the_protocol(finished):
    harder = bomemeta.evaluate(finished.run_dir, ["problem.ways=6", "evaluation.episodes=4"])
    assert harder.metrics["test_accuracy"] < finished.metrics["test_accuracy"]
    assert harder.upper_sha256 == finished.upper_sha256


# Figures after the lower problem is solved


def test_a_y_that_was_trained_on_the_upper_loss_is_found_out(tmp_path):
    """All labels wrong and a barrier that asks for nothing: y learns from the validation set, and
    forgets it when it is solved on g.
    """
    job = {
        "problem": {
            "name": "hyper_cleaning",
            "train": 80,
            "validation": 40,
            "selection": 0,
            "corruption": "shift",
            "noise": 1.0,
        },
        "data": {"dataset": "toy_labelled"},
        "solver": {
            "name": "bome",
            "inner_steps": 1,
            "inner_lr": 1e-6,
            "lower_lr": 0.3,
            "eta": 1e-9,
            "upper_lr": 1e-3,
            "phi": "gap",
        },
        "steps": 40,
        "evaluation": {"solve_steps": 10},
    }
    result = bomemeta.train(job, [f"output_dir={tmp_path / 'a'}"])
    assert result.metrics["test_accuracy_solved"] == pytest.approx(
        result.metrics["test_accuracy"], abs=0.04
    )  # steps of 1e-6 solve nothing
    longer = bomemeta.train(
        job, [f"output_dir={tmp_path / 'b'}", "solver.inner_lr=0.5", "evaluation.solve_steps=300"]
    )
    assert longer.metrics["test_accuracy"] > longer.metrics["test_accuracy_solved"] + 0.3
    assert any("what x is worth" in note for note in longer.notes)


def test_solved_metrics_are_those_of_the_solved_lower_problem(tmp_path):
    job = {
        "problem": {"name": "analytic", "case": "quadratic", "tasks": 3, "dim_lower": 4, "condition": 2.0},
        "solver": {"name": "bome"}, "steps": 3, "dtype": "float64", "evaluation": {"solve_steps": 500},
    }  # fmt: skip
    result = bomemeta.train(job, [f"output_dir={tmp_path / 'a'}"])
    problem = build_problem(load_config(job))
    data = problem.load(range(3), 0, "train")
    solved = torch.linalg.solve(data["A"], (result.upper["x"] @ data["B"])[..., None])[..., 0]
    losses = [
        float(
            problem.lower_loss(
                result.upper, {"y": solved[i]}, {name: tensor[i] for name, tensor in data.items()}
            )
        )
        for i in range(3)
    ]
    assert result.metrics["lower_loss_solved"] == pytest.approx(sum(losses) / 3, rel=1e-9)
    assert result.metrics["lower_loss"] > result.metrics["lower_loss_solved"]


# How long a run is


def test_steps_must_be_given_where_the_problem_has_no_end(tmp_path):
    job = {name: value for name, value in FEW_SHOT.items() if name != "steps"}
    with pytest.raises(ConfigError, match="steps: missing; problem few_shot has no end of its own"):
        bomemeta.train(job, [f"output_dir={tmp_path / 'a'}"])
    assert not (tmp_path / "a").exists()


def test_few_shot_wants_a_data_set_of_episodes(tmp_path):
    with pytest.raises(
        ConfigError, match="problem few_shot draws episodes, which ToyLabelled does not have"
    ):
        bomemeta.train(
            {**FEW_SHOT, "data": {"dataset": "toy_labelled"}}, [f"output_dir={tmp_path / 'a'}"]
        )
