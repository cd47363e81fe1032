"""What a page reads of a run folder: its config, its log, its result and its newest checkpoint."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bomemeta.checkpoint import Checkpoint, judged_upper, load_latest, upper_sha256
from bomemeta.config import Config
from bomemeta.errors import CheckpointError, ConfigError
from bomemeta.metrics import read_metrics
from bomemeta.page.charts import Curve
from bomemeta.run_folder import RunFolder
from bomemeta.trust import config_of


@dataclass(frozen=True)
class Source:
    """One run, as far as it has come."""

    folder: RunFolder
    settings: Config
    log: list[dict[str, float]]  # the finite numbers of every step, with its `step`
    result: Mapping[str, Any] | None  # None: it has not ended, or result.json cannot be used
    checkpoint: Checkpoint | None
    notes: list[str]  # what was passed over on the way

    @property
    def name(self) -> str:
        return str(self.folder.location).rstrip("/").rpartition("/")[2] or "run"

    @property
    def steps(self) -> int:
        """How many steps are in the checkpoint, or in the log where there is none."""
        if self.checkpoint is not None:
            return self.checkpoint.step
        return int(self.log[-1]["step"]) + 1 if self.log else 0

    @property
    def sha256(self) -> str | None:
        return upper_sha256(judged_upper(self.checkpoint)) if self.checkpoint is not None else None

    @property
    def metrics(self) -> dict[str, float]:
        """The final metrics; none before the run's end."""
        return finite_numbers(self.result["metrics"]) if self.result is not None else {}

    def curves(self) -> dict[str, Curve]:
        """Every metric of the log over its steps."""
        steps: dict[str, list[int]] = defaultdict(list)
        values: dict[str, list[float]] = defaultdict(list)
        for line in self.log:
            for name, value in line.items():
                if name != "step":
                    steps[name].append(int(line["step"]))
                    values[name].append(value)
        return {name: Curve(steps[name], values[name]) for name in values}


def read(
    run_dir: str, overrides: list[str], keys: Mapping[str, Any] | None, *, trust: bool
) -> Source:
    """Reads a run folder. Raises ConfigError where it is none, is a folder of seeds, or comes from
    elsewhere and would execute something.
    """
    folder = RunFolder.open(run_dir)
    settings = config_of(folder, overrides, keys, trust=trust)
    if settings.seeds > 1:
        below = f"{folder.location}/seed-{settings.seed}"
        raise ConfigError(
            f"report: {folder.location} holds {settings.seeds} runs, one of each seed. Give one of them, as in "
            f"`bomemeta report {below}`; `bomemeta compare {folder.location} OTHER --html FILE` has means over seeds"
        )
    result, fault = folder.read_result()
    notes = [fault] if fault is not None else []
    checkpoint: Checkpoint | None = None
    try:
        loaded = load_latest(folder.checkpoints)
        checkpoint = loaded.checkpoint
        notes += loaded.notes
    except CheckpointError as error:
        notes.append(str(error))
    log = [finite_numbers(line) for line in read_metrics(folder.metrics_file)]
    return Source(folder, settings, log, result, checkpoint, notes)


def finite_numbers(values: object) -> dict[str, float]:
    """Of a mapping what is a finite number: a file from elsewhere may hold anything."""
    if not isinstance(values, Mapping):
        return {}
    return {
        str(name): value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    }


def texts(values: object) -> Iterator[str]:
    """Of a list what can be shown as a sentence."""
    for value in values if isinstance(values, list) else []:
        yield value if isinstance(value, str) else json.dumps(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond a float
        return False
