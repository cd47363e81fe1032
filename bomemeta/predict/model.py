"""A trained x with the problem and the solver that it belongs to, without the data it was trained on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bomemeta.assembly import torch_threads
from bomemeta.checkpoint import judged_upper, load_latest
from bomemeta.config import Config, load_config
from bomemeta.core import tree
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.problem import Batch, Problem
from bomemeta.core.solver import Solver
from bomemeta.core.tree import Params
from bomemeta.data.episodes import EpisodeSource
from bomemeta.data.preprocessing import Preprocessing, preprocessing_of
from bomemeta.errors import ConfigError, DataError
from bomemeta.problems import few_shot_auxiliary as auxiliary
from bomemeta.problems.few_shot import FewShot
from bomemeta.problems.few_shot_predict import load_frozen
from bomemeta.run_folder import RunFolder
from bomemeta.trust import config_of


class NoData:
    """Stands for the data set where a problem is only asked to predict: the images' shape."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.image_shape = (preprocessing.channels, preprocessing.height, preprocessing.width)

    def prepare(self) -> None:
        """There is nothing to read."""

    def check(self, split: object, spec: object) -> None:
        """Episodes come from the user."""

    def episode(self, *asked: object) -> Any:
        raise DataError("a trained model has no data set: give it images")


@dataclass(frozen=True)
class TrainedModel:
    """x, and what computes with it. Nothing of it changes: copies of it are itself."""

    config: Mapping[str, Any]  # `Config.to_dict()` of the run
    problem: Problem
    solver: Solver
    upper: Params
    preprocessing: Preprocessing | None  # None: the problem is not about images

    @classmethod
    def of_run(cls, run_dir: str, *, trust: bool = False) -> TrainedModel:
        """The model of a run's newest checkpoint. Raises ConfigError, CheckpointError."""
        folder = RunFolder.open(run_dir)
        settings = config_of(folder, trust=trust)
        return cls.of_config(settings, judged_upper(load_latest(folder.checkpoints).checkpoint))

    @classmethod
    def of_config(
        cls,
        config: Config | Mapping[str, Any],
        upper: Params,
        preprocessing: Preprocessing | None = None,
        frozen: Params | None = None,
    ) -> TrainedModel:
        """`preprocessing` and `frozen` (the weights below x): None where the data set, and the
        network's own source, are to be asked.
        """
        settings = config if isinstance(config, Config) else load_config(config)
        problem: Problem = copy.copy(settings.problem)
        data: Any = settings.data
        if preprocessing is None and getattr(data, "image_shape", None) is not None:
            preprocessing = preprocessing_of(data)
        if isinstance(problem, FewShot):
            problem.auxiliary_weight = 0.0  # nothing that predicts has a use for it
            upper = auxiliary.without(upper)
        given = NoData(preprocessing) if preprocessing is not None else data
        problem.attach(seed=settings.seed, dtype=getattr(torch, settings.dtype), data=given)
        if frozen is not None:
            assert isinstance(problem, FewShot), "only a classifier is saved"
            load_frozen(problem, frozen)
        _check_entries(problem, upper)
        return cls(settings.to_dict(), problem, settings.solver, upper, preprocessing)

    def adapt(
        self, batch: Batch, steps: int | None = None, problem: Problem | None = None
    ) -> Adapted:
        """y of new tasks: the run's own lower problem solved by its own solver on g alone.

        `batch` is as `problem.load` gives it, every tensor `[B, ...]`; `steps`: None for as many as
        in the run's evaluation.
        """
        problem = problem if problem is not None else self.problem
        steps = self.config["evaluation"]["inner_steps"] if steps is None else steps
        with torch_threads(self.config["threads"]):
            oracle = LocalOracle(problem, self.upper, batch, self._task_map, differentiable=False)
            return Adapted(oracle.encoded, tree.detached(self.solver.adapt(oracle, steps)))

    @property
    def _task_map(self) -> Any:
        return "loop" if self.config["task_map"] == "auto" else self.config["task_map"]

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainedModel:
        return self


@dataclass(frozen=True)
class Adapted:
    """New tasks' encoded data and their y, stacks `[B, ...]`."""

    encoded: dict[str, Tensor]
    lower: Params


def validation_source(model: TrainedModel) -> EpisodeSource:
    """The run's own data set, read. Raises ConfigError where the model does not name it, DataError
    where it is not there.
    """
    settings = load_config({**model.config, "output_dir": None})
    if settings.data is None:
        raise ConfigError("the run has no `data:` section; give images of the fitted classes")
    source: EpisodeSource = copy.copy(settings.data)
    source.prepare()
    return source


def _check_entries(problem: Problem, upper: Params) -> None:
    wanted = problem.init_upper(torch.Generator().manual_seed(0))
    different = [
        name
        for name in sorted({*wanted, *upper})
        if name not in wanted or name not in upper or wanted[name].shape != upper[name].shape
    ]
    if different:
        raise ConfigError(
            f"the trained x does not fit its config's problem: {', '.join(different)}; was the config edited?"
        )
