"""Few-shot classification: each task is an episode, its lower variable adapts to the support set,
the upper one is shared.

form head       x = the backbone, y_i = a linear head on the episode's features
form network    x = an initialisation, y_i = the whole network, held near x (as iMAML's)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bomemeta.core import tree
from bomemeta.core.problem import Batch, Encoded, Encoding, Loss, LossGradient, Split
from bomemeta.core.tree import Params
from bomemeta.data.class_images import episode_of
from bomemeta.data.episode_check import check_episodes, checked
from bomemeta.data.episodes import Episode, EpisodeSource, EpisodeSpec
from bomemeta.data.feature_cache import frozen_features, has_rows
from bomemeta.data.image_folder import ImageEpisodes
from bomemeta.errors import ConfigError
from bomemeta.nets.backbone import Backbone, Norms
from bomemeta.nets.conv4_passes import Conv4Passes
from bomemeta.nets.neck import Neck, apply_neck, initial_neck
from bomemeta.nets.passes import MicroBatches
from bomemeta.nets.sources import build_module, is_own, load_weights
from bomemeta.problems import few_shot_auxiliary as auxiliary
from bomemeta.problems import few_shot_heads as heads
from bomemeta.problems import few_shot_linear as linear
from bomemeta.problems.few_shot_checks import check_fields, check_network, check_source_fits
from bomemeta.problems.few_shot_network import DROPS, NETWORK_HEAD, NetworkForm
from bomemeta.registry import problems

# The third number of an episode's key: what one split draws says nothing about another's.
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Head = Literal["prototype", "ridge", "span", "protonet", "cosine", "r2d2", "svm", "logistic"]


@problems.register("few_shot")
@dataclass(kw_only=True)
class FewShot(NetworkForm):
    """N-way K-shot episodes of `data:`; upper loss on the queries, lower loss on the support set.

    head: prototype   g = CE(Z_s W) + (regularisation/2) |W - P|^2, P = class means of the encoded
    support set, y = W from P
          ridge       g = CE(Z_s W) + (regularisation/2) |W|^2, y = W from 0
          span        g = CE(Z_s W) + (regularisation/2) |W|^2 with W = Z_s' A in the span of the support set, y = A from 0
          protonet, cosine, r2d2, svm, logistic: `few_shot_heads.py`
    form network:     g = CE(net_y(support)) + (regularisation/2) |y - x|^2, y from x

    The last five heads have a solution W*(x), differentiated with the features. Their y is the
    distance from it: g = |y|^2 / 2, f = CE(Z_q (W* + y)), y from 0. That has the same minimisers,
    and a solver that takes no step of y has the exact hypergradient. `auxiliary_weight` adds a
    term to f: `few_shot_auxiliary.py`.

    Z = `feature_scale` times the L2-normalised features. `batch_norm` names whose images make a
    task's BatchNorm statistics: `transductive` lets the queries in (head: support and queries
    together; network: the queries among themselves, as MAML does), `inductive` uses the support set
    alone, `running` a pretrained network's own.
    """

    needs_data = True
    meta_tests = True
    class_sizes: ClassVar[
        tuple[int, ...]
    ] = ()  # of one task, where they differ: few_shot_predict.py

    form: Literal["head", "network"] = "head"
    head: Head = "prototype"
    ways: Annotated[int, Field(ge=2)] = 5
    # in validation and test; None: as in training
    test_ways: Annotated[int, Field(ge=2)] | None = None
    shots: Annotated[int, Field(ge=1)] = 1
    queries: Annotated[int, Field(ge=1)] = 5  # per class, in training
    # per class, in validation and test: the field's usual number
    test_queries: Annotated[int, Field(ge=1)] = 15
    # A name, module:function, an nn.Module or a function that makes one: see nets/sources.py
    backbone: Any = "conv4"
    width: Annotated[int, Field(ge=1)] = 32
    weights: str | None = None
    trainable: str | list[str] = "all"
    adapter_rank: Annotated[int, Field(ge=1)] = 4
    neck: Neck = "none"
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    regularisation: Annotated[float, Field(ge=0)] = 1.0
    feature_scale: Annotated[float, Field(gt=0)] | None = 4.0
    batch_norm: Norms = "transductive"
    dropout: Literal["off", "key"] = "off"
    auxiliary_weight: Annotated[float, Field(ge=0)] = 0.0
    # so many episodes whose y persists; none: fresh ones for ever
    fixed_tasks: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def setup(self) -> None:
        check_source_fits(self)
        source: EpisodeSource = self.data
        self.notes: list[str] = []
        for split in SPLITS:
            source.check(split, self.spec(split))
            if isinstance(source, ImageEpisodes):
                self.notes += source.small_notes(split, self.spec(split))
        self.network = self._built(torch.Generator().manual_seed(self.seed))
        check_network(self)
        self._backbone_names = self.network.names
        # Written out is the plain case; a subclass that changes it is asked for its own `encode`.
        self._has_passes = (
            (self.form, self.backbone, self.batch_norm, self.trainable)
            == ("head", "conv4", "transductive", "all")
            and type(self).encode is FewShot.encode
            and type(self)._backbone is FewShot._backbone
        )
        self._features = self.network.width(source.image_shape, self.dtype)
        self._classes = (
            auxiliary.class_count(source, self.spec("train")) if self.auxiliary_weight else 0
        )
        self._own_names = list(self._own_entries(torch.Generator()))
        self._table: NDArray[Any] | None = None
        if self.form == "head" and not self._backbone_names:
            if set(self._own_names) <= {*auxiliary.NAMES}:
                raise ConfigError(
                    f"problem.trainable: none, and head {self.head} has nothing to learn either; set problem.neck=scale "
                    "or linear, or problem.head=cosine, r2d2 or svm"
                )
            if not self.network.mixes and self.dropout == "off" and has_rows(self.data):
                self._table = self._encoded_once()

    def check_data(self) -> dict[str, Any]:
        return check_episodes(self.data, {split: self.spec(split) for split in SPLITS}, self.seed)

    def _encoded_once(self) -> NDArray[Any]:
        """The features of every image, [n, d], for all episodes of the run."""
        encode, weights = functools.partial(self.network.features, {}), self.network.digest()
        return frozen_features(self.data, encode, weights, self.micro_batch, self.dtype)

    def _built(self, generator: torch.Generator) -> Backbone:
        running = self.batch_norm == "running" and self.weights is not None
        channels = self.data.image_shape[0]
        module = build_module(self.backbone, channels, self.width, generator, running)
        if self.weights is not None:
            self.notes += load_weights(module, self.weights)
        return Backbone(module.to(self.dtype), self.trainable, self.batch_norm)

    def spec(self, split: Split) -> EpisodeSpec:
        if split == "train":
            return EpisodeSpec(self.ways, self.shots, self.queries)
        return EpisodeSpec(self.test_ways or self.ways, self.shots, self.test_queries)

    @property
    def num_tasks(self) -> int | None:
        return self.fixed_tasks

    def _sizes(self, supports: int) -> Sequence[int]:
        """How many support images each class has; rows are sorted by label."""
        return self.class_sizes or [self.shots] * (supports // self.shots)

    def init_upper(self, generator: torch.Generator) -> Params:
        # Ours are drawn anew from the run's generator; what others bring is kept.
        own = is_own(self.backbone) and self.trainable == "all" and self.weights is None
        network = self._built(generator) if own else self.network
        upper = network.initial(self.adapter_rank, generator)
        if self.form == "network":
            # A head of zeros starts every class alike, as in MAML's analyses and iMAML's code.
            upper["head.weight"] = torch.zeros(self._features, self.ways, dtype=self.dtype)
            upper["head.bias"] = torch.zeros(self.ways, dtype=self.dtype)
            return upper
        return upper | self._own_entries(generator)

    def _own_entries(self, generator: torch.Generator) -> Params:
        """x's entries above the backbone, `form: head`."""
        entries = initial_neck(self.neck, self._features, self.dtype)
        entries |= heads.initial(self.head, self.regularisation, self.dtype)
        if not self._classes:
            return entries
        return entries | auxiliary.initial(self._classes, self._features, self.dtype, generator)

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        spec = self.spec(split)
        keys = [(self.seed, SPLITS.index(split), task) for task in task_ids]
        drawn = [self._episode(split, spec, key) for key in keys]
        # Marks the tasks whose features have dropout: the functions of a task are not told the split.
        drops = self.dropout == "key" and split == "train"
        marks = {DROPS: torch.ones(len(keys))} if drops else {}
        if self._classes and split == "train":
            marks[auxiliary.CLASSES] = auxiliary.numbers(self.data, spec, keys, self._classes)
        return marks | {
            "support": torch.stack([episode.support for episode in drawn]).to(self.dtype),
            "support_labels": torch.stack([episode.support_labels for episode in drawn]),
            "query": torch.stack([episode.query for episode in drawn]).to(self.dtype),
            "query_labels": torch.stack([episode.query_labels for episode in drawn]),
        }

    def _episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        """An episode of images, or of their features where these never change."""
        if self._table is None:
            return checked(self.data, split, spec, key)
        draw = self.data.rows(split, spec, key)
        support, query = (
            torch.from_numpy(self._table[rows.ravel()]) for rows in (draw.support, draw.query)
        )
        return episode_of(support, query, spec)

    # The two forms differ in where x enters. `encode` of the network form is the identity: x enters
    # by the proximal term alone.

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        if self.form == "network":
            return upper
        images = torch.cat([batch["support"], batch["query"]])
        if self._table is not None:
            return self._seen_by_head(upper, images, len(batch["support"]), batch)
        seen = None if self.batch_norm == "transductive" else len(batch["support"])
        features = self._backbone(upper, images, seen, DROPS in batch)
        return self._seen_by_head(upper, features, len(batch["support"]), batch)

    def encode_tasks(self, upper: Params, batch: Batch, differentiable: bool) -> Encoding | None:
        by_parts = self.micro_batch is not None and self._table is None
        if not (self._has_passes or by_parts):
            return None
        images, supports = (
            torch.cat([batch["support"], batch["query"]], 1),
            batch["support"].shape[1],
        )
        passes: Conv4Passes | MicroBatches
        if self.micro_batch is not None and by_parts:
            own = {name: upper[name] for name in self._backbone_names}
            passes = MicroBatches(
                lambda x, part: self._backbone(x, part, None), own, images, self.micro_batch
            )
        else:
            passes = Conv4Passes(upper, images, differentiable)
        features = passes.features.requires_grad_(differentiable)
        seen = self._seen_by_head(upper, features, supports, batch)
        above = {name: upper[name] for name in self._own_names}

        def pull_back(cotangent: Encoded) -> Params:
            grads = torch.autograd.grad(
                list(seen.values()),
                [features, *above.values()],
                list(cotangent.values()),
                retain_graph=True,
                materialize_grads=True,
            )
            return passes.pull_back(grads[0]) | dict(zip(above, grads[1:], strict=True))

        return Encoding(tree.detached(seen), pull_back)

    def _seen_by_head(
        self, upper: Params, features: Tensor, supports: int, batch: Batch
    ) -> Encoded:
        """From features [..., n, d] of support and queries what f and g work on, of one task or of a
        stack. The first `supports` rows are the support set's.
        """
        features = self.scaled_features(upper, features)
        classes = batch.get(auxiliary.CLASSES)
        told = auxiliary.encoded(upper, features, supports, classes)
        return self._inputs(upper, features, supports) | told

    def _inputs(self, upper: Params, features: Tensor, supports: int) -> Encoded:
        """What the head works on."""
        support, query = features[..., :supports, :], features[..., supports:, :]
        if self.head == "span":
            # W = Z_s' A: the head acts through inner products
            return {"support": support @ support.mT, "query": query @ support.mT}
        if self.head == "ridge":
            return {"support": support, "query": query}
        if self.head == "prototype":
            means = linear.class_means(support, self._sizes(supports))
            return {"support": support, "query": query, "prior": means.mT}
        targets = heads.targets(support, self._sizes(supports))
        solution = heads.solution(self.head, upper, support, targets, self.regularisation)
        return {"query": heads.with_one(query), "solution": solution}

    def scaled_features(self, upper: Params, features: Tensor) -> Tensor:
        """What a head sees of a backbone's features [..., n, d]: through the neck, with the length
        `feature_scale`.
        """
        features = apply_neck(self.neck, upper, features)
        if self.feature_scale is None:
            return features
        return self.feature_scale * functional.normalize(features, dim=-1)

    def module(self, upper: Params) -> nn.Module:
        """The backbone with x in its place, as an ordinary module with its buffers: images `[n, C,
        H, W]` to features `[n, d]`, without neck and scale.
        """
        return self.network.filled(upper)

    @property
    def encodes(self) -> bool:
        return self.form == "head"

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        if self.form == "network":
            # A solver may carry entries of its own in x: they are no part of the network.
            return {name: encoded[name] for name in (*self._backbone_names, *NETWORK_HEAD)}
        if self.head == "prototype":
            return {"head": encoded["prior"]}
        if "solution" in encoded:
            return {"head": torch.zeros_like(encoded["solution"])}
        ways = len(self._sizes(len(batch["support"])))
        return {"head": encoded["support"].new_zeros(encoded["support"].shape[1], ways)}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        loss = functional.cross_entropy(
            self.query_logits(encoded, lower, batch), batch["query_labels"]
        )
        return auxiliary.added(loss, encoded, self.auxiliary_weight)

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        if self.form == "network":
            loss = functional.cross_entropy(
                self.logits(lower, self.support_features(lower, batch)), batch["support_labels"]
            )
            distance = torch.stack(
                [((lower[name] - encoded[name]) ** 2).sum() for name in lower]
            ).sum()
            return loss + self.regularisation / 2 * distance
        return linear.lower_loss(self.head, self.regularisation, encoded, lower, batch)

    def loss_gradient(
        self, loss: Loss, encoded: Encoded, lower: Params, batch: Batch, in_encoded: bool
    ) -> LossGradient | None:
        if self.form == "network":
            return None
        found = (
            linear.solved_gradient(loss, encoded, lower, batch, in_encoded)
            if "solution" in encoded
            else linear.gradient(
                self.head, self.regularisation, loss, encoded, lower, batch, in_encoded
            )
        )
        return auxiliary.added_gradient(found, encoded, self.auxiliary_weight, loss, in_encoded)

    def lower_steps(
        self, encoded: Encoded, lower: Params, batch: Batch, steps: int, lr: float
    ) -> Params | None:
        if self.form == "network":
            return None
        if "solution" in encoded:
            return {"head": lower["head"] * (1 - lr) ** steps}
        return linear.steps_on_g(self.head, self.regularisation, encoded, lower, batch, steps, lr)

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """`accuracy` and `loss` on the queries, and `baseline_accuracy` of the nearest support
        image, L2 in raw pixels, or in the features where these are kept.
        """
        logits = self.query_logits(encoded, lower, batch)
        labels = batch["query_labels"]
        distance = torch.cdist(batch["query"].flatten(1), batch["support"].flatten(1))
        nearest = batch["support_labels"][distance.argmin(1)]
        return {
            "accuracy": (logits.argmax(1) == labels).to(logits.dtype).mean(),
            "loss": functional.cross_entropy(logits, labels),
            "baseline_accuracy": (nearest == labels).to(logits.dtype).mean(),
        }

    def classified(self, encoded: Encoded, lower: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.query_logits(encoded, lower, batch).argmax(1), batch["query_labels"]

    def evaluation_variants(self) -> Mapping[str, Mapping[str, Any]]:
        if not self.network.mixes:
            return {}
        return {policy: {"batch_norm": policy} for policy in ("transductive", "inductive")}

    def query_logits(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        """`[n, ways]` of one task."""
        if "solution" in encoded:
            return encoded["query"] @ (encoded["solution"] + lower["head"])
        if self.form == "head":
            return encoded["query"] @ lower["head"]
        return self.logits(lower, self.query_features(lower, batch))

    def _backbone(
        self, params: Params, images: Tensor, statistics_rows: int | None, drops: bool = False
    ) -> Tensor:
        if self._backbone_names:
            return self.network.features(params, images, statistics_rows, drops)
        with torch.no_grad():
            return self.network.features(params, images, statistics_rows, drops)
