"""Where a figure was measured: the line that belongs under every table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Processor, cores and versions of what is installed. No host name, no path."""
    packages = ("torch", "learn2learn", "numpy", "ray", "bomemeta")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version()}
        | {name: found for name in packages if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
