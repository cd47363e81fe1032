"""What a run says in numbers: one line per step, and the same numbers for TensorBoard."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from bomemeta.errors import BomemetaError
from bomemeta.files import naming, written_whole
from bomemeta.run_folder import RunFolder, finite

__all__ = ["TENSORBOARD_TAGS", "MetricsLog", "RunFolder", "read_metrics"]

# Where TensorBoard shows a metric. Others, as of a user's own solver, are shown under their own
# name.
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
    "upper_steps": "upper/steps",
    "learning_rate": "upper/learning_rate",
    "gradient_evaluations": "cost/gradient_evaluations",
    "hessian_products": "cost/hessian_products",
    "reduces": "cost/reduces",
    "bytes_reduced": "cost/bytes_reduced",
    "driver_bytes": "cost/driver_bytes",
    "exchanged_bytes": "cost/exchanged_bytes",
    "broadcast_s": "time/broadcast_s",
    "compute_s": "time/compute_s",
    "reduce_s": "time/reduce_s",
    "update_s": "time/update_s",
    "step_s": "time/step_s",
}


class MetricsLog:
    """metrics.jsonl, one flushed line per step, and TensorBoard's event files where asked for.

    Opening it for a run that is resumed at `from_step` drops the lines of that step and later ones,
    which will be computed again, and a last line that a kill cut short.
    """

    def __init__(self, folder: RunFolder, tensorboard: bool, from_step: int = 0) -> None:
        self._hash = hashlib.sha256()
        self._size = 0
        self._folder = folder
        self._path = folder.metrics_file
        self._tensorboard = tensorboard
        self._open(from_step)

    def go_back(self, step: int) -> None:
        """Drops `step` and later ones while the run continues, for a run that returns to a
        checkpoint.
        """
        self.close()
        self._open(step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one step's numbers. Raises BomemetaError where the disk is full."""
        line = json.dumps({"step": step, **finite(metrics)}) + "\n"
        with naming(self._path):
            self._file.write(line)
            self._file.flush()
            self._count(line.encode())
            if self._writer is not None:
                # add_scalar would write an event for every number, which takes eight times as long.
                self._writer.file_writer.add_summary(_summary(metrics), step)

    def digest(self) -> str:
        """`SIZE:SHA256` of the lines so far, for `fault`."""
        return f"{self._size}:{self._hash.hexdigest()}"

    def fault(self, digest: str | None) -> str | None:
        """What is to be said where the file does not begin with the lines of which `digest` was. Reads
        the file.
        """
        size, _, wanted = (digest or "").partition(":")
        if not size.isdigit():
            return None
        with naming(self._path), self._path.open("rb") as file:
            if hashlib.sha256(file.read(int(size))).hexdigest() == wanted:
                return None
        return (
            f"{self._path} is not as the run wrote it: lines were changed or are missing. x and the final metrics "
            "do not depend on it"
        )

    def _count(self, content: bytes) -> None:
        self._hash.update(content)
        self._size += len(content)

    def image(self, name: str, png: bytes, step: int) -> None:
        """Shows a PNG file's picture in TensorBoard; metrics.jsonl holds numbers alone."""
        if self._writer is None:
            return
        from PIL import Image  # a second's work that runs without TensorBoard are spared

        with Image.open(io.BytesIO(png)) as picture, naming(self._path):
            self._writer.add_image(
                name, np.asarray(picture.convert("RGB")), step, dataformats="HWC"
            )

    def flush(self) -> None:
        """Brings what TensorBoard's writer holds back to the disk; lines are there already."""
        if self._writer is not None:
            with naming(self._path):
                self._writer.flush()

    def close(self) -> None:
        """Closes the files; may be called twice."""
        # Every line was flushed when it was written; what fails again here was reported there.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _open(self, from_step: int) -> None:
        self._hash, self._size = hashlib.sha256(), 0
        self._count(_keep_before(self._path, from_step))
        with naming(self._path):
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, in order; a line that was cut short is left out. [] where
    there is no file.
    """
    return parse_metrics(path.read_bytes()) if path.exists() else []


def parse_metrics(content: bytes) -> list[dict[str, Any]]:
    """As `read_metrics`, of a file's content."""
    lines = []
    for text in content.decode(errors="replace").splitlines():
        try:
            line = json.loads(text)
        # Half a line; nested deeper, or a number longer, than Python reads.
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
    return lines


def _summary(metrics: Mapping[str, float]) -> Any:
    """TensorBoard's form of a step's numbers, all in one."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    finite_ones = {
        TENSORBOARD_TAGS.get(name, name): value
        for name, value in metrics.items()
        if math.isfinite(value)
    }
    return Summary(
        value=[Summary.Value(tag=tag, simple_value=value) for tag, value in finite_ones.items()]
    )


def _keep_before(path: Path, step: int) -> bytes:
    """Takes the lines of this step and later ones out, and those that are none; what is kept."""
    if not path.exists():
        return b""
    if not path.is_file():
        raise BomemetaError(
            f"{path} is a folder, a pipe or a device; wanted the file that a run writes. Take it away"
        )
    lines = path.read_bytes().splitlines(keepends=True)
    kept = b"".join(line for line in lines if _is_before(line, step))
    with naming(path), written_whole(path) as file:
        file.write(kept)
    return kept


def _is_before(line: bytes, step: int) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return line.endswith(b"\n") and any(found["step"] < step for found in parse_metrics(line))


def _next_second(folder: Path) -> None:
    """Waits until a new event file comes after those in the folder: TensorBoard reads them in the
    order of their names, which begin with the second of their birth.
    """
    # Other files may have such a name too.
    seconds = (path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*"))
    newest = max((int(each) for each in seconds if re.fullmatch("[0-9]{1,12}", each)), default=0)
    while 0 <= newest - int(time.time()) < 2:  # a clock that was set back is not waited for
        time.sleep(0.02)
