"""Few-shot classification: each task is an episode, its lower variable adapts to the support set, the upper one is shared.

`form: head`     x = the backbone,         y_i = a linear head on the episode's features (features are computed once per step)
`form: network`  x = an initialisation,    y_i = the whole network, held near x (the proximal lower problem of iMAML)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bomemeta.core.problem import Batch, BilevelProblem, Encoded, Split
from bomemeta.core.tree import Params
from bomemeta.data.episodes import EpisodeSource, EpisodeSpec
from bomemeta.errors import ConfigError
from bomemeta.nets import BACKBONES, build_backbone
from bomemeta.registry import problems

# The third number of an episode's key: what one split draws says nothing about another's.
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@problems.register("few_shot")
@dataclass(kw_only=True)
class FewShot(BilevelProblem):
    """N-way K-shot episodes from the config's `data:` section; upper loss on the queries, lower loss on the support set.

    head: prototype   g = CE(Z_s W) + (regularisation/2) |W - P|^2, P = class means of the encoded support set, y = W from P
          ridge       g = CE(Z_s W) + (regularisation/2) |W|^2, y = W from 0
          span        g = CE(Z_s W) + (regularisation/2) |W|^2 with W = Z_s' A in the span of the support set, y = A from 0
    form network:     g = CE(net_y(support)) + (regularisation/2) |y - x|^2, y from x

    In the head form Z = `feature_scale` times the L2-normalised features. `batch_norm` names whose images make the BatchNorm
    statistics of a task: `transductive` lets the queries in (head: support and queries together; network: the queries among
    themselves, as MAML does), `inductive` uses the support set alone.
    """

    needs_data = True
    meta_tests = True
    head_names: ClassVar[tuple[str, ...]] = ("head.weight", "head.bias")  # form network: x's entries that are not the backbone's

    form: Literal["head", "network"] = "head"
    head: Literal["prototype", "ridge", "span"] = "prototype"
    ways: Annotated[int, Field(ge=2)] = 5
    shots: Annotated[int, Field(ge=1)] = 1
    queries: Annotated[int, Field(ge=1)] = 5  # per class, in training
    test_queries: Annotated[int, Field(ge=1)] = 15  # per class, in validation and test: the field's usual number
    backbone: Literal["conv4", "resnet12"] = "conv4"
    width: Annotated[int, Field(ge=1)] = 32
    regularisation: Annotated[float, Field(ge=0)] = 1.0
    feature_scale: Annotated[float, Field(gt=0)] = 4.0
    batch_norm: Literal["transductive", "inductive"] = "transductive"
    fixed_tasks: Annotated[int, Field(ge=1)] | None = None  # so many episodes whose y persists; none: fresh ones for ever

    def setup(self) -> None:
        if not hasattr(self.data, "episode"):
            raise ConfigError(
                f"data.dataset: problem few_shot draws episodes, which {type(self.data).__name__} does not have; use glyphs, omniglot "
                "or one of learn2learn's"
            )
        source: EpisodeSource = self.data
        channels, height, width = source.image_shape
        if self.backbone == "conv4" and min(height, width) < 16:
            raise ConfigError(
                f"problem.backbone: conv4 halves its input four times and got images of {height}x{width}; it needs 16x16 or more"
            )
        for split in SPLITS:
            source.check(split, self._spec(split))
        self._skeleton = self._network(channels, torch.Generator())
        self._backbone_names = [name for name, _ in self._skeleton.named_parameters()]
        with torch.no_grad():
            self._features = BACKBONES[self.backbone](channels, self.width)(torch.zeros(1, channels, height, width)).shape[1]

    def _network(self, channels: int, generator: torch.Generator) -> nn.Module:
        return build_backbone(self.backbone, channels, self.width, generator).to(self.dtype)

    def _spec(self, split: Split) -> EpisodeSpec:
        return EpisodeSpec(self.ways, self.shots, self.queries if split == "train" else self.test_queries)

    @property
    def pool(self) -> int | None:
        return self.fixed_tasks

    def init_upper(self, generator: torch.Generator) -> Params:
        net = self._network(self.data.image_shape[0], generator)
        upper = {name: tensor.detach() for name, tensor in net.named_parameters()}
        if self.form == "network":
            # A head of zeros starts every class alike; MAML's analyses and iMAML's code do the same for the last layer.
            upper["head.weight"] = torch.zeros(self._features, self.ways, dtype=self.dtype)
            upper["head.bias"] = torch.zeros(self.ways, dtype=self.dtype)
        return upper

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        spec = self._spec(split)
        drawn = [self.data.episode(split, spec, (self.seed, SPLITS.index(split), task)) for task in task_ids]
        return {
            "support": torch.stack([episode.support for episode in drawn]).to(self.dtype),
            "support_labels": torch.stack([episode.support_labels for episode in drawn]),
            "query": torch.stack([episode.query for episode in drawn]).to(self.dtype),
            "query_labels": torch.stack([episode.query_labels for episode in drawn]),
        }

    # The two forms differ in where x enters. `encode` of the network form is the identity: x enters by the proximal term alone.

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        if self.form == "network":
            return upper
        images = torch.cat([batch["support"], batch["query"]])
        seen = None if self.batch_norm == "transductive" else len(batch["support"])
        features = self._backbone(upper, images, seen)
        features = self.feature_scale * functional.normalize(features, dim=1)
        support, query = features[: len(batch["support"])], features[len(batch["support"]) :]
        if self.head == "span":
            return {"support": support @ support.T, "query": query @ support.T}  # W = Z_s' A: the head acts through inner products
        if self.head == "ridge":
            return {"support": support, "query": query}
        prototypes = support.reshape(self.ways, self.shots, -1).mean(1)  # rows are sorted by label
        return {"support": support, "query": query, "prior": prototypes.T}

    @property
    def encodes(self) -> bool:
        return self.form == "head"

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        if self.form == "network":
            # A solver may carry entries of its own in x: they are no part of the network.
            return {name: encoded[name] for name in (*self._backbone_names, *self.head_names)}
        if self.head == "prototype":
            return {"head": encoded["prior"]}
        return {"head": encoded["support"].new_zeros(encoded["support"].shape[1], self.ways)}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return functional.cross_entropy(self._query_logits(encoded, lower, batch), batch["query_labels"])

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        if self.form == "network":
            loss = functional.cross_entropy(self.logits(lower, self.support_features(lower, batch)), batch["support_labels"])
            distance = torch.stack([((lower[name] - encoded[name]) ** 2).sum() for name in lower]).sum()
            return loss + self.regularisation / 2 * distance
        logits = encoded["support"] @ lower["head"]
        loss = functional.cross_entropy(logits, batch["support_labels"])
        if self.head == "span":
            penalty = (lower["head"] * logits).sum()  # |W|^2 = A' K A
        elif self.head == "ridge":
            penalty = (lower["head"] ** 2).sum()
        else:
            penalty = ((lower["head"] - encoded["prior"]) ** 2).sum()
        return loss + self.regularisation / 2 * penalty

    def upper_gradient(self, encoded: Encoded, lower: Params, batch: Batch) -> tuple[Tensor, Params] | None:
        if self.form == "network":
            return None
        value, grad, _ = _softmax_regression(encoded["query"], lower["head"], batch["query_labels"])
        return value, {"head": grad}

    def lower_gradient(self, encoded: Encoded, lower: Params, batch: Batch) -> tuple[Tensor, Params] | None:
        if self.form == "network":
            return None
        head, rho = lower["head"], self.regularisation
        value, grad, logits = _softmax_regression(encoded["support"], head, batch["support_labels"])
        # (rho/2) <force, offset> is the penalty and rho * force its gradient
        if self.head == "span":
            offset, force = head, logits
        else:
            offset = force = head - encoded["prior"] if self.head == "prototype" else head
        return value + rho / 2 * (offset * force).sum((1, 2)), {"head": grad + rho * force}

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """`accuracy` and `loss` on the queries, and `baseline_accuracy` of the nearest support image in raw pixels (L2)."""
        logits = self._query_logits(encoded, lower, batch)
        labels = batch["query_labels"]
        distance = torch.cdist(batch["query"].flatten(1), batch["support"].flatten(1))
        nearest = batch["support_labels"][distance.argmin(1)]
        return {
            "accuracy": (logits.argmax(1) == labels).to(logits.dtype).mean(),
            "loss": functional.cross_entropy(logits, labels),
            "baseline_accuracy": (nearest == labels).to(logits.dtype).mean(),
        }

    def evaluation_variants(self) -> Mapping[str, Mapping[str, Any]]:
        return {policy: {"batch_norm": policy} for policy in ("transductive", "inductive")}

    def _query_logits(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        if self.form == "head":
            return encoded["query"] @ lower["head"]
        return self.logits(lower, self.query_features(lower, batch))

    # The parts of the network form's network, for one task; solvers that adapt the network themselves use them too.

    def support_features(self, params: Params, batch: Batch) -> Tensor:
        """[n, d], BatchNorm statistics of the support set."""
        return self._backbone(params, batch["support"], None)

    def query_features(self, params: Params, batch: Batch) -> Tensor:
        """[n, d], BatchNorm statistics as `batch_norm` says."""
        if self.batch_norm == "transductive":
            return self._backbone(params, batch["query"], None)
        images = torch.cat([batch["support"], batch["query"]])
        return self._backbone(params, images, len(batch["support"]))[len(batch["support"]) :]

    def logits(self, params: Params, features: Tensor) -> Tensor:
        """The head `head_names` on features."""
        return features @ params["head.weight"] + params["head.bias"]

    def _backbone(self, params: Params, images: Tensor, statistics_rows: int | None) -> Tensor:
        backbone = {name: params[name] for name in self._backbone_names}
        features: Tensor = functional_call(self._skeleton, backbone, (images, statistics_rows))
        return features


def _softmax_regression(inputs: Tensor, weights: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of a stack of linear heads in closed form: value [B], gradient [B, d, ways], logits [B, n, ways].

    inputs [B, n, d], weights [B, d, ways], labels [B, n].
    """
    logits = inputs @ weights
    log_probabilities = functional.log_softmax(logits, dim=2)
    value = -log_probabilities.gather(2, labels[:, :, None]).mean((1, 2))
    residual = log_probabilities.exp()
    residual.scatter_add_(2, labels[:, :, None], residual.new_full((*labels.shape, 1), -1.0))
    return value, inputs.transpose(1, 2) @ residual / labels.shape[1], logits
