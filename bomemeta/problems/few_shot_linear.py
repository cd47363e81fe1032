"""Linear heads of few-shot classification that are fitted by gradient steps, in closed form on a whole
stack of tasks: losses, gradients and the inner loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.core.problem import Batch, Encoded, Loss, LossGradient
from bomemeta.core.tree import Params


def class_means(support: Tensor, sizes: Sequence[int]) -> Tensor:
    """`[..., ways, d]` of support features `[..., n, d]`, class after class, `sizes` of each."""
    if min(sizes) == max(sizes):
        return support.reshape(*support.shape[:-2], len(sizes), sizes[0], -1).mean(-2)
    parts = torch.split(support, list(sizes), -2)
    return torch.stack([part.mean(-2) for part in parts], -2)


def lower_loss(kind: str, rho: float, encoded: Encoded, lower: Params, batch: Batch) -> Tensor:
    """g of one task, the readable form."""
    head = lower["head"]
    if "solution" in encoded:
        return (head**2).sum() / 2
    logits = encoded["support"] @ head
    loss = functional.cross_entropy(logits, batch["support_labels"])
    if kind == "span":
        penalty = (head * logits).sum()  # |W|^2 = A' K A
    elif kind == "ridge":
        penalty = (head**2).sum()
    else:
        penalty = ((head - encoded["prior"]) ** 2).sum()
    return loss + rho / 2 * penalty


def gradient(
    kind: str,
    rho: float,
    loss: Loss,
    encoded: Encoded,
    lower: Params,
    batch: Batch,
    in_encoded: bool,
) -> LossGradient:
    """f or g of a fitted head with its gradients."""
    data = "query" if loss == "upper" else "support"
    inputs, head = encoded[data], lower["head"]
    value, residual, logits = softmax_regression(inputs, head, batch[f"{data}_labels"])
    in_head = inputs.mT @ residual
    seen: Encoded = {data: residual @ head.mT} if in_encoded else {}
    if loss == "lower":
        # (rho/2) <force, offset> is the penalty and rho * force its gradient in the head
        if kind == "span":
            offset, force = head, logits
            if in_encoded:
                seen["support"] = torch.baddbmm(seen["support"], head, head.mT, alpha=rho / 2)
        else:
            offset = force = head - encoded["prior"] if kind == "prototype" else head
            if in_encoded and kind == "prototype":
                seen["prior"] = -rho * force
        value = value + rho / 2 * (offset * force).sum((1, 2))
        in_head = torch.add(in_head, force, alpha=rho)
    return LossGradient(value, {"head": in_head}, seen)


def solved_gradient(
    loss: Loss, encoded: Encoded, lower: Params, batch: Batch, in_encoded: bool
) -> LossGradient:
    """The same of a head with a solution: f = CE(queries; W* + y), g = |y|^2 / 2."""
    offset = lower["head"]
    if loss == "lower":
        return LossGradient(offset.square().sum((1, 2)) / 2, {"head": offset}, {})
    inputs, head = encoded["query"], encoded["solution"] + offset
    value, residual, _ = softmax_regression(inputs, head, batch["query_labels"])
    in_head = inputs.mT @ residual
    seen = {"query": residual @ head.mT, "solution": in_head} if in_encoded else {}
    return LossGradient(value, {"head": in_head}, seen)


def steps_on_g(
    kind: str, rho: float, encoded: Encoded, lower: Params, batch: Batch, steps: int, lr: float
) -> Params:
    """Four operations a step: what a step adds whatever W is, is made before, and the loss itself
    nobody asks for.
    """
    support, head = encoded["support"], lower["head"]
    rate = lr / support.shape[1]
    targets = functional.one_hot(batch["support_labels"], head.shape[2]).to(support.dtype)
    constant = rate * (support.mT @ targets)
    if kind == "prototype":
        constant = torch.add(constant, encoded["prior"], alpha=lr * rho)
    for _ in range(steps):
        logits = torch.bmm(support, head)
        # The gradient of span's penalty is rho times the logits.
        moved = (
            torch.add(constant, head).sub_(logits, alpha=lr * rho)
            if kind == "span"
            else torch.add(constant, head, alpha=1 - lr * rho)
        )
        head = moved.baddbmm_(support.mT, torch.softmax(logits, 2), alpha=-rate)
    return {"head": head}


class Regression(NamedTuple):
    value: Tensor  # [B]
    residual: Tensor  # the gradient in the logits [B, n, ways]
    logits: Tensor  # [B, n, ways]


def softmax_regression(inputs: Tensor, weights: Tensor, labels: Tensor) -> Regression:
    """Cross-entropy of a stack of linear heads in closed form: inputs [B, n, d], weights [B, d,
    ways], labels [B, n].
    """
    logits = inputs @ weights
    log_probabilities = functional.log_softmax(logits, dim=2)
    indices = labels[:, :, None]
    residual = log_probabilities.exp().scatter_add_(
        2, indices, log_probabilities.new_full((), -1.0).expand_as(indices)
    )
    return Regression(
        -log_probabilities.gather(2, indices).mean((1, 2)), residual.div_(labels.shape[1]), logits
    )
