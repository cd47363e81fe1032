"""What a run needs to go on to the same bits, written whole or not at all and read without
executing anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bomemeta.config import Config, differing_keys
from bomemeta.errors import CheckpointError
from bomemeta.files import written_whole


class Checkpoint(NamedTuple):
    """The state after `step` steps were committed. Nothing but tensors, numbers, texts, dicts and
    lists.
    """

    step: int
    upper: dict[str, Tensor]
    solver: dict[str, Any]
    lower: dict[int, Tensor]  # flat state of each persistent task, by task id
    config: dict[str, Any]  # Config.to_dict()


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
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            torch.save(checkpoint._asdict(), file)
        # A later step than this one is of a past that the run went back from: damaged, or never to
        # be reached again.
        later = [other for other in _checkpoints(folder) if other.name > path.name]
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


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step, readable or not; None where there is none."""
    return next(iter(_checkpoints(folder)), None)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint to the CPU. Pickled code in it is refused, not run.

    Raises CheckpointError where the file is missing, damaged or no checkpoint, naming the one
    before it.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        return Checkpoint(**values)
    # torch.load has no error class of its own: a damaged file surfaces as any of many.
    except Exception as error:
        older = _checkpoints(path.parent, before=path)
        hint = f"The one before it is {older[0]}" if older else "There is none before it"
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({type(error).__name__}: {str(error).partition(chr(10))[0]}). {hint}"
        ) from error


def load_latest(folder: Path) -> Loaded:
    """The newest readable checkpoint, with a note for each newer one that is damaged.

    Raises CheckpointError where none can be read.
    """
    notes: list[str] = []
    for path in _checkpoints(folder):
        try:
            return Loaded(load(path), path, notes)
        except CheckpointError as error:
            notes.append(f"passed over a damaged checkpoint: {error}")
    if notes:
        raise CheckpointError("\n".join([f"no checkpoint in {folder} can be read:", *notes]))
    raise CheckpointError(
        f"there is no checkpoint in {folder}; start the run again with `bomemeta train`"
    )


def check_same_run(checkpoint: Checkpoint, config: Config) -> None:
    """Raises CheckpointError listing the result-changing keys in which `config` differs from the
    checkpoint's.
    """
    # The checkpoint's config is compared as plain values: loading it would run the files that it
    # names.
    differences = differing_keys(checkpoint.config, config)
    if differences:
        lines = [f"  {key}: checkpoint {a!r}, config {b!r}" for key, a, b in differences]
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} belongs to another run:\n"
            + "\n".join(lines)
            + "\nSet these keys back to go on, or start a new run with `bomemeta train`"
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


def _checkpoints(folder: Path, before: Path | None = None) -> list[Path]:
    """Newest first."""
    found = sorted(folder.glob("step_*.pt"), reverse=True)
    return found if before is None else [path for path in found if path.name < before.name]


def _disk_error(error: BaseException) -> OSError | None:
    """The OSError itself, or the one behind a RuntimeError: torch's zip writer fails over again
    while it is closed.
    """
    chain: BaseException | None = error
    while chain is not None and not isinstance(chain, OSError):
        chain = chain.__cause__ or chain.__context__
    return chain
