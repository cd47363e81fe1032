"""What is compared: for every entry the final metrics of its seeds, read from result.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bomemeta.errors import ConfigError

RESULT = "result.json"


@dataclass(frozen=True)
class Entry:
    """One method: its name in the table and, for each of its seeds, the final metrics."""

    label: str
    seeds: Mapping[int, Mapping[str, float]]
    config: Mapping[str, Any]  # of one of its runs
    versions: Mapping[str, str]


def read_entries(texts: Sequence[str]) -> list[Entry]:
    """The entries that `[LABEL=]DIR` texts name. DIR is a run's folder, the folder of a config with
    `seeds`, or a folder whose subfolders are runs that differ in their seed alone.

    Raises ConfigError where a folder holds no finished run, where runs of one entry differ in
    another key than the seed, and where two entries have the same label.
    """
    entries = [_read(text) for text in texts]
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(
                f"compare: two entries are called {label}; give them names, as in NAME=DIR"
            )
    return entries


def _read(text: str) -> Entry:
    label, mark, rest = text.partition("=")
    if not mark or Path(text).exists():
        label, rest = "", text
    folder = Path(rest).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"compare: {folder} is not a folder; wanted a run's folder, or NAME=DIR")
    files = [folder / RESULT] if (folder / RESULT).is_file() else sorted(folder.glob(f"*/{RESULT}"))
    if not files:
        begun = " The run there has not ended." if (folder / "config.yaml").is_file() else ""
        raise ConfigError(f"compare: no {RESULT} in {folder} or one folder below it.{begun}")
    seeds: dict[int, Mapping[str, float]] = {}
    first: tuple[Path, Mapping[str, Any]] | None = None
    versions: Mapping[str, str] = {}
    for file in files:
        record = _record(file)
        versions = versions or record.get("versions", {})
        _check_same(file, record["config"], first)
        first = first or (file, record["config"])
        runs = record.get("runs") or [{"seed": record["seed"], "metrics": record["metrics"]}]
        for run in runs:
            if run["seed"] in seeds:
                raise ConfigError(f"compare: {folder} has seed {run['seed']} twice ({file})")
            # JSON has no NaN: a run writes null for what is not finite.
            seeds[run["seed"]] = {
                name: math.nan if value is None else float(value)
                for name, value in run["metrics"].items()
            }
    assert first is not None, "there is a file"
    return Entry(label or folder.name, dict(sorted(seeds.items())), first[1], versions)


def _record(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        missing = {"config", "seed", "metrics"} - set(record)
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"compare: {file} is not a run's {RESULT}: {error}") from error
    return record


# Keys that say which run it is, where it ran, and how it was watched.
_RESULT_NEUTRAL = {"seed", "seeds", "output_dir"}


def _check_same(
    file: Path, config: Mapping[str, Any], first: tuple[Path, Mapping[str, Any]] | None
) -> None:
    if first is None:
        return
    from bomemeta.config import result_keys

    mine, theirs = result_keys(config), result_keys(first[1])
    different = [
        f"{key} ({theirs.get(key)!r}, {mine.get(key)!r})"
        for key in sorted({*mine, *theirs} - _RESULT_NEUTRAL)
        if mine.get(key) != theirs.get(key)
    ]
    if different:
        raise ConfigError(
            f"compare: {first[0].parent} and {file.parent} are no seeds of one config; they differ "
            f"in {', '.join(different)}. Give each as an entry of its own"
        )
