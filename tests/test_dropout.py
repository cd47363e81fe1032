"""`problem.dropout: key`: in training alone, from seed, step and episode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Toy, attached

import bomemeta
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.oracle import Term
from bomemeta.core.randomness import Draws
from bomemeta.errors import ConfigError
from bomemeta.problems.few_shot import FewShot

SMALL: dict[str, Any] = {"ways": 3, "queries": 2, "test_queries": 2, "batch_norm": "running"}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.Dropout(0.5), nn.Linear(16, 8))


def losses(problem: Any, tasks: list[int], split: Any = "train", **how: Any) -> Tensor:
    """f of each task at its first y."""
    how = {"task_map": "loop", "step": 4, **how}
    x = problem.init_upper(torch.Generator().manual_seed(1))
    if "head.weight" in x:  # zeros, which would see no features
        x["head.weight"] = x["head.weight"] + torch.linspace(-1, 1, 3)
    batch = problem.load(tasks, how["step"], split)
    draws = Draws(problem.seed, how["step"], split, tasks)
    oracle = LocalOracle(problem, x, batch, how["task_map"], draws=draws)
    return oracle.total(Term("upper", oracle.init_lower())).values[0]


@pytest.mark.parametrize("form", ["head", "network"])
def test_it_follows_from_the_episode_s_key(form: Any) -> None:
    off = attached(FewShot(**SMALL, backbone=net(), form=form))
    on = attached(FewShot(**SMALL, backbone=net(), form=form, dropout="key"))
    here = losses(on, [0, 1, 2, 3])
    assert not torch.isclose(here, losses(off, [0, 1, 2, 3])).any()
    assert torch.equal(here, losses(on, [0, 1, 2, 3], task_map="vmap"))
    # Cut anyhow, as among workers, and whatever was drawn before.
    torch.rand(5)
    assert torch.equal(here, torch.cat([losses(on, [0]), losses(on, [1, 2, 3])]))
    assert not torch.isclose(here, losses(on, [0, 1, 2, 3], step=5)).any()
    for split in ("validation", "test"):
        assert torch.equal(losses(on, [0, 1], split), losses(off, [0, 1], split))


def test_a_run_is_another_one_and_repeats() -> None:
    def digest(dropout: str, **keys: Any) -> str:
        problem = FewShot(**SMALL, backbone=net(), dropout=dropout)  # type: ignore[arg-type]
        solver = bomemeta.BOME(barrier="per_task")
        given = {"data": Toy(), "steps": 2, "tasks_per_step": 4, "workers": 0}  # fmt: skip
        evaluation = {"episodes": 4, "examine_steps": 0}
        return bomemeta.train(problem, solver, evaluation=evaluation, **given, **keys).upper_sha256  # type: ignore[arg-type]

    assert digest("key", shards=4) == digest("key", shards=4) != digest("off", shards=4)


def test_what_it_does_not_go_with_is_refused() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(256, 8))
    with pytest.raises(ConfigError, match=r"problem\.dropout: key, but the backbone has no layer"):
        attached(FewShot(**SMALL, backbone=plain, dropout="key"))
    with pytest.raises(ConfigError, match=r"problem\.micro_batch passes twice"):
        attached(FewShot(**SMALL, backbone=net(), dropout="key", micro_batch=4))
