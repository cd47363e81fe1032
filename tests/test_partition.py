"""Three nodes in network namespaces of their own, two of which cannot reach each other for 20 s:
nothing is lost, the bits stay, and what is said can be read.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest
import yaml
from ray_head import processes_of
from test_transport_nodes import WIDE

import bomemeta
from bomemeta.metrics import read_metrics

PARTITION_S = 20.0
PORT = 6399
# `ray`, which waits longer than 30 s for a node on a slow machine.
NODE_S, ALL_TRIES_S = 200, 900
RAY = f"""
import time
from bomemeta.distributed.node import patient
from ray.scripts.scripts import main
with patient(time.monotonic() + {NODE_S}):
    main()
"""


def run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True)


def wait_for(condition: Callable[[], object], timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not get there in time"
        time.sleep(0.1)


class Spaces:
    """Namespaces bm0, bm1, ... on one bridge, with addresses 10.77.0.1, ..."""

    def __init__(self, stack: ExitStack, spaces: int) -> None:
        run("ip", "link", "add", "bmbr", "type", "bridge")
        stack.callback(subprocess.run, ["ip", "link", "del", "bmbr"])
        run("ip", "link", "set", "bmbr", "up")
        for number in range(spaces):
            name = f"bm{number}"
            run("ip", "netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name])
            run(
                "ip",
                "link",
                "add",
                f"{name}v",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                name,
            )
            run("ip", "link", "set", f"{name}v", "master", "bmbr")
            run("ip", "link", "set", f"{name}v", "up")
            for arguments in (
                ["ip", "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0"],
                ["ip", "link", "set", "eth0", "up"],
                ["ip", "link", "set", "lo", "up"],
            ):
                run(*self.inside(number), *arguments)

    def inside(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", f"bm{number}"]

    def clear(self, number: int) -> None:
        """Nobody is left inside."""
        found = subprocess.run(
            ["ip", "netns", "pids", f"bm{number}"], capture_output=True, text=True
        )
        for pid in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    @contextmanager
    def parted(self, one: int, other: int) -> Iterator[None]:
        """Neither reaches the other."""
        pairs = [(one, other), (other, one)]
        for here, there in pairs:
            run(*self.inside(here), "ip", "route", "add", "blackhole", f"10.77.0.{there + 1}/32")
        try:
            yield
        finally:
            for here, there in pairs:
                run(
                    *self.inside(here), "ip", "route", "del", "blackhole", f"10.77.0.{there + 1}/32"
                )


def allowed() -> bool:
    try:
        with ExitStack() as stack:
            Spaces(stack, 1)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.mark.slow(
    reason="three nodes and 20 s without a network; as root: pytest -m slow tests/test_partition.py"
)
@pytest.mark.parametrize("parted", [(0, 2), (1, 2)], ids=["driver and node", "two nodes"])
def test_a_partition_is_survived(parted, tmp_path):
    if not allowed():
        pytest.skip("network namespaces cannot be made here: root and a bridge are needed")
    config, folder = tmp_path / "a.yaml", tmp_path / "run"
    settings = {**WIDE, "steps": 40, "checkpoint": {"every_steps": 5}}
    config.write_text(yaml.safe_dump(settings))
    reference = bomemeta.train(settings, [f"output_dir={tmp_path / 'reference'}"])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_worker_niceness": "0",
    }  # fmt: skip
    with ExitStack() as stack:
        started: list[subprocess.Popen[bytes]] = []
        stack.callback(lambda: [process.wait() for process in started])
        spaces = Spaces(stack, 3)
        temporary = Path(tempfile.mkdtemp(prefix="bmp", dir="/tmp"))
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        stack.callback(end, spaces, temporary)

        def start(number: int, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
            with log.open("a") as file:
                process = subprocess.Popen(
                    [*spaces.inside(number), sys.executable, *arguments],
                    env=environment, stdout=file, stderr=file,
                )  # fmt: skip
            started.append(process)
            return process

        for number in range(3):
            where = (
                ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
                if number == 0
                else [f"--address=10.77.0.1:{PORT}", "--num-cpus=1"]
            )
            arguments = [
                "start", "--block", "--num-gpus=0", "--object-store-memory=100000000", *where,
                f"--node-ip-address=10.77.0.{number + 1}",
            ]  # fmt: skip
            deadline = time.monotonic() + ALL_TRIES_S
            for attempt in count():
                log = tmp_path / f"node-{number}-{attempt}.log"
                own = [f"--temp-dir={temporary / str(attempt)}"] if number == 0 else []
                process = start(number, log, "-c", RAY, *arguments, *own)
                if came_up(process, log):
                    break
                # A machine with much other work: what came up of the node goes, and it is tried again.
                assert time.monotonic() < deadline, log.read_text()
                spaces.clear(number)
                process.wait()
        log = tmp_path / "log"
        training = start(
            0, log, "-m", "bomemeta", "train", str(config), f"output_dir={folder}", "workers=2",
            f"address=10.77.0.1:{PORT}", "problem.load_s=0.5", "reduce=tree", "step_timeout_s=60",
            "wait_for_room_s=300", "--auto-resume",
        )  # fmt: skip
        stack.callback(training.kill)
        wait_for(
            lambda: len(read_metrics(folder / "metrics.jsonl")) >= 5 or training.poll() is not None
        )
        with spaces.parted(*parted):
            time.sleep(PARTITION_S)
        assert training.wait(400) == 0, log.read_text()
    message = log.read_text()
    assert "Traceback" not in message
    assert message.splitlines()[-1].startswith("done after 40 steps")
    record = json.loads((folder / "result.json").read_text())
    assert record["upper_sha256"] == reference.upper_sha256


def came_up(process: subprocess.Popen[bytes], log: Path) -> bool:
    deadline = time.monotonic() + NODE_S + 60
    while "Ray runtime started" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def end(spaces: Spaces, temporary: Path) -> None:
    for pid in processes_of(temporary):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for number in range(3):
        spaces.clear(number)
