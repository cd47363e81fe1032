"""What this machine has, against what the numbers of a config ask for: said before it is taken."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bomemeta.boundary import reason
from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.extras import installed

# More threads than cores are slow and no fault: another machine's run may want its number here.
THREADS_PER_CORE, THREADS_ANYWHERE = 4, 64
# Of a task that is only counted: its number, in a list and in a request.
BYTES_PER_TASK = 100
_COUNTS = (
    "tasks_per_step",
    "shards",
    "seeds",
    "evaluation.episodes",
    "evaluation.validation_episodes",
)
# What torch, numpy and Python say of sizes that they cannot have.
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|Unable to allocate")
# The same, in words that other mistakes have too: of sizes where this package, torch or numpy asked.
_TOO_LARGE = re.compile(
    r"[Oo]verflow|too (large|big)|Maximum allowed|exceeds? the (limit|maximum)|numel|negative dimension|int too big|"
    r"cannot fit|must be less than|exceeded|can't represent|too many",
)
_ASKING = ("bomemeta", "torch", "numpy")
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def check_threads(threads: int) -> None:
    """Raises ConfigError where so many threads would not start on this machine."""
    cores = os.cpu_count() or 1
    most = max(THREADS_PER_CORE * cores, THREADS_ANYWHERE)
    if threads > most:
        raise ConfigError(
            f"threads: got {threads}; this machine has {cores} cores, and at most {most} threads are started on it"
        )


def check_counts(values: Mapping[str, Any]) -> None:
    """Raises ConfigError naming a number of tasks that this machine could not even list.

    `values` is a `Config.to_dict()`.
    """
    memory = available_memory()
    for key in _COUNTS:
        value: Any = values
        for part in key.split("."):
            value = value[part]
        if isinstance(value, int) and memory is not None and value * BYTES_PER_TASK > memory:
            raise ConfigError(
                f"{key}: got {value}; to list so many takes {size_text(value * BYTES_PER_TASK)}, and this machine has "
                f"{size_text(memory)} free"
            )


def check_bytes(key: str, what: str, size: int) -> None:
    """Raises ConfigError where `what`, of `size` bytes, is more than this machine has free."""
    free = available_memory()
    if free is not None and size > free:
        raise ConfigError(
            f"{key}: {what} take {size_text(size)}, and this machine has {size_text(free)} free; wanted less"
        )


@contextlib.contextmanager
def within_memory(values: Mapping[str, Any], *, limited: bool) -> Iterator[None]:
    """Turns the errors of arrays that cannot be had into a ConfigError that names the largest numbers
    of `values`, a `Config.to_dict()`.

    `limited`: what would take more than the machine has free fails as it is asked for, and not when
    it is filled and the machine ends the process.
    """
    memory = available_memory()
    try:
        with _limited(memory) if limited else contextlib.nullcontext():
            yield
    except BomemetaError:
        raise
    except Exception as error:
        if asks_too_much(error) and _largest(values):
            raise _refusal(values, error, memory) from error
        raise


def asks_too_much(error: Exception) -> bool:
    """Whether this is what torch, numpy or Python say of a size that cannot be had."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(
        error, RuntimeError | ValueError | TypeError | IndexError | OverflowError
    ) or isinstance(error, RecursionError):
        return False
    if _NO_MEMORY.search(str(error)) is not None:
        return True
    sized = isinstance(error, OverflowError) or _TOO_LARGE.search(str(error)) is not None
    return sized and _raised_by_a_library(error)


def _raised_by_a_library(error: Exception) -> bool:
    """Whether the line that raised it is none of a user's own file, where it is a mistake like any."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    return str(module).partition(".")[0] in _ASKING


def available_memory() -> int | None:
    """Bytes that this process can still have; None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = dict(
            line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line
        )
        if "MemAvailable" in lines:
            found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for most, now in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            used = int((_CGROUP / now).read_text())
            found.append(max(int((_CGROUP / most).read_text()) - used, 0))
    return min(found) if found else None


def size_text(size: int) -> str:
    """Bytes in words."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if amount < 1000 or unit == "PB":
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return ""


@contextlib.contextmanager
def _limited(memory: int | None) -> Iterator[None]:
    used = _data_bytes()
    if memory is None or used is None or not installed("resource"):  # Windows has no such limit
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + memory
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    try:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (min([wanted, *limits]), hard))
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int | None:
    """What this process has asked for so far, as RLIMIT_DATA counts it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[5]) * mmap.PAGESIZE
    return None


def _refusal(values: Mapping[str, Any], error: Exception, memory: int | None) -> ConfigError:
    there = f"; this machine has {size_text(memory)} free" if memory is not None else ""
    return ConfigError(
        f"the config's numbers ask for more than this machine has ({reason(error, named=False)}){there}. The largest are "
        + ", ".join(f"{key}: {number}" for key, number in _largest(values))
    )


def _largest(values: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The largest integers of problem, solver and data, and the numbers of tasks."""
    found: list[tuple[str, int]] = []

    def walk(key: str, value: Any) -> None:
        if isinstance(value, bool):
            return
        if isinstance(value, int) and key != "seed":
            found.append((key, value))
        elif isinstance(value, Mapping):
            for name, item in value.items():
                walk(f"{key}.{name}" if key else str(name), item)

    walk("", values)
    found.sort(key=lambda each: -each[1])
    return found[:3]
