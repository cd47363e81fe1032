"""The classifier that a stream of tasks left: y of the run's newest checkpoint, at the trained x."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bomemeta.assembly import build_problem, torch_threads
from bomemeta.checkpoint import Checkpoint, judged_upper, load_latest
from bomemeta.config import Config
from bomemeta.core.tree import Layout, Params
from bomemeta.data.labelled import GREY_LEVELS
from bomemeta.errors import ConfigError, DataError
from bomemeta.predict.inputs import class_array
from bomemeta.problems.continual import Continual
from bomemeta.run_folder import RunFolder
from bomemeta.stages import stage_of, stages_of

PART = 500  # rows of one forward pass
_LOWER = "y"


class StreamClassifier:
    """Classifies rows as the stream's network does after its last step. It is fitted already: the
    stream was its training.

    X: rows `[n, ...]` as of the run's data set: uint8 is read as 0 to 1, floats as they are. `task`: the number of
    the task that the rows are of, from 0, with `protocol: task_incremental`, which tells it; None with
    `class_incremental`, where all classes are in question.
    """

    classes_: NDArray[Any]

    def __init__(self, config: Config, saved: Checkpoint) -> None:
        """Reads the run's data, for its classes. Raises ConfigError where the checkpoint has no y yet."""
        stages = stages_of(config)
        settings = stages[stage_of(saved, stages)]
        problem = build_problem(settings)
        assert isinstance(problem, Continual)
        self._problem, self._threads = problem, config.threads
        self.tasks, ways = problem.allowed.shape
        self.classes_ = class_array(problem.class_names[:ways])
        self._lower = _lower_of(saved)
        with torch_threads(self._threads), torch.no_grad():
            self._encoded = problem.encode(judged_upper(saved), {})

    @classmethod
    def of_folder(cls, folder: RunFolder, config: Config) -> StreamClassifier:
        """Of the folder's newest checkpoint. Raises CheckpointError as `load_latest`."""
        return cls(config, load_latest(folder.checkpoints).checkpoint)

    def decision_function(self, X: Any, task: int | None = None) -> NDArray[np.float64]:
        """Logits `[n, classes]`, -inf for what is not in question. Raises ConfigError where the task is
        missing or unknown, DataError where X has rows of another size.
        """
        rows, allowed = self._rows(X), self._in_question(task)
        number = torch.full((len(rows),), 0 if task is None else task)
        with torch_threads(self._threads), torch.no_grad():
            parts = [
                self._problem.logits(self._encoded, self._lower, part, of)
                for part, of in zip(torch.split(rows, PART), torch.split(number, PART), strict=True)
            ]
        logits = torch.cat(parts).masked_fill(~allowed, -torch.inf)
        return logits.double().numpy()

    def predict_proba(self, X: Any, task: int | None = None) -> NDArray[np.float64]:
        """The softmax of the logits, `[n, classes]`, in the order of `classes_`. Not calibrated."""
        return torch.from_numpy(self.decision_function(X, task)).softmax(1).numpy()

    def predict(self, X: Any, task: int | None = None) -> NDArray[Any]:
        """The class of each row, `[n]`."""
        chosen: NDArray[Any] = self.classes_[self.decision_function(X, task).argmax(1)]
        return chosen

    def score(self, X: Any, y: Any, task: int | None = None) -> float:
        """The share of rows whose class is `y`'s."""
        return float((self.predict(X, task) == np.asarray(y)).mean())

    def _in_question(self, task: int | None) -> Tensor:
        needs_task = self._problem.protocol == "task_incremental"
        if task is None and needs_task and self._problem.stream == "split":
            raise ConfigError(
                f"task: missing; protocol task_incremental tells the task. Give its number, 0 to {self.tasks - 1}"
            )
        if task is None and self._problem.method == "ctn":
            raise ConfigError(
                f"task: missing; method ctn is a function of it. Give its number, 0 to {self.tasks - 1}"
            )
        if task is not None and not 0 <= task < self.tasks:
            raise ConfigError(f"task: got {task}; wanted 0 to {self.tasks - 1}")
        return self._problem.allowed[0 if task is None else task]

    def _rows(self, X: Any) -> Tensor:
        found = torch.as_tensor(np.asarray(X))
        rows = found.reshape(len(found), -1) if found.dim() else found
        width = self._problem.data.features
        if rows.dim() != 2 or rows.shape[1] != width:
            raise DataError(
                f"X: got {list(found.shape)}; wanted [n, ...] with rows of {width} numbers"
            )
        if found.dtype == torch.uint8:
            return rows.to(self._problem.dtype).div_(GREY_LEVELS)
        if not found.is_floating_point():
            raise DataError(f"X: got {found.dtype}; wanted uint8 or floats")
        return rows.to(self._problem.dtype)


def _lower_of(saved: Checkpoint) -> Params:
    """y of the one shared lower problem."""
    if not saved.lower:
        raise ConfigError("the run has taken no step yet, so there is nothing to predict with")
    layout = Layout.read(saved.solver["lower_layout"])
    lower: Params = layout.unflatten(saved.lower[min(saved.lower)])[_LOWER]
    return lower
