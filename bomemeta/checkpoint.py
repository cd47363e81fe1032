"""What a run needs to be resumed to the same bits, written whole or not at all and read without
executing anything.

A file ends with the SHA-256 of everything before it, as the comment of a zip archive (which is what
torch's files are). It is compared before anything is read.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor

from bomemeta.boundary import reason
from bomemeta.checkpoint_content import fault_in
from bomemeta.config import Config, differing_keys
from bomemeta.core.tree import unflatten
from bomemeta.errors import CheckpointError, ConfigError
from bomemeta.files import written_whole

# What a file holds beside a Checkpoint's fields: files of format 2 end with a digest.
FORMAT_KEY, FORMAT = "format", 2
_MARK = b"bomemeta sha256 "
_SEAL_BYTES = len(_MARK) + 64
_LENGTH_BYTES = 2  # the last field of a zip archive: how long its comment is
_READ_BYTES = 2**20
# Our own names alone: what else lies in the folder (a copy, step_best.pt) is the user's.
_NAME = re.compile(r"step_([0-9]{8,})\.pt")


class Checkpoint(NamedTuple):
    """The state after `step` steps were committed. Nothing but tensors, numbers, texts, dicts and
    lists.
    """

    step: int
    upper: dict[str, Tensor]
    solver: dict[str, Any]
    lower: dict[int, Tensor]  # flat state of each persistent task, by task id
    config: dict[str, Any]  # Config.to_dict()
    data: dict[str, str] = {}  # noqa: RUF012  digests of what was trained on, by name; never changed
    files: dict[str, str] = {}  # noqa: RUF012  digests of the run folder's other files as they were


class Loaded(NamedTuple):
    """A checkpoint, where it lies, and what had to be passed over to find it (empty: nothing)."""

    checkpoint: Checkpoint
    path: Path
    notes: list[str]


def name_of(step: int) -> str:
    """`step_00000200.pt`: a fixed number of digits, so names sort as steps do."""
    return f"step_{step:08d}.pt"


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `step_00000200.pt` and removes all checkpoints but the newest `keep`, this one
    included.

    Raises CheckpointError where the disk is full or cannot be written; the earlier checkpoints are
    then untouched.
    """
    path = folder / name_of(checkpoint.step)
    try:
        folder.mkdir(exist_ok=True)  # the run's own is there, or it was moved away
        with written_whole(path) as file:
            _write_sealed(checkpoint, file)
        # A later step than this one is of a past that the run went back from: damaged, or never to
        # be reached again.
        later = [other for other in _checkpoints(folder) if step_of(other) > checkpoint.step]
        for old in [*later, *_checkpoints(folder, before=path)[keep - 1 :]]:
            old.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        cause = _disk_error(error)
        if cause is None:
            raise
        good = _checkpoints(folder, before=path)
        last = (
            f"The last good checkpoint is {good[0]}" if good else "There is no earlier checkpoint"
        )
        raise CheckpointError(
            f"{path} could not be written: {cause.strerror or cause}. The unfinished file was removed. {last}. "
            "Make room, then `bomemeta resume` the run"
        ) from error
    return path


def written_bytes(checkpoint: Checkpoint) -> int:
    """How large its file is."""
    file = io.BytesIO()
    _write_sealed(checkpoint, file)
    return len(file.getvalue())


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step, readable or not; None where there is none."""
    return next(iter(_checkpoints(folder)), None)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint to the CPU. Pickled code in it is refused, not run.

    Raises CheckpointError where the file is missing, damaged, changed by hand or no checkpoint,
    naming the one before it.
    """
    return _load(path)[0]


def load_latest(folder: Path) -> Loaded:
    """The newest readable checkpoint, with a note for each newer one that is damaged.

    Raises CheckpointError where none can be read.
    """
    notes: list[str] = []
    for path in _checkpoints(folder):
        try:
            checkpoint, sealed = _load(path)
        except CheckpointError as error:
            notes.append(f"passed over a damaged checkpoint: {error}")
            continue
        if not sealed:
            notes.append(
                f"{path} has no digest, as an older version wrote it: whether a bit of it has changed cannot be told"
            )
        return Loaded(checkpoint, path, notes)
    if notes:
        raise CheckpointError("\n".join([f"no checkpoint in {folder} can be read:", *notes]))
    raise CheckpointError(
        f"there is no checkpoint in {folder}; start the run again with `bomemeta train`"
    )


def _renamed(checkpoint: Checkpoint) -> Checkpoint:
    """With the names of today for what older versions called otherwise."""
    solver = dict(checkpoint.solver)
    if "figures" in solver and "metrics" not in solver:
        solver["metrics"] = solver.pop("figures")
    return checkpoint._replace(solver=solver)


def _load(path: Path) -> tuple[Checkpoint, bool]:
    """The checkpoint, and whether its file ends with a digest (that of its content)."""
    try:
        sealed = _sealed(path)
        if not sealed:
            _check_sums(path)
        with warnings.catch_warnings():  # of layouts that no run writes, which are refused below
            warnings.simplefilter("ignore")
            values = torch.load(path, map_location="cpu", weights_only=True)
        fault = _fault(path, values, sealed)
        if fault is None:
            return _renamed(Checkpoint(**values)), sealed
        why, cause = fault, None
    # torch.load has no error class of its own: a damaged file surfaces as any of many.
    except Exception as error:
        why, cause = reason(error), error
    older = _checkpoints(path.parent, before=path)
    hint = f"The one before it is {older[0]}" if older else "There is none before it"
    raise CheckpointError(f"{path} is not a readable checkpoint ({why}). {hint}") from cause


def _fault(path: Path, values: Any, sealed: bool) -> str | None:
    """What keeps a file's values from being a Checkpoint's; takes the format's key out of them."""
    if not isinstance(values, dict):
        return f"it holds {type(values).__name__}, wanted a mapping"
    written = values.pop(FORMAT_KEY, None)
    if written not in (None, FORMAT):
        return f"its format is {written!r}; this version reads {FORMAT}"
    fault = fault_in(values, Checkpoint._fields, Checkpoint._field_defaults, sealed)
    if fault is not None:
        return fault
    if _NAME.fullmatch(path.name) and values["step"] != step_of(path):
        return f"its name says step {step_of(path)}, and it holds step {values['step']}"
    if written == FORMAT and not sealed:
        return "its digest is missing: it was written again, or changed, by something else"
    return None


def _write_sealed(checkpoint: Checkpoint, file: IO[bytes]) -> None:
    """torch's file of the values, with the digest of all of it as the archive's comment."""
    hashing = _Hashing(file)
    values = {**checkpoint._asdict(), FORMAT_KEY: FORMAT}
    torch.save(values, cast(IO[bytes], hashing))  # it asks for `write` alone
    # The digest is of an archive without a comment: the comment's length is set afterwards.
    file.seek(-_LENGTH_BYTES, os.SEEK_END)
    file.write(struct.pack("<H", _SEAL_BYTES) + _MARK + hashing.digest.hexdigest().encode())


class _Hashing:
    """A file to write to that hashes what passes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def _sealed(path: Path) -> bool:
    """Whether the file ends with a digest. Raises ValueError where it is not that of the content."""
    size = path.stat().st_size
    content = size - _SEAL_BYTES - _LENGTH_BYTES
    if content <= 0:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(size - _SEAL_BYTES)
        seal = file.read()
        if not seal.startswith(_MARK):
            return False
        file.seek(0)
        while content > 0 and (part := file.read(min(content, _READ_BYTES))):
            digest.update(part)
            content -= len(part)
    digest.update(bytes(_LENGTH_BYTES))
    if digest.hexdigest().encode() != seal[len(_MARK) :]:
        raise ValueError("its content is not what was written: the digest at its end is another")
    return True


def _check_sums(path: Path) -> None:
    """Of a file without a digest: the checksums that zip keeps, which torch does not compare. Raises
    ValueError.
    """
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} is not what was written: its checksum is another")


def check_same_run(checkpoint: Checkpoint, config: Config) -> None:
    """Raises CheckpointError listing the result-changing keys in which `config` differs from the
    checkpoint's, ConfigError where it has fewer steps than were done.
    """
    if config.steps is not None and checkpoint.step > config.steps:
        raise ConfigError(
            f"steps: got {config.steps}; the run has done {checkpoint.step}. Give {checkpoint.step} or more to train on, or "
            "leave it out"
        )
    # The checkpoint's config is compared as plain values: loading it would run the files that it
    # names.
    differences = differing_keys(checkpoint.config, config)
    if differences:
        lines = [f"  {key}: checkpoint {a!r}, config {b!r}" for key, a, b in differences]
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} belongs to another run:\n"
            + "\n".join(lines)
            + "\nSet these keys back to resume, or start a new run with `bomemeta train`"
        )


def upper_sha256(upper: Mapping[str, Tensor]) -> str:
    """SHA-256 over the upper variable's numbers: every tensor's contiguous little-endian bytes, in
    sorted key order.

    Names, shapes and dtypes are not hashed. Equal hashes of two runs of one config mean equal bits.
    """
    digest = hashlib.sha256()
    for key in sorted(upper):
        # As bytes first: numpy has no bfloat16. torch runs on little-endian machines only.
        digest.update(
            upper[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 where the name is not one of ours."""
    name = _NAME.fullmatch(path.name)
    return int(name[1]) if name else -1


def _checkpoints(folder: Path, before: Path | None = None) -> list[Path]:
    """Newest first."""
    # A folder or a pipe of that name is none of ours.
    found = [path for path in folder.glob("step_*.pt") if step_of(path) >= 0 and path.is_file()]
    found.sort(key=step_of, reverse=True)
    return found if before is None else [path for path in found if step_of(path) < step_of(before)]


def _disk_error(error: BaseException) -> OSError | None:
    """The OSError itself, or the one behind a RuntimeError: torch's zip writer fails over again
    while it is closed.
    """
    chain: BaseException | None = error
    while chain is not None and not isinstance(chain, OSError):
        chain = chain.__cause__ or chain.__context__
    return chain


def judged_upper(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The x that a run is judged by: the mean over steps where one is taken, else x."""
    mean = checkpoint.solver["optimizer"].get("average")
    return checkpoint.upper if mean is None else unflatten(mean, checkpoint.upper)
