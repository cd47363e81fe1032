"""Everything that a card can show, in one command of at most nine minutes; on a machine without one
the same with the CPU in its place.

    python -m benchmarks.on_device --json OUT.json --markdown OUT.md

Each part is a process of its own with a time box; what it had measured when it failed or ran over
is kept, and the reason stands beside it. The parts:

    bits          every run twice: equal hashes of x, and which solvers' are not
    trajectories  CPU against card in float64
    steps         conv4, resnet12, ResNet-18 and GPT steps over supervised ones, in float32, TF32 and bf16
    jax           the same steps in plain JAX
    two_on_one    two workers that share a card
    scaling       Ray workers 1, 2, 4 ... 16 on the CPU's cores

`--sizes`: full (a card), cpu, tiny (a test); default: by what is here. `--here`: the parts run in
this process, without a time box.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.device.jax_peer import jax_steps
from benchmarks.device.same import bits, trajectories
from benchmarks.device.sizes import SIZES, Say, Sizes, device_here, device_name
from benchmarks.device.steps import steps
from benchmarks.device.workers import Absent, scaling, two_on_one
from bomemeta.environment import environment, environment_line

Part = Callable[[Sizes, Say], None]
# By name, with the share of the time that each may take.
PARTS: dict[str, tuple[Part, float]] = {
    "steps": (steps, 0.30),
    "bits": (bits, 0.17),
    "trajectories": (trajectories, 0.15),
    "jax": (jax_steps, 0.14),
    "two_on_one": (two_on_one, 0.10),
    "scaling": (scaling, 0.14),
}


def run_here(name: str, sizes: Sizes, rows: list[dict[str, Any]], wrote: Callable[[], None]) -> str:
    """Runs the part, adding its rows; returns how it ended: "done", or why not."""

    def say(row: dict[str, Any]) -> None:
        print(name, row, flush=True)
        rows.append(row)
        wrote()

    try:
        PARTS[name][0](sizes, say)
    except Absent as reason:
        return f"left out: {reason}"
    except Exception as error:  # a part that fails leaves the others to run
        return f"failed: {type(error).__name__}: {str(error)[:300]}"
    return "done"


def run_apart(name: str, sizes: Sizes, box_s: float) -> tuple[str, list[dict[str, Any]]]:
    """As `run_here`, in a process that is ended with all its children after `box_s` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.on_device", "--only", name]
        process = subprocess.Popen(
            [*command, "--sizes", sizes.name, "--json", str(file)], start_new_session=True
        )
        try:
            process.wait(box_s)
            ended = f"failed: its process ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"ran over its time box of {box_s:.0f} s"
        finally:
            _end(process)
        if not file.is_file():
            return ended, []
        reported = json.loads(file.read_text())
        return reported["ended"] or ended, reported["rows"]


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and whatever it started, which is all in its own session's group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def only(name: str, sizes: Sizes, file: Path) -> None:
    """One part; its rows are in the file as soon as they are there."""
    rows: list[dict[str, Any]] = []

    def write(ended: str | None = None) -> None:
        temporary = file.with_suffix(".part")
        temporary.write_text(json.dumps({"ended": ended, "rows": rows}))
        temporary.replace(file)

    ended = run_here(name, sizes, rows, write)
    write(ended)


def markdown(result: dict[str, Any]) -> str:
    """The tables, with the device's name above and the versions below."""
    lines = [f"## {result['device']}", ""]
    for name, part in result["parts"].items():
        lines += [f"### {name}: {part['ended']} ({part['seconds']:.0f} s)", ""]
        columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
        if columns:
            lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
            lines += [
                "| " + " | ".join(_cell(row.get(key, "")) for key in columns) + " |"
                for row in part["rows"]
            ]
            lines.append("")
    return "\n".join([*lines, environment_line(result["environment"]), ""])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return (", ".join(value) if isinstance(value, list) else str(value)).replace("|", "/")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sizes", choices=list(SIZES))
    parser.add_argument("--minutes", type=float, default=8.5, help="for all parts together")
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--only", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    sizes = SIZES[options.sizes or ("cpu" if device_here() == "cpu" else "full")]
    if options.only:
        only(options.only, sizes, options.json)
        return {}
    result: dict[str, Any] = {
        "device": device_name(), "sizes": sizes.name, "torch_cuda": torch.version.cuda,
        "environment": environment(), "parts": {},
    }  # fmt: skip
    ends = time.monotonic() + 60 * options.minutes
    for i, name in enumerate(options.parts):
        start, rows = time.monotonic(), []
        share = PARTS[name][1] / sum(PARTS[other][1] for other in options.parts[i:])
        if options.here:
            ended = run_here(name, sizes, rows, lambda: None)
        else:
            # What earlier parts left of their time is the later ones'.
            ended, rows = run_apart(name, sizes, share * (ends - start))
        seconds = time.monotonic() - start
        result["parts"][name] = {"ended": ended, "seconds": seconds, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        if options.markdown:
            options.markdown.write_text(markdown(result))
    print(markdown(result))
    return result


if __name__ == "__main__":
    main()
