"""The toy data set with its rows in any order, or with a fault. Named in configs' `imports:`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from toy import Toy

from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.registry import datasets

LATE = 3  # the first episode with a fault that no look at the first ones finds


@datasets.register("mixed_toy")
@dataclass(kw_only=True)
class MixedToy(Toy):
    order: Literal["sorted", "mixed"] = "sorted"
    fault: Literal["none", "one_based", "nan", "late_nan", "late_labels"] = "none"

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        support, support_labels, query, query_labels = super().episode(split, spec, key)
        late = key[-1] >= LATE
        if self.fault == "one_based" or (self.fault == "late_labels" and late):
            support_labels = support_labels + 1
        if self.fault == "nan" or (self.fault == "late_nan" and late):
            support[0, 0, 0, 0] = float("nan")
        if self.order == "sorted":
            return Episode(support, support_labels, query, query_labels)
        drawn = torch.Generator().manual_seed(hash(key) % 2**31)
        s, q = (torch.randperm(len(rows), generator=drawn) for rows in (support, query))
        return Episode(support[s], support_labels[s], query[q], query_labels[q])
