"""Workers behind leaders, on a real cluster with real kills: the bits are the serial run's."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bomemeta
from bomemeta.distributed import cluster
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.leaders import LedTransport, group_sizes, subtree
from bomemeta.distributed.ray_transport import RayTransport
from bomemeta.distributed.summation import TreeSum
from bomemeta.distributed.transport import ShardCall
from bomemeta.errors import ClusterError, DivergenceError

WORKERS = 3
# Lower variables that persist; two leaders, of eight shards and three.
JOB: dict[str, Any] = {
    "imports": [str(Path(__file__).with_name("mortal.py"))],
    "problem": {"name": "mortal_analytic", "case": "quadratic", "tasks": 13},
    "solver": {"name": "bome", "inner_steps": 4, "lower_momentum": 0.5, "upper_lr": 0.01, "lower_lr": 0.05},
    "steps": 8, "tasks_per_step": 12, "shards": 11,
    "log": {"tensorboard": False},
}  # fmt: skip
LED = [f"workers={WORKERS}", "leaders_above=2", "cpus_per_worker=0.1", "start_timeout_s=900"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bomemeta.Result:
    return bomemeta.train(JOB, [f"output_dir={tmp_path_factory.mktemp('reference') / 'run'}"])


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with cluster.local(RayOptions(workers=WORKERS, cpus_per_worker=0.2), print):
        yield


@pytest.fixture
def transports(monkeypatch: pytest.MonkeyPatch) -> list[LedTransport]:
    """Those that a run makes."""
    made: list[LedTransport] = []
    begin = LedTransport.__init__

    def init(self: LedTransport, *given: Any) -> None:
        begin(self, *given)
        made.append(self)

    monkeypatch.setattr(LedTransport, "__init__", init)
    return made


class Echo:
    def __init__(self, device: str) -> None: ...

    def execute(self, order: str, broadcast: np.ndarray, *states: np.ndarray) -> tuple[Any, ...]:
        if order == "diverge":
            raise DivergenceError("step 3: the loss is nan")
        if order == "foreign":
            there = sys.modules["only_there"] = types.ModuleType("only_there")
            exec("class Odd(Exception): pass", vars(there))
            raise there.Odd("step 3 has no loss")
        if order == "locked":
            locked = ValueError("step 4 has no loss")
            locked.lock = threading.Lock()  # type: ignore[attr-defined]
            raise locked
        return f"{order} done", *(state + broadcast[0] for state in states)


def until(condition: Callable[[], Any], timeout_s: float = 600.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.05)
    return found


def status(pid: int) -> str:
    """As in /proc/PID/stat: T is stopped, an empty text is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_groups_are_subtrees():
    assert group_sizes(5) == [2, 2, 1]
    assert group_sizes(48) == [8] * 6
    assert group_sizes(1024) == [32] * 32
    for workers in range(1, 200):
        assert sum(group_sizes(workers)) == workers
    shares = np.random.default_rng(0).standard_normal((70, 3)).astype(np.float32)
    for calls in range(1, 70):
        whole = TreeSum(calls)
        for leaf in range(calls):
            whole.add(leaf, shares[leaf])
        for leaders in range(1, 20):
            size = subtree(calls, leaders)
            above = TreeSum(-(-calls // size))
            for group, first in enumerate(range(0, calls, size)):
                part = TreeSum(min(size, calls - first))
                for leaf in range(first, min(first + size, calls)):
                    part.add(leaf - first, shares[leaf])
                above.add(group, part.total)
            assert np.array_equal(above.total, whole.total), (calls, leaders)
            assert -(-calls // size) <= leaders


def test_states_replies_and_errors_pass_through(ray_cluster):
    options = RayOptions(workers=WORKERS, cpus_per_worker=0.1, start_timeout_s=900.0)
    states = [np.full(3, number, np.float32) for number in range(14)]
    calls = [ShardCall(f"{n}", tuple(states[2 * n : 2 * n + 2]), 2) for n in range(7)]
    one = np.ones(1, np.float32)
    with closing(LedTransport(Echo, options)) as transport:
        answer = transport.run(one, calls)
        assert [reply.reply for reply in answer.replies] == [f"{n} done" for n in range(7)]
        moved = [state for reply in answer.replies for state in reply.states]
        again = transport.run(one, [calls[0]._replace(states=tuple(moved[12:]))])
        assert [array[0] for array in transport.fetch(moved)] == list(range(1, 15))
        assert [array[0] for array in transport.fetch(again.replies[0].states)] == [14, 15]
        with pytest.raises(DivergenceError, match="step 3: the loss is nan"):
            transport.run(one, [*calls[:5], ShardCall("diverge", (), 2)])
        assert len(transport.run(one, calls).replies) == 7
        until(lambda: transport.run(one, calls) and transport.workers == (WORKERS, WORKERS))
        members, leaders = transport.worker_pids(), transport.leader_pids()
        assert len(leaders) == 2
        assert len({*members, *leaders}) == WORKERS + 2
    until(lambda: not any(map(status, [*members, *leaders])))


@pytest.mark.parametrize("made", [RayTransport, LedTransport])
def test_an_exception_that_cannot_come_here_is_reported_by_its_text(ray_cluster, made):
    """Of a module that the driver has not, and one that cannot be pickled: with leaders as without."""
    options = RayOptions(workers=2, cpus_per_worker=0.1, start_timeout_s=900.0)
    texts = {"foreign": "only_there.Odd: step 3 has no loss", "locked": "step 4 has no loss"}
    with closing(made(Echo, options)) as transport:
        for order, text in texts.items():
            with pytest.raises(
                ClusterError, match=f"a worker raised .*{text}; the exception itself"
            ):
                transport.run(np.ones(1, np.float32), [ShardCall(order)])


def test_same_bits_with_a_member_killed(reference, ray_cluster, transports, tmp_path):
    mark = tmp_path / "mark"
    arm = ["problem.strike_step=4", "problem.strike_signal=SIGKILL", f"problem.strike_mark={mark}"]
    output = f"output_dir={tmp_path / 'run'}"
    result = bomemeta.train(JOB, [output, *LED, *arm, "reduce=tree"])
    assert mark.exists()
    assert len(transports) == 1
    assert transports[0].replacements == 1
    assert any("of the leader with pid" in note and "died" in note for note in result.notes)
    assert result.upper_sha256 == reference.upper_sha256
    assert result.metrics == reference.metrics


def test_same_bits_with_a_leader_killed_in_a_round(reference, ray_cluster, transports, tmp_path):
    """Its member that has stopped, and would never answer, goes with it."""
    mark, struck = tmp_path / "mark", []
    arm = ["problem.strike_step=4", "problem.strike_signal=SIGSTOP", f"problem.strike_mark={mark}"]

    def strike() -> None:
        until(mark.exists)
        reported = [each for transport in transports for each in transport._fleet.reports()]
        leader_of = {member: each.leader for each in reported for member in each.members}
        stopped = until(lambda: [pid for pid in leader_of if status(pid) == "T"])
        os.kill(leader_of[stopped[0]], signal.SIGKILL)
        struck.extend(stopped)

    killer = threading.Thread(target=strike)
    killer.start()
    result = bomemeta.train(JOB, [f"output_dir={tmp_path / 'run'}", *LED, *arm])
    killer.join()
    assert len(struck) == 1
    assert any(note.startswith("leader ") and "died" in note for note in result.notes)
    assert result.upper_sha256 == reference.upper_sha256
    assert result.metrics == reference.metrics
    until(lambda: not status(struck[0]))
