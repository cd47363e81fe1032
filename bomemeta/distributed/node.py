"""How a node of Ray's comes up on this machine, and whether it is still there."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray._private import services
from ray._private.node import Node
from ray._private.parameter import RayParams

from bomemeta.errors import ClusterLost

# Ports of Ray's agents, as its parameters name them.
AGENTS = (
    "metrics_agent_port",
    "metrics_export_port",
    "dashboard_agent_listen_port",
    "runtime_env_agent_port",
)
# Where they may listen: above those of Ray's workers, below Linux's ephemeral ones.
PORTS = (20_000, 32_768)


@contextmanager
def patient(deadline: float) -> Iterator[None]:
    """A node of Ray's may take until the deadline (monotonic seconds) to come up.

    Ray's own patience ends after 30 s, in a bare exception; and its raylet dies where an agent of
    its, a Python process, has not told its ports within 15 s. To begin again is no help: on a machine with
    much other work the next try takes as long (measured: 9 of 9 tries in 300 s). So the agents and
    the raylet are told the ports, and the node is waited for.
    """
    get_node, start, begin = services.get_node, RayParams.__init__, Node.start_raylet

    def asked(*given: Any) -> Any:
        while True:
            try:
                return get_node(*given)
            except RuntimeError:  # it is not there yet
                if time.monotonic() > deadline or dead_raylets():
                    raise
                time.sleep(0.1)

    def with_ports(self: Any, *given: Any, **named: Any) -> None:
        start(self, *given, **named)
        missing = [name for name in AGENTS if not getattr(self, name)]
        for name, port in zip(missing, free_ports(len(missing)), strict=True):
            setattr(self, name, port)

    def announced(self: Any, *given: Any, **named: Any) -> None:
        # Where the raylet looks for what an agent says of its port.
        for name in AGENTS:
            path = Path(self.get_session_dir_path()) / f"{name}_{self._node_id}"
            path.write_text(str(getattr(self._ray_params, name)))
        begin(self, *given, **named)

    services.get_node, RayParams.__init__, Node.start_raylet = asked, with_ports, announced
    try:
        yield
    finally:
        services.get_node, RayParams.__init__, Node.start_raylet = get_node, start, begin


def free_ports(count: int) -> list[int]:
    """Below the ports that the kernel gives to whoever asks for any: one of those may be another's
    before the agent listens on it, and the raylet dies with its agent.
    """
    found: set[int] = set()
    while len(found) < count:
        port = PORTS[0] + secrets.randbelow(PORTS[1] - PORTS[0])
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.add(port)
    return list(found)


def check_own_node() -> None:
    """Raises ClusterLost where the raylet of a cluster that this process started has ended."""
    if dead_raylets():
        raise ClusterLost(
            "the Ray node that this run had started on this machine has died: see raylet.err in the logs of its session "
            "directory. The same command resumes the run"
        )


def dead_raylets() -> list[int]:
    """Children of ours that were raylets and have ended (zombies, which Ray does not look at)."""
    found = []
    for pid in all_children():
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().partition(" ")[2]
            if state.startswith("(raylet) Z"):
                found.append(pid)
    return found


def reap() -> None:
    """Forgets raylets that have ended: they say nothing about the next one."""
    for pid in dead_raylets():
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def ray_children() -> set[int]:
    """This process's children that are Ray's."""
    return {pid for pid in all_children() if b"ray" in command_of(pid)}


def all_children() -> set[int]:
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
