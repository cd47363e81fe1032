"""Intervals of few values are Student's, whoever asks."""

from __future__ import annotations

import math

import pytest
from scipy.stats import t

import bomemeta
from bomemeta.intervals import half_width


@pytest.mark.parametrize("n", [2, 3, 5, 30, 600])
def test_half_width_is_students(n):
    width = half_width(4.0, n)
    assert width == pytest.approx(t.ppf(0.975, n - 1) * 2 / math.sqrt(n), rel=1e-12)


def test_one_value_has_no_interval():
    assert half_width(0.0, 1) is None


def test_an_interval_covers_as_often_as_it_says():
    """Of 4,000 means of three normal numbers 95 % lie within their interval; of 1.96 s it would be
    81 %.
    """
    import numpy as np

    draws = np.random.default_rng(0).standard_normal((4000, 3))
    widths = np.array([half_width(float(row.var(ddof=1)), 3) for row in draws])
    covered = (np.abs(draws.mean(1)) <= widths).mean()
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


@pytest.mark.parametrize(("episodes", "quantile"), [(1, None), (2, 12.706205), (5, 2.776445)])
def test_a_meta_test_of_few_episodes(episodes, quantile, tmp_path):
    config = {
        "imports": ["toy"],
        "problem": {"name": "few_shot", "ways": 3, "queries": 2, "test_queries": 4, "width": 4},
        "data": {"dataset": "toy", "noise": 2.0},
        "solver": {"name": "bome", "inner_steps": 1, "adapt_steps": 1, "barrier_steps": 1},
        "steps": 1, "tasks_per_step": 1, "log": {"tensorboard": False},
    }  # fmt: skip
    run = bomemeta.train(
        config, [f"evaluation.episodes={episodes}", f"output_dir={tmp_path / 'run'}"]
    )
    widths = [name for name in run.metrics if "ci95" in name]
    if quantile is None:
        assert widths == []
        return
    # The accuracies themselves, one episode at a time.
    from bomemeta.assembly import build_problem, build_solver
    from bomemeta.config import load_config
    from bomemeta.core.local_oracle import LocalOracle

    settings = load_config(config)
    problem = build_problem(settings)
    solver = build_solver(settings, problem)
    values = []
    for task in range(episodes):
        oracle = LocalOracle(problem, run.upper, problem.load([task], 0, "test"), "loop", False)
        values.append(float(oracle.evaluate(solver.adapt(oracle, None))["accuracy"][0]))
    mean = sum(values) / episodes
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (episodes - 1))
    assert deviation > 0
    wanted = quantile * deviation / math.sqrt(episodes)
    assert run.metrics["test_ci95"] == pytest.approx(wanted, rel=1e-4)
