"""A few-shot regressor out of a finished run, with scikit-learn's manners."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from bomemeta.core.problem import Batch
from bomemeta.errors import ConfigError, DataError
from bomemeta.predict.model import TrainedModel
from bomemeta.predict.task import first_of
from bomemeta.problems.few_shot_regression import FewShotRegression
from bomemeta.sections import label


class FewShotRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Predicts a new function's values from a few of its points, on a network that was meta-trained.

    `model`: a TrainedModel of problem few_shot_regression, or a run's folder. `steps`: steps of the
    lower problem, None for as many as in the run's evaluation.

    X: numbers `[n, inputs]`; y: numbers `[n]` or `[n, outputs]`, any n from 1. Everything is computed
    in the run's dtype.
    """

    def __init__(
        self, model: TrainedModel | str | os.PathLike[str], *, steps: int | None = None
    ) -> None:
        self.model = model
        self.steps = steps

    def fit(self, X: Any, y: Any) -> FewShotRegressor:
        """Fits to the points: one lower problem, solved by the run's own solver. Raises DataError
        where X or y cannot be used.
        """
        inputs, targets = self._inputs(X, "X"), self._targets(y)
        if len(inputs) != len(targets) or not len(inputs):
            raise DataError(
                f"X has {len(inputs)} rows and y {len(targets)}; wanted one value of y for each row, and at least one"
            )
        self._flat = np.ndim(y) == 1
        self._points = inputs, targets
        batch = self._batch(inputs[:0])
        adapted = self.trained.adapt(batch, self.steps)
        self._lower = {name: tensor[0] for name, tensor in adapted.lower.items()}
        self._encoded = first_of(adapted)
        self.n_features_in_ = inputs.shape[1]
        self.n_examples_ = len(inputs)
        return self

    def add_examples(self, X: Any, y: Any) -> FewShotRegressor:
        """Adds points: the same regressor as `fit` on everything."""
        self._check_fitted()
        inputs, targets = self._points
        more, values = self._inputs(X, "X"), self._targets(y)
        flat = self._flat
        self.fit(torch.cat([inputs, more]), torch.cat([targets, values]))
        self._flat = flat
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """`[n]`, or `[n, outputs]` where y of `fit` was so."""
        self._check_fitted()
        problem, batch = self._problem, self._batch(self._inputs(X, "X"))
        one = {name: tensor[0] for name, tensor in batch.items()}
        with torch.no_grad():
            encoded = self._encoded
            if problem.encodes:
                encoded = problem.encode(self.trained.upper, one)
            found = problem.predictions(encoded, self._lower, one, "query").numpy()
        return found[:, 0] if self._flat else found

    @property
    def trained(self) -> TrainedModel:
        """The model, read from its run's folder where that was given. Raises ConfigError where it is
        of another problem.
        """
        known = self.__dict__.get("_trained")
        if known is None or known[0] is not self.model:
            model = self.model
            made = model if isinstance(model, TrainedModel) else TrainedModel.of_run(str(model))
            if not isinstance(made.problem, FewShotRegression):
                raise ConfigError(
                    f"problem {label(made.problem)} is no regression: a regressor is of few_shot_regression"
                )
            self._trained = known = (model, made)
        trained: TrainedModel = known[1]
        return trained

    @property
    def _problem(self) -> FewShotRegression:
        problem = self.trained.problem
        assert isinstance(problem, FewShotRegression)
        return problem

    def _batch(self, query: Tensor) -> Batch:
        """The one task as `FewShotRegression.load` gives it; its queries' values are not used."""
        inputs, targets = self._points
        return {
            "support": inputs[None],
            "support_targets": targets[None],
            "query": query[None],
            "query_targets": query.new_zeros(1, len(query), targets.shape[1]),
        }

    def _inputs(self, X: Any, name: str) -> Tensor:
        source: Any = self._problem.data
        found = self._numbers(X, name)
        if found.dim() != 2 or found.shape[1] != source.inputs:
            raise DataError(
                f"{name}: got {list(found.shape)}; wanted [n, {source.inputs}], as the run's tasks have"
            )
        return found

    def _targets(self, y: Any) -> Tensor:
        source: Any = self._problem.data
        found = self._numbers(y, "y")
        found = found[:, None] if found.dim() == 1 else found
        if found.dim() != 2 or found.shape[1] != source.outputs:
            raise DataError(
                f"y: got {list(np.shape(y))}; wanted [n, {source.outputs}]"
                + (" or [n]" if source.outputs == 1 else "")
            )
        return found

    def _numbers(self, values: Any, name: str) -> Tensor:
        try:
            array = np.asarray(values, np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"{name}: wanted numbers ({error})") from error
        found = torch.from_numpy(array).to(self._problem.dtype)
        if not bool(found.isfinite().all()):
            raise DataError(f"{name}: NaN, infinite or too large numbers; wanted finite ones")
        return found

    def _check_fitted(self) -> None:
        if "_lower" not in self.__dict__:
            raise NotFittedError("this regressor has no points yet: call fit(X, y) first")
