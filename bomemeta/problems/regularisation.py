"""Learnable regularisation: one l2 penalty per feature of a linear classifier on sparse counts,
learned on validation rows.

The problem is the regularisation experiment of the BOME paper (Liu et al., NeurIPS 2022), which is
that of Grazzi et al. ("On the Iteration Complexity of Hypergradient Computation", ICML 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from bomemeta.core.problem import Batch, Encoded, Loss, LossGradient, SharedProblem, Split
from bomemeta.core.tree import Params
from bomemeta.data.digest import digest_of_documents
from bomemeta.data.newsgroups import Documents, DocumentSource, chosen, stratified_halves
from bomemeta.errors import ConfigError, DataError
from bomemeta.registry import problems

# The halves of the data set's training and test parts: y is fitted to `train`, x to `validation`;
# settings are chosen on `selection`.
Part = Literal["train", "validation", "test", "selection"]


@problems.register("regularisation")
@dataclass(kw_only=True)
class Regularisation(SharedProblem):
    """x [features] are log-decays, y [features, classes] the weights of a linear softmax without
    bias:

    g = CE(train) + 1/2 mean_jc exp(x_j) y_jc^2,   f = CE(validation),   y from 0.

    The data set's training rows are halved into train and validation, its test rows into test and
    selection, each by class.
    """

    needs_data = True

    blocks: Annotated[int, Field(ge=1)] = (
        1  # parts that the rows are cut into; f and g are the same for any number
    )
    log_decay: float = 0.0  # every x_j at step 0

    def setup(self) -> None:
        if not isinstance(self.data, DocumentSource):
            raise ConfigError(
                f"data.dataset: problem regularisation reads sparse labelled rows, which {type(self.data).__name__} does not have; "
                f"use twenty_newsgroups"
            )
        self._features, self._classes = self.data.features, self.data.classes
        self._parts: dict[Part, Documents] = {}
        halves: dict[Literal["train", "test"], tuple[Part, Part]] = {
            "train": ("train", "validation"),
            "test": ("test", "selection"),
        }
        for number, (whole, names) in enumerate(halves.items()):
            documents = self.data.documents(whole)
            for name, chosen_rows in zip(
                names, stratified_halves(documents.label, (self.seed, number)), strict=True
            ):
                self._parts[name] = chosen(documents, chosen_rows)
        fewest, rows = min(
            ((part, len(documents.label)) for part, documents in self._parts.items()),
            key=lambda pair: pair[1],
        )
        if rows < self.blocks:
            raise DataError(
                f"problem.blocks is {self.blocks}; {fewest} has {rows} rows, and a block needs one: lower it"
            )
        self._cut: dict[tuple[Part, int, torch.device], _Block] = {}

    def check_data(self) -> dict[str, Any]:
        return digest_of_documents(self.data)

    @property
    def num_blocks(self) -> int:
        return self.blocks

    def init_upper(self, generator: torch.Generator) -> Params:
        return {"log_decay": torch.full((self._features,), self.log_decay, dtype=self.dtype)}

    def load(self, task_ids: Sequence[int], step: int, split: Split) -> Batch:
        """The blocks' numbers: the rows, of uneven length, stay in the problem, as products are
        taken with them.
        """
        return {"block": torch.tensor(list(task_ids))}

    def init_lower(self, encoded: Encoded, batch: Batch) -> Params:
        return {"weights": encoded["log_decay"].new_zeros(self._features, self._classes)}

    def upper_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        return self._block("validation", batch["block"]).loss(lower["weights"])

    def lower_loss(self, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
        weights = lower["weights"]
        penalty = torch.dot(self._decay(encoded), (weights**2).sum(1)) / 2
        return self._block("train", batch["block"]).loss(weights) + penalty

    def loss_gradient(
        self, loss: Loss, encoded: Encoded, lower: Params, batch: Batch, in_encoded: bool
    ) -> LossGradient | None:
        if in_encoded:
            return None
        decay = self._decay(encoded)
        results = []
        for i, weights in zip(batch["block"], lower["weights"], strict=True):
            if loss == "upper":
                results.append(self._block("validation", i).gradient(weights))
                continue
            value, gradient = self._block("train", i).gradient(weights)
            penalty = torch.dot(decay, (weights**2).sum(1)) / 2
            results.append((value + penalty, gradient.addcmul_(weights, decay[:, None])))
        return LossGradient(*_stacked(results), {})

    def evaluate(self, encoded: Encoded, lower: Params, batch: Batch) -> dict[str, Tensor]:
        """`test_accuracy`, `test_loss`, `selection_accuracy` and `selection_loss`; the mean over
        blocks is the whole part's.
        """
        metrics = {}
        for part in ("test", "selection"):
            block = self._block(part, batch["block"])
            logits = _product(block.matrix.rows, lower["weights"])
            right = (logits.argmax(1) == block.label).to(logits.dtype).sum()
            metrics[f"{part}_accuracy"] = right * block.share
            metrics[f"{part}_loss"] = (
                functional.cross_entropy(logits, block.label, reduction="sum") * block.share
            )
        return metrics

    def classified(self, encoded: Encoded, lower: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        block = self._block("test", batch["block"])
        return _product(block.matrix.rows, lower["weights"]).argmax(1), block.label

    def _decay(self, encoded: Encoded) -> Tensor:
        """What multiplies each y_j in the penalty's gradient: exp(x_j) / (features * classes)."""
        return encoded["log_decay"].exp() / (self._features * self._classes)

    def _block(self, part: Part, number: Tensor) -> _Block:
        """Made once on each device: the transpose costs more than many products."""
        key = (part, int(number), number.device)
        if key not in self._cut:
            rows = len(self._parts[part].label)
            # Every `blocks`-th row: the rows are sorted by class, so each block has its share of
            # every class.
            documents = chosen(self._parts[part], torch.arange(key[1], rows, self.blocks))
            row_start, column, value, label = (tensor.to(number.device) for tensor in documents)
            matrix = _Matrix.of(_Rows(row_start, column, value.to(self.dtype)), self._features)
            self._cut[key] = _Block(matrix, label, self.blocks / rows)
        return self._cut[key]


class _Rows(NamedTuple):
    """A sparse matrix by rows: row i has `value[k]` in column `column[k]` for k from `start[i]` up
    to `start[i + 1]`.
    """

    start: Tensor  # int64 [rows + 1]
    column: Tensor  # int64 [entries]
    value: Tensor  # [entries]


class _Matrix(NamedTuple):
    """A constant sparse matrix, and its transpose for the backward pass."""

    rows: _Rows
    columns: _Rows

    @classmethod
    def of(cls, rows: _Rows, width: int) -> _Matrix:
        row = torch.repeat_interleave(
            torch.arange(len(rows.start) - 1, device=rows.start.device), rows.start.diff()
        )
        order = rows.column.argsort(stable=True)
        counts = torch.bincount(rows.column, minlength=width)
        return cls(
            rows,
            _Rows(
                torch.cat([counts.new_zeros(1), counts.cumsum(0)]), row[order], rows.value[order]
            ),
        )

    @property
    def transposed(self) -> _Matrix:
        return _Matrix(self.columns, self.rows)


def _product(rows: _Rows, dense: Tensor) -> Tensor:
    """The sparse matrix times `dense` [columns, k]: [rows, k].

    An embedding bag is this product: as fast here as torch's sparse CSR tensors, which are in beta
    and warn, and ten times as fast as COO.
    """
    return functional.embedding_bag(
        rows.column,
        dense,
        rows.start,
        mode="sum",
        per_sample_weights=rows.value,
        include_last_offset=True,
    )


class _Linear(torch.autograd.Function):
    """`_product` whose derivative is again one of its own, with the transpose: differentiable any
    number of times.
    """

    @staticmethod
    def forward(ctx: Any, dense: Tensor, matrix: _Matrix) -> Tensor:
        ctx.matrix = matrix
        return _product(matrix.rows, dense)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Linear.apply(grads[0].contiguous(), ctx.matrix.transposed), None


class _Block(NamedTuple):
    """A part's rows in one block. Losses are summed and scaled, so that their mean over blocks is
    the mean over the part's rows.
    """

    matrix: _Matrix
    label: Tensor  # int64 [rows]
    share: float  # what a row counts: blocks / rows of the whole part

    def loss(self, weights: Tensor) -> Tensor:
        """Cross-entropy, []."""
        logits = _Linear.apply(weights, self.matrix)
        return functional.cross_entropy(logits, self.label, reduction="sum") * self.share

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its gradient in closed form, a tensor of the caller's own."""
        log_probabilities = functional.log_softmax(_product(self.matrix.rows, weights), dim=1)
        value = -log_probabilities.gather(1, self.label[:, None]).sum() * self.share
        residual = log_probabilities.exp_()
        residual.scatter_add_(1, self.label[:, None], residual.new_full((len(self.label), 1), -1.0))
        return value, _product(self.matrix.columns, residual.mul_(self.share))


def _stacked(results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Params]:
    values, gradients = zip(*results, strict=True)
    # One block, the usual case: its gradient of 10 MB is not copied.
    return torch.stack(values), {
        "weights": gradients[0][None] if len(gradients) == 1 else torch.stack(gradients)
    }
