"""Workers are killed all the time, on a healthy cluster: that is no fault of the run, which continues
as long as steps are committed.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from test_transport_nodes import WIDE
from test_transport_ray import ray_processes

import bomemeta
from bomemeta.distributed import cluster
from bomemeta.distributed.cluster import RayOptions

EVERY_S, KILLS = 3.0, 20
# A shard takes most of the time between two kills: it is often the same one that is hit again.
SHARD_S = 2.0


def at_work() -> list[int]:
    """Workers in the middle of a shard."""
    found = []
    for pid in ray_processes():
        with suppress(OSError):
            if b"ShardActor.execute" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.mark.slow(reason="20 kills, one in 3 s: pytest -m slow tests/test_storm.py")
def test_a_storm_of_kills_is_no_fault_of_the_run(tmp_path: Path) -> None:
    job = {
        **WIDE,
        "problem": {"name": "wide", "size": 1000, "hurry": str(tmp_path / "hurry")},
        "steps": 300,
        "shards": 2,
    }
    reference = bomemeta.train(job, [f"output_dir={tmp_path / 'reference'}"])
    killed: list[int] = []
    over, dice = threading.Event(), random.Random(0)

    def strike() -> None:
        while len(killed) < KILLS and not over.wait(EVERY_S):
            if workers := at_work():
                killed.append(dice.choice(workers))
                with suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)
        (tmp_path / "hurry").touch()

    with cluster.local(RayOptions(workers=2), print):
        storm = threading.Thread(target=strike)
        storm.start()
        try:
            keys = [f"output_dir={tmp_path / 'run'}", "workers=2", f"problem.load_s={SHARD_S}"]
            result = bomemeta.train(job, keys)
        finally:
            over.set()
            storm.join()
    assert len(killed) == KILLS
    lost = [note for note in result.notes if " died " in note and "in shard" in note]
    # A kill may come when a shard has just answered.
    assert len(lost) >= KILLS / 2, result.notes
    assert result.upper_sha256 == reference.upper_sha256
