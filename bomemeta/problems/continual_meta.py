"""Continual meta-learning: a representation on which a head can learn class after class online,
without forgetting.

Javed and White, "Meta-Learning Representations for Continual Learning" (OML), NeurIPS 2019. A task
is a trajectory: C classes that no other split has, one after the other, `shots` images of each,
every image seen once. On features Z(x) a linear head learns from it by ONE step on the
cross-entropy of ONE image after another:

    W_0 = 0,   W_t = W_(t-1) - a grad CE(W_(t-1); z_t),   t = 1..n,        S(x) = W_n

This pass, and no other procedure, is what x is judged by: the accuracy after c classes on held-out
images of all c, for several c. As a bilevel problem, with y_i the head of trajectory i:

    g_i(x, y) = |y - S_i(x)|^2 / 2                                  argmin_y g_i = S_i(x), the head at the pass's end
    f_i(x, y) = CE(s Z_held-out(x) y)                               over all classes of the trajectory, first and last alike

Steps of gradient descent of one size minimise the linearised losses that were met, plus a proximal
term (online gradient descent in its lazy form): S = argmin_y sum_t <grad CE(W_(t-1); z_t), y> +
|y|^2 / 2a, and g_i is that sum times a, less what does not depend on y. So the order of the classes
is in g, and g has the Hessian I: ONE inner step of size 1 solves it from anywhere, and an exact
hypergradient is OML's gradient. BOME's is that too: at a y that a barrier step took a little way
along -grad f, lambda (y - S) is -grad_y f, up to the order of that way. The pass is part of
`encode`: what x does to S is one pull-back, through n small steps on features and the network under
them.

Where this differs from the paper: the head is linear, without bias, and starts at 0 in every
trajectory (theirs are two fully connected layers with an initialisation in x, and columns that
stand for training classes): so "random other classes" have no columns, and what is to be remembered
in f are the trajectory's own earlier classes. a and s are learned with x, as exp of its last two
entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from bomemeta.core.problem import Batch, Encoded, Loss, LossGradient, Problem, Split
from bomemeta.core.tree import Params
from bomemeta.data.episode_check import check_episodes, checked
from bomemeta.data.episodes import EpisodeSource, EpisodeSpec
from bomemeta.errors import ConfigError, DataError
from bomemeta.nets.sample_conv import DEPTH, SampleConv
from bomemeta.problems import continual_meta_report as report
from bomemeta.registry import problems

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LOG_STEP, LOG_SHARPNESS = "online.log_step", "online.log_sharpness"
SHUFFLE = 3  # after a split's number in the key of a trajectory's shuffled order
CHUNK = 500  # images that go through the backbone at once: a long trajectory's are thousands

Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


@problems.register("continual_meta")
@dataclass(kw_only=True)
class ContinualMeta(Problem):
    """Class-incremental trajectories from the config's `data:` section: x = representation, y_i =
    the head after the online pass.

    g_i = |y - S_i(x)|^2 / 2,  S_i(x) = head after one step of size a on each image's cross-entropy,
    in order, from 0; f_i = CE(s Z y) on `queries` held-out images of each class. Z = L2-normalised
    features; a and s are learned with x.

    `order: shuffled` mixes the images of all classes: the i.i.d. pass that forgetting is measured
    against.
    """

    needs_data = True
    meta_tests = True

    classes: Annotated[int, Field(ge=2)] = 20  # of a training trajectory
    shots: Size = 5  # images of each that the pass sees
    queries: Size = 3  # held-out images of each, in training
    lengths: list[Annotated[int, Field(ge=2)]] = field(
        default_factory=lambda: [10, 20, 50, 100, 200]
    )
    test_shots: Size | None = None  # in validation and test; None: as in training
    test_queries: Size = 5
    order: Literal["sequential", "shuffled"] = "sequential"
    width: Size = 32
    step: Positive = 0.1  # a at the start
    sharpness: Positive = 30.0  # s at the start
    test_step_factor: Positive = (
        1.0  # multiplies a in validation and test, where trajectories are longer
    )

    def __post_init__(self) -> None:
        if not self.lengths or any(
            b <= a for a, b in zip(self.lengths, self.lengths[1:], strict=False)
        ):
            raise ConfigError(
                f"problem.lengths: got {self.lengths}; wanted one or more numbers of classes, growing, as in [10, 20, 50]"
            )

    def setup(self) -> None:
        if not hasattr(self.data, "episode"):
            raise ConfigError(
                f"data.dataset: problem continual_meta draws classes, which {type(self.data).__name__} does not have; use glyphs, "
                "omniglot or one of learn2learn's"
            )
        source: EpisodeSource = self.data
        channels, height, width = source.image_shape
        if min(height, width) < 2**DEPTH:
            raise ConfigError(
                f"problem continual_meta: got images of {height}x{width}; its network wants 16x16 or more"
            )
        for split in SPLITS:
            try:
                source.check(split, self.spec(split))
            except DataError as error:
                raise DataError(
                    f"{error}. In continual_meta `ways` of the {split} split are "
                    + (
                        "`classes`"
                        if split == "train"
                        else "the last of `lengths`, its shots `test_shots`, its queries `test_queries`"
                    )
                ) from error
        self._skeleton = SampleConv(channels, self.width, torch.Generator()).to(self.dtype)

    def check_data(self) -> dict[str, Any]:
        return check_episodes(self.data, {split: self.spec(split) for split in SPLITS}, self.seed)

    @property
    def outputs(self) -> int:
        """Of the head, in every trajectory: as many as the longest one has classes."""
        return max(self.classes, self.lengths[-1])

    def spec(self, split: Split) -> EpisodeSpec:
        if split == "train":
            return EpisodeSpec(self.classes, self.shots, self.queries)
        return EpisodeSpec(self.lengths[-1], self.test_shots or self.shots, self.test_queries)

    def init_upper(self, generator: torch.Generator) -> Params:
        net = SampleConv(self.data.image_shape[0], self.width, generator).to(self.dtype)
        upper = {name: tensor.detach() for name, tensor in net.named_parameters()}
        logs = {LOG_STEP: self.step, LOG_SHARPNESS: self.sharpness}
        return upper | {
            name: torch.tensor(value, dtype=self.dtype).log() for name, value in logs.items()
        }

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        spec, number = self.spec(split), SPLITS.index(split)
        drawn = [checked(self.data, split, spec, (self.seed, number, task)) for task in task_ids]
        batch = {
            "images": torch.stack(
                [torch.cat([episode.support, episode.query]) for episode in drawn]
            ).to(self.dtype),
            "labels": torch.stack([episode.support_labels for episode in drawn]),
            "query_labels": torch.stack([episode.query_labels for episode in drawn]),
        }
        lengths = (spec.ways,) if split == "train" else self.lengths
        for length in lengths:  # rows are sorted by class: those of the first classes come first
            rows = length * spec.shots
            orders = [
                np.random.default_rng((self.seed, number, task, SHUFFLE)).permutation(rows)
                if self.order == "shuffled"
                else np.arange(rows)
                for task in task_ids
            ]
            batch[f"{ORDER}{length}"] = torch.from_numpy(np.stack(orders))
        if split != "train":
            batch["judged"] = torch.ones(len(drawn), dtype=self.dtype)
        return batch

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        """`online` S(x) at the longest length, `queries` the held-out features times s; with a
        test's batch `heads` of every length.
        """
        backbone = {
            name: tensor for name, tensor in upper.items() if name not in (LOG_STEP, LOG_SHARPNESS)
        }
        chunks = [
            functional_call(self._skeleton, backbone, (images,))
            for images in torch.split(batch["images"], CHUNK)
        ]
        features = functional.normalize(torch.cat(chunks), dim=1)
        seen, queries = features[: len(batch["labels"])], features[len(batch["labels"]) :]
        step = upper[LOG_STEP].exp()
        judged = "judged" in batch
        if judged:
            step = self.test_step_factor * step
        orders = [order for name, order in batch.items() if name.startswith(ORDER)]
        heads: list[Tensor] = []
        for order in orders:
            # In sequence a longer trajectory begins with the shorter one.
            done = len(orders[len(heads) - 1]) if heads and self.order == "sequential" else 0
            start = heads[-1] if done else features.new_zeros(features.shape[1], self.outputs)
            heads.append(
                online_pass(start, seen[order[done:]], batch["labels"][order[done:]], step)
            )
        encoded = {"online": heads[-1], "queries": upper[LOG_SHARPNESS].exp() * queries}
        return encoded | {"heads": torch.stack(heads), "seen": seen} if judged else encoded

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        return {"head": encoded["online"]}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return functional.cross_entropy(encoded["queries"] @ lower["head"], batch["query_labels"])

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return ((lower["head"] - encoded["online"]) ** 2).sum() / 2

    def loss_gradient(
        self, loss: Loss, encoded: Encoded, lower: Params, batch: Batch, in_encoded: bool
    ) -> LossGradient | None:
        if in_encoded:
            return None
        if loss == "lower":
            offset = lower["head"] - encoded["online"]
            return LossGradient((offset**2).sum((1, 2)) / 2, {"head": offset}, {})
        inputs, labels = encoded["queries"], batch["query_labels"][:, :, None]
        log_probabilities = functional.log_softmax(inputs @ lower["head"], dim=2)
        value = -log_probabilities.gather(2, labels).mean((1, 2))
        residual = log_probabilities.exp()
        residual.scatter_add_(2, labels, residual.new_full(labels.shape, -1.0))
        gradient = inputs.transpose(1, 2) @ residual / labels.shape[1]
        return LossGradient(value, {"head": gradient}, {})

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """After c classes of the pass, on all images of these c classes with these c in question:
        `accuracy_classes_c` on held-out ones, `trajectory_accuracy_classes_c` on those that the
        pass has seen. `accuracy` and `loss` at the longest length, and `baseline_accuracy` of the
        nearest class mean in raw pixels there.
        """
        metrics: dict[str, Tensor] = {}
        labels, query_labels = batch["labels"], batch["query_labels"]
        longest = self.lengths[-1]
        for length, head in zip(self.lengths, encoded["heads"], strict=True):
            for name, inputs, wanted in (
                ("", encoded["queries"], query_labels),
                ("trajectory_", encoded["seen"], labels),
            ):
                rows = len(wanted) // longest * length
                hits = (inputs[:rows] @ head[:, :length]).argmax(1) == wanted[:rows]
                metrics[f"{name}{report.metric_name(length)}"] = hits.to(head.dtype).mean()
        pixels = batch["images"].flatten(1)
        means = pixels[: len(labels)].reshape(longest, -1, pixels.shape[1]).mean(1)
        nearest = torch.cdist(pixels[len(labels) :], means).argmin(1)
        return {
            "accuracy": metrics[report.metric_name(longest)],
            "loss": self.upper_loss(encoded, lower, batch),
            "baseline_accuracy": (nearest == query_labels).to(pixels.dtype).mean(),
            **metrics,
        }

    def evaluation_variants(self) -> Mapping[str, Mapping[str, Any]]:
        return {order: {"order": order} for order in ("sequential", "shuffled")}

    def artefacts(
        self, history: Sequence[Mapping[str, float]], metrics: Mapping[str, float]
    ) -> dict[str, bytes]:
        about = {"order": self.order, "shots": self.spec("test").shots, "seed": self.seed}
        return report.files(
            metrics, about, "test_accuracy_shuffled" if self.order == "sequential" else None
        )


ORDER = "order_"  # of a length: the rows of its classes as the pass meets them


def online_pass(head: Tensor, features: Tensor, labels: Tensor, step: Tensor) -> Tensor:
    """The head [d, classes] after one step on the cross-entropy of each row of `features` [n, d],
    in order: W += a z (e - softmax(W'z))'.

    In closed form, and differentiable; for one task, under `torch.vmap` too.
    """
    targets = (labels[:, None] == torch.arange(head.shape[1], device=labels.device)).to(head.dtype)
    for inputs, target in zip(features.unbind(0), targets.unbind(0), strict=True):
        head = head + torch.outer(inputs, step * (target - torch.softmax(inputs @ head, 0)))
    return head
