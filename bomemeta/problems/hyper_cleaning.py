"""Data hyper-cleaning: find the training samples whose labels are wrong, by a weight per sample
that a clean validation set teaches.

    f(y)    = mean CE of the validation samples at y
    g(x, y) = mean_j w_j(x_j) CE_j of the training samples, some labels of which were changed, + ridge |y|^2

`weights: clamp` is the protocol of BOME (Liu et al., NeurIPS 2022), `sigmoid` that of LancBiO (Gao
et al., ICLR 2025). y is ONE model; its data is cut into blocks, each a contiguous slice of every
part, and block i's losses are scaled so that the plain mean over blocks is f or g, also where the
blocks differ in size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bomemeta.core.problem import Batch, Encoded, Loss, LossGradient, SharedProblem, Split
from bomemeta.core.tree import Params
from bomemeta.data.digest import check_rows, digest_of_rows
from bomemeta.data.labelled import Examples, LabelledArrays, Moments
from bomemeta.errors import ConfigError, DataError
from bomemeta.registry import problems

# A sample is kept where it weighs at least this: where `clamp` starts, and sigmoid(0), where
# `sigmoid` starts. So at step 0 all are kept, and later the label of a sample whose weight has
# fallen is declared wrong.
KEPT_FROM = 0.5

# Second numbers of the keys of what is drawn from the config's seed; none knows of the blocks.
ORDER, CORRUPTION, NETWORK, VALIDATION = range(4)

Size = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@problems.register("hyper_cleaning")
@dataclass(kw_only=True)
class HyperCleaning(SharedProblem):
    """A weight for each training sample, learned from a clean validation set; x = {weights
    [train]}, y = one classifier.

    The data set's training part is cut into `train`, `validation` and `selection` samples, in its
    own order or (`shuffle`) in one drawn from the seed; all of its test part is for testing.
    `standardise`: every input minus the mean of all training inputs, divided by their deviation. Of
    the `train` labels the share `noise` is changed:

    corruption: redraw   to one drawn from all classes, so that some stay right (BOME)
                shift    to one drawn from the other classes (LancBiO)
    weights:    clamp    w = x, kept in [0, 1], from 0.5 (BOME)
                sigmoid  w = 1 / (1 + exp(-x)), from x = 0 (LancBiO)
    model:      linear   softmax of weight @ input + bias, from 0
                mlp      the same on `hidden` units, tanh or sigmoid, from small random numbers

    |y|^2 includes the biases: without them g would not be strongly convex.
    """

    needs_data = True

    train: Size = 50_000
    validation: Size = 5_000
    selection: Count = 5_000  # clean samples for comparing settings; 0: none
    shuffle: bool = True
    validation_from: Literal["rest", "all"] = "rest"
    standardise: bool | tuple[float, Annotated[float, Field(gt=0)]] = False
    corruption: Literal["redraw", "shift"] = "redraw"
    noise: Share = 0.5
    weights: Literal["clamp", "sigmoid"] = "clamp"
    model: Literal["linear", "mlp"] = "linear"
    hidden: Size = 128  # model: mlp
    activation: Literal["tanh", "sigmoid"] = "tanh"  # model: mlp
    ridge: Annotated[float, Field(ge=0)] = 0.001
    blocks: Size = 2

    @property
    def num_blocks(self) -> int:
        return self.blocks

    def setup(self) -> None:
        if not isinstance(self.data, LabelledArrays):
            raise ConfigError(
                f"data.dataset: hyper_cleaning wants labelled rows (mnist, fashion_mnist, labelled_array), and {type(self.data).__name__} "
                "is none of these"
            )
        check_rows(self.data, self.dtype)
        self._samples = self._cut(self.data)
        self._moments = self._scale(self.data)
        if self._moments.deviation == 0:
            raise DataError(
                "problem.standardise: all training inputs of the data set are the same number; set it to false"
            )
        self._stacks: dict[bool, Batch] = {}
        self._views: dict[tuple[bool, int, int], Batch] = {}

    def check_data(self) -> dict[str, Any]:
        return digest_of_rows(self.data)

    def _scale(self, data: LabelledArrays) -> Moments:
        if isinstance(self.standardise, bool):
            return data.examples("train").moments() if self.standardise else Moments(0.0, 1.0)
        return Moments(*self.standardise)

    def _cut(self, data: LabelledArrays) -> _Samples:
        labels = data.examples("train").labels.numpy()
        wanted = self.train + self.validation + self.selection
        if wanted > len(labels):
            raise DataError(
                f"problem.train + problem.validation + problem.selection = {self.train} + {self.validation} + {self.selection} = "
                f"{wanted} samples; the training part of the data set has {len(labels)}: make one of them smaller"
            )
        order = (
            self._generator(ORDER).permutation(len(labels))
            if self.shuffle
            else np.arange(len(labels))
        )
        train, validation, selection = np.split(
            order[:wanted], [self.train, self.train + self.validation]
        )
        if self.validation_from == "all":
            validation = self._generator(VALIDATION).permutation(np.setdiff1d(order, selection))[
                : self.validation
            ]
        true = labels[train]
        given = true.copy()
        draw = self._generator(CORRUPTION)
        chosen = draw.permutation(self.train)[: round(self.noise * self.train)]
        if self.corruption == "redraw":
            given[chosen] = draw.integers(0, data.classes, len(chosen))
        else:
            given[chosen] = (
                true[chosen] + draw.integers(1, data.classes, len(chosen))
            ) % data.classes
        return _Samples(train, validation, selection, given, given != true)

    def _generator(self, what: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, what))))

    def init_upper(self, generator: torch.Generator) -> Params:
        start = 0.5 if self.weights == "clamp" else 0.0
        return {"weights": torch.full((self.train,), start, dtype=self.dtype)}

    def project_upper(self, upper: Params) -> Params:
        return {"weights": upper["weights"].clamp(0, 1)} if self.weights == "clamp" else upper

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        """Views of one stack per process, of all blocks: asked for in every round, and too large to
        be copied.
        """
        ids = list(task_ids)
        first, count, training = ids[0], len(ids), split == "train"
        if training not in self._stacks:
            self._stacks[training] = self._training_stack() if training else self._test_stack()
        stack = self._stacks[training]
        if ids != list(range(first, first + count)):
            return {name: tensor[ids] for name, tensor in stack.items()}
        return self._views.setdefault(
            (training, first, count),
            {name: tensor[first : first + count] for name, tensor in stack.items()},
        )

    def _training_stack(self) -> Batch:
        part, samples = self.data.examples("train"), self._samples
        given = Examples(part.inputs, torch.zeros_like(part.labels))
        given.labels[torch.from_numpy(samples.train)] = torch.from_numpy(samples.given)
        return (
            self._train_rows()
            | self._stack("train", given, samples.train)
            | self._stack("validation", part, samples.validation)
        )

    def _test_stack(self) -> Batch:
        part, samples = self.data.examples("train"), self._samples
        rows = self._train_rows()
        stack = rows | {"wrong": torch.from_numpy(samples.wrong)[rows["rows"]]}
        if self.selection > 0:
            stack |= self._stack("selection", part, samples.selection)
        test = self.data.examples("test")
        return stack | self._stack("test", test, np.arange(len(test.labels)))

    def _train_rows(self) -> Batch:
        """Which entries of x are a block's."""
        rows, scale = _slices(self.train, self.blocks)
        return {"rows": rows, "train_scale": scale.to(self.dtype)}

    def _stack(self, name: str, part: Examples, samples: NDArray[np.int64]) -> Batch:
        """Inputs, labels and scales of these samples of the part, `[blocks, m, ...]`."""
        rows, scale = _slices(len(samples), self.blocks)
        chosen = torch.from_numpy(samples)[rows]
        inputs = part.rows(chosen, self.dtype)
        if self.standardise:
            inputs.sub_(self._moments.mean).div_(self._moments.deviation)
        return {
            f"{name}_inputs": inputs,
            f"{name}_labels": part.labels[chosen],
            f"{name}_scale": scale.to(self.dtype),
        }

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        x = upper["weights"].index_select(0, batch["rows"])
        return {"weights": x if self.weights == "clamp" else x.sigmoid()}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        like = encoded["weights"]
        d, classes = self.data.features, self.data.classes
        if self.model == "linear":
            return {"weight": like.new_zeros(classes, d), "bias": like.new_zeros(classes)}
        draw = self._generator(NETWORK)

        def normal(units: int, inputs: int) -> Tensor:
            return like.new_tensor(
                draw.standard_normal((units, inputs)) / math.sqrt(inputs)
            )  # what goes in keeps its size

        return {
            "hidden.weight": normal(self.hidden, d),
            "hidden.bias": like.new_zeros(self.hidden),
            "weight": normal(classes, self.hidden),
            "bias": like.new_zeros(classes),
        }

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return (batch["validation_scale"] * self._cross_entropies("validation", lower, batch)).sum()

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        losses = self._cross_entropies("train", lower, batch)
        penalty = torch.stack([(tensor**2).sum() for tensor in lower.values()]).sum()
        return (batch["train_scale"] * encoded["weights"] * losses).sum() + self.ridge * penalty

    def loss_gradient(
        self, loss: Loss, encoded: Encoded, lower: Params, batch: Batch, in_encoded: bool
    ) -> LossGradient | None:
        if self.model == "mlp" or in_encoded:
            return None
        part = "validation" if loss == "upper" else "train"
        scale = batch[f"{part}_scale"]
        if loss == "lower":
            scale = scale * encoded["weights"]
        value, grads = _softmax_regression(
            batch[f"{part}_inputs"],
            batch[f"{part}_labels"],
            scale,
            lower["weight"],
            lower["bias"],
        )
        if loss == "lower":
            penalty = torch.stack([(tensor**2).flatten(1).sum(1) for tensor in lower.values()])
            value = value + self.ridge * penalty.sum(0)
            grads = {name: grads[name] + 2 * self.ridge * lower[name] for name in lower}
        return LossGradient(value, grads, {})

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """Accuracies and `test_loss`, scaled as the losses are, and counts of samples: right
        labels, kept ones, and both.
        """
        metrics = {}
        for name in ("test", "selection") if self.selection > 0 else ("test",):
            hits = self._logits(lower, batch[f"{name}_inputs"]).argmax(1) == batch[f"{name}_labels"]
            metrics[f"{name}_accuracy"] = (batch[f"{name}_scale"] * hits).sum()
        real = batch["train_scale"] > 0  # filling is no sample
        right, kept = real & ~batch["wrong"], real & (encoded["weights"] >= KEPT_FROM)
        losses = self._cross_entropies("test", lower, batch)
        return {
            **metrics,
            "test_loss": (batch["test_scale"] * losses).sum(),
            **{
                name: which.to(losses.dtype).sum()
                for name, which in (("right", right), ("kept", kept), ("both", right & kept))
            },
        }

    def classified(self, encoded: Encoded, lower: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        real = batch["test_scale"] > 0  # filling is no sample
        found = self._logits(lower, batch["test_inputs"]).argmax(1)
        return found[real], batch["test_labels"][real]

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """`precision`, `recall` and `f1` of what is kept, from the mean counts, and `f1_wrong` of
        what is not; 0 where 0/0.

        The papers' F1 is taken to be `f1`, right labels being the positive class: the published
        level is met so and not with wrong ones.
        """
        metrics = dict(means)
        right, kept, both = (metrics.pop(name) for name in ("right", "kept", "both"))
        samples = self.train / self.blocks  # in a block, on average, as the counts are
        return metrics | {
            "precision": _ratio(both, kept),
            "recall": _ratio(both, right),
            "f1": _ratio(2 * both, right + kept),
            "f1_wrong": _ratio(2 * (samples - right - kept + both), 2 * samples - right - kept),
        }

    def _cross_entropies(self, name: str, lower: Params, batch: Batch) -> Tensor:
        return functional.cross_entropy(
            self._logits(lower, batch[f"{name}_inputs"]), batch[f"{name}_labels"], reduction="none"
        )

    def _logits(self, lower: Params, inputs: Tensor) -> Tensor:
        if self.model == "mlp":
            hidden = functional.linear(inputs, lower["hidden.weight"], lower["hidden.bias"])
            inputs = hidden.tanh() if self.activation == "tanh" else hidden.sigmoid()
        return functional.linear(inputs, lower["weight"], lower["bias"])


class _Samples(NamedTuple):
    """Rows of the data set's training part, and what became of the labels of the first."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    selection: NDArray[np.int64]
    given: NDArray[np.int64]  # [train], labels after corruption
    wrong: NDArray[np.bool_]  # [train], whether they differ from the true ones


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _slices(n: int, blocks: int) -> tuple[Tensor, Tensor]:
    """The numbers 0..n-1 in contiguous blocks of sizes that differ by 1 at most, int64 [blocks, m],
    and their scales.

    A scale is blocks / n, so that the mean over blocks of scaled sums is the mean over all n; what
    fills up a shorter block repeats the number 0 and has scale 0.
    """
    bounds = torch.arange(blocks + 1) * n // blocks
    rows = bounds[:-1, None] + torch.arange(int(bounds.diff().max()))
    real = rows < bounds[1:, None]
    return torch.where(real, rows, 0), torch.where(
        real, torch.tensor(blocks / n, dtype=torch.float64), 0.0
    )


def _softmax_regression(
    inputs: Tensor, labels: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Params]:
    """Scaled cross-entropies of a stack, summed, in closed form: values [B] and gradients.

    inputs [B, n, d], labels [B, n], scale [B, n], weight [B, classes, d], bias [B, classes].
    """
    # Classes first from here on: softmax over short contiguous rows is slow.
    logits = torch.baddbmm(bias[:, None], inputs, weight.mT).mT.contiguous()
    log_probabilities = functional.log_softmax(logits, dim=1)
    picked = labels[:, None]
    value = -(scale * log_probabilities.gather(1, picked)[:, 0]).sum(1)
    residual = log_probabilities.exp()
    residual.scatter_add_(1, picked, residual.new_full(picked.shape, -1.0))
    residual *= scale[:, None]
    return value, {"weight": residual @ inputs, "bias": residual.sum(2)}
