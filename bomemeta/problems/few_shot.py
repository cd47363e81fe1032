"""Few-shot classification: each task is an episode, its lower variable adapts to the support set,
the upper one is shared.

`form: head`     x = the backbone,         y_i = a linear head on the episode's features (features
are computed once per step) `form: network`  x = an initialisation,    y_i = the whole network, held
near x (the proximal lower problem of iMAML)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bomemeta.core import tree
from bomemeta.core.problem import Batch, Encoded, Encoding, Loss, LossGradient, Problem, Split
from bomemeta.core.tree import Params
from bomemeta.data.episodes import EpisodeSource, EpisodeSpec
from bomemeta.errors import ConfigError
from bomemeta.nets import BACKBONES, build_backbone
from bomemeta.nets.conv4_passes import Conv4Passes
from bomemeta.registry import problems

# The third number of an episode's key: what one split draws says nothing about another's.
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

NETWORK_HEAD = ("head.weight", "head.bias")  # form network: x's entries that are not the backbone's


@problems.register("few_shot")
@dataclass(kw_only=True)
class FewShot(Problem):
    """N-way K-shot episodes from the config's `data:` section; upper loss on the queries, lower
    loss on the support set.

    head: prototype   g = CE(Z_s W) + (regularisation/2) |W - P|^2, P = class means of the encoded
    support set, y = W from P
          ridge       g = CE(Z_s W) + (regularisation/2) |W|^2, y = W from 0
          span        g = CE(Z_s W) + (regularisation/2) |W|^2 with W = Z_s' A in the span of the support set, y = A from 0
    form network:     g = CE(net_y(support)) + (regularisation/2) |y - x|^2, y from x

    In the head form Z = `feature_scale` times the L2-normalised features. `batch_norm` names whose
    images make the BatchNorm statistics of a task: `transductive` lets the queries in (head:
    support and queries together; network: the queries among themselves, as MAML does), `inductive`
    uses the support set alone.
    """

    needs_data = True
    meta_tests = True

    form: Literal["head", "network"] = "head"
    head: Literal["prototype", "ridge", "span"] = "prototype"
    ways: Annotated[int, Field(ge=2)] = 5
    shots: Annotated[int, Field(ge=1)] = 1
    queries: Annotated[int, Field(ge=1)] = 5  # per class, in training
    test_queries: Annotated[int, Field(ge=1)] = (
        15  # per class, in validation and test: the field's usual number
    )
    backbone: Literal["conv4", "resnet12"] = "conv4"
    width: Annotated[int, Field(ge=1)] = 32
    regularisation: Annotated[float, Field(ge=0)] = 1.0
    feature_scale: Annotated[float, Field(gt=0)] = 4.0
    batch_norm: Literal["transductive", "inductive"] = "transductive"
    fixed_tasks: Annotated[int, Field(ge=1)] | None = (
        None  # so many episodes whose y persists; none: fresh ones for ever
    )

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
        # What is written out is the plain case; a subclass that changes it is asked for its own
        # `encode`.
        self._has_passes = (
            (self.form, self.backbone, self.batch_norm) == ("head", "conv4", "transductive")
            and type(self).encode is FewShot.encode
            and type(self)._backbone is FewShot._backbone
        )
        with torch.no_grad():
            self._features = BACKBONES[self.backbone](channels, self.width)(
                torch.zeros(1, channels, height, width)
            ).shape[1]

    def _network(self, channels: int, generator: torch.Generator) -> nn.Module:
        return build_backbone(self.backbone, channels, self.width, generator).to(self.dtype)

    def _spec(self, split: Split) -> EpisodeSpec:
        return EpisodeSpec(
            self.ways, self.shots, self.queries if split == "train" else self.test_queries
        )

    @property
    def num_tasks(self) -> int | None:
        return self.fixed_tasks

    def init_upper(self, generator: torch.Generator) -> Params:
        net = self._network(self.data.image_shape[0], generator)
        upper = {name: tensor.detach() for name, tensor in net.named_parameters()}
        if self.form == "network":
            # A head of zeros starts every class alike; MAML's analyses and iMAML's code do the same
            # for the last layer.
            upper["head.weight"] = torch.zeros(self._features, self.ways, dtype=self.dtype)
            upper["head.bias"] = torch.zeros(self.ways, dtype=self.dtype)
        return upper

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        spec = self._spec(split)
        drawn = [
            self.data.episode(split, spec, (self.seed, SPLITS.index(split), task))
            for task in task_ids
        ]
        return {
            "support": torch.stack([episode.support for episode in drawn]).to(self.dtype),
            "support_labels": torch.stack([episode.support_labels for episode in drawn]),
            "query": torch.stack([episode.query for episode in drawn]).to(self.dtype),
            "query_labels": torch.stack([episode.query_labels for episode in drawn]),
        }

    # The two forms differ in where x enters. `encode` of the network form is the identity: x enters
    # by the proximal term alone.

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        if self.form == "network":
            return upper
        images = torch.cat([batch["support"], batch["query"]])
        seen = None if self.batch_norm == "transductive" else len(batch["support"])
        return self._seen_by_head(self._backbone(upper, images, seen))

    def encode_tasks(self, upper: Params, batch: Batch, differentiable: bool) -> Encoding | None:
        if not self._has_passes:
            return None
        passes = Conv4Passes(
            upper, torch.cat([batch["support"], batch["query"]], 1), differentiable
        )
        features = passes.features.requires_grad_(differentiable)
        seen = self._seen_by_head(features)

        def pull_back(cotangent: Encoded) -> Params:
            (grad,) = torch.autograd.grad(
                list(seen.values()), features, list(cotangent.values()), retain_graph=True
            )
            return passes.pull_back(grad)

        return Encoding(tree.detached(seen), pull_back)

    def _seen_by_head(self, features: Tensor) -> Encoded:
        """From features [..., n, d] of support and queries what the head works on, of one task or
        of a stack.
        """
        features = self.feature_scale * functional.normalize(features, dim=-1)
        supports = self.ways * self.shots
        support, query = features[..., :supports, :], features[..., supports:, :]
        if self.head == "span":
            # W = Z_s' A: the head acts through inner products
            return {"support": support @ support.mT, "query": query @ support.mT}
        if self.head == "ridge":
            return {"support": support, "query": query}
        prototypes = support.reshape(*support.shape[:-2], self.ways, self.shots, -1).mean(
            -2
        )  # rows are sorted by label
        return {"support": support, "query": query, "prior": prototypes.mT}

    @property
    def encodes(self) -> bool:
        return self.form == "head"

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        if self.form == "network":
            # A solver may carry entries of its own in x: they are no part of the network.
            return {name: encoded[name] for name in (*self._backbone_names, *NETWORK_HEAD)}
        if self.head == "prototype":
            return {"head": encoded["prior"]}
        return {"head": encoded["support"].new_zeros(encoded["support"].shape[1], self.ways)}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return functional.cross_entropy(
            self._query_logits(encoded, lower, batch), batch["query_labels"]
        )

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        if self.form == "network":
            loss = functional.cross_entropy(
                self.logits(lower, self.support_features(lower, batch)), batch["support_labels"]
            )
            distance = torch.stack(
                [((lower[name] - encoded[name]) ** 2).sum() for name in lower]
            ).sum()
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

    def loss_gradient(
        self, loss: Loss, encoded: Encoded, lower: Params, batch: Batch, in_encoded: bool
    ) -> LossGradient | None:
        if self.form == "network":
            return None
        data = "query" if loss == "upper" else "support"
        inputs, head, rho = encoded[data], lower["head"], self.regularisation
        value, residual, logits = _softmax_regression(inputs, head, batch[f"{data}_labels"])
        in_head = inputs.mT @ residual
        seen: Encoded = {data: residual @ head.mT} if in_encoded else {}
        if loss == "lower":
            # (rho/2) <force, offset> is the penalty and rho * force its gradient in the head
            if self.head == "span":
                offset, force = head, logits
                if in_encoded:
                    seen["support"] = torch.baddbmm(seen["support"], head, head.mT, alpha=rho / 2)
            else:
                offset = force = head - encoded["prior"] if self.head == "prototype" else head
                if in_encoded and self.head == "prototype":
                    seen["prior"] = -rho * force
            value = value + rho / 2 * (offset * force).sum((1, 2))
            in_head = torch.add(in_head, force, alpha=rho)
        return LossGradient(value, {"head": in_head}, seen)

    def lower_steps(
        self, encoded: Encoded, lower: Params, batch: Batch, steps: int, lr: float
    ) -> Params | None:
        """Four operations a step: what a step adds whatever W is, is made before, and the loss
        itself nobody asks for.
        """
        if self.form == "network":
            return None
        support, head, rho = encoded["support"], lower["head"], self.regularisation
        rate = lr / support.shape[1]
        targets = functional.one_hot(batch["support_labels"], self.ways).to(support.dtype)
        constant = rate * (support.mT @ targets)
        if self.head == "prototype":
            constant = torch.add(constant, encoded["prior"], alpha=lr * rho)
        for _ in range(steps):
            logits = torch.bmm(support, head)
            if self.head == "span":  # its penalty's gradient is rho times the logits
                moved = torch.add(constant, head).sub_(logits, alpha=lr * rho)
            else:
                moved = torch.add(constant, head, alpha=1 - lr * rho)
            head = moved.baddbmm_(support.mT, torch.softmax(logits, 2), alpha=-rate)
        return {"head": head}

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """`accuracy` and `loss` on the queries, and `baseline_accuracy` of the nearest support
        image in raw pixels (L2).
        """
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

    @property
    def head_names(self) -> tuple[str, ...]:
        return NETWORK_HEAD if self.form == "network" else ("head",)

    def adaptation(
        self, encoded: Encoded, lower: Params, batch: Batch, names: tuple[str, ...]
    ) -> Callable[[Params], Tensor]:
        """Network form: the support set's cross-entropy, without the proximal term, on features
        that are computed once where only the head adapts.
        """
        if self.form != "network":
            return super().adaptation(encoded, lower, batch, names)
        labels = batch["support_labels"]
        if set(names) <= set(NETWORK_HEAD):
            features = self.support_features(lower, batch)
            return lambda part: functional.cross_entropy(
                self.logits({**lower, **part}, features), labels
            )

        def loss(part: Params) -> Tensor:
            y = {**lower, **part}
            return functional.cross_entropy(self.logits(y, self.support_features(y, batch)), labels)

        return loss

    # The parts of the network form's network, for one task.

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
        """The head on features."""
        return features @ params["head.weight"] + params["head.bias"]

    def _backbone(self, params: Params, images: Tensor, statistics_rows: int | None) -> Tensor:
        backbone = {name: params[name] for name in self._backbone_names}
        features: Tensor = functional_call(self._skeleton, backbone, (images, statistics_rows))
        return features


class _Regression(NamedTuple):
    value: Tensor  # [B]
    residual: Tensor  # the gradient in the logits [B, n, ways]
    logits: Tensor  # [B, n, ways]


def _softmax_regression(inputs: Tensor, weights: Tensor, labels: Tensor) -> _Regression:
    """Cross-entropy of a stack of linear heads in closed form: inputs [B, n, d], weights [B, d,
    ways], labels [B, n].
    """
    logits = inputs @ weights
    log_probabilities = functional.log_softmax(logits, dim=2)
    places = labels[:, :, None]
    residual = log_probabilities.exp().scatter_add_(
        2, places, log_probabilities.new_full((), -1.0).expand_as(places)
    )
    return _Regression(
        -log_probabilities.gather(2, places).mean((1, 2)), residual.div_(labels.shape[1]), logits
    )
