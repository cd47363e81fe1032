"""A worker's side of a kernel that all workers run together: its place in a process group, and the
group. The driver's: collective.py.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
import torch.distributed

from bomemeta.distributed.transport import Gather

dist: Any = torch.distributed  # whose stubs leave out what is used here
FORM_TIMEOUT_S = 30.0  # for the members to find each other


class GroupBroken(Exception):
    """A member of the process group died or hangs. Message only, so that it arrives with its type."""


class Member(NamedTuple):
    """A worker's place in a process group."""

    epoch: int
    rank: int
    world: int
    host: str  # of the store where the members find each other
    port: int
    timeout_s: float


class ProcessGroup:
    """The group that a worker is in now, if in any."""

    def __init__(self) -> None:
        self._member: Member | None = None
        self._group: Any = None

    def join(self, member: Member) -> Gather:
        """What gathers in the member's group, which is formed where it is a new one. Raises
        GroupBroken.
        """
        if member != self._member:
            self._group, self._member = None, None
            if member.world > 1:
                self._group = _formed(member)
            self._member = member
        return self._gather

    def _gather(self, own: np.ndarray) -> list[np.ndarray]:
        assert self._member is not None
        if self._group is None:
            return [own]
        mine = torch.from_numpy(np.ascontiguousarray(own))
        found = [torch.empty_like(mine) for _ in range(self._member.world)]
        try:
            self._group.allgather([found], [mine]).wait()
        except RuntimeError as error:
            raise GroupBroken(f"epoch {self._member.epoch}: {error}") from error
        return [tensor.numpy() for tensor in found]


def _formed(member: Member) -> Any:
    try:
        store = dist.TCPStore(
            member.host, member.port, is_master=False, timeout=timedelta(seconds=FORM_TIMEOUT_S)
        )
        options = dist.ProcessGroupGloo._Options()
        options._devices = [
            dist.ProcessGroupGloo.create_device(hostname=ray.util.get_node_ip_address())
        ]
        options._timeout = timedelta(seconds=member.timeout_s)
        named = dist.PrefixStore(str(member.epoch), store)
        return dist.ProcessGroupGloo(named, member.rank, member.world, options)
    except RuntimeError as error:
        raise GroupBroken(f"epoch {member.epoch} could not be formed: {error}") from error
