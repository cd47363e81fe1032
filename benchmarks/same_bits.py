"""The hash of x after the same training with different numbers of workers, deaths and
interruptions: real processes, real signals.

python -m benchmarks.same_bits --config configs/quickstart.yaml --steps 30 --json OUT
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bomemeta.environment import environment
from bomemeta.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(arguments.config, arguments.steps, Path(folder))
        hashes = {f"workers={count}": job.undisturbed(count) for count in range(4)}
        hashes["workers=2, one killed (SIGKILL)"] = job.struck_worker(signal.SIGKILL)
        hashes["workers=2, one stopped (SIGSTOP), step_timeout_s=5"] = job.struck_worker(
            signal.SIGSTOP
        )
        hashes["workers=0, driver killed (SIGKILL), resumed"] = job.struck_driver(signal.SIGKILL)
        hashes["workers=0, driver interrupted (SIGINT), resumed"] = job.struck_driver(signal.SIGINT)
    for what, value in hashes.items():
        print(f"{value}  {what}")
    print("all equal" if len(set(hashes.values())) == 1 else "NOT EQUAL")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"upper_sha256": hashes, "environment": environment()}, indent=1)
        )


class Job:
    """Runs of one config, each in a folder of its own; returns `upper_sha256`."""

    def __init__(self, config: str, steps: int, folder: Path) -> None:
        self._config, self._steps, self._folder, self._runs = config, steps, folder, 0

    def undisturbed(self, workers: int) -> str:
        run = self._new_run()
        self._wait(self._start("train", self._config, f"output_dir={run}", *self._keys(workers)))
        return _hash(run)

    def struck_worker(self, number: signal.Signals) -> str:
        run = self._new_run()
        process = self._start(
            "train", self._config, f"output_dir={run}", *self._keys(2), "step_timeout_s=5"
        )
        self._until(lambda: self._committed(run) >= self._steps // 3, process)
        os.kill(_workers_below(process.pid)[0], number)
        self._wait(process)
        return _hash(run)

    def struck_driver(self, number: signal.Signals) -> str:
        run = self._new_run()
        process = self._start("train", self._config, f"output_dir={run}", *self._keys(0))
        self._until(lambda: self._committed(run) >= self._steps // 3, process)
        process.send_signal(number)
        process.communicate()
        self._wait(self._start("resume", str(run)))
        return _hash(run)

    def _new_run(self) -> Path:
        self._runs += 1
        return self._folder / f"run{self._runs}"

    def _keys(self, workers: int) -> list[str]:
        # A checkpoint in between, so that a resumed run has something to repeat.
        return [
            f"steps={self._steps}",
            f"workers={workers}",
            "evaluation.episodes=10",
            f"checkpoint.every_steps={self._steps // 5}",
        ]

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bomemeta", *arguments]
        return subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def _wait(self, process: subprocess.Popen[str]) -> None:
        output, _ = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"the run failed:\n{output}")

    def _committed(self, run: Path) -> int:
        return len(read_metrics(run / "metrics.jsonl"))

    def _until(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        while not condition():
            if process.poll() is not None:
                raise SystemExit(
                    f"the run ended before it could be struck:\n{process.communicate()[0]}"
                )
            time.sleep(0.02)


def _hash(run: Path) -> str:
    return str(json.loads((run / "result.json").read_text())["upper_sha256"])


def _workers_below(ancestor: int) -> list[int]:
    """Ray's worker processes among the descendants of a process."""
    listing = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], text=True, capture_output=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    family = {ancestor}
    for _ in range(5):  # driver, raylet, worker: a few generations at most
        family |= {int(pid) for pid, parent, *_ in rows if int(parent) in family}
    return [
        int(pid)
        for pid, _, *args in rows
        if int(pid) in family and args and args[0].startswith("ray::ShardActor")
    ]


if __name__ == "__main__":
    main()
