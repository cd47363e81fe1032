"""Where a value was measured: the line that belongs under every table; and what a run is told by the
process that started it.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from bomemeta.extras import versions

# `train --restarts` sets it for the run: how often the run was started before.
RESTARTS = "BOMEMETA_RESTARTS"


def restarts_before() -> int:
    """How often `--restarts` started this run again; 0 without it."""
    value = os.environ.get(RESTARTS, "")
    return int(value) if value.isdigit() else 0


def environment() -> dict[str, Any]:
    """Processor, cores and versions of what is installed. No host name, no path."""
    packages = ("torch", "learn2learn", "numpy", "ray", "bomemeta")
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "versions": {"python": platform.python_version(), **versions(*packages)},
    }


def usable_cores() -> int:
    """The processor's cores that this process may use; all of them where the system cannot say."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment_line(found: dict[str, Any]) -> str:
    """What `environment` gave, as it stands under a table."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['cores']} cores of {found['cpu']}; {versions}"


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if information.exists()
        else None
    )
    return found[1] if found else platform.processor() or platform.machine()
