"""A run through kills of workers, raylets, the head and its driver, stops and a full disk, in a
seeded order that anyone can repeat; it has to end with the bits of an undisturbed serial run.

    python -m benchmarks.chaos --seed N --minutes M [--out FOLDER] [--deeds worker raylet ...]

Starts a Ray cluster of its own (a head without CPUs, two nodes of one CPU each), runs
`bomemeta train ... --auto-resume --restarts 100` on it, and gives the same command again where it
ends before its time, as an operator would. What was done, and how long it took until a step was
committed again, is a table at the end. The full disk is a small tmpfs: that needs the right to
mount.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bomemeta import api
from bomemeta.metrics import read_metrics

ROOT = Path(__file__).parents[1]
NODES, WORKERS = 2, 2
LOAD_S = 0.5  # a shard's; with it a step takes about a second
STEPS_A_MINUTE = 20  # of undisturbed time a third: the rest is for what is done to it
QUIET_S = (5.0, 20.0)  # between a step after one deed and the next deed
LONGEST_S = 300.0  # without a new step: the run is taken to be lost
DISK_MIB = 64
# `ray`, which waits longer than 30 s for a node on a slow machine.
PATIENT_RAY = """
import time
from bomemeta.distributed.node import patient
from ray.scripts.scripts import main
with patient(time.monotonic() + 300):
    main()
"""
CONFIG: dict[str, Any] = {
    "imports": [str(ROOT / "tests" / "wide.py")],
    "problem": {"name": "wide"},
    "solver": {"name": "bome", "inner_steps": 3, "lower_momentum": 0.5, "upper_lr": 0.05},
    "shards": 4,
    "checkpoint": {"every_steps": 5},
    "log": {"tensorboard": False, "every_steps": 1},
}


class Row(NamedTuple):
    """What was done at which second, and how long it took until a step was committed."""

    at_s: float
    deed: str
    back_s: float | None
    step: int


class Nodes:
    """A head and its nodes, as processes in a session of their own each."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._folder, self._count = folder, 0
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",  # or workers starve where others are at work too
        }  # fmt: skip
        self.head: subprocess.Popen[bytes] | None = None
        self.others: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """What is not there is started."""
        while self.head is None or self.head.poll() is not None or not self._answers():
            # A new session of Ray's for each head: the old one's sockets may still be there.
            session = Path(tempfile.mkdtemp(prefix="h", dir=self._folder))
            head = ["--head", f"--port={self.port}", "--num-cpus=0", f"--temp-dir={session}"]
            self.head = process = self._ray(*head, "--include-dashboard=false")
            _until(lambda: process.poll() is not None or self._answers(), 120)  # noqa: B023
        self.others = [other for other in self.others if other.poll() is None]
        while len(self.others) < NODES:
            self.others.append(self._ray(f"--address={self.address}", "--num-cpus=1"))

    def kill(self, process: subprocess.Popen[bytes], only: bytes | None = None) -> None:
        """SIGKILL to what `ray start` has started; `only`: to the first that has this in its
        command, and to the others when they have had the time to notice.
        """
        for pid in _session(process.pid):
            if only is None or only in _command(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def lose_head(self) -> None:
        assert self.head is not None
        self.kill(self.head, b"gcs_server")

    def end(self) -> None:
        for process in [*self.others, *([self.head] if self.head else [])]:
            self.kill(process)
            process.wait()
        self.head, self.others = None, []

    def _ray(self, *options: str) -> subprocess.Popen[bytes]:
        self._count += 1
        log = (self._folder / f"ray-{self._count}.log").open("w")
        arguments = [sys.executable, "-c", PATIENT_RAY, "start", "--block", "--num-gpus=0"]
        arguments += ["--object-store-memory=100000000", "--node-ip-address=127.0.0.1", *options]
        return subprocess.Popen(
            arguments, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


class Chaos:
    """One run, what is done to it, and what came of it."""

    def __init__(self, seed: int, minutes: float, folder: Path) -> None:
        self.dice, self.minutes, self.folder = random.Random(seed), minutes, folder
        self.output, self.rows, self.starts = folder / "disk" / "run", list[Row](), 0
        self.steps = max(5, int(STEPS_A_MINUTE * minutes))
        self.nodes = Nodes(folder)
        self.run: subprocess.Popen[bytes] | None = None
        self.begun = time.monotonic()
        self.config = folder / "chaos.yaml"
        self.config.write_text(yaml.safe_dump({**CONFIG, "steps": self.steps}))
        self.overrides = [
            f"output_dir={self.output}", f"address={self.nodes.address}", f"workers={WORKERS}",
            f"problem.load_s={LOAD_S}", "step_timeout_s=15", "address_wait_s=120",
            "wait_for_room_s=120",
        ]  # fmt: skip

    def command(self) -> None:
        """The same command, as often as it takes."""
        self.starts += 1
        arguments = [sys.executable, "-m", "bomemeta", "train", str(self.config), *self.overrides]
        arguments += ["--auto-resume", "--restarts", "100"]
        with (self.folder / "run.log").open("a") as log:
            self.run = subprocess.Popen(
                arguments,
                env=self.nodes.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def step(self) -> int:
        found = read_metrics(self.output / "metrics.jsonl")
        return int(found[-1]["step"]) + 1 if found else 0

    def last(self) -> float:
        path = self.output / "metrics.jsonl"
        return path.stat().st_mtime if path.exists() else 0.0

    def tended(self) -> bool:
        """Gives the command again where it has ended too early; whether the run is finished."""
        assert self.run is not None
        self.nodes.start()
        if self.run.poll() is None:
            return False
        if self.run.returncode == 0:
            return True
        self.command()
        return False

    # Deeds. Each leaves the cluster such that the run can continue.

    def worker(self) -> None:
        self._signal_worker(signal.SIGKILL)

    def hang(self) -> None:
        self._signal_worker(signal.SIGSTOP)

    def raylet(self) -> None:
        """A node is lost with all on it, and another comes."""
        self.nodes.kill(self.nodes.others.pop(self.dice.randrange(len(self.nodes.others))))
        self.nodes.start()

    def head(self) -> None:
        """kill -9 of the GCS; what is left of the cluster goes, and after a while there is a new
        one at the same address.
        """
        self.nodes.lose_head()
        time.sleep(25)
        self.nodes.end()
        self.nodes.start()

    def driver(self) -> None:
        """kill -9 of the run; the command starts it again."""
        assert self.run is not None
        for pid in _children(self.run.pid):
            os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, as a scheduler's preemption; the same command again."""
        assert self.run is not None
        self.run.terminate()
        self.run.wait(60)

    def disk(self) -> None:
        """No space is left for a while."""
        filler = self.output.parent / "filler"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(2**20))
                file.flush()
        time.sleep(15)
        filler.unlink()

    def _signal_worker(self, number: int) -> None:
        workers = [
            pid
            for node in self.nodes.others
            for pid in sorted(_session(node.pid))
            if _command(pid).startswith(b"ray::ShardActor")
        ]
        if workers:
            with suppress(ProcessLookupError):
                os.kill(self.dice.choice(workers), number)

    def play(self, deeds: Sequence[str]) -> None:
        self.nodes.start()
        self.command()
        _until(lambda: self.step() > 0 or self.tended(), LONGEST_S)
        while time.monotonic() - self.begun < 60 * self.minutes and not self.tended():
            name = self.dice.choice(list(deeds))
            at, before, step = time.monotonic(), time.time(), self.step()
            print(f"{at - self.begun:6.0f} s, step {step}: {name}", flush=True)
            getattr(self, name)()
            after = time.monotonic()
            done = _until(lambda before=before: self.tended() or self.last() > before, LONGEST_S)  # type: ignore[misc]
            back = time.monotonic() - at if done else None
            self.rows.append(Row(at - self.begun, name, back, step))
            if not done:
                raise SystemExit(
                    f"no step for {time.monotonic() - after:.0f} s after {name}; see {self.folder}"
                )
            quiet = time.monotonic() + self.dice.uniform(*QUIET_S)
            _until(lambda quiet=quiet: self.tended() or time.monotonic() > quiet, LONGEST_S)  # type: ignore[misc]
        _until(self.tended, 60 * self.minutes + LONGEST_S)

    def end(self) -> None:
        if self.run is not None and self.run.poll() is None:
            self.run.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.run.wait(20)
            self.run.kill()
        self.nodes.end()


def table(result: dict[str, Any]) -> str:
    lines = [
        "| deed | times | until a step was committed again, s: least, median, most |",
        "|---|---|---|",
    ]
    for name in sorted({row["deed"] for row in result["rows"]}):
        took = sorted(row["back_s"] for row in result["rows"] if row["deed"] == name)
        lines.append(
            f"| {name} | {len(took)} | {took[0]:.0f}, {took[len(took) // 2]:.0f}, {took[-1]:.0f} |"
        )
    same = (
        "the serial run's"
        if result["sha256"] == result["serial_sha256"]
        else "ANOTHER than the serial run's"
    )
    lines += [
        "",
        f"{result['steps']} steps in {result['seconds']:.0f} s, seed {result['seed']}; the command was given "
        f"{result['starts']} times; the hash is {same}: {result['sha256'][:16]}",
    ]
    return "\n".join(lines)


def _until(condition: Callable[[], object], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _stat(pid: str) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _session(leader: int) -> set[int]:
    """The processes of a session."""
    numbers = [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {int(pid) for pid in numbers if (stat := _stat(pid)) and stat[3] == str(leader)}


def _children(parent: int) -> set[int]:
    numbers = [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {int(pid) for pid in numbers if (stat := _stat(pid)) and stat[1] == str(parent)}


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


DEEDS = ("worker", "hang", "raylet", "head", "driver", "stop", "disk")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, help="keeps the logs and the table's JSON there")
    parser.add_argument("--deeds", nargs="+", choices=DEEDS, default=list(DEEDS))
    options = parser.parse_args(argv)
    with ExitStack() as stack:
        # Not a long path: a socket's may have 107 characters.
        folder = Path(tempfile.mkdtemp(prefix="chaos", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "disk").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", str(folder / "disk")]
        if subprocess.run(mount, capture_output=True).returncode == 0:
            stack.callback(subprocess.run, ["umount", "-l", str(folder / "disk")])
        elif "disk" in options.deeds:
            options.deeds.remove("disk")
            print("no right to mount: without a full disk", flush=True)
        chaos = Chaos(options.seed, options.minutes, folder)
        serial = api.train({**CONFIG, "steps": chaos.steps}, [f"output_dir={folder / 'serial'}"])
        stack.callback(chaos.end)
        if options.out is not None:
            stack.callback(_keep, folder, options.out)
        chaos.play(options.deeds)
        seconds = time.monotonic() - chaos.begun
        ended = json.loads((chaos.output / "result.json").read_text())
    result = {
        "seed": options.seed, "minutes": options.minutes, "steps": chaos.steps, "seconds": seconds,
        "starts": chaos.starts, "rows": [row._asdict() for row in chaos.rows],
        "sha256": ended["upper_sha256"], "serial_sha256": serial.upper_sha256,
    }  # fmt: skip
    print(table(result))
    if options.out is not None:
        (options.out / "chaos.json").write_text(json.dumps(result, indent=2))
    if result["sha256"] != result["serial_sha256"]:
        raise SystemExit("the bits are not those of the serial run")
    return result


def _keep(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, out)


if __name__ == "__main__":
    main()
