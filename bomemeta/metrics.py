"""What a run leaves behind: its folder, one line of numbers per step, and the same numbers for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from bomemeta.config import Config
from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.files import written_whole

# Where TensorBoard shows a metric. Others, as of a user's own solver, are shown under their own name.
TENSORBOARD_TAGS = {
    "upper_loss": "loss/upper",
    "lower_loss": "loss/lower",
    "validation_loss": "loss/validation",
    "validation_accuracy": "accuracy/validation",
    "validation_ci95": "accuracy/validation_ci95",
    "gap": "barrier/gap",
    "multiplier": "barrier/multiplier",
    "multiplier_zero_share": "barrier/multiplier_zero_share",
    "grad_upper_gap_norm": "barrier/grad_upper_gap_norm",
    "grad_lower_gap_norm": "barrier/grad_lower_gap_norm",
    "stationarity_gradient": "stationarity/gradient",
    "stationarity_gap": "stationarity/gap",
    "hypergradient_norm": "implicit/hypergradient_norm",
    "residual": "implicit/residual",
    "aux_norm": "implicit/aux_norm",
    "mu": "implicit/mu",
    "penalty": "implicit/penalty",
    "upper_norm": "upper/norm",
    "upper_update_norm": "upper/update_norm",
    "learning_rate": "upper/learning_rate",
    "gradient_evaluations": "cost/gradient_evaluations",
    "hessian_products": "cost/hessian_products",
    "reduces": "cost/reduces",
    "bytes_reduced": "cost/bytes_reduced",
    "broadcast_s": "time/broadcast_s",
    "compute_s": "time/compute_s",
    "reduce_s": "time/reduce_s",
    "update_s": "time/update_s",
    "step_s": "time/step_s",
}


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; `path` is absolute."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result_file(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @classmethod
    def create(cls, output_dir: str | None, config_name: str, config: Config) -> RunFolder:
        """A new folder with the config in it: `output_dir`, or the first free of runs/NAME, runs/NAME-2, ...

        Raises ConfigError where `output_dir` holds something already or cannot be made.
        """
        try:
            if output_dir is None:
                path = _first_free(Path("runs") / config_name)
            else:
                path = Path(output_dir).expanduser()
                if not _claim(path):
                    raise ConfigError(
                        f"output_dir: {path.resolve()} exists and is not empty; a run never overwrites another. "
                        f"Go on with `bomemeta resume {path}`, or choose another output_dir"
                    )
            folder = cls(path.resolve())
            folder.write_config(config)
        except OSError as error:
            raise ConfigError(f"output_dir: {error.filename} cannot be written: {error.strerror}") from error
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run. Raises ConfigError where it is not one."""
        folder = cls(Path(path).expanduser().resolve())
        if folder.config_file.is_file():
            return folder
        runs = sorted(str(file.parent) for file in Path("runs").glob("*/config.yaml"))
        hint = f"Runs here: {', '.join(runs)}" if runs else "`bomemeta train` prints the folder of each run"
        raise ConfigError(f"{folder.path} is not a run's folder: it has no config.yaml. {hint}")

    def abandon(self) -> None:
        """Takes back a folder in which nothing happened; one that holds more than the config stays."""
        if [path.name for path in self.path.iterdir()] == [self.config_file.name]:
            self.config_file.unlink()
            self.path.rmdir()

    def write_config(self, config: Config) -> None:
        """Every key with its value, so that the run does not depend on a later version's defaults."""
        _replace(self.config_file, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Replaces result.json; NaN and infinite numbers, which JSON does not have, become null."""
        _replace(self.result_file, json.dumps(_finite(result), indent=2) + "\n")

    def write_file(self, name: str, content: bytes) -> None:
        """Puts a file of the problem's own into the folder, or replaces it."""
        with _naming(self.path / name), written_whole(self.path / name) as file:
            file.write(content)


class MetricsLog:
    """metrics.jsonl, one flushed line per step, and TensorBoard's event files where asked for.

    Opening it for a run that goes on at `from_step` drops the lines of that step and later ones, which will be
    computed again, and a last line that a kill cut short.
    """

    def __init__(self, folder: RunFolder, tensorboard: bool, from_step: int = 0) -> None:
        self._folder = folder
        self._path = folder.metrics_file
        self._tensorboard = tensorboard
        self._open(from_step)

    def go_back(self, step: int) -> None:
        """Drops `step` and later ones while the run goes on, for a run that returns to a checkpoint."""
        self.close()
        self._open(step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one step's numbers. Raises BomemetaError where the disk is full."""
        with _naming(self._path):
            self._file.write(json.dumps({"step": step, **_finite(metrics)}) + "\n")
            self._file.flush()
            if self._writer is not None:
                for name, value in metrics.items():
                    if math.isfinite(value):
                        self._writer.add_scalar(TENSORBOARD_TAGS.get(name, name), value, step)

    def close(self) -> None:
        """Closes the files; may be called twice."""
        # Every line was flushed when it was written; what fails again here was reported there.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _open(self, from_step: int) -> None:
        _keep_before(self._path, from_step)
        with _naming(self._path):
            self._file = self._path.open("a", encoding="utf-8")
        self._writer: Any = None
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            _next_second(self._folder.tensorboard)
            # TensorBoard then hides what earlier event files say of these steps.
            purge_step = from_step if from_step > 0 else None
            self._writer = SummaryWriter(str(self._folder.tensorboard), purge_step=purge_step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, in order; a line that was cut short is left out. [] where there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _keep_before(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] < step)
    _replace(path, kept)


def _replace(path: Path, text: str) -> None:
    with _naming(path), written_whole(path) as file:
        file.write(text.encode())


def _next_second(folder: Path) -> None:
    """Waits until a new event file comes after those in the folder: TensorBoard reads them in the order of their names, which begin with
    the second of their birth.
    """
    newest = max((int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")), default=0)
    while 0 <= newest - int(time.time()) < 2:  # a clock that was set back is not waited for
        time.sleep(0.02)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a BomemetaError that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise BomemetaError(f"{path} could not be written: {reason}. See to the disk, then `bomemeta resume` the run") from error


def _first_free(path: Path) -> Path:
    number = 1
    candidate = path
    while not _claim(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _claim(path: Path) -> bool:
    """Makes the folder ours: True where it was not there (only one process can make it) or was there and empty."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return path.is_dir() and not any(path.iterdir())
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
