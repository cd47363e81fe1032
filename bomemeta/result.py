"""The result of a run, and what one does with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from bomemeta.config import Config
from bomemeta.errors import ConfigError
from bomemeta.run_folder import RunFolder
from bomemeta.sections import label

if TYPE_CHECKING:
    from bomemeta.predict import (
        FewShotClassifier,
        FewShotRegressor,
        StreamClassifier,
        TrainedModel,
    )


@dataclass(frozen=True)
class Result:
    """The result of a run. `metrics` are the final ones, `upper` is x on the CPU, `upper_sha256`
    identifies its bits.

    `run_dir` is the run's folder, None where nothing was kept. `uri`: where output_dir is one, the
    location of everything; `run_dir` was a temporary copy of it. `signal`: the number of the signal
    that interrupted the run.
    """

    run_dir: Path | None
    steps: int
    metrics: dict[str, float]
    upper: dict[str, Tensor]
    upper_sha256: str
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)
    uri: str | None = None
    signal: int | None = None
    config: Config | None = None  # None: of several seeds

    def classifier(self) -> FewShotClassifier | StreamClassifier:
        """A classifier of images on the trained x, to be fitted to examples (problem few_shot); or the
        one that a stream left, of the run's folder (problem continual).
        """
        from bomemeta.predict import FewShotClassifier, StreamClassifier
        from bomemeta.problems.continual import Continual

        if self.config is not None and isinstance(self.config.problem, Continual):
            if self.run_dir is None:
                raise ConfigError(
                    "y of a stream is in the run's checkpoint, and nothing was kept: give output_dir=DIR"
                )
            return StreamClassifier.of_folder(RunFolder.open(self.run_dir), self.config)
        return FewShotClassifier(self.model())

    def regressor(self) -> FewShotRegressor:
        """A regressor on the trained x, to be fitted to a few points of a new function. Problem
        few_shot_regression alone.
        """
        from bomemeta.predict import FewShotRegressor

        made = FewShotRegressor(self.model())
        _ = made.trained  # raises for another problem
        return made

    def module(self) -> nn.Module:
        """The trained backbone as an ordinary module, images `[n, C, H, W]` to features `[n, d]`.

        Raises ConfigError where the problem has no network of its own.
        """
        model = self.model()
        if not hasattr(model.problem, "module"):
            raise ConfigError(f"problem {label(model.problem)} has no network to give")
        module: nn.Module = model.problem.module(self.upper)
        return module

    def adapt(self, batch: Mapping[str, Tensor], steps: int | None = None) -> dict[str, Tensor]:
        """y of new tasks of any problem: the lower problem at the trained x, solved by the run's
        solver on g alone. `batch` is as `problem.load` gives it, every tensor `[B, ...]`.
        """
        return self.model().adapt(dict(batch), steps).lower

    def model(self) -> TrainedModel:
        """x with its problem and solver, as `bomemeta.predict` uses it."""
        from bomemeta.predict import TrainedModel

        if self.config is None or not self.upper:
            raise ConfigError(
                "this result has no x to predict with (it is of several seeds, or its checkpoints are gone); "
                "load one run's folder"
            )
        return TrainedModel.of_config(self.config, self.upper)
