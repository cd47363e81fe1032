"""The serial transport keeps the promises of the contract that need no cluster."""

import subprocess
import sys

import numpy as np
import pytest

from bomemeta.distributed.serial import SerialTransport
from bomemeta.distributed.transport import ShardCall


class Echo:
    def __init__(self, device: str) -> None:
        self.device = device

    def execute(self, request, broadcast, *states):
        if request == "write":
            broadcast += 1
        return (request, self.device), *(state + broadcast for state in states)


def test_replies_in_order_and_states_as_arrays():
    transport = SerialTransport(Echo, device="cpu")
    x = np.ones(3)
    got = transport.run(x, [ShardCall("a"), ShardCall("b", (np.zeros(3),), 1)])
    assert [reply.reply for reply in got.replies] == [("a", "cpu"), ("b", "cpu")]
    assert np.array_equal(transport.fetch(got.replies[1].states)[0], x)
    transport.close()
    transport.close()


def test_what_there_is_to_do_meanwhile_is_done_once():
    called = []
    assert (
        len(
            SerialTransport(Echo)
            .run(np.ones(3), [ShardCall("a"), ShardCall("b")], lambda: called.append(None))
            .replies
        )
        == 2
    )
    assert len(called) == 1


def test_arguments_are_read_only_as_on_a_cluster():
    with pytest.raises(ValueError, match="read-only"):
        SerialTransport(Echo).run(np.ones(3), [ShardCall("write")])


def test_wrong_number_of_states_says_what_to_return():
    with pytest.raises(
        TypeError, match=r"2 values; this call wants a tuple of 1 reply and 0 states\. Return"
    ):
        SerialTransport(Echo).run(np.ones(3), [ShardCall("a", (np.ones(3),), 0)])


def test_serial_does_not_import_ray():
    check = "import sys, bomemeta.distributed.serial; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
