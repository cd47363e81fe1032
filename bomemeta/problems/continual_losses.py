"""Losses against what earlier networks said, and a block's share in writing that down. The shares
of all blocks are summed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.core.problem import Batch
from bomemeta.core.tree import Params

# A logit that is out of the question: its probability is 0 in either precision, and 0 times its
# logarithm is 0 and not NaN.
NEVER = -1e9
FISHER_ROWS = 16  # whose gradients, each as large as y, are held at once


def masked(logits: Tensor, allowed: Tensor) -> Tensor:
    """The logits, NEVER for classes that are not allowed."""
    return logits.masked_fill(~allowed, NEVER)


def distilled(logits: Tensor, notes: Tensor, allowed: Tensor, temperature: float | None) -> Tensor:
    """Per sample, summed over its classes: KL(notes || softmax(logits / temperature)), or without
    one (logits - notes)^2.
    """
    if temperature is None:
        return ((logits - notes) ** 2 * allowed).sum(1)
    log_q = functional.log_softmax(masked(logits / temperature, allowed), dim=1)
    entropy: Tensor = torch.special.xlogy(notes, notes)
    return (entropy - notes * log_q).sum(1)


def rows_share(old: Tensor, new: Tensor, weight: Tensor, batch: Batch, blocks: int) -> Tensor:
    """Rows `old` [slots, c] with the block's `new` [m, c] in their places; `weight` is 1, of
    filling 0.

    An old row that stays comes from block (its number) % blocks.
    """
    mine = torch.arange(len(old), device=old.device) % blocks == batch["block"]
    kept = old * (mine & ~batch["stale"])[:, None]
    return kept.index_add(0, batch["kept_slots"], new * weight[:, None])


def fisher_share(
    loss: Callable[..., Tensor],
    lower: Params,
    samples: tuple[Tensor, ...],
    weight: Tensor,
    batch: Batch,
) -> Params:
    """The diagonal of the empirical Fisher information at y, weighted over this block's samples,
    added to the old; and y as the anchor.

    `loss(y, *sample)` is one sample's. What there is once comes from block 0.
    """
    once = (batch["block"] == 0).to(weight.dtype)
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(samples)))
    fisher = {name: once * batch[f"fisher.{name}"] for name in lower}
    for *chunk, share in zip(
        *(torch.split(tensor, FISHER_ROWS) for tensor in (*samples, weight)), strict=True
    ):
        for name, gradient in gradients(lower, *chunk).items():
            fisher[name] = fisher[name] + torch.tensordot(share, gradient**2, dims=1)
    return {f"fisher.{name}": value for name, value in fisher.items()} | {
        f"anchor.{name}": once * y for name, y in lower.items()
    }


def cross_entropies(logits: Tensor, labels: Tensor, allowed: Tensor) -> Tensor:
    """`[n]`, of each sample among its task's classes."""
    return functional.cross_entropy(masked(logits, allowed), labels, reduction="none")


def nothing_of(lower: Params) -> Tensor:
    """0, as a function of y: of no samples."""
    return next(iter(lower.values())).sum() * 0
