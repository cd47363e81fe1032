"""The problem of benchmarks/resident_y.py: two layers of any size as the one y of all data, a weight
for each sample as x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.core.problem import Batch, Encoded, SharedProblem, Split
from bomemeta.core.tree import Params
from bomemeta.registry import problems

FEATURES, CLASSES, BLOCKS = 512, 10, 2


def data(batch: int, block: int) -> dict[str, Tensor]:
    """Of a block: as many samples for g as for f."""
    generator = torch.Generator().manual_seed(block)
    found: dict[str, Tensor] = {}
    for name in ("train", "validation"):
        found[name] = torch.randn(batch, FEATURES, generator=generator)
        found[f"{name}_labels"] = torch.randint(CLASSES, (batch,), generator=generator)
    return found


def start(numbers: int) -> Params:
    """y with about so many numbers."""
    hidden = max(numbers // (FEATURES + CLASSES), 1)
    generator = torch.Generator().manual_seed(7)
    return {
        "first": torch.randn(hidden, FEATURES, generator=generator) / FEATURES**0.5,
        "last": torch.randn(CLASSES, hidden, generator=generator) / hidden**0.5,
    }


def logits(y: Params, inputs: Tensor) -> Tensor:
    return functional.linear(functional.relu(functional.linear(inputs, y["first"])), y["last"])


@problems.register("two_layers")
@dataclass(kw_only=True)
class TwoLayers(SharedProblem):
    """g: cross-entropy with a weight for each sample; f: on other samples, without."""

    numbers: int = 100_000
    batch: int = 64

    def setup(self) -> None:
        blocks = [data(self.batch, block) for block in range(BLOCKS)]
        self._data = {name: torch.stack([block[name] for block in blocks]) for name in blocks[0]}
        self._data["row"] = torch.arange(BLOCKS)

    @property
    def num_blocks(self) -> int:
        return BLOCKS

    def init_upper(self, generator: torch.Generator) -> Params:
        return {"x": torch.zeros(BLOCKS, self.batch, dtype=self.dtype)}

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        return {name: tensor[list(task_ids)] for name, tensor in self._data.items()}

    def encode(self, upper: Params, batch: Batch) -> Encoded:
        return {"weights": upper["x"].sigmoid()[batch["row"]]}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        return start(self.numbers)

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return functional.cross_entropy(
            logits(lower, batch["validation"]), batch["validation_labels"]
        )

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return weighted(lower, encoded["weights"], batch)


def weighted(y: Params, weights: Tensor, batch: Params) -> Tensor:
    losses = functional.cross_entropy(
        logits(y, batch["train"]), batch["train_labels"], reduction="none"
    )
    return (weights * losses).mean()
