"""The ray transport on several nodes (processes of this machine): what is lost with a node, who
comes with one, who is slow.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import ray
import torch
from ray._raylet import Config
from ray.cluster_utils import Cluster

import bomemeta
from bomemeta.distributed import capacity, cluster, private
from bomemeta.distributed.ray_transport import RayOptions, RayTransport
from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.transport import ShardCall
from bomemeta.errors import ClusterError, ConfigError, LowerStateLost
from bomemeta.metrics import read_metrics

WIDE: dict[str, Any] = {
    "imports": [str(Path(__file__).with_name("wide.py"))],
    "problem": {"name": "wide"},
    "solver": {"name": "bome", "inner_steps": 3, "lower_momentum": 0.5, "upper_lr": 0.05},
    "steps": 12, "shards": 4,
    "checkpoint": {"every_steps": 2}, "log": {"tensorboard": False},
}  # fmt: skip


class Order(NamedTuple):
    trouble: str = ""  # the first to touch this file stops
    slow: str = (
        ""  # the process that is named in this file, the first to come, takes 20 times as long
    )
    leaf: int = 0


class Adder:
    def __init__(self, device: str) -> None:
        pass

    def execute(self, order: Order, broadcast: np.ndarray, *states: np.ndarray):
        if order.trouble and not Path(order.trouble).exists():
            Path(order.trouble).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        if order.slow:
            if not Path(order.slow).exists():
                Path(order.slow).write_text(str(os.getpid()))
            time.sleep(2.0 if Path(order.slow).read_text() == str(os.getpid()) else 0.1)
        return (
            os.getpid(),
            broadcast * (1 + 10.0**-order.leaf),
            *(state + broadcast[0] for state in states),
        )


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without CPUs, for the driver; tests say how many nodes beside it they want
    (`with_nodes`).
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        # With tokens, as a cluster that bomemeta starts: earlier tests may have done so in this
        # process.
        private.make_token(print)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        Config.initialize("")  # reads it again
        # The cluster finds a dead node within 3 s instead of 15.
        quick = {
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 1000,
            "health_check_failure_threshold": 3,
        }
        with cluster._local_settings():  # loopback only here too
            head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
            cluster_of_nodes = Cluster(initialize_head=True, head_node_args=head)
            ray.init(address=cluster_of_nodes.address, log_to_driver=False, logging_level="error")
            yield cluster_of_nodes
            ray.shutdown()
            cluster_of_nodes.shutdown()


def with_nodes(nodes: Cluster, wanted: int) -> list[Any]:
    """Brings the cluster to so many nodes of one CPU each: what an earlier test left is used again,
    since a node takes seconds to start.
    """
    while len(nodes.worker_nodes) > wanted:
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=True)
    while len(nodes.worker_nodes) < wanted:
        nodes.add_node(num_cpus=1)
    wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 1 + wanted)
    return list(nodes.worker_nodes)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.05)


def all_ready(transport: RayTransport, workers: int) -> None:
    while len(transport.worker_pids()) < workers:  # a transport looks at its workers in rounds only
        transport.run(np.ones(1, np.float32), [ShardCall(Order(), summed=True)] * workers)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bomemeta.Result:
    return bomemeta.train(WIDE, [f"output_dir={tmp_path_factory.mktemp('reference') / 'run'}"])


def test_an_address_where_nobody_listens():  # before the file's cluster is there to be joined
    with pytest.raises(ClusterError, match=r"no Ray cluster could be joined at 127\.0\.0\.1:1"):
        RayTransport(Adder, RayOptions(workers=1, address="127.0.0.1:1"))


def test_labels_match_as_with_ray():
    node = {"kind": "fast"}
    for selector in ["fast", "in(fast, faster)", "in(slow,fast)", "!slow", "!in(slow, slower)"]:
        assert capacity.matches(node, {"kind": selector}), selector
    for selector in ["slow", "fas", "in(slow, slower)", "!fast", "!in(slow, fast)"]:
        assert not capacity.matches(node, {"kind": selector}), selector
    assert not capacity.matches(node, {"kind": "fast", "zone": "a"})
    assert capacity.matches(node, {"zone": "!a"})  # a label that is not there is no such value
    assert capacity.matches(node, {})


def test_workers_are_placed_by_labels(nodes, tmp_path):
    with_nodes(nodes, 1)
    labelled = nodes.add_node(num_cpus=1, labels={"kind": "fast"})
    wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 3)
    (fast,) = (node["NodeID"] for node in ray.nodes() if node["Labels"].get("kind") == "fast")
    for selector, there in [("fast", True), ("!in(fast, faster)", False)]:
        options = RayOptions(workers=1, worker_labels={"kind": selector})
        with closing(RayTransport(Adder, options)) as transport:
            all_ready(transport, 1)
            assert [node == fast for node in transport.worker_nodes()] == [there], selector
    with pytest.raises(ClusterError, match=r"worker_labels kind=fast \(1 of 3 nodes\) has 1 CPU"):
        RayTransport(Adder, RayOptions(workers=2, worker_labels={"kind": "fast"}))
    keys = ["workers=1", "worker_labels={kind: huge}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(
        ClusterError,
        match=r"worker_labels: got kind=huge, and no node of the cluster \(3 nodes\) is so: there are kind=fast\. Change",
    ):
        bomemeta.train(WIDE, keys)
    nodes.remove_node(labelled, allow_graceful=True)
    with pytest.raises(ConfigError, match=r"worker_labels: got .*Invalid label selector value"):
        RayOptions(workers=1, worker_labels={"kind": "in(fast"})


def test_a_lost_node(nodes, tmp_path):
    (first,) = with_nodes(nodes, 1)
    with closing(RayTransport(Adder, RayOptions(workers=1, step_timeout_s=20.0))) as transport:
        one = np.ones(
            200_000, np.float32
        )  # large enough for the store of the node that computes it
        reply = transport.run(one, [ShardCall(Order(), (one,), 1, summed=True)]).replies[0]

        # The worker hangs on a node that is not the driver's: its process must go, or its CPU is
        # never free again.
        transport._options = transport._fleet.options = RayOptions(workers=1, step_timeout_s=1.0)
        second = transport.run(
            one, [ShardCall(Order(str(tmp_path / "mark")), reply.states, 1, summed=True)]
        ).replies[0]
        transport._options = transport._fleet.options = RayOptions(workers=1, step_timeout_s=20.0)
        assert second.reply != reply.reply
        assert not Path(f"/proc/{reply.reply}").exists()

        nodes.add_node(num_cpus=1)
        nodes.remove_node(first, allow_graceful=False)
        with pytest.raises(LowerStateLost, match="last checkpoint"):
            transport.run(one, [ShardCall(Order(), second.states, 1, summed=True)])
        with pytest.raises(LowerStateLost):
            transport.fetch(second.states)
        third = transport.run(one, [ShardCall(Order(), (one,), 1, summed=True)]).replies[0]
        assert np.array_equal(transport.fetch(third.states)[0], one + 1)
        assert transport.replacements == 2


def test_workers_are_spread_and_sums_meet_in_a_tree_on_them(nodes):
    with_nodes(nodes, 3)
    calls = [ShardCall(Order(leaf=leaf), summed=True) for leaf in range(7)]
    x = np.linspace(0, 1, 100_000, dtype=np.float32)
    expected = SerialTransport(Adder).run(x, calls).total
    with closing(
        RayTransport(Adder, RayOptions(workers=3, step_timeout_s=30.0, reduce="tree"))
    ) as transport:
        all_ready(transport, 3)
        assert len(set(transport.worker_nodes())) == 3
        got = transport.run(x, calls)
    assert np.array_equal(got.total, expected)
    assert got.driver_bytes == expected.nbytes  # one sum, not seven shares
    with closing(RayTransport(Adder, RayOptions(workers=1, step_timeout_s=30.0))) as plain:
        got = plain.run(x, calls)
    assert np.array_equal(got.total, expected)
    assert got.driver_bytes == 7 * expected.nbytes


def test_a_slow_worker_gets_less_and_its_calls_are_run_twice_where_that_is_asked_for(
    nodes, tmp_path
):
    with_nodes(nodes, 3)
    rounds, mark = 10, tmp_path / "slow"
    calls = [
        ShardCall(Order(slow=str(mark), leaf=leaf), summed=True, kind="k") for leaf in range(4)
    ]
    x = np.ones(10, np.float32)
    plain = [ShardCall(Order(leaf=leaf), summed=True) for leaf in range(4)]
    expected = SerialTransport(Adder).run(x, plain).total
    with closing(RayTransport(Adder, RayOptions(workers=3, step_timeout_s=30.0))) as transport:
        all_ready(transport, 3)
        for backup_after in (None, 2.0):
            options = RayOptions(workers=3, step_timeout_s=30.0, backup_after=backup_after)
            transport._options = transport._fleet.options = options
            answered: Counter[int] = Counter()
            for _ in range(rounds):
                got = transport.run(x, calls)
                assert np.array_equal(got.total, expected)
                answered.update(reply.reply for reply in got.replies)
            # If nothing were learned, it would have a call in every round. tests/test_rounds_plan.py
            # says after how many answers it is known on a quiet machine.
            assert answered[int(mark.read_text())] <= rounds / 2, answered


def train_through(
    folder: Path, load_s: float, overrides: list[str], *deeds: tuple[int, Callable[[], Any]]
) -> bomemeta.Result:
    """A run in a thread, and each deed in the middle of the step after so many; after the last one
    the run hurries. (Ray starts nodes in the main thread only.)
    """
    hurry = folder.with_suffix(".hurry")
    keys = [f"problem.load_s={load_s}", f"problem.hurry={hurry}", "step_timeout_s=30"]
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(bomemeta.train, WIDE, [f"output_dir={folder}", *keys, *overrides])
        for steps, deed in deeds:
            wait_for(
                lambda steps=steps: (
                    running.done() or len(read_metrics(folder / "metrics.jsonl")) >= steps
                )
            )  # type: ignore[misc]
            time.sleep(0.3)
            deed()
        hurry.touch()
        return running.result()


def test_a_run_that_loses_a_node_with_lower_state_goes_back_and_reaches_the_same_bits(
    nodes, reference, tmp_path
):
    # After an odd step: what a checkpoint has fetched has a copy on the driver's node.
    three = with_nodes(nodes, 3)
    lost = (5, lambda: nodes.remove_node(three[0], allow_graceful=False))
    result = train_through(tmp_path / "run", 0.25, ["workers=3", "reduce=tree"], lost)
    assert any("Going back to the checkpoint" in note for note in result.notes), result.notes
    assert result.upper_sha256 == reference.upper_sha256
    assert result.metrics == reference.metrics


def test_workers_follow_the_cluster(nodes, tmp_path):
    (first,) = with_nodes(nodes, 1)
    longer = ["steps=40"]  # a node may take as long as ten steps to start
    reference = bomemeta.train(WIDE, [f"output_dir={tmp_path / 'reference'}", *longer])
    result = train_through(
        tmp_path / "run",
        0.2,
        ["workers=auto", "max_workers=3", "reduce=tree", *longer],
        (2, lambda: nodes.add_node(num_cpus=1)),
        (6, lambda: nodes.remove_node(first, allow_graceful=False)),
    )
    assert any("the cluster has room for worker" in note for note in result.notes), result.notes
    assert any("lost with its node" in note for note in result.notes), result.notes
    assert result.upper_sha256 == reference.upper_sha256


def test_too_few_nodes_are_waited_for_and_then_named(nodes):
    with_nodes(nodes, 0)
    events: list[str] = []
    options = RayOptions(workers=3, min_workers=2, start_timeout_s=3.0)
    with pytest.raises(
        ClusterError, match=r"2 workers of 1 CPU .* do not fit: the cluster \(1 nodes\) has 0 CPU"
    ):
        RayTransport(Adder, options, events.append)
    assert any("waiting for room for 2 workers" in event for event in events)


def test_a_gpu_that_torch_does_not_see_is_named(nodes):
    if torch.cuda.is_available():
        pytest.skip(
            "torch sees a GPU here; the error is for machines where Ray has one and torch does not"
        )
    with_nodes(nodes, 0)
    nodes.add_node(num_cpus=1, num_gpus=1)  # Ray believes it
    with (
        closing(RayTransport(Adder, RayOptions(workers=1, gpus_per_worker=1.0))) as transport,
        pytest.raises(
            ClusterError, match=r"GPU 0, and torch .* sees none there\. .*gpus_per_worker=0"
        ),
    ):
        transport.run(np.ones(1, np.float32), [ShardCall(Order())])
    with_nodes(nodes, 0)
