"""The network form of few-shot classification: y is a whole network, backbone and head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.core.problem import Batch, Encoded, Problem
from bomemeta.core.tree import Params

DROPS = "drops"  # in a batch whose features have dropout
NETWORK_HEAD = ("head.weight", "head.bias")  # x's entries that are not the backbone's


class NetworkForm(Problem):
    """What `few_shot` does with whole networks; `_backbone` computes their features."""

    form: str
    batch_norm: str

    def _backbone(
        self, params: Params, images: Tensor, statistics_rows: int | None, drops: bool = False
    ) -> Tensor:
        raise NotImplementedError

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
        return self._backbone(params, batch["support"], None, DROPS in batch)

    def query_features(self, params: Params, batch: Batch) -> Tensor:
        """[n, d], BatchNorm statistics as `batch_norm` says."""
        if self.batch_norm == "transductive":
            return self._backbone(params, batch["query"], None, DROPS in batch)
        images, supports = torch.cat([batch["support"], batch["query"]]), len(batch["support"])
        return self._backbone(params, images, supports, DROPS in batch)[supports:]

    def logits(self, params: Params, features: Tensor) -> Tensor:
        """The head on features."""
        return features @ params["head.weight"] + params["head.bias"]
