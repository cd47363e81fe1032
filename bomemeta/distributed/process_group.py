"""A worker's side of a kernel that all workers run together: its place in a process group, and the
group. The driver's: collective.py.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import ray
import torch
import torch.distributed

from bomemeta.distributed.slices import Parcels

dist: Any = torch.distributed  # whose stubs leave out what is used here
FORM_TIMEOUT_S = 30.0  # for the members to find each other


class GroupBroken(Exception):
    """A member of the process group died or hangs. Message only, so that it arrives with its type."""


class GroupMember(NamedTuple):
    """A worker's place in a process group."""

    epoch: int
    rank: int
    world: int
    host: str  # of the store where the members find each other
    port: int
    timeout_s: float


class ProcessGroup:
    """The group that a worker is in now, if in any. See `slices.Peers`."""

    rank, world = 0, 1

    def __init__(self) -> None:
        self.sent_bytes = 0
        self._member: GroupMember | None = None
        self._group: Any = None

    def join(self, member: GroupMember) -> None:
        """Forms the member's group where it is a new one. Raises GroupBroken."""
        if member == self._member:
            return
        self._group, self._member = None, None
        self.rank, self.world = member.rank, member.world
        if member.world > 1:
            self._group = _formed(member)
        self._member = member

    def swap(self, out: Parcels, into: Parcels) -> None:
        """See `slices.Peers`. Raises GroupBroken."""
        moved = []
        try:
            # Straight out of and into the arrays' memory. Half of what gloo's own all-to-all and
            # all-gather take (1e7 numbers on 2 processes: 62 ms for both against 214).
            for rank, array in into:
                if array.size:
                    moved.append(self._group.recv([torch.from_numpy(array)], rank, 0))
            for rank, array in out:
                if array.size:
                    moved.append(self._group.send([torch.from_numpy(array)], rank, 0))
                    self.sent_bytes += array.nbytes
            for work in moved:
                work.wait()
        except RuntimeError as error:
            assert self._member is not None
            epoch = self._member.epoch
            # Closes what leads to the others, who may wait for this member and not for the lost one.
            self._group, self._member = None, None
            raise GroupBroken(f"epoch {epoch}: {error}") from error


def _formed(member: GroupMember) -> Any:
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
