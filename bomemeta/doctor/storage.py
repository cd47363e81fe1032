"""Where a run writes: whether it can, whether there is room, and whether it will still be there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from bomemeta.config import Config
from bomemeta.doctor.findings import Finding, size
from bomemeta.doctor.machine import text_of
from bomemeta.doctor.nodes import Machines
from bomemeta.storage import is_uri

# File systems that other machines see too; `fuse` is a prefix of several.
SHARED = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "afs",
    "glusterfs",
    "9p",
    "virtiofs",
)
# Part of the path of the throw-away copy in which `ray job submit` runs a job.
JOB_COPY = "runtime_resources/working_dir_files"
TENSORBOARD_BYTES = 60  # of an event of one number beside its tag


class Needs(NamedTuple):
    """Bytes that a run leaves, and holds while the last checkpoint is written."""

    checkpoint: float
    checkpoints: float  # all that are there at once
    logs: float

    @property
    def total(self) -> float:
        return self.checkpoints + self.logs


def output(config: Config, name: str, machines: Machines, needs: Needs | None) -> list[Finding]:
    """`name`: what a run folder would be called. Nothing is made or written."""
    given = config.output_dir
    if given is not None and is_uri(given):
        return [_at_uri(given, needs)]
    path = Path(given if given is not None else Path("runs") / name).expanduser().absolute()
    there = _nearest(path)
    refused = _refused(path, there, given is not None)
    if refused:
        return [
            Finding(
                "PROBLEM", "output", f"output_dir {path}: {refused}", "Choose another output_dir"
            )
        ]
    found = []
    if JOB_COPY in str(path):
        text = f"output_dir {path} lies in the job's copy of the working directory, which vanishes with the job"
        found.append(
            Finding("PROBLEM", "output", text, "Give an absolute output_dir on storage that stays")
        )
    kind = _file_system(there)
    shared = kind in SHARED or kind.startswith("fuse")
    if kind in ("tmpfs", "ramfs"):
        found.append(
            Finding(
                "NOTE",
                "output",
                f"{path} is kept in memory ({kind}): it is gone after a restart",
                "Choose a disk",
            )
        )
    elif machines.kind == "cluster" and not shared:
        text = f"{path} is this machine's own ({kind}): if it is lost, so is the run"
        found.append(
            Finding(
                "NOTE",
                "output",
                text,
                "Storage that other machines see lets the run be resumed there",
            )
        )
    if needs is not None:
        free = shutil.disk_usage(there).free
        text = f"{size(free)} free at {there}; the run leaves {size(needs.total)}"
        text += f" (checkpoints of {size(needs.checkpoint)}, {size(needs.checkpoints)} at once, logs {size(needs.logs)})"
        if needs.total > free:
            do = "Choose another output_dir, or set checkpoint.keep=1 or log.tensorboard=false"
            found.append(Finding("PROBLEM", "output", text, do))
        else:
            found.append(Finding("OK", "output", text))
    return found


def _at_uri(uri: str, needs: Needs | None) -> Finding:
    """A run at a URI is worked on in a folder of the temporary directory."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    text = f"{uri} was not looked at; the run's own copy goes to {folder}, with {size(free)} free"
    if needs is not None and needs.total > free:
        do = "Let TMPDIR name a folder with more room"
        return Finding("PROBLEM", "output", f"{text}, and wants {size(needs.total)}", do)
    return Finding("NOTE", "output", text, "The first checkpoint shows whether it can be written")


def _nearest(path: Path) -> Path:
    """The path itself, or the first above it that exists."""
    return next(above for above in (path, *path.parents) if above.exists())


def _refused(path: Path, there: Path, chosen: bool) -> str:
    """Why a run could not have this folder; empty where it could."""
    if not there.is_dir():
        return f"{there} is no folder"
    if not os.access(there, os.W_OK | os.X_OK) or _read_only(there):
        return f"{there} cannot be written"
    if chosen and there == path and any(path.iterdir()):
        return "it exists and is not empty, and a run never overwrites another"
    return ""


def _read_only(there: Path) -> bool:
    """Whether its file system is; Windows cannot say."""
    return hasattr(os, "statvfs") and bool(os.statvfs(there).f_flag & os.ST_RDONLY)


def _file_system(path: Path) -> str:
    """The kind of the file system that holds the path."""
    mounts = [line.split() for line in text_of("/proc/mounts").splitlines()]
    resolved = str(path.resolve())
    holding = [
        (len(fields[1]), fields[2])
        for fields in mounts
        if len(fields) > 2
        and (resolved == fields[1] or resolved.startswith(fields[1].rstrip("/") + "/"))
    ]
    return max(holding, key=lambda one: one[0])[1] if holding else "unknown"
