"""`load_ahead`: the next step's tasks are loaded in a thread while this one computes, and nobody
can tell but by the clock.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import Toy, attached

import bomemeta
from bomemeta.assembly import BuildWorker, _loads_ahead
from bomemeta.config import load_config
from bomemeta.core.solver import LowerStates
from bomemeta.distributed.ahead import Ahead, Asked
from bomemeta.distributed.rounds import StepRun
from bomemeta.distributed.worker import Request, ShardWorker, variant_of
from bomemeta.errors import DataError
from bomemeta.problems.few_shot import FewShot
from bomemeta.solvers.bome import BOME

JOB: dict[str, Any] = {
    "imports": ["toy"],
    "problem": {"name": "few_shot", "width": 4, "ways": 3, "queries": 2},
    "data": {"dataset": "toy"},
    "solver": {"name": "bome", "inner_steps": 2, "upper_lr": 0.01},
    "steps": 6,
    "tasks_per_step": 5,
    "shards": 2,
    "evaluation": {"episodes": 4, "every_steps": 2, "validation_episodes": 3},
    "log": {"tensorboard": False},
}


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Which thread drew which episode: `main` or `ahead`, and its key."""
    found: list[tuple[str, tuple[int, ...]]] = []
    plain = Toy.episode

    def episode(self: Toy, split: Any, spec: Any, key: tuple[int, ...]) -> Any:
        main = threading.current_thread() is threading.main_thread()
        found.append(("main" if main else "ahead", key))
        return plain(self, split, spec, key)

    monkeypatch.setattr(Toy, "episode", episode)
    return found


def trained(folder: Path, *keys: str) -> Any:
    return bomemeta.train(JOB, [f"output_dir={folder}", *keys])


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.endswith("_s")} for line in found
    ]


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_same_bits_and_the_tasks_come_from_the_thread(
    shards: int, tmp_path: Path, heard: list[tuple[str, tuple[int, ...]]]
) -> None:
    off = trained(tmp_path / "off", f"shards={shards}", "load_ahead=false")
    assert {thread for thread, _ in heard} == {"main"}
    drawn = sorted(key for _, key in heard)
    heard.clear()
    on = trained(tmp_path / "on", f"shards={shards}", "load_ahead=true")
    assert (on.upper_sha256, on.metrics) == (off.upper_sha256, off.metrics)
    assert lines(tmp_path / "on") == lines(tmp_path / "off")
    # Nothing is drawn twice; only the first step's tasks, validation and test are drawn where they
    # are computed.
    assert sorted(key for _, key in heard) == drawn
    train = [(thread, task) for thread, (_, split, task) in heard if split == 0]
    assert [task for thread, task in train if thread == "ahead"] == list(range(5, 30))
    assert all(thread == "main" for thread, (_, split, _) in heard if split > 0)


def test_same_bits_on_a_worker(tmp_path: Path) -> None:
    """The one test here that starts Ray."""
    from bomemeta.distributed import cluster

    off = trained(tmp_path / "off", "load_ahead=false")
    with cluster.local(cluster.RayOptions(workers=1), print):
        on = trained(tmp_path / "on", "workers=1", "cpus_per_worker=0.5", "load_ahead=true")
    assert (on.upper_sha256, on.metrics) == (off.upper_sha256, off.metrics)


def requests(
    worker_calls: list[tuple[tuple[int, ...], int]], next_ids: tuple[int, ...]
) -> list[Request]:
    """Requests for these tasks and steps, all of which announce `next_ids`."""
    asked: list[Request] = []

    class Noted:
        collective = False

        def run(self, broadcast: np.ndarray, calls: Any, meanwhile: Any) -> Any:
            asked.append(calls[0].request._replace(next_ids=next_ids))
            raise StopIteration

    problem = attached(FewShot(width=4, ways=3, queries=2))
    solver = BOME(inner_steps=2)
    upper = solver.start(problem.init_upper(torch.Generator().manual_seed(0)), 9)
    for ids, step in worker_calls:
        with pytest.raises(StopIteration):
            solver.step(
                upper,
                LowerStates.none(),
                StepRun(Noted(), ids, 1, step=step, steps=9, persistent=False),
            )  # type: ignore[arg-type]
    return asked


def test_a_wrong_guess_does_no_harm() -> None:
    problem = attached(FewShot(width=4, ways=3, queries=2))
    x = torch.cat(
        [
            tensor.reshape(-1)
            for tensor in problem.init_upper(torch.Generator().manual_seed(0)).values()
        ]
    ).numpy()

    def worker(load_ahead: bool) -> ShardWorker:
        return ShardWorker(lambda changes: variant_of(problem, changes), "loop", "cpu", load_ahead)

    calls = [((0, 1), 0), ((8, 9), 1), ((8, 9), 1), ((4, 5), 2), ((2, 3), 1)]
    plain, ahead = worker(False), worker(True)
    for request in requests(calls, (4, 5)):
        (_, want), (_, got) = plain.execute(request, x), ahead.execute(request, x)
        assert np.array_equal(got, want)


def test_what_is_held_is_one_batch_and_what_is_expected_does_not_pile_up() -> None:
    loaded: list[Asked] = []

    def load(asked: Asked) -> dict[str, torch.Tensor]:
        loaded.append(asked)
        return {"ids": torch.tensor(asked.task_ids)}

    ahead = Ahead(load)
    for step in range(50):  # the guesses are of another worker's shard
        mine, guess = (
            Asked((step,), step, "train", ""),
            Asked((1000 + step,), step + 1, "train", ""),
        )
        assert ahead.batch(mine, guess)["ids"].tolist() == [step]
        assert len(ahead._expected) <= 2
    assert {asked for asked in loaded if asked.task_ids[0] < 1000} == {
        Asked((step,), step, "train", "") for step in range(50)
    }


def test_an_error_is_met_where_it_is_due_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Toy.episode
    threads: list[bool] = []

    def episode(self: Toy, split: Any, spec: Any, key: tuple[int, ...]) -> Any:
        if split == "train" and key[-1] == 17:  # of step 3
            threads.append(threading.current_thread() is threading.main_thread())
            raise DataError("episode 17 is torn")
        return plain(self, split, spec, key)

    monkeypatch.setattr(Toy, "episode", episode)
    with pytest.raises(DataError, match=r"^episode 17 is torn$") as raised:
        trained(tmp_path / "run", "load_ahead=true")
    assert threads == [False, True]
    assert raised.value.__cause__ is None
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 1, 2]


def test_an_error_in_the_thread_alone_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = trained(tmp_path / "off", "load_ahead=false")
    plain = Toy.episode

    def episode(self: Toy, split: Any, spec: Any, key: tuple[int, ...]) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise OSError("the file server is busy")
        return plain(self, split, spec, key)

    monkeypatch.setattr(Toy, "episode", episode)
    assert trained(tmp_path / "on", "load_ahead=true").upper_sha256 == off.upper_sha256


def test_tasks_that_cannot_be_told_are_not_announced(
    tmp_path: Path, heard: list[tuple[str, tuple[int, ...]]]
) -> None:
    trained(tmp_path / "run", "load_ahead=true", "problem.fixed_tasks=6", "tasks_per_step=2")
    assert {thread for thread, _ in heard} == {"main"}


@pytest.mark.parametrize(
    ("keys", "device", "on"),
    [
        ([], "cpu", False),
        ([], "cuda:0", True),
        (["cpus_per_worker=2"], "cpu", False),
        (["load_ahead=true"], "cpu", True),
        (["load_ahead=false"], "cuda:0", False),
    ],
)
def test_auto_is_on_where_a_gpu_computes(keys: list[str], device: str, on: bool) -> None:
    assert _loads_ahead(load_config(JOB, keys), device) is on


def test_it_is_no_part_of_a_runs_identity() -> None:
    one, other = (load_config(JOB, [f"load_ahead={value}"]) for value in ("true", "false"))
    assert one.result_keys() == other.result_keys()
    assert BuildWorker.of(one)("cpu")._ahead is not None
