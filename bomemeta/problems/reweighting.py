"""Reweighting: train a network on samples some of whose labels are wrong, with weights that a small clean
set teaches.

    f(y)    = mean CE of the clean samples at y
    g(x, y) = mean_j w_j(x) CE_j(y) of the training samples + (decay/2) |y|^2

What hyper_cleaning does for a linear model in full batches this does for any network in batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bomemeta.core.problem import Batch, Encoded, SharedProblem, Split
from bomemeta.core.tree import Params
from bomemeta.data.labelled import LabelledArrays
from bomemeta.data.pictures import Picture, picture_of
from bomemeta.errors import ConfigError
from bomemeta.nets.small import SmallConv, mlp
from bomemeta.problems.blocks import block_rows
from bomemeta.problems.reweighting_samples import Selection, samples
from bomemeta.registry import problems

Size = Annotated[int, Field(ge=1)]

# Second numbers of the keys of what is drawn from the config's seed; the samples have 0 and 1.
TRAIN, CLEAN, NETWORK = range(2, 5)
RATED = 8  # the side to which images are averaged for a rater
HIDDEN = 64  # units of the nets that make weights


@problems.register("reweighting")
@dataclass(kw_only=True)
class Reweighting(SharedProblem):
    """A network on noisy samples; x says what each is worth, a clean set says how good that is.

    weights: sample    w_j = 2 sigmoid(x_j), one number for each training sample, from 1
             loss_net  w_j = 2 sigmoid(net_x(CE_j)), of the sample's loss, which is held constant in
                       it (Meta-Weight-Net; Shu et al., NeurIPS 2019)
             rater     w_j = 2 sigmoid(net_x(sample, given label)), so also of samples never seen
             labels    label correction: the label of j is softmax(x_j), from `confidence` in the
                       given one; w_j = 1
    network: mlp, conv (nets/small.py) or linear; a subclass may define `build`
    labels:  own, or a set that the data set knows (cifar10n: worse, aggregate, random1 ...)

    The share `noise` of the labels is changed to another class; `imbalance` > 1 cuts the classes to
    a long tail. A label is declared wrong where its weight is below `wrong_below` (labels: where
    another class is the likeliest); `f1` is that of these, with wrong labels as the positive class.
    `batch`, `clean_batch`: samples of a block in a step; none: all of them.
    """

    needs_data = True

    train: Size | None = None
    clean: Size = 1000
    labels: str = "own"
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    imbalance: Annotated[float, Field(ge=1)] = 1.0
    weights: Literal["sample", "loss_net", "rater", "labels"] = "sample"
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.9
    wrong_below: Annotated[float, Field(gt=0, lt=2)] = 0.5
    network: Literal["linear", "mlp", "conv"] = "conv"
    width: Size = 16
    decay: Annotated[float, Field(ge=0)] = 0.0
    batch: Size | None = 64
    clean_batch: Size | None = 64
    inner_batches: bool = False  # inner step k draws its own samples, not the step's
    blocks: Size = 2

    @property
    def num_blocks(self) -> int:
        return self.blocks

    @property
    def minibatches(self) -> bool:  # type: ignore[override]
        return self.batch is not None or self.clean_batch is not None

    def build(self) -> nn.Module:
        """From inputs `[n, *shape]` to logits `[n, classes]`. Without buffers that change."""
        features, classes = self.data.features, self.data.classes
        if self.network == "linear":
            return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))
        if self.network == "mlp":
            return mlp(features, classes, self.width)
        return SmallConv(
            picture_of(self.data, "problem.network: conv").channels, classes, self.width
        )

    def setup(self) -> None:
        if not isinstance(self.data, LabelledArrays):
            raise ConfigError(
                f"data.dataset: reweighting wants labelled rows (cifar10n, mnist, fashion_mnist, labelled_array), and "
                f"{type(self.data).__name__} is none of these"
            )
        part = self.data.examples("train")
        self._picture = _picture(self.data)
        self._shape = (self.data.features,) if self._picture is None else self._picture.shape
        selection = Selection(
            self.train, self.clean, self.labels, self.noise, self.imbalance, self.seed
        )
        self._samples = samples(self.data, selection)
        self._moments = part.moments()
        self._net = self.build().to(self.dtype)
        self._tests: dict[int, Batch] = {}
        self._whole: dict[int, Batch] = {}
        self._rows, self._scale = block_rows(len(self._samples.train), self.blocks)
        self._clean_rows, self._clean_scale = block_rows(len(self._samples.clean), self.blocks)
        for key, samples_, size in (
            ("batch", self._samples.train, self.batch),
            ("clean_batch", self._samples.clean, self.clean_batch),
        ):
            if size is not None and size > len(samples_) // self.blocks:
                raise ConfigError(
                    f"problem.{key}: got {size}; the smallest of {self.blocks} blocks has {len(samples_) // self.blocks} samples: "
                    "make it smaller, or null for all of them"
                )

    def init_upper(self, generator: torch.Generator) -> Params:
        n, classes = len(self._samples.train), self.data.classes
        if self.weights == "sample":
            return {"weights": torch.zeros(n, dtype=self.dtype)}
        if self.weights == "labels":
            odds = self.confidence * (classes - 1) / (1 - self.confidence)
            one = functional.one_hot(torch.from_numpy(self._samples.given), classes)
            return {"logits": np.log(odds) * one.to(self.dtype)}
        inputs = 1 if self.weights == "loss_net" else self._rated + classes
        first = torch.randn(HIDDEN, inputs, generator=generator, dtype=torch.float64)
        return {
            "hidden.weight": (first / inputs**0.5).to(self.dtype),
            "hidden.bias": torch.zeros(HIDDEN, dtype=self.dtype),
            "weight": torch.zeros(HIDDEN, dtype=self.dtype),  # every weight starts at 1
            "bias": torch.zeros((), dtype=self.dtype),
        }

    @property
    def _rated(self) -> int:
        shape = self._shape
        return shape[0] * RATED**2 if len(shape) == 3 else self.data.features

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        if split != "train":
            return _stacked([self._test(block) for block in task_ids])
        return _stacked([self._drawn(block, step, 0) for block in task_ids])

    def load_inner(self, task_ids: Sequence[int], step: int, inner: int) -> Batch:
        return _stacked([self._drawn(block, step, 1 + inner) for block in task_ids])

    def _drawn(self, block: int, step: int, number: int) -> Batch:
        """One block's samples; where all are taken they are kept, and the same each time."""
        if self.batch is None and self.clean_batch is None and block in self._whole:
            return self._whole[block]
        rows, scale = self._some(self._rows, self._scale, self.batch, (TRAIN, step, number, block))
        chosen, clean_scale = self._some(
            self._clean_rows, self._clean_scale, self.clean_batch, (CLEAN, step, number, block)
        )
        clean = torch.from_numpy(self._samples.clean)[chosen]
        found = {
            **self._training(rows, scale),
            "clean_inputs": self._inputs("train", clean),
            "clean_labels": self.data.examples("train").labels[clean],
            "clean_scale": clean_scale,
        }
        if self.batch is None and self.clean_batch is None:
            self._whole[block] = found
        return found

    def _some(
        self, rows: Tensor, scale: Tensor, size: int | None, key: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """`size` of a block's rows without replacement, and scales whose sums have the mean of the
        whole block's.
        """
        own, scales = rows[key[-1]], scale[key[-1]]
        if size is None:
            return own, scales.to(self.dtype)
        count = int((scales > 0).sum())
        draw = np.random.default_rng((self.seed, *key))
        chosen = torch.from_numpy(np.sort(draw.permutation(count)[: min(size, count)]))
        return own[chosen], (scales[chosen] * (count / len(chosen))).to(self.dtype)

    def _training(self, rows: Tensor, scale: Tensor) -> Batch:
        inputs = self._inputs("train", torch.from_numpy(self._samples.train)[rows])
        labels = torch.from_numpy(self._samples.given)[rows]
        share = torch.ones((), dtype=self.dtype)  # of |y|^2
        return {"rows": rows, "inputs": inputs, "labels": labels, "scale": scale, "share": share}

    def _inputs(self, part: Literal["train", "test"], rows: Tensor) -> Tensor:
        found: Tensor = self.data.examples(part).rows(rows, self.dtype)
        found = found.sub_(self._moments.mean).div_(self._moments.deviation)
        if self._picture is not None:
            found = self._picture.fold(found.flatten(0, -2))
        return found.reshape(*rows.shape, *self._shape)

    def _test(self, block: int) -> Batch:
        if block not in self._tests:
            labels = self.data.examples("test").labels
            rows, scale = block_rows(len(labels), self.blocks)
            clean = torch.from_numpy(self._samples.clean)[self._clean_rows[block]]
            own = self._rows[block]
            self._tests[block] = {
                **self._training(own, self._scale[block].to(self.dtype)),
                "wrong": torch.from_numpy(self._samples.wrong)[own],
                "clean_inputs": self._inputs("train", clean),
                "clean_labels": self.data.examples("train").labels[clean],
                "clean_scale": self._clean_scale[block].to(self.dtype),
                "test_inputs": self._inputs("test", rows[block]),
                "test_labels": labels[rows[block]],
                "test_scale": scale[block].to(self.dtype),
            }
        return self._tests[block]

    def micro_batches(self, batch: Batch, size: int) -> list[Batch]:
        rows, clean = batch["rows"].shape[1], batch["clean_labels"].shape[1]
        parts = min(-(-max(rows, clean) // size), rows, clean)
        cut = {
            name: tensor.tensor_split(parts, 1) for name, tensor in batch.items() if name != "share"
        }
        return [
            {name: each[part] for name, each in cut.items()} | {"share": batch["share"] / parts}
            for part in range(parts)
        ]

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        if self.weights == "sample":
            return {"weights": 2 * upper["weights"][batch["rows"]].sigmoid()}
        if self.weights == "labels":
            return {"soft": upper["logits"][batch["rows"]].softmax(1)}
        if self.weights == "rater":
            return {"weights": self.rate(upper, batch["inputs"], batch["labels"])}
        return dict(upper)

    def rate(self, upper: Params, inputs: Tensor, labels: Tensor) -> Tensor:
        """A rater's weights [n] of any samples with their given labels."""
        if len(self._shape) == 3:
            inputs = functional.adaptive_avg_pool2d(inputs, RATED)
        one = functional.one_hot(labels, self.data.classes).to(inputs.dtype)
        return _weight(upper, torch.cat([inputs.flatten(1), one], 1))

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        key = np.random.SeedSequence((self.seed, NETWORK)).generate_state(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(key[0]))
            net = self.build()
        like = batch["scale"]
        return {name: tensor.detach().to(like) for name, tensor in net.named_parameters()}

    def logits(self, lower: Params, inputs: Tensor) -> Tensor:
        found: Tensor = functional_call(self._net, lower, (inputs,))
        return found

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        logits = self.logits(lower, batch["clean_inputs"])
        losses = functional.cross_entropy(logits, batch["clean_labels"], reduction="none")
        return (batch["clean_scale"] * losses).sum()

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        losses, weights = self.losses_and_weights(encoded, lower, batch)
        loss = (batch["scale"] * weights * losses).sum()
        if self.decay == 0:
            return loss
        square = torch.stack([(tensor**2).sum() for tensor in lower.values()]).sum()
        return loss + batch["share"] * self.decay / 2 * square

    def losses_and_weights(
        self, encoded: Encoded, lower: Params, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The training samples' losses and weights."""
        logits = self.logits(lower, batch["inputs"])
        if self.weights == "labels":
            losses = functional.cross_entropy(logits, encoded["soft"], reduction="none")
            return losses, torch.ones_like(losses)
        losses = functional.cross_entropy(logits, batch["labels"], reduction="none")
        if self.weights == "loss_net":
            return losses, _weight(encoded, losses.detach()[:, None])
        return losses, encoded["weights"]

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """Accuracies and losses on the test and the clean samples, and what `f1` is made of."""
        metrics = {}
        for name in ("test", "clean"):
            logits = self.logits(lower, batch[f"{name}_inputs"])
            labels, scale = batch[f"{name}_labels"], batch[f"{name}_scale"]
            losses = functional.cross_entropy(logits, labels, reduction="none")
            metrics[f"{name}_accuracy"] = (scale * (logits.argmax(1) == labels)).sum()
            metrics[f"{name}_loss"] = (scale * losses).sum()
        real = batch["scale"] > 0  # filling is no sample
        _, weights = self.losses_and_weights(encoded, lower, batch)
        found = weights < self.wrong_below
        if self.weights == "labels":
            found = encoded["soft"].argmax(1) != batch["labels"]
        found, wrong = found & real, batch["wrong"] & real
        counts = {"wrong": wrong, "found": found, "both": found & wrong, "real": real}
        weights = weights * real
        return metrics | {
            **{name: which.to(weights.dtype).sum() for name, which in counts.items()},
            "weights": weights.sum(),
            "weights_of_wrong": (weights * wrong).sum(),
        }

    def classified(self, encoded: Encoded, lower: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        real = batch["test_scale"] > 0  # filling is no sample
        found = self.logits(lower, batch["test_inputs"]).argmax(1)
        return found[real], batch["test_labels"][real]

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """`f1`, `precision` and `recall` of the labels declared wrong, and the mean weights of right and
        wrong ones; 0 where 0/0.
        """
        metrics = dict(means)
        wrong, found, both, real = (
            metrics.pop(name) for name in ("wrong", "found", "both", "real")
        )
        every, of_wrong = metrics.pop("weights"), metrics.pop("weights_of_wrong")
        return metrics | {
            "precision": _ratio(both, found),
            "recall": _ratio(both, wrong),
            "f1": _ratio(2 * both, wrong + found),
            "mean_weight_wrong": _ratio(of_wrong, wrong),
            "mean_weight_right": _ratio(every - of_wrong, real - wrong),
        }


def _weight(net: Params, inputs: Tensor) -> Tensor:
    """2 sigmoid of a net with one hidden layer, [n], from inputs `[n, d]`."""
    hidden = functional.relu(functional.linear(inputs, net["hidden.weight"], net["hidden.bias"]))
    return 2 * (hidden @ net["weight"] + net["bias"]).sigmoid()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _picture(data: LabelledArrays) -> Picture | None:
    """How a row is folded; None: it is a row of numbers, or how is not known."""
    if not hasattr(data, "picture") and not hasattr(data, "image_shape"):
        return None
    if hasattr(data, "picture") and isinstance(data.picture(), str):
        return None
    return picture_of(data, "problem.network")


def _stacked(blocks: list[Batch]) -> Batch:
    return {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
