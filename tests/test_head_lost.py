"""The head of the cluster is lost: what is committed is saved, the run ends with 75, is started
again when there is a cluster, and reaches the same bits.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ray_head import Head, processes_of, ray_head
from test_promises import QUADRATIC
from test_supervise import lines_of, supervised

import bomemeta
from bomemeta import supervise
from bomemeta.cli.app import TRY_AGAIN
from bomemeta.config import Settings
from bomemeta.distributed import head
from bomemeta.distributed.head import HeadWatch
from bomemeta.errors import HeadLost
from bomemeta.metrics import read_metrics


def wait_for(condition: Callable[[], object], timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not get there in time"
        time.sleep(0.05)


def test_a_silent_head_is_said_at_once_and_given_up_later(monkeypatch):
    for name, seconds in (("EVERY_S", 0.02), ("SILENT_S", 0.1), ("LOST_S", 1.0)):
        monkeypatch.setattr(head, name, seconds)
    events, alarms = [], []
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    watch = HeadWatch(f"127.0.0.1:{port}", events.append, lambda: alarms.append(len(events)))
    watch.check()
    listener.close()
    wait_for(lambda: alarms == [1])
    assert watch.silent()
    listener = socket.create_server(("127.0.0.1", port))
    wait_for(lambda: len(events) == 2)
    assert [word in event for word, event in zip(("is saved now", "again"), events, strict=True)]
    watch.check()
    listener.close()
    wait_for(lambda: watch.lost)
    assert alarms == [1, 3]
    with pytest.raises(HeadLost, match=f"127.0.0.1:{port} is gone"):
        watch.check()
    watch.end()


def test_a_run_that_lost_its_cluster_counts_as_killed(tmp_path):
    process = supervised(tmp_path, "sh", "-c", f"echo begun; exit {TRY_AGAIN}", restarts=1)
    how = "ended for want of its cluster or store"
    assert lines_of(process) == [
        "begun",
        f"note: the run {how}; restart 1 of 1, in 0 s, begins again",
        "begun",
        f"failed: the run {how}, 2 times in a row without a new checkpoint; the same command resumes from its last checkpoint",
    ]
    assert process.returncode == TRY_AGAIN == supervise.TRY_AGAIN


def test_the_cluster_is_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(supervise, "FIRST_LOOK_S", 0.01)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    reported: list[str] = []

    def say(text: str) -> None:
        nonlocal listener
        reported.append(text)
        if "waiting" in text:
            listener = socket.create_server(("127.0.0.1", port))

    listener.close()
    with supervise._held_back():
        assert supervise._there_again(supervise.Cluster("127.0.0.1", port, 60.0), say)
        assert reported == [f"note: waiting for a cluster at 127.0.0.1:{port}, for 60 s at most"]
        listener.close()
        assert supervise._there_again(supervise.Cluster("127.0.0.1", port, 0.0), say)
    assert "there is no cluster" in reported[-1]


def test_where_the_cluster_is_stands_in_the_config(monkeypatch, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump({**QUADRATIC, "workers": 1}))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert supervise.cluster_of(str(config), []) is None
    assert supervise.cluster_of(str(config), ["address=local"]) is None
    wait_s = Settings.model_fields["address_wait_s"].default
    assert supervise.cluster_of(str(config), ["address=a:1"]) == ("a", 1, wait_s)
    assert supervise.cluster_of(str(config), ["address=a:1", "address_wait_s=3"]) == ("a", 1, 3.0)
    monkeypatch.setenv("RAY_ADDRESS", "b:2")
    assert supervise.cluster_of(str(config), []) == ("b", 2, wait_s)
    assert supervise.cluster_of(str(config), ["workers=0"]) is None


def kill(at: Head, *names: bytes) -> None:
    """All of them at once."""
    doomed = [
        pid
        for pid in processes_of(at.folder)
        if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(names)
    ]
    assert len(doomed) == len(names)
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)


SLOW = {
    **QUADRATIC,
    "imports": [str(Path(__file__).with_name("wide.py"))],
    "problem": {"name": "wide"},
    "steps": 30,
    "checkpoint": {"every_steps": 1000},  # what is saved is saved because of the loss
}


@pytest.mark.slow(reason="a head starts for it: pytest -m slow -k goes_with_its_raylet")
def test_a_head_that_goes_with_its_raylet_leaves_a_line_and_75(tmp_path):
    """Without --restarts. What was due before is there."""
    config, folder, hurry = tmp_path / "a.yaml", tmp_path / "run", tmp_path / "hurry"
    config.write_text(yaml.safe_dump({**SLOW, "checkpoint": {"every_steps": 2}}))
    with ray_head("disabled") as head:
        arguments = [
            "train", str(config), f"output_dir={folder}", "workers=1", f"address={head.address}", "problem.load_s=1.0",
            f"problem.hurry={hurry}",
        ]  # fmt: skip
        run = subprocess.Popen(
            [sys.executable, "-m", "bomemeta", *arguments],
            env=head.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        wait_for(lambda: (folder / "checkpoints" / "step_00000002.pt").exists())
        kill(head, b"gcs_server", b"raylet")
        _, message = run.communicate(timeout=300)
    assert run.returncode == TRY_AGAIN, message
    assert message.splitlines()[-1] == (
        "failed: the run was ended by Ray, as where this machine's part of the cluster is lost; "
        f"`bomemeta resume {folder}` resumes from its last checkpoint"
    )
    hurry.touch()
    resumed = bomemeta.resume(folder, ["address=null", "workers=0"])
    assert resumed.upper_sha256 == bomemeta.train(SLOW).upper_sha256


@pytest.mark.slow(
    reason="two heads start, one is missed for 20 s: pytest -m slow -k kill_9_of_the_gcs"
)
@pytest.mark.parametrize("workers", ["1", "auto"])
def test_a_run_survives_kill_9_of_the_gcs(workers, tmp_path):
    reference = bomemeta.train(SLOW, [f"output_dir={tmp_path / 'reference'}"])
    config, folder = tmp_path / "a.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(SLOW))
    with ray_head("disabled") as first:
        arguments = [
            "train", str(config), f"output_dir={folder}", f"workers={workers}", f"address={first.address}",
            "problem.load_s=1.0", "--auto-resume", "--restarts", "2",
        ]  # fmt: skip
        with (tmp_path / "log").open("w") as log:
            run = subprocess.Popen(
                [sys.executable, "-m", "bomemeta", *arguments],
                env=first.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_for(lambda: len(read_metrics(folder / "metrics.jsonl")) >= 3)
        kill(first, b"gcs_server")
        wait_for(lambda: "waiting for a cluster" in (tmp_path / "log").read_text())
        message = (tmp_path / "log").read_text()
    assert "does not answer; what is committed is saved now" in message
    # The head's raylet goes with it, sooner or later: then Ray ends the driver without a word.
    if "the run was ended by Ray" not in message:
        assert "the state before this step is saved" in message
        assert f"failed: the head of the Ray cluster at {first.address} is gone" in message
    with ray_head("disabled", port=int(first.address.rpartition(":")[2])):
        assert run.wait(300) == 0, (tmp_path / "log").read_text()
    record = json.loads((folder / "result.json").read_text())
    assert record["upper_sha256"] == reference.upper_sha256
