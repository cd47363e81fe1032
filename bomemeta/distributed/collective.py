"""A shared lower problem's whole kernel on all workers together: they exchange their shards' sums
among themselves, over gloo.

Every worker runs the same kernel on the same numbers and computes its own shards whenever the
kernel asks something of the blocks. What they computed is gathered by all, and each adds it up in
the order of `summation.merges`. So an inner loop of T steps is one round of Ray instead of T, and
has the same bits: they depend neither on how many workers there are nor on which shard is whose.

y, and what else a kernel keeps, stays with the members (`resident.py`): x comes from the driver, and
x's gradient and numbers go back.

A process group cannot outlive a member. Groups have numbers (epochs): one that lost a member is
left behind, and the survivors, with whoever has come meanwhile, form the next (measured: 0.02 s)
and run the kernel again, from the y that they all still have.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import numpy as np
import ray
import torch.distributed
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from bomemeta.distributed import cluster
from bomemeta.distributed.fleet import Fleet
from bomemeta.distributed.losses import WorkerLost, WorkerUnavailable, poison
from bomemeta.distributed.process_group import FORM_TIMEOUT_S, GroupBroken, GroupMember
from bomemeta.distributed.resident import GONE, Resident, Residents
from bomemeta.distributed.slots import Phase, Slot
from bomemeta.distributed.transport import JointRequest
from bomemeta.errors import ClusterError, LowerStateLost

dist: Any = torch.distributed  # whose stubs leave out what is used here
# Members that are silent for this long after others have lost the group are taken to hang.
GRACE_S = 5.0
# A kernel that lost so many groups in a row is given up: each member's loss costs all of them.
TRIES = 10


class Collective:
    """The driver's side; the workers' is process_group.py."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._epoch = 0
        self._residents = Residents()
        self._present: list[
            tuple[int, Any]
        ] = []  # the members of the present epoch: slot and process
        self._holders: list[tuple[int, Any]] = []  # the members of the last kernel that ended
        # The store lives in this process: it has no state that a lost worker could take along. On
        # the driver's own address only, and not on all of them, as torch would have it.
        self._host = ray.util.get_node_ip_address()
        self._socket = socket.create_server((self._host, 0))
        self._port = self._socket.getsockname()[1]
        self._store = dist.TCPStore(
            self._host,
            self._port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=self._socket.detach(),
        )

    def run(
        self, broadcast: np.ndarray, request: JointRequest, shards: int
    ) -> tuple[Any, Resident]:
        """The answer of the member with rank 0 to `request.execute`, run by at most `shards`
        workers together, and the handle of what they keep.

        Raises the workers' own exceptions with their own types, and ClusterError as
        `Transport.run`.
        """
        shared = cluster.outgoing(broadcast, len(self._fleet.slots))
        loss: WorkerLost | None = None
        handle = self._residents.new()
        for _ in range(TRIES):
            slots = self._members(shards)
            try:
                answer, loss = self._try(slots, request, shared, handle)
            except BaseException:
                self._present = []
                for slot in list(self._fleet.in_phase(Phase.BUSY).values()):
                    self._fleet.drain(slot)
                raise
            if loss is None:
                self._holders = self._present
                return answer, handle
        assert loss is not None
        raise ClusterError(
            poison("a kernel of all workers together", TRIES, loss, self._fleet.options)
        )

    def fetch(self, handle: Resident) -> np.ndarray:
        """What the members keep, from the first that has it. Any thread's: of a lost worker the fleet
        hears when it next asks it for something. Raises LowerStateLost.
        """
        for slot in self._fleet.slots:
            if slot.process is None:
                continue
            asked = slot.actor.kept.remote(handle.name)
            try:
                array: np.ndarray | None = ray.get(
                    asked, timeout=self._fleet.options.step_timeout_s
                )
            except (RayActorError, ObjectLostError, GetTimeoutError):
                continue
            if array is not None:
                return array
        raise LowerStateLost(GONE)

    def _have_y(self, there: dict[int, Slot]) -> bool:
        """Whether one of these may have what is kept. After a loss the others are asked for a sign of
        life; a kernel of newcomers alone, begun before they answer, would find no y.
        """
        if not there or not self._fleet.in_phase(Phase.DRAINING):
            return bool(there)
        return any((slot.index, slot.process) in self._holders for slot in there.values())

    def _members(self, shards: int) -> list[Slot]:
        """The workers that are there; waits for one."""
        while True:
            there = self._fleet.in_phase(Phase.IDLE)
            if there and not self._fleet.waiting:
                break
            heard, enough = False, self._have_y(there)
            for slot, overdue in self._fleet.heard(time.monotonic() if enough else None):
                self._fleet.settle(slot, overdue)
                heard = True
            if enough and not heard:
                break
        idle = [slot for _, slot in sorted(there.items())]
        slots = idle[:shards]
        present = [(slot.index, slot.process) for slot in slots]
        if present != self._present:
            self._epoch, self._present = self._epoch + 1, present
        return slots

    def _try(
        self, slots: list[Slot], request: JointRequest, shared: Any, handle: Resident
    ) -> tuple[Any, WorkerLost | None]:
        options = self._fleet.options
        # Who waits for a member that hangs answers when the exchange's own limit is over, which is after
        # the call's: with the same limit for both, those who still have y would be taken to hang too.
        limit_s = options.step_timeout_s
        if len(slots) > 1:
            limit_s = FORM_TIMEOUT_S + 2 * limit_s + GRACE_S
        for rank, slot in enumerate(slots):
            member = GroupMember(
                self._epoch, rank, len(slots), self._host, self._port, options.step_timeout_s
            )
            slot.job, slot.begun = -1, time.monotonic()
            asked = (request, member, shared, handle.name, self._residents.names)
            answers = [slot.actor.together.remote(*asked)]
            self._fleet.watch(slot, Phase.BUSY, answers, limit_s)
        answer, loss, broken = None, None, False
        lost: list[tuple[Slot, WorkerLost]] = []
        while any(slot.phase is Phase.BUSY for slot in slots):
            for slot, overdue in self._fleet.heard():
                if slot.phase is not Phase.BUSY:
                    self._fleet.settle(slot, overdue)
                    continue
                try:
                    given = self._fleet.get(slot, overdue)
                    answer = given if slot is slots[0] else answer
                except GroupBroken as error:
                    broken = True
                    loss = loss or WorkerLost(f"lost its group ({error})")
                except WorkerLost as error:
                    loss, broken = error, True
                    lost.append((slot, error))
                    # Until all have been heard: a replacement would be none of this group.
                    self._fleet.rest(slot, Phase.ABSENT)
                    continue
                self._fleet.rest(slot, Phase.IDLE)
                if broken:
                    for silent in self._fleet.in_phase(Phase.BUSY).values():
                        self._fleet.hasten(silent, GRACE_S)
        again = "in a kernel of all workers together, which runs again"
        for slot, how in lost:
            if isinstance(how, WorkerUnavailable):
                self._fleet.await_return(slot, how, again)
            else:
                self._fleet.replace(slot, how, again)
        if broken:
            self._present = []
        return answer, loss
