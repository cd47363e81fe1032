"""A cluster that a run starts for itself: where its agents listen, and what is said when it dies."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from test_transport_ray import Order, Toy, X

from bomemeta.distributed import node
from bomemeta.distributed.cluster import RayOptions
from bomemeta.distributed.ray_transport import RayTransport
from bomemeta.distributed.transport import ShardCall
from bomemeta.errors import ClusterLost


def raylets() -> list[int]:
    return [pid for pid in node.all_children() if b"/raylet\0" in node.command_of(pid)]


def test_agents_listen_where_nobody_is_given_a_port() -> None:
    ports = node.free_ports(50)
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len({*ports}) == 50
    assert all(node.PORTS[0] <= port < low for port in ports)


@pytest.mark.slow(
    reason="a minute: Ray takes leave of a dead node slowly; pytest -m slow -k own_that_dies"
)
def test_a_node_of_ones_own_that_dies_is_said_and_the_next_one_is_well() -> None:
    for dies in (True, False):
        transport = RayTransport(Toy, RayOptions(workers=1), lambda text: None)
        try:
            transport.wait_ready()
            transport.run(X, [ShardCall(Order())])  # the worker is up
            (raylet,) = [pid for pid in raylets() if pid not in node.dead_raylets()]
            if not dies:
                continue
            timer = threading.Timer(0.5, os.kill, (raylet, signal.SIGKILL))
            timer.start()
            with pytest.raises(
                ClusterLost, match=r"Ray node that this run had started .* has died"
            ):
                transport.run(X, [ShardCall(Order(sleep_s=600.0))])
            timer.join()
        finally:
            transport.close()
