"""A shared y stays with the workers that compute with it: over Ray, with workers killed in every
round and between them. The reference is the serial run, bit for bit.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bomemeta
from bomemeta.assembly import trainer_of
from bomemeta.checkpoint import Checkpoint
from bomemeta.config import load_config
from bomemeta.distributed import cluster
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.collective import Collective
from bomemeta.distributed.resident import Resident
from bomemeta.distributed.slots import Phase, Slot
from bomemeta.doctor import examine
from bomemeta.evaluation import own_metrics

MORTAL = str(Path(__file__).with_name("mortal.py"))
# y with velocity, five uneven blocks in three shards, 4 + 1 rounds and a kernel more in a step.
JOB: dict[str, Any] = {
    "imports": [MORTAL],
    "problem": {
        "name": "mortal_hyper_cleaning", "train": 62, "validation": 33, "selection": 10, "weights": "sigmoid", "blocks": 5,
    },
    "data": {"dataset": "toy_labelled"},
    "solver": {
        "name": "bome", "inner_steps": 4, "inner_lr": 0.1, "lower_lr": 0.1, "lower_momentum": 0.5, "upper_lr": 10.0,
        "inner_optimizer": "momentum", "inner_momentum": 0.5,
    },
    "steps": 6, "shards": 3, "dtype": "float64", "checkpoint": {"every_steps": 2}, "log": {"tensorboard": False},
}  # fmt: skip
X_NUMBERS = 62
RAY = ["cpus_per_worker=0.5", "reduce=collective"]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with cluster.local(RayOptions(workers=3, cpus_per_worker=0.5), print):
        yield


@pytest.fixture(scope="module")
def reference() -> Checkpoint:
    with trainer_of(load_config(JOB)) as trainer:
        trainer.advance(trainer.steps)
        return trainer.checkpoint()


def assert_same(found: Checkpoint, wanted: Checkpoint) -> None:
    assert torch.equal(found.upper["weights"], wanted.upper["weights"])
    assert torch.equal(found.lower[0], wanted.lower[0])
    assert found.solver["lower_layout"] == wanted.solver["lower_layout"]


def test_who_comes_new_gets_y_from_the_others(ray_cluster):
    """One of two members is killed; when its replacement has y, the other is. The driver has only a
    handle all the time.
    """
    with trainer_of(load_config(JOB, ["workers=2", *RAY, "steps=100000"])) as trainer:
        transport: Any = trainer.transport
        deadline = time.monotonic() + 400

        def step_until(condition: Callable[[list[int]], bool]) -> list[int]:
            while not condition(pids := transport.worker_pids()):
                assert time.monotonic() < deadline, "no replacement came in time"
                time.sleep(0.2)
                trainer.step()
            return pids

        first, second = step_until(lambda pids: len(pids) == 2)
        trainer.step()
        os.kill(first, signal.SIGKILL)
        trainer.step()
        step_until(lambda pids: len(pids) == 2 and first not in pids)
        trainer.step()
        assert isinstance(trainer.state.lower.handles[0], Resident)
        os.kill(second, signal.SIGKILL)
        trainer.checkpoint()  # from the one that is left
        trainer.step()
        steps, found = trainer.state.step, trainer.checkpoint()
    with trainer_of(load_config(JOB, ["steps=100000"])) as alone:
        alone.advance(steps)
        assert_same(found, alone.checkpoint())


def test_a_step_costs_the_driver_x_and_not_y(ray_cluster):
    config = load_config(JOB, ["workers=2", *RAY, "steps=100000"])
    report = examine(config)
    together = report.values["together"]
    with trainer_of(config) as trainer:
        transport: Any = trainer.transport
        deadline = time.monotonic() + 400
        while len(transport.worker_pids()) < 2:
            trainer.step()  # by whoever is there
            assert time.monotonic() < deadline, "no second worker came in time"
        metrics = [trainer.step() for _ in range(2)][-1]
        y = trainer.checkpoint().lower[0].numel() // 2  # half of it is the velocity
    # grad_x f, grad_x q and 7 numbers, of which one has half the bytes.
    assert metrics["driver_bytes"] == 8 * (2 * X_NUMBERS + 7) - 4
    # 4 rounds of |y| + 1 and one of 2 (|x| + |y|) + 3 numbers on two members, the one with two shards
    # that are one node of the tree, the other with one: each sends half, twice. And who has which y.
    sent = 4 * (y + 1) + 2 * (X_NUMBERS + y) + 3
    assert metrics["exchanged_bytes"] == pytest.approx(8 * sent, abs=8 * 5 + 8)
    # And that is what doctor says before.
    assert (together["to_driver"], together["kernels"], together["members"]) == (
        metrics["driver_bytes"],
        1,
        2,
    )
    assert together["exchanged"] == pytest.approx(metrics["exchanged_bytes"], abs=8 * 5 + 40)
    assert together["down"] == 8 * X_NUMBERS  # x, for the one kernel
    assert together["member"] > 5 * 8 * y  # two of y with its velocity, and what is added
    (line,) = (each.text for each in report.findings if each.topic == "bytes per step")
    assert "y stays with 2 members" in line
    assert "2 |y| (W - 1) / W in each reduce of W = 2" in line


@pytest.mark.parametrize(
    ("sent", "noted", "keys"),
    [
        ("SIGKILL", "died", ()),
        # Each of five is found out after a minute of silence; in less a replacement may not have come
        # through its first step, in which it imports much, on a busy machine.
        pytest.param(
            "SIGSTOP", "did not answer", ("step_timeout_s=60",),
            marks=pytest.mark.slow(reason="minutes of silence: pytest -m slow -k SIGSTOP"),
        ),
    ],
)  # fmt: skip
def test_same_bits_with_a_worker_killed_or_stopped_in_every_round(
    sent, noted, keys, reference, ray_cluster, tmp_path
):
    """In step k when it comes to its load number k: 5 rounds in a step, 6 steps. Before each there are
    two who have y.
    """
    notes: list[str] = []
    struck = [f"problem.strike_rounds={tmp_path}", f"problem.strike_signal={sent}"]
    config = load_config(JOB, ["workers=3", *RAY, *struck, *keys])
    with trainer_of(config, notes.append) as trainer:
        transport: Any = trainer.transport
        deadline = time.monotonic() + 900
        for _ in range(trainer.steps):
            while trainer.state.step > 0 and len(transport.worker_pids()) < 2:
                assert time.monotonic() < deadline, "no replacement came in time"
                own_metrics(trainer)  # asks the workers, who are not struck there
                time.sleep(0.2)
            if trainer.state.step > 0:
                own_metrics(trainer)
            trainer.step()
        assert_same(trainer.checkpoint(), reference)
    assert {path.name for path in tmp_path.iterdir()} >= set("01234")
    assert sum(noted in note for note in notes) >= 5, notes


@pytest.mark.slow(reason="a worker starts for every round of a step: pytest -m slow -k coming_in")
def test_same_bits_with_a_worker_coming_in_every_round(reference, ray_cluster, tmp_path):
    """Before each step one of two is killed. Its replacement is built while the other, alone with all
    three shards, is in round 0 of step 1, round 1 of step 2 and so on; and that other is the next
    to be killed, so what the step after has of y is what the newcomer was given.
    """
    joins = [f"problem.strike_joins={tmp_path}", "problem.strike_loads=3"]
    with trainer_of(load_config(JOB, ["workers=2", *RAY, *joins])) as trainer:
        transport: Any = trainer.transport
        deadline = time.monotonic() + 500
        while len(transport.worker_pids()) < 2:
            assert time.monotonic() < deadline, "no second worker came in time"
            own_metrics(trainer)
            time.sleep(0.2)
        trainer.step()
        leaves, stays = transport.worker_pids()
        for step in range(1, trainer.steps):
            (tmp_path / "hold").write_text(str(step))
            os.kill(leaves, signal.SIGKILL)
            own_metrics(trainer)  # the driver hears of it
            assert transport.worker_pids() == [stays]
            trainer.step()
            assert (tmp_path / f"came{step}").exists(), "nobody came in this round"
            while len(pids := transport.worker_pids()) < 2:
                assert time.monotonic() < deadline, "the newcomer was not taken in"
                own_metrics(trainer)
                time.sleep(0.2)
            (newcomer,) = set(pids) - {stays}
            trainer.checkpoint()
            leaves, stays = stays, newcomer
        assert_same(trainer.checkpoint(), reference)


class Two:
    """A fleet of a newcomer and one who is asked for a sign of life, who answers to who waits."""

    waiting = True

    def __init__(self, newcomer: Slot, asked: Slot) -> None:
        self.slots = [newcomer, asked]
        self.waited = False

    def in_phase(self, phase: Phase) -> dict[int, Slot]:
        return {slot.index: slot for slot in self.slots if slot.phase is phase}

    def heard(self, until: float | None) -> Iterator[tuple[Slot, bool]]:
        if until is None:
            self.waited = True
            yield self.slots[1], False

    def settle(self, slot: Slot, overdue: bool) -> None:
        slot.phase = Phase.IDLE


@pytest.mark.parametrize("holder", ["asked", "newcomer"])
def test_a_kernel_does_not_begin_with_newcomers_alone(holder):
    newcomer, asked = Slot(0), Slot(1)
    newcomer.phase, asked.phase = Phase.IDLE, Phase.DRAINING
    newcomer.process, asked.process = "newcomer", "asked"  # type: ignore[assignment]
    fleet = Two(newcomer, asked)
    group: Any = Collective.__new__(Collective)  # without a store
    group._fleet, group._epoch, group._present = fleet, 0, []
    group._holders = [(0 if holder == "newcomer" else 1, holder)]
    found = group._members(3)
    assert found == ([newcomer, asked] if holder == "asked" else [newcomer])
    assert fleet.waited == (holder == "asked")


def test_a_run_goes_back_to_its_checkpoint_only_where_all_are_lost(
    reference, ray_cluster, tmp_path
):
    result = bomemeta.train(
        JOB,
        ["workers=1", *RAY, f"output_dir={tmp_path / 'run'}", "problem.strike_step=3",
         f"problem.strike_mark={tmp_path / 'mark'}"],
    )  # fmt: skip
    assert any(
        "all that had it are gone. Going back to the checkpoint of step 2" in note
        for note in result.notes
    ), result.notes
    assert_same(
        bomemeta.checkpoint.load_latest(result.run_dir / "checkpoints").checkpoint, reference
    )
