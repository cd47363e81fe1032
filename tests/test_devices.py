"""Every solver and every kind of problem on a device that is not the driver's: nothing mixes the
two, and x has the same bits.

No GPU is needed: see elsewhere.py. What only a GPU can show, speed and its own rounding, is not
tested here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from elsewhere import DEVICE, elsewhere
from test_any_solver import NAMES
from test_continual_meta import run_config
from test_promises import FEW_SHOT, QUADRATIC, SHARED, STREAM
from test_regularisation import made_up

import bomemeta
from bomemeta.data import archives, newsgroups
from bomemeta.problems.analytic import Analytic
from bomemeta.registry import solvers

# Of those that torch's use_deterministic_algorithms names as without a deterministic version on a
# GPU, what a problem of ours might use.
NOT_REPEATABLE = {
    "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "nll_loss2d_forward", "median", "histc", "put_", "scatter_reduce",
    "upsample_bilinear2d_backward", "grid_sampler_2d_backward", "reflection_pad2d_backward", "_embedding_bag_backward", "max_unpool2d",
}  # fmt: skip


def check(job: dict[str, Any], folder: Path, **changes: Any) -> None:
    """Here and elsewhere: two steps, or with a stream four, the last of which replays what it has
    remembered.
    """
    sections = {
        key: {**job[key], **value} if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    job = {**job, "steps": 4 if job is STREAM else 2, **sections}
    here = bomemeta.train(job, [f"output_dir={folder / 'here'}", "task_map=vmap"])
    with elsewhere() as seen:
        there = bomemeta.train(job, [f"output_dir={folder / 'there'}"])
    assert (there.upper_sha256, there.metrics) == (here.upper_sha256, here.metrics)
    used = {operation._schema.name.removeprefix("aten::") for operation in seen.ran}
    assert "mul" in used  # it did compute there
    assert not used & NOT_REPEATABLE


def with_solver(job: dict[str, Any], name: str, **options: Any) -> dict[str, Any]:
    rate = {"upper_lr": 0.01} if "upper_lr" in solvers.get(name).__dataclass_fields__ else {}
    return {**job, "solver": {"name": name, **rate, **options}}


@pytest.mark.parametrize("name", NAMES)
def test_every_solver(name: str, tmp_path: Path) -> None:
    check(with_solver(QUADRATIC, name), tmp_path)


@pytest.mark.parametrize("name", ["lancbio", "bome", "itd"])
def test_one_lower_variable(name: str, tmp_path: Path) -> None:
    check(with_solver(SHARED, name), tmp_path)


@pytest.mark.parametrize(
    ("barrier", "statistics"), [("per_task", "transductive"), ("global", "inductive")]
)
def test_few_shot_heads(barrier: str, statistics: str, tmp_path: Path) -> None:
    check(
        FEW_SHOT,
        tmp_path,
        problem={"batch_norm": statistics},
        solver={"barrier": barrier, "diagnose_every": 1},
    )


def test_resnet(tmp_path: Path) -> None:
    problem = {name: value for name, value in FEW_SHOT["problem"].items() if name != "width"} | {
        "backbone": "resnet12"
    }
    job = {**FEW_SHOT, "problem": problem, "tasks_per_step": 2, "shards": 1}
    check({**job, "evaluation": {"episodes": 1}}, tmp_path, steps=1)


@needs.learn2learn
@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "meta_sgd", "reptile"])
def test_few_shot_networks(name: str, tmp_path: Path) -> None:
    check(
        with_solver(FEW_SHOT, name, inner_steps=1), tmp_path, problem={"form": "network"}, steps=1
    )


@pytest.mark.parametrize("name", ["bome", "ctn", "agem"])
def test_a_stream(name: str, tmp_path: Path) -> None:
    check(with_solver(STREAM, name, inner_steps=1), tmp_path)


@pytest.mark.parametrize(
    "case", ["coreset", "minimax", "degenerate", "bamm_sensitive", "bamm_convex"]
)
def test_analytic_cases(case: str, tmp_path: Path) -> None:
    check(
        {
            **QUADRATIC,
            "problem": {"name": "analytic", "case": case},
            "tasks_per_step": 1,
            "shards": 1,
        },
        tmp_path,
    )


def test_continual_meta(tmp_path: Path) -> None:
    check(run_config(tmp_path), tmp_path)


def test_regularisation(tmp_path: Path) -> None:
    archives.write(tmp_path / newsgroups.FILE, made_up(), compress=True)
    data = {"dataset": "twenty_newsgroups", "root": str(tmp_path)}
    check(
        {
            **with_solver(SHARED, "bome"),
            "problem": {"name": "regularisation", "blocks": 3},
            "data": data,
        },
        tmp_path,
    )


@pytest.mark.parametrize(("job", "more"), [(FEW_SHOT, 5), (SHARED, 0)])
def test_a_call_takes_one_copy_there_and_one_back(
    job: dict[str, Any], more: int, tmp_path: Path
) -> None:
    """More go there for a fresh batch of four tensors, and for a count in the answer; a block's
    data stay from the second round on.
    """
    sent, brought = [], []
    for steps in (2, 3):
        with elsewhere() as seen:
            bomemeta.train(job, [f"output_dir={tmp_path / str(steps)}", f"steps={steps}"])
        sent.append(len(seen.sent))
        brought.append(len(seen.brought))
    calls = brought[1] - brought[0]
    assert calls % job["shards"] == 0
    assert sent[1] - sent[0] == calls * (1 + more)


def test_a_mixture_is_found() -> None:
    with elsewhere():
        there, here = torch.ones(2, device=DEVICE), torch.ones(2)
        assert (
            there * torch.tensor(2.0)
        ).sum().item() == 4.0  # a number may come from here, as on a GPU
        assert there[torch.tensor([1])].device == DEVICE  # and indices
        with pytest.raises(RuntimeError, match="same device, but found meta and cpu"):
            there + here
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert there.cpu().numpy().tolist() == [1.0, 1.0]


def test_a_worker_computes_with_deterministic_algorithms(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    load = Analytic.load

    def watched(self: Analytic, *arguments: Any) -> Any:
        seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            )
        )
        return load(self, *arguments)

    monkeypatch.setattr(Analytic, "load", watched)
    # The check of the problem is the driver's, before any worker computes.
    monkeypatch.setattr("bomemeta.session.check_at_start", lambda *_, **__: None)
    bomemeta.train(QUADRATIC, [f"output_dir={tmp_path / 'run'}", "steps=1"])
    assert {*seen} == {(True, True)}
    assert (
        not torch.are_deterministic_algorithms_enabled()
    )  # this process may be a user's, who wants the others
