"""One machine, as the process that asks sees it. The standard library alone, and no other module of
bomemeta: `cluster.py` sends this file to nodes where bomemeta may be missing.
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("bomemeta", "torch", "ray", "numpy")


def facts() -> dict[str, Any]:
    """Versions (None: not there), cores, free memory, GPUs as [total, free] and the room of the
    shared memory, in bytes.
    """
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in PACKAGES},
        },
        "cores": cores(),
        "memory_available": memory_available(),
        "gpus": gpus(),
        "shm_available": shm_available(),
        "data_folder": os.environ.get("BOMEMETA_DATA"),
        "keeps_bytecode": keeps_bytecode(),
    }


def keeps_bytecode() -> bool:
    """Whether torch's compiled modules are there, or a process that imports it would leave them."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return True
    cached = Path(importlib.util.cache_from_source(spec.origin))
    there = next(folder for folder in cached.parents if folder.exists())
    return cached.exists() or (not sys.dont_write_bytecode and os.access(there, os.W_OK))


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Those that this process may use: its affinity, and its container's share of time."""
    everywhere = not hasattr(os, "sched_getaffinity")  # macOS and Windows
    allowed = (os.cpu_count() or 1) if everywhere else len(os.sched_getaffinity(0))
    quota, _, period = text_of("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        allowed = min(allowed, max(int(quota) // int(period), 1))
    return allowed


def memory_available() -> int:
    """Bytes that new processes can have: the machine's, or what the container's limit leaves."""
    free = [
        int(line.split()[1]) * 1024
        for line in text_of("/proc/meminfo").splitlines()
        if line.startswith("MemAvailable:")
    ]
    limit, used = text_of("/sys/fs/cgroup/memory.max"), text_of("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit():
        # Files that were read long ago are given back when memory is short.
        cache = [
            int(line.split()[1])
            for line in text_of("/sys/fs/cgroup/memory.stat").splitlines()
            if line.startswith("inactive_file ")
        ]
        free.append(int(limit) - int(used) + sum(cache))
    return min(free, default=0)


def process_memory() -> int:
    """Bytes of this process's own in memory: libraries, which processes share, are not counted."""
    status = text_of("/proc/self/status").splitlines()
    return next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:")), 0)


def shm_available() -> int:
    try:
        return os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize
    except (OSError, AttributeError):  # AttributeError: Windows has no statvfs
        return 0


def gpus() -> list[list[int]]:
    """[total, free] of each GPU in bytes; the driver is asked, because torch may not be there."""
    query = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=20, check=True
        ).stdout
        return [
            [int(float(amount) * 2**20) for amount in line.split(",")]
            for line in answer.splitlines()
            if line.strip()
        ]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def build_worker(factory: str, threads: int, paths: list[str]) -> str:
    """Builds a run's worker here, from the pickled factory in base64, as an actor does; what went
    wrong, or an empty text.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    sys.path.extend(path for path in paths if path not in sys.path)
    try:
        pickle.loads(base64.b64decode(factory))("cpu")
    except Exception as error:  # whatever it is, it is what a run's worker would fail with
        return f"{type(error).__name__}: {error}"
    return ""


def text_of(path: str) -> str:
    """The text of a small file of the kernel's; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
