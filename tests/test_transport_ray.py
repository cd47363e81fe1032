"""The ray transport on a real cluster with real kills, held against the serial transport."""

import ctypes
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, TaskCancelledError

import bomemeta
from bomemeta.data import archives
from bomemeta.distributed import cluster, ray_round
from bomemeta.distributed.actor import LATE, actor_class
from bomemeta.distributed.fleet import Fleet
from bomemeta.distributed.losses import WorkerLost, WorkerUnavailable, loss_of
from bomemeta.distributed.ray_round import RayRound
from bomemeta.distributed.ray_transport import RayOptions, RayTransport
from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.slots import Phase
from bomemeta.distributed.transport import ShardCall
from bomemeta.errors import ClusterError, ClusterLost, ConfigError, DivergenceError

SMALL = 0.1  # CPUs of a test's worker: several transports share the module's cluster


class Order(NamedTuple):
    """What the toy worker does on the way to its answer. `once` marks trouble that only the first
    try meets.
    """

    scale: float = 1.0
    sleep_s: float = 0.0
    trouble: str = ""
    once: str = ""
    times: int = 1
    imported: str = ""  # it answers whether it has this module
    reads: str = ""  # an archive whose x it reads and holds


def lines_in(path: str) -> int:
    return len(Path(path).read_text().splitlines()) if Path(path).exists() else 0


class Toy:
    def __init__(self, device: str) -> None:
        self.device = device

    def execute(self, order: Order, broadcast: np.ndarray, *states: np.ndarray):
        if order.trouble and not (order.once and lines_in(order.once) >= order.times):
            if order.once:
                with open(order.once, "a") as file:
                    print(os.getpid(), file=file)
            make_trouble(order.trouble)
        if order.imported:
            return (order.imported in sys.modules,)
        if order.reads:
            os.environ["BOMEMETA_CACHE"] = str(Path(order.reads).with_suffix(".cache"))
            self.held = archives.read(Path(order.reads), ["x"])["x"]
            float(self.held.sum())
        time.sleep(order.sleep_s)
        if order.reads:
            return ((memory_of("x.npy"), os.getpid()),)
        total = (torch.tensor(broadcast) * order.scale).sum().numpy()
        moved = [state + total for state in states]
        return (
            float(total),
            os.getpid(),
            torch.get_num_threads(),
            self.device,
            broadcast.flags.writeable,
        ), *moved


def memory_of(name: str) -> tuple[int, int]:
    """KiB of this process's maps of the file: in memory, and of those its own."""
    there, resident, own = False, 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            there = line.endswith(name)
        elif there:
            resident += int(rest[0]) if first == "Rss:" else 0
            own += int(rest[0]) if first == "Anonymous:" else 0
    return resident, own


def make_trouble(trouble: str) -> None:
    if trouble == "raise":
        raise DivergenceError("step 3: the loss is nan")
    if trouble == "none":  # `once` is marked all the same
        return
    if trouble == "crash":
        ctypes.string_at(0)
    os.kill(os.getpid(), {"die": signal.SIGKILL, "stop": signal.SIGSTOP}[trouble])
    time.sleep(60)


def failing_factory(device: str) -> Toy:
    raise ConfigError(f"no such problem on {device}")


def numbers(round_):
    return [reply.reply[0] for reply in round_.replies]


X = np.linspace(-1.0, 2.0, 10_001, dtype=np.float32)


EVENTS: list[str] = []


@pytest.fixture(scope="module")
def home():
    """Three workers, on the cluster that this transport starts; the others join it."""
    environment = dict(os.environ)
    transport = RayTransport(
        Toy, RayOptions(workers=3, cpus_per_worker=0.5, step_timeout_s=60.0), EVENTS.append
    )
    all_ready(transport, 3)
    processes = ray_processes()
    yield transport
    transport.close()
    transport.close()
    assert not ray.is_initialized()
    deadline = time.monotonic() + 10
    while (
        left := [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    ) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert {name: value for name, value in os.environ.items() if name.startswith("RAY")} == {
        name: value for name, value in environment.items() if name.startswith("RAY")
    } | {"RAY_CLIENT_MODE": os.environ.get("RAY_CLIENT_MODE")}  # set by `import ray`
    with pytest.raises(ClusterError, match="closed"):
        transport.run(X, [ShardCall(Order())])


@pytest.fixture(scope="module")
def single(home):
    """One worker, on a cluster that it joins and leaves as it was."""
    transport = RayTransport(
        Toy, RayOptions(workers=1, cpus_per_worker=SMALL, step_timeout_s=3.0), EVENTS.append
    )
    yield transport
    all_ready(transport, 1)
    (pid,), pids = transport.worker_pids(), home.worker_pids()
    transport.close()
    transport.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
    assert len(home.run(X, [ShardCall(Order())] * 3).replies) == 3
    assert set(pids) <= set(home.worker_pids())


def all_ready(transport: RayTransport, workers: int) -> None:
    while len(transport.worker_pids()) < workers:  # a transport looks at its workers in rounds only
        transport.run(X, [ShardCall(Order(sleep_s=0.1))])


def kill_all(transport: RayTransport) -> None:
    for pid in transport.worker_pids():
        os.kill(pid, signal.SIGKILL)


def ray_processes() -> list[int]:
    """All descendants of this process."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = [os.getpid()]
    for parent in found:
        found += [pid for pid, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def listening_addresses(pids: list[int]) -> set[str]:
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(descriptor).removeprefix("socket:[").rstrip("]"))
            except FileNotFoundError:
                continue
    addresses = set()
    for table, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in sockets:  # 0A: LISTEN
                message = np.array(
                    [int(columns[1][at : at + 8], 16) for at in range(0, len(columns[1]) - 5, 8)]
                )
                addresses.add(socket.inet_ntop(family, message.astype("<u4").tobytes()))
    return addresses


@pytest.mark.parametrize(
    ("x", "sent"),
    [(X, np.ndarray), (np.tile(X, 60), ray.ObjectRef)],
    ids=["in the calls", "through the store"],
)
def test_serial_and_any_number_of_workers_agree(x, sent, home, single):
    calls = [
        ShardCall(Order(scale=scale), (np.full(5, scale), np.ones(2)), 2)
        for scale in (0.1, -3.0, 7.7, 2.0, 1e-3)
    ]
    assert isinstance(cluster.outgoing(x, len(calls)), sent)
    serial = SerialTransport(Toy, threads=1)
    expected = serial.run(x, calls)
    expected_states = [serial.fetch(reply.states) for reply in expected.replies]
    with closing(RayTransport(Toy, RayOptions(workers=2, cpus_per_worker=SMALL))) as two:
        for transport in (single, two, home):
            got = transport.run(x, calls)
            assert numbers(got) == numbers(expected)
            assert {reply.reply[2:] for reply in got.replies} == {
                (1, "cpu", False)
            }  # False: x is not to be written into
            for reply, states in zip(got.replies, expected_states, strict=True):
                for state, expected_state in zip(
                    transport.fetch(reply.states), states, strict=True
                ):
                    assert np.array_equal(state, expected_state)


def test_what_the_check_of_a_problem_had_imported_is_there_before_the_first_shard(home):
    torch.vmap(torch.nn.functional.cross_entropy)(torch.zeros(2, 3, 4), torch.zeros(2, 3).long())
    with closing(RayTransport(Toy, RayOptions(workers=1, cpus_per_worker=SMALL))) as transport:
        got = transport.run(X, [ShardCall(Order(imported=module)) for module in (*LATE, "sympy")])
    assert [reply.reply for reply in got.replies] == [True, True]


def test_workers_of_one_node_hold_what_they_read_once(home, tmp_path):
    all_ready(home, 3)
    size = 4 * 2**20
    np.savez_compressed(tmp_path / "a.npz", x=np.ones(size, np.uint8))
    order = Order(sleep_s=1.0, reads=str(tmp_path / "a.npz"))
    replies = [reply.reply for reply in home.run(X, [ShardCall(order)] * 3).replies]
    assert len({pid for _, pid in replies}) > 1
    assert [(resident >= size / 1024, own) for (resident, own), _ in replies] == [(True, 0)] * 3


def test_replies_come_in_the_order_of_the_calls(home):
    orders = [
        Order(scale=1, sleep_s=0.4),
        Order(scale=2, sleep_s=0.2),
        Order(scale=3),
        Order(scale=4),
    ]
    got = home.run(np.ones(2, np.float32), [ShardCall(order) for order in orders])
    assert numbers(got) == [2.0, 4.0, 6.0, 8.0]
    assert home.run(X, []).replies == []


@pytest.fixture
def beforehand(monkeypatch):
    """The numbers of the calls that were given to a worker while it was still at another."""
    found, begin = [], RayRound._begin

    def spy(self, slot, job):
        if slot.phase is Phase.BUSY:
            found.append(job)
        begin(self, slot, job)

    monkeypatch.setattr(RayRound, "_begin", spy)
    return found


def sleeping(*seconds):
    return [
        ShardCall(Order(scale=1.0 + number, sleep_s=sleep), kind=f"call {number}")
        for number, sleep in enumerate(seconds)
    ]


def test_a_worker_has_its_next_call_before_it_is_done(single, beforehand):
    all_ready(single, 1)
    expected = numbers(SerialTransport(Toy).run(X, sleeping(0, 0, 0)))
    assert numbers(single.run(X, sleeping(0, 0, 0))) == expected
    assert beforehand == []  # how long these calls take is not known yet
    assert numbers(single.run(X, sleeping(1, 1, 1))) == expected
    assert len(beforehand) == 2  # all but the first of three, whichever is taken for the longest
    # A worker that dies with one call in hand and one to follow: neither is lost, and the second
    # has no strike.
    before = single.replacements
    timer = threading.Timer(1.5, kill_all, [single])
    timer.start()
    assert numbers(single.run(X, sleeping(2.5, 0, 0))) == expected
    timer.join()
    assert single.replacements == before + 1
    assert len(beforehand) > 2


def test_a_call_that_waits_behind_a_late_one_is_given_to_another(home, beforehand):
    with closing(RayTransport(Toy, RayOptions(workers=2, cpus_per_worker=SMALL))) as transport:
        all_ready(transport, 2)
        for _ in range(
            2
        ):  # one worker is known to have the second call, the other the first and then the third
            transport.run(X, sleeping(0.4, 1.2, 0.1))
        beforehand.clear()
        late, other, third = transport.run(X, sleeping(3, 1.2, 0.1)).replies
        assert beforehand == [2]
        assert third.reply[1] == other.reply[1] != late.reply[1]
        expected = numbers(SerialTransport(Toy).run(X, sleeping(0, 0, 0)))
        for _ in range(2):  # what was taken back is not heard
            assert numbers(transport.run(X, sleeping(0, 0, 0))) == expected
        assert transport.replacements == 0


def phantoms(tries: int) -> int:
    """How often a worker is taken for dead, and another takes its place, because a call was taken
    back that may not have been sent yet.
    """
    found, dice = 0, random.Random(0)
    factory = cloudpickle.dumps(Toy)
    actor = None
    for _ in range(tries):
        if actor is None:
            actor = actor_class(SMALL, 0, None).remote()
            ray.get(actor.build.remote(factory, 1, cluster.importable_paths()))
        begun, back = (
            actor.execute.remote(Order(sleep_s=seconds), 0, "plain", X)
            for seconds in (dice.random() * 0.004, 0.001)
        )
        time.sleep(dice.random() * 0.006)
        ray.cancel(back)
        try:
            ray.get([begun, actor.ping.remote()], timeout=20)  # a phantom's takes 30 s
        except (GetTimeoutError, RayActorError):
            found, actor = found + 1, None
        with suppress(TaskCancelledError):
            ray.get(back)
    return found


def test_a_call_that_is_taken_back_before_it_is_sent_costs_no_worker(home):
    assert phantoms(150) == 0


@pytest.mark.slow(reason="2,000 tries take half a minute: pytest -m slow -k costs_a_worker")
def test_of_many_calls_that_are_taken_back_none_costs_a_worker(home):
    assert phantoms(2000) == 0


def test_a_worker_that_cannot_be_reached_is_not_dead(home, monkeypatch):
    all_ready(home, 3)
    before, pids, get = home.replacements, set(home.worker_pids()), Fleet.get
    unreached = []

    def once(self, slot, overdue):
        if slot.phase is Phase.BUSY and len(unreached) < 3:  # shard 0 each time: no strikes either
            unreached.append(slot.job)
            raise WorkerUnavailable("could not be reached (the network was gone)")
        return get(self, slot, overdue)

    monkeypatch.setattr(Fleet, "get", once)
    orders = [ShardCall(Order(scale=scale)) for scale in (1, 2, 3, 4)]
    assert numbers(home.run(X, orders)) == numbers(SerialTransport(Toy).run(X, orders))
    assert len(unreached) == 3
    all_ready(home, 3)
    assert home.replacements == before
    assert set(home.worker_pids()) == pids
    assert any("it is asked for a sign of life" in line for line in EVENTS)


def test_kill_in_the_middle_of_a_call(home, tmp_path):
    before = home.replacements
    calls = [
        ShardCall(
            Order(scale=scale, trouble="die" if scale == 2 else "", once=str(tmp_path / "mark"))
        )
        for scale in (1, 2, 3)
    ]
    got = home.run(X, calls)
    assert numbers(got) == numbers(
        SerialTransport(Toy).run(X, [ShardCall(Order(scale=scale)) for scale in (1, 2, 3)])
    )
    assert home.replacements == before + 1
    assert any("died" in line and "in shard 1" in line and "pid" in line for line in EVENTS)


def test_kill_from_outside(single):
    all_ready(single, 1)
    expected = numbers(single.run(X, [ShardCall(Order())]))
    timer = threading.Timer(0.3, kill_all, [single])
    timer.start()
    assert numbers(single.run(X, [ShardCall(Order(sleep_s=1.0))])) == expected
    timer.join()


def test_workers_that_died_between_rounds_do_not_count_against_a_shard(home):
    all_ready(home, 3)
    before = home.replacements
    kill_all(home)
    time.sleep(0.3)
    assert len(home.run(X, [ShardCall(Order())]).replies) == 1
    assert home.replacements == before + 3


def test_a_hung_worker_is_killed_and_its_late_answer_is_not_used(single, tmp_path):
    all_ready(single, 1)
    (pid,) = single.worker_pids()
    got = single.run(X, [ShardCall(Order(trouble="stop", once=str(tmp_path / "mark")))])
    assert numbers(got) == numbers(SerialTransport(Toy).run(X, [ShardCall(Order())]))
    assert got.replies[0].reply[1] != pid
    assert not Path(f"/proc/{pid}").exists()
    assert any(f"(pid {pid}) did not answer within 3 s in shard 0" in line for line in EVENTS)


def test_a_shard_that_always_crashes_is_named(home):
    with pytest.raises(
        ClusterError, match=r"shard 1 took 3 workers down .* crashed \((Seg|SIGSEGV)"
    ) as reported:
        home.run(X, [ShardCall(Order()), ShardCall(Order(trouble="crash"))])
    assert not isinstance(reported.value, ClusterLost)  # the same command fails again
    assert len(home.run(X, [ShardCall(Order())]).replies) == 1


def test_kills_from_outside_are_no_fault_of_the_shard(home, tmp_path):
    killed = Order(trouble="die", once=str(tmp_path / "mark"), times=4)
    assert len(home.run(X, [ShardCall(Order()), ShardCall(killed)]).replies) == 2
    assert lines_in(killed.once) == 4


def test_a_shard_that_is_always_killed_is_named_in_the_end(home, monkeypatch):
    monkeypatch.setattr(ray_round, "MAX_KILLS", 2)
    with pytest.raises(ClusterError, match="shard 0 took 2 workers down"):
        home.run(X, [ShardCall(Order(trouble="die"))])


def test_losses_count_until_a_round_is_finished(home, monkeypatch, tmp_path):
    home.run(X, [ShardCall(Order())])  # whatever was lost before
    options = dataclasses.replace(home._options, max_replacements=1)
    monkeypatch.setattr(home._fleet, "options", options)
    for number in range(2):
        once = Order(trouble="die", once=str(tmp_path / f"mark {number}"))
        assert len(home.run(X, [ShardCall(once)]).replies) == 1
    with pytest.raises(ClusterLost, match="2 workers were lost in the same round"):
        home.run(X, [ShardCall(Order(trouble="die", once=str(tmp_path / "2"), times=2))])


def test_a_slow_start_of_ray_is_tried_again_and_ends_in_an_error_of_ours(monkeypatch, tmp_path):
    tries, events = [], []

    def slow(**options):
        tries.append(options)
        if len(tries) < 3:
            raise Exception("The current node timed out during startup.")  # as Ray has it

    monkeypatch.setattr(cluster.ray, "init", slow)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    with pytest.raises(ClusterLost, match=r"Ray did not start .* timed out during startup"):
        cluster._start(RayOptions(workers=1), events.append, time.monotonic() + 60, tmp_path)
    monkeypatch.setattr(cluster, "QUICK_S", 0.0)
    tries.clear()
    cluster._start(
        RayOptions(workers=1), events.append, time.monotonic() + 60, tmp_path, num_cpus=1
    )
    assert [options["num_cpus"] for options in tries] == [1, 1, 1]
    assert len(events) == 2
    assert "it is tried again" in events[0]


def test_rays_start_and_the_workers_have_one_deadline(monkeypatch):
    deadlines: list[float] = []

    @contextmanager
    def started(options: RayOptions, on_event: object, deadline: float) -> Iterator[None]:
        deadlines.append(deadline)
        time.sleep(0.5)
        yield

    def start(self: Fleet, deadline: float) -> None:
        deadlines.append(deadline)
        raise ClusterLost("no worker came up")

    monkeypatch.setattr(cluster, "local", started)
    monkeypatch.setattr(Fleet, "start", start)
    begun = time.monotonic()
    transport = RayTransport(Toy, RayOptions(workers=1, address="local", start_timeout_s=100.0))
    with pytest.raises(ClusterLost, match="no worker came up"):
        transport.wait_ready()
    transport.close()
    assert deadlines[0] == deadlines[1]
    assert begun + 99.5 < deadlines[0] < time.monotonic() + 99.5  # the start took half a second


def test_the_folder_of_a_run_that_never_began_may_be_used_again(monkeypatch, tmp_path):
    def slow(**options):
        raise Exception("The current node timed out during startup.")

    config = {
        "problem": {"name": "analytic", "case": "minimax"},
        "solver": {"name": "bome"},
        "steps": 2,
    }
    overrides = ["address=local", f"output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(cluster.ray, "init", slow)
        patch.setattr(cluster.ray, "shutdown", lambda: None)
        with pytest.raises(ClusterLost, match="timed out during startup"):
            bomemeta.train(config, [*overrides, "workers=1"])
    assert bomemeta.train(config, overrides).steps == 2


def test_the_workers_exception_keeps_its_type_and_is_immediate(home):
    all_ready(home, 3)
    before = home.replacements
    started = time.monotonic()
    with pytest.raises(DivergenceError, match="step 3: the loss is nan") as caught:
        home.run(
            X,
            [
                ShardCall(Order(sleep_s=0.5)),
                ShardCall(Order(trouble="raise"), (X,), 1),
                ShardCall(Order(sleep_s=8)),
            ],
        )
    assert time.monotonic() - started < 4
    assert "make_trouble" in str(caught.value.__cause__)  # the traceback over there
    # The worker that is still busy gives its old answer to nobody.
    assert numbers(home.run(np.ones(3, np.float32), [ShardCall(Order())] * 3)) == [3.0] * 3
    assert home.replacements == before


def test_what_there_is_to_do_meanwhile_is_done_while_the_workers_compute(home, tmp_path):
    all_ready(home, 3)
    mark = tmp_path / "begun"
    called = []

    def meanwhile():
        called.append(None)
        while not mark.exists():  # a call has been given out, and nobody waits for it yet
            time.sleep(0.01)

    assert (
        len(home.run(X, [ShardCall(Order(trouble="none", once=str(mark)))] * 4, meanwhile).replies)
        == 4
    )
    assert len(called) == 1

    def full_disk():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        home.run(X, [ShardCall(Order(sleep_s=0.3))] * 3, full_disk)
    assert numbers(home.run(np.ones(3, np.float32), [ShardCall(Order())] * 3)) == [3.0] * 3


def test_a_factory_that_fails(home):
    transport = RayTransport(failing_factory, RayOptions(workers=2, cpus_per_worker=SMALL))
    with pytest.raises(ConfigError, match="no such problem on cpu"):
        transport.run(X, [ShardCall(Order())])
    transport.close()


def test_a_wrong_number_of_states(home):
    for transport in (SerialTransport(Toy), home):
        with pytest.raises(
            TypeError, match="returned 1 values; this call wants a tuple of 1 reply and 2 states"
        ):
            transport.run(X, [ShardCall(Order(), (), 2)])


def test_states_survive_the_worker_that_made_them(single):
    transport = single
    state = np.arange(100_000, dtype=np.float32)
    first = transport.run(X, [ShardCall(Order(), (state,), 1)]).replies[0]
    os.kill(first.reply[1], signal.SIGKILL)
    second = transport.run(X, [ShardCall(Order(), first.states, 1)]).replies[0]
    assert second.reply[1] != first.reply[1]
    (got,) = transport.fetch(second.states)
    total = np.float32(first.reply[0])
    assert np.array_equal(got, state + total + total)


def test_too_many_workers(home):
    with pytest.raises(ClusterError, match=r"50 workers of 1 CPU .* room for . workers"):
        RayTransport(Toy, RayOptions(workers=50))
    with pytest.raises(ClusterError, match="GPU"):
        RayTransport(Toy, RayOptions(workers=1, cpus_per_worker=SMALL, gpus_per_worker=1.0))
    cores = len(os.sched_getaffinity(0))
    with (
        pytest.raises(ClusterError, match=f"this machine has {cores}"),
        cluster.local(RayOptions(workers=32 * cores), print),
    ):
        pass
    with pytest.raises(ConfigError, match="workers is 0"):
        RayOptions(workers=0)


def test_a_full_cluster_is_waited_for_where_that_is_asked_for(home):
    """Another transport has the room, and leaves as soon as it is said that it is waited for."""
    free = ray.available_resources()["CPU"]
    full = RayTransport(Toy, RayOptions(workers=1, cpus_per_worker=free - SMALL))
    all_ready(full, 1)
    events: list[str] = []

    def hear(line: str) -> None:
        events.append(line)
        if "waiting for room" in line:
            full.close()

    options = RayOptions(workers=1, cpus_per_worker=2 * SMALL, wait_for_room_s=120.0)
    with closing(RayTransport(Toy, options, hear)) as transport:
        assert len(transport.run(X, [ShardCall(Order())]).replies) == 1
    assert [line for line in events if "waiting for room for 1 workers, 120 s at most" in line]


def test_an_x_larger_than_the_store_is_noted_once(home, monkeypatch):
    """tests/test_short.py has one that really is."""
    monkeypatch.setattr(cluster, "store_bytes", lambda: 80 * 2**20)
    message = len(EVENTS)
    for megabytes in (1, 85, 90):
        home.run(np.zeros(megabytes * 2**18, np.float32), [ShardCall(Order())])
    noted = [line[:50] for line in EVENTS[message:] if "object store" in line]
    assert noted == ["x has 0.08 GiB and the object store of this node 0"]
    monkeypatch.undo()
    assert 75 * 2**20 < cluster.store_bytes() < 2**40


def test_rays_memory_killer_is_named():
    error = OutOfMemoryError(
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 4f2a) was "
        "15.21GB used / 16.00GB limit (0.951), which exceeds the memory usage threshold of 0.95."
    )
    loss = loss_of(error, starting=False)
    assert "was killed for memory on 10.0.0.7: 15.21 GiB of 16.00 in use there" in str(loss)
    assert "lower the number of workers" in loss.advice
    assert type(loss) is WorkerLost  # no strike


def test_memory_stays_flat(home):
    broadcast = np.ones(250_000, np.float32)  # 1 MB
    calls = [ShardCall(Order(), (broadcast,), 1)] * 2
    states = home.run(broadcast, calls).replies[0].states
    free = ray.available_resources()["object_store_memory"]
    for _ in range(200):
        states = home.run(broadcast, [ShardCall(Order(), states, 1)] * 2).replies[0].states
    deadline = time.monotonic() + 10  # Ray reports its memory once a second
    while (
        used := free - ray.available_resources()["object_store_memory"]
    ) > 10e6 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert used < 10e6  # 200 rounds that kept anything would hold at least 200 MB


def test_interrupt_of_the_process_group_leaves_workers_alone(home):
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        all_ready(home, 3)
        pids = set(home.worker_pids())
        for pid in ray_processes():  # as the terminal does, but for pytest's own group
            os.kill(pid, signal.SIGINT)
        assert len(home.run(X, [ShardCall(Order())] * 6).replies) == 6
        assert pids <= set(home.worker_pids())
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_cluster_listens_on_loopback_only_and_wants_a_token(home):
    addresses = listening_addresses(ray_processes()) | listening_addresses([os.getpid()])
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"
    ask = f"from ray._raylet import GcsClient; GcsClient({ray.get_runtime_context().gcs_address!r}).internal_kv_get(b'x', None, 5)"
    for token, refused in ((None, False), ("0" * 64, True)):
        environment = {**os.environ, **({"RAY_AUTH_TOKEN": token} if token else {})}
        stranger = subprocess.run(
            [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, timeout=60
        )
        assert (stranger.returncode != 0) == refused, stranger.stderr
        assert (
            "InvalidAuthToken" in stranger.stderr or "Unauthenticated" in stranger.stderr
        ) == refused, stranger.stderr
