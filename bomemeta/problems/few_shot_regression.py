"""Few-shot regression: each task is a function, known at a few points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bomemeta.core.problem import Batch, Encoded, Problem, Split
from bomemeta.core.tree import Params
from bomemeta.data.regression import SPLITS, RegressionSource, check_tasks
from bomemeta.errors import ConfigError
from bomemeta.problems.few_shot_heads import ridge_regression, with_one
from bomemeta.registry import problems

Size = Annotated[int, Field(ge=1)]


@problems.register("few_shot_regression")
@dataclass(kw_only=True)
class FewShotRegression(Problem):
    """Tasks from the config's `data:` section; f and the data term of g are mean squared errors, on
    the queries and on the support set. A network of ReLU layers, Z = [its last hidden layer, 1].

    form head, head ridge    y = distance from W*(x) = argmin |Z_s W - T|^2 + e^r |W|^2, whose weight r
                             is part of x; g = |y|^2 / 2, y from 0 (as R2D2 does with classes)
    form head, head linear   g = mse(Z_s W) + (regularisation/2) |W|^2, y = W from 0
    form network             g = mse(net_y) + (regularisation/2) |y - x|^2, y from x; MAML's family
                             descends the mse alone
    """

    needs_data = True
    meta_tests = True

    form: Literal["head", "network"] = "head"
    head: Literal["ridge", "linear"] = "ridge"
    shots: Size = 10
    queries: Size = 10
    test_queries: Size = 100
    hidden: list[Size] = field(default_factory=lambda: [40, 40])  # MAML's
    regularisation: Annotated[float, Field(ge=0)] = 0.1

    def __post_init__(self) -> None:
        if not self.hidden:
            raise ConfigError("hidden: got no layer; wanted at least one")
        if self.form == "head" and self.head == "ridge" and not self.regularisation > 0:
            raise ConfigError("regularisation: got 0; head ridge needs a number > 0")

    def setup(self) -> None:
        if not hasattr(self.data, "task"):
            raise ConfigError(
                f"data.dataset: problem few_shot_regression draws regression tasks, which {type(self.data).__name__} "
                "does not have; use sinusoid or regression_arrays"
            )
        source: RegressionSource = self.data
        for split in SPLITS:
            source.check_task(split, self.shots + self._queries(split))
        self._sizes = [source.inputs, *self.hidden]
        self._outputs = source.outputs

    def check_data(self) -> dict[str, Any]:
        sizes: dict[Split, tuple[int, int]] = {s: (self.shots, self._queries(s)) for s in SPLITS}
        return check_tasks(self.data, sizes, self.seed)

    def _queries(self, split: Split) -> int:
        return self.queries if split == "train" else self.test_queries

    def init_upper(self, generator: torch.Generator) -> Params:
        upper: Params = {}
        for i, (a, b) in enumerate(pairwise(self._sizes)):  # He et al., 2015, for ReLU
            drawn = torch.randn(a, b, generator=generator, dtype=torch.float64) * (2 / a) ** 0.5
            upper |= {f"layer{i}.weight": drawn, f"layer{i}.bias": torch.zeros_like(drawn[0])}
        if self.form == "network":
            units = self._sizes[-1]
            drawn = torch.randn(units, self._outputs, generator=generator, dtype=torch.float64)
            upper |= {"head.weight": drawn / units**0.5, "head.bias": torch.zeros(self._outputs)}
        elif self.head == "ridge":
            upper["head.log_ridge"] = torch.tensor([self.regularisation]).log()
        return {name: tensor.to(self.dtype) for name, tensor in upper.items()}

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        drawn = [
            self.data.task(
                split, self.shots, self._queries(split), (self.seed, SPLITS.index(split), task)
            )
            for task in task_ids
        ]
        names = ("support", "support_targets", "query", "query_targets")
        return {
            name: torch.stack([getattr(task, name) for task in drawn]).to(self.dtype)
            for name in names
        }

    @property
    def encodes(self) -> bool:
        return self.form == "head"

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        if self.form == "network":
            return upper
        support, query = (
            with_one(self._hidden(upper, batch[part])) for part in ("support", "query")
        )
        encoded = {"support": support, "query": query}
        if self.head == "ridge":
            ridge = upper["head.log_ridge"].exp()
            encoded["solution"] = ridge_regression(support, batch["support_targets"], ridge)
        return encoded

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        if self.form == "network":
            names = [f"layer{i}" for i in range(len(self.hidden))] + ["head"]
            return {
                f"{n}.{part}": encoded[f"{n}.{part}"] for n in names for part in ("weight", "bias")
            }
        features, outputs = encoded["support"], batch["support_targets"].shape[-1]
        return {"head": features.new_zeros(features.shape[-1], outputs)}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return (
            (self.predictions(encoded, lower, batch, "query") - batch["query_targets"])
            .square()
            .mean()
        )

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        if "solution" in encoded:
            return lower["head"].square().sum() / 2
        fit = self._fit(encoded, lower, batch)
        if self.form == "head":
            return fit + self.regularisation / 2 * lower["head"].square().sum()
        distance = torch.stack([(lower[n] - encoded[n]).square().sum() for n in lower]).sum()
        return fit + self.regularisation / 2 * distance

    @property
    def head_names(self) -> tuple[str, ...]:
        return ("head.weight", "head.bias") if self.form == "network" else ("head",)

    def adaptation(
        self, encoded: Encoded, lower: Params, batch: Batch, names: tuple[str, ...]
    ) -> Callable[[Params], Tensor]:
        if self.form == "network":  # MAML's loss has no proximal term
            return lambda part: self._fit(encoded, {**lower, **part}, batch)
        return super().adaptation(encoded, lower, batch, names)

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """`loss`, the queries' mean squared error, and `baseline_loss` of the support targets' mean."""
        mean = batch["support_targets"].mean(0)
        return {
            "loss": self.upper_loss(encoded, lower, batch),
            "baseline_loss": (mean - batch["query_targets"]).square().mean(),
        }

    def predictions(
        self, encoded: Encoded, lower: Params, batch: Batch, part: Literal["support", "query"]
    ) -> Tensor:
        """`[n, outputs]` for one task."""
        if self.form == "network":
            hidden = self._hidden(lower, batch[part])
            return hidden @ lower["head.weight"] + lower["head.bias"]
        head = lower["head"]
        return encoded[part] @ (encoded["solution"] + head if "solution" in encoded else head)

    def _fit(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        found = self.predictions(encoded, lower, batch, "support")
        return (found - batch["support_targets"]).square().mean()

    def _hidden(self, params: Params, inputs: Tensor) -> Tensor:
        for i in range(len(self.hidden)):
            inputs = torch.relu(inputs @ params[f"layer{i}.weight"] + params[f"layer{i}.bias"])
        return inputs
