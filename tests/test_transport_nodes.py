"""The ray transport on several nodes (processes of this machine): what is lost with a node, and who kills a far worker."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from bomemeta.distributed import cluster
from bomemeta.distributed.ray_transport import RayOptions, RayTransport
from bomemeta.distributed.transport import ShardCall
from bomemeta.errors import ClusterError, LowerStateLost


class Adder:
    def __init__(self, device: str) -> None:
        pass

    def execute(self, trouble: str, broadcast: np.ndarray, *states: np.ndarray):
        if trouble and not Path(trouble).exists():
            Path(trouble).touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return os.getpid(), *(state + broadcast[0] for state in states)


@pytest.fixture
def nodes(monkeypatch):
    """A head without CPUs for the driver, and one node for a worker."""
    # Ray reads the mode once per process, and earlier tests may have started clusters with tokens here: this one has them too.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    cluster._make_token()
    # The cluster finds a dead node within 3 s instead of 15.
    quick = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
    with cluster._local_settings():  # loopback only here too
        cluster_of_nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
        )
        first = cluster_of_nodes.add_node(num_cpus=1)
        ray.init(address=cluster_of_nodes.address, log_to_driver=False, logging_level="error")
        yield cluster_of_nodes, first
        ray.shutdown()
        cluster_of_nodes.shutdown()


def test_an_address_where_nobody_listens():
    with pytest.raises(ClusterError, match=r"no Ray cluster could be joined at 127\.0\.0\.1:1"):
        RayTransport(Adder, RayOptions(workers=1, address="127.0.0.1:1"))


def test_a_lost_node(nodes, tmp_path):
    cluster_of_nodes, first = nodes
    transport = RayTransport(Adder, RayOptions(workers=1, step_timeout_s=20.0))
    one = np.ones(200_000, np.float32)  # large enough for the store of the node that computes it
    reply = transport.run(one, [ShardCall("", (one,), 1)]).replies[0]

    # The worker hangs on a node that is not the driver's: its process must go, or its CPU is never free again.
    transport._options = RayOptions(workers=1, step_timeout_s=1.0)
    second = transport.run(one, [ShardCall(str(tmp_path / "mark"), reply.states, 1)]).replies[0]
    transport._options = RayOptions(workers=1, step_timeout_s=20.0)
    assert second.reply != reply.reply
    assert not Path(f"/proc/{reply.reply}").exists()

    cluster_of_nodes.add_node(num_cpus=1)
    cluster_of_nodes.remove_node(first, allow_graceful=False)
    with pytest.raises(LowerStateLost, match="last checkpoint"):
        transport.run(one, [ShardCall("", second.states, 1)])
    with pytest.raises(LowerStateLost):
        transport.fetch(second.states)
    third = transport.run(one, [ShardCall("", (one,), 1)]).replies[0]
    assert np.array_equal(transport.fetch(third.states)[0], one + 1)
    assert transport.replacements == 2
    transport.close()
