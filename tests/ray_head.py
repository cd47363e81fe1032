"""A Ray head with its dashboard, as `ray start --head` makes it: processes, ports and a folder of
its own, all gone at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_S = 90.0


@dataclass(frozen=True)
class Head:
    dashboard: str  # http://127.0.0.1:PORT
    address: str  # 127.0.0.1:PORT, of the cluster itself
    folder: Path  # Ray's temporary folder
    environment: dict[str, str]  # what a client of this cluster has to have set


@contextmanager
def ray_head(
    authentication: str, cpus: int = 2, port: int | None = None, system: Mapping[str, float] = {}
) -> Iterator[Head]:
    """`authentication`: "token" or "disabled". Everything listens on the loopback address alone.
    `system`: Ray's system config.
    """
    with ExitStack() as stack:
        # Not pytest's folder: a socket's path may have 107 characters.
        folder = Path(tempfile.mkdtemp(prefix="bmh", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        free, dashboard, *others = _free_ports(7)
        port = port or free
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": authentication,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # one machine: loopback only
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # as conftest.py has it
            # Tests run under `uv run`: the head would find it among its parents and start every job
            # with it, in the job's folder.
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        if authentication == "token":
            environment["RAY_AUTH_TOKEN"] = "0123456789abcdef" * 4
        names = [
            "ray-client-server",
            "dashboard-agent-listen",
            "dashboard-agent-grpc",
            "metrics-export",
            "runtime-env-agent",
        ]
        options = [f"--{name}-port={number}" for name, number in zip(names, others, strict=True)]
        log = stack.enter_context((folder / "head.log").open("w"))
        process = subprocess.Popen(
            [
                Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--num-cpus={cpus}", "--num-gpus=0", f"--port={port}",
                "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
                "--object-store-memory=100000000", f"--system-config={json.dumps(dict(system))}", *options,
            ],
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        stack.callback(_end, process, folder)
        head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", folder, environment)
        _wait_for_jobs_server(head, process)
        _wait_for_agent(others[names.index("dashboard-agent-listen")], head, process)
        yield head


def _wait_for_jobs_server(head: Head, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/")
    if "RAY_AUTH_TOKEN" in head.environment:
        request.add_header("Authorization", f"Bearer {head.environment['RAY_AUTH_TOKEN']}")
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            message = (head.folder / "head.log").read_text()
            assert process.poll() is None, message
            assert time.monotonic() < deadline, message
            time.sleep(0.2)


def _wait_for_agent(port: int, head: Head, process: subprocess.Popen[bytes]) -> None:
    """Who starts the jobs: on a busy machine it comes up long after the server that takes them,
    which waits 10 s for it, then refuses.
    """
    deadline = time.monotonic() + START_S
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                return
        except OSError:
            message = (head.folder / "head.log").read_text()
            assert process.poll() is None, message
            assert time.monotonic() < deadline, message
            time.sleep(0.2)


def processes_of(folder: Path) -> list[int]:
    """All processes that have the head's folder in their command line or environment, whoever their
    parent is now.
    """
    found = []
    needle = os.fsencode(folder)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if (
                needle in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            ):  # jobs have it in their environment
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Everything goes within ten seconds; Ray itself may take a minute to drain a node on which a
    job was killed.
    """
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 2
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for number in left:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
