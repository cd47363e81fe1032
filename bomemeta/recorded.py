"""The record of a folder's run: its result, and the checkpoint that it stands at. Nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from bomemeta import checkpoint as checkpoints
from bomemeta.checkpoint import Loaded, judged_upper, load_latest, upper_sha256
from bomemeta.config import Config, differing_keys
from bomemeta.errors import CheckpointError
from bomemeta.result import Result
from bomemeta.run_folder import RunFolder


def finished(settings: Config, folder: RunFolder) -> Result | None:
    """The result of the folder's run, where it is the config's and has ended; else None."""
    record, _ = folder.read_result()
    # It ended before it was taken further, or the file cannot be used.
    if record is None or differing_keys(record["config"], settings):
        return None
    notes: list[str] = record["notes"]
    last = standing(folder)
    if last is None or upper_sha256(judged_upper(last.checkpoint)) != record["upper_sha256"]:
        if settings.seeds == 1:
            notes = [*notes, f"the final x is not in {folder.location} any more"]
        last = None
    if record["config"]["evaluation"] != settings.to_dict()["evaluation"]:
        notes = [
            *notes,
            f"measured with another `evaluation:` than this config's; `bomemeta eval {folder.location}` measures again",
        ]
    upper = judged_upper(last.checkpoint) if last is not None else {}
    return _read(
        settings, folder, record["steps"], record["metrics"], upper, record["upper_sha256"], notes
    )


def loaded(settings: Config, folder: RunFolder) -> Result:
    """The result of the folder's run as far as it has come; `metrics` is empty before its end."""
    if (result := finished(settings, folder)) is not None:
        return result
    last = load_latest(folder.checkpoints)
    upper = judged_upper(last.checkpoint)
    digest = upper_sha256(upper)
    _, fault = folder.read_result()
    notes = last.notes if fault is None else [*last.notes, fault]
    return _read(settings, folder, last.checkpoint.step, {}, upper, digest, notes)


def _read(
    settings: Config,
    folder: RunFolder,
    steps: int,
    metrics: Mapping[str, float | None],
    upper: dict[str, Tensor],
    digest: str,
    notes: list[str],
) -> Result:
    found = {name: math.nan if value is None else value for name, value in metrics.items()}
    uri = folder.mirror.uri if folder.mirror is not None else None
    return Result(folder.path, steps, found, upper, digest, False, notes, uri, config=settings)


def standing(folder: RunFolder) -> Loaded | None:
    """The newest readable checkpoint; None where there is nothing to lose: no checkpoint, or only a
    damaged one of the start.
    """
    newest = checkpoints.latest(folder.checkpoints)
    if newest is None:
        return None
    try:
        return load_latest(folder.checkpoints)
    except CheckpointError:
        if newest.name == checkpoints.name_of(0):
            return None
        raise
