"""What follows from a run's seed: every seed is a run of its own, and the small ones keep theirs."""

from __future__ import annotations

import itertools

import pytest
import torch

import bomemeta
from bomemeta.core.randomness import generator, mixed_seed

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
