"""What follows from a run's seed: every seed is a run of its own, and the small ones keep theirs."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

import bomemeta
from bomemeta.core.randomness import Draws, generator, mixed_seed
from bomemeta.errors import ConfigError
from bomemeta.hypercheck.hypercheck import check

SEEDS = (
    0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, 2**96, 10**1000,
)  # fmt: skip
ANALYTIC = {
    "problem": {"name": "analytic", "case": "quadratic", "tasks": 4},
    "solver": {"name": "bome", "inner_steps": 2},
    "steps": 2,
    "tasks_per_step": 2,
    "log": {"tensorboard": False},
}


def test_small_seeds_are_what_they_were():
    for seed in (0, 1, 7, 2**31, 2**32 - 1):
        assert mixed_seed(seed) == seed
        ours, torchs = generator(seed), torch.Generator().manual_seed(seed)
        assert torch.equal(torch.randn(5, generator=ours), torch.randn(5, generator=torchs))


def test_every_bit_of_a_large_seed_counts():
    mixed = [mixed_seed(seed) for seed in SEEDS]
    assert all(0 <= seed < 2**63 for seed in mixed)  # what torch takes
    # What a generator of torch's reads of it differs as well.
    assert len({seed % 2**32 for seed in mixed}) == len(SEEDS)
    assert all(seed >= 2**32 for seed, given in zip(mixed, SEEDS, strict=True) if given >= 2**32)
    draws = [tuple(torch.randn(3, generator=generator(seed)).tolist()) for seed in SEEDS]
    assert len(set(draws)) == len(SEEDS)


def test_runs_of_large_seeds_are_different_runs(tmp_path):
    results = {}
    for seed in (0, 2**32, 2**63, 2**64 + 1):
        folder = tmp_path / str(seed)
        results[seed] = bomemeta.train(ANALYTIC, [f"seed={seed}", f"output_dir={folder}"])
    for (a, left), (b, right) in itertools.combinations(results.items(), 2):
        assert left.upper_sha256 != right.upper_sha256, (a, b)
    again = bomemeta.train(ANALYTIC, [f"seed={2**64 + 1}", f"output_dir={tmp_path / 'again'}"])
    assert again.upper_sha256 == results[2**64 + 1].upper_sha256


@pytest.mark.parametrize("seed", [2**32, 2**64 + 1])
def test_every_stream_and_episode_of_a_large_seed_differs_from_seed_0(seed, tmp_path):
    stream = {
        "problem": {"name": "continual", "tasks": 2, "samples_per_task": 40, "test_samples_per_task": 20, "hidden": 8},
        "data": {"dataset": "digits"},
        "solver": {"name": "bome", "inner_steps": 1},
        "log": {"tensorboard": False},
    }  # fmt: skip
    episodes = {
        "imports": ["toy"],
        "problem": {"name": "few_shot", "ways": 3, "queries": 2, "test_queries": 2, "width": 4},
        "data": {"dataset": "toy"},
        "solver": {"name": "bome", "inner_steps": 1, "adapt_steps": 1, "barrier_steps": 1},
        "steps": 1, "tasks_per_step": 2, "evaluation": {"episodes": 2}, "log": {"tensorboard": False},
    }  # fmt: skip
    for name, config in (("stream", stream), ("episodes", episodes)):
        large, small = (
            bomemeta.train(config, [f"seed={s}", f"output_dir={tmp_path / name / str(s)}"])
            for s in (seed, 0)
        )
        assert large.upper_sha256 != small.upper_sha256


# Problems that draw


DRAWING: dict[str, Any] = {
    "imports": ["drawing"],
    "problem": {"name": "drawing"},
    "solver": {"name": "bome", "inner_steps": 3, "inner_lr": 0.05, "lower_lr": 0.05, "upper_lr": 0.05},
    "steps": 4, "dtype": "float64", "log": {"tensorboard": False},
}  # fmt: skip
WHERE = ("losses", "init_lower", "setup")
REFUSED = {
    "init_upper": "every random number from `generator`",
    "numpy": "numpy's global generator",
}


def drawn(tmp_path: Any, name: str, *overrides: str) -> bomemeta.Result:
    torch.manual_seed(len(name))  # what the caller's generators are at must not matter
    np.random.seed(len(name))
    random.seed(name)
    return bomemeta.train(DRAWING, [*overrides, f"output_dir={tmp_path / name}"])


@pytest.mark.parametrize(
    ("where", "fixed"), [*((where, "true") for where in WHERE), ("losses", "false")]
)
def test_a_problem_that_draws_repeats_its_bits(where, fixed, tmp_path):
    keys = (f"problem.where={where}", f"problem.fixed={fixed}", "tasks_per_step=4")
    first = drawn(tmp_path, "first", *keys)
    assert drawn(tmp_path, "second run", *keys).upper_sha256 == first.upper_sha256
    plain = drawn(tmp_path, "plain", *keys, "problem.where=nothing")
    assert plain.upper_sha256 != first.upper_sha256  # it does draw
    other = drawn(tmp_path, "other", *keys, "seed=1")
    assert other.upper_sha256 != first.upper_sha256  # and draws by the seed
    drawn(tmp_path, "half", *keys, "steps=2")
    assert bomemeta.resume(tmp_path / "half", ["steps=4"]).upper_sha256 == first.upper_sha256


@pytest.mark.parametrize("where", REFUSED)
def test_what_cannot_be_seeded_by_task_is_refused(where, tmp_path):
    with pytest.raises(ConfigError, match=rf"Drawing\..*{REFUSED[where]}"):
        drawn(tmp_path, "run", f"problem.where={where}")


def test_vmap_and_shards_do_not_change_what_a_task_draws(tmp_path):
    """vmap cannot draw by task, so such a function is looped over; the numbers are then a task's own
    whatever is beside it in a shard. Rounding differs with the order of a sum.
    """
    runs = [
        drawn(tmp_path, name, *keys)
        for name, keys in {
            "loop": (),
            "vmap": ("task_map=vmap",),
            "one": ("shards=1",),
            "four": ("shards=4",),
        }.items()
    ]
    for run in runs[1:]:
        torch.testing.assert_close(run.upper, runs[0].upper, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("problem", "solver"),
    [
        ("drawing", "lancbio"),
        ("drawing", "itd"),
        ("drawing_encoder", "bome"),
        ("drawing_encoder", "f2sa"),
    ],
)
def test_solvers_see_one_function_in_a_step(problem, solver, tmp_path):
    keys = (f"problem.name={problem}", f"solver={{name: {solver}}}", "steps=2")
    assert (
        drawn(tmp_path, "a", *keys).upper_sha256 == drawn(tmp_path, "another", *keys).upper_sha256
    )


def test_a_draw_differs_from_step_to_step_and_task_to_task(tmp_path):
    seeds = {
        Draws(seed, step, split, (task,)).seed_of(name, 0)
        for seed in (0, 1)
        for step in (0, 1)
        for split in ("train", "test")
        for task in (0, 1)
        for name in ("upper", "lower")
    }
    assert len(seeds) == 32


def test_the_callers_generators_are_left_alone(tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    wanted = torch.rand(1), np.random.rand(), random.random()
    for where in WHERE:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        bomemeta.train(
            DRAWING, ["steps=1", f"problem.where={where}", f"output_dir={tmp_path / where}"]
        )
        assert (torch.rand(1), np.random.rand(), random.random()) == wanted


def test_the_check_command_takes_a_drawing_problem_as_one_function():
    """Finite differences and the implicit hypergradient agree: f and g are what they were."""
    report = check(DRAWING, [], tasks=1, settle_steps=3, directions=1)
    compared = report.numbers["finite_differences"]
    assert len(compared) == 2
    for one in compared:
        assert one["found"] == pytest.approx(one["implicit"], rel=1e-5), one


def test_two_workers_draw_as_one_process_does(tmp_path):
    here = drawn(tmp_path, "here")
    there = drawn(tmp_path, "there", "workers=2", "cpus_per_worker=0.5")
    assert there.upper_sha256 == here.upper_sha256
