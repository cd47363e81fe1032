"""Arithmetic on `Params`, flat dictionaries of tensors. A *stack* of tasks has a leading task axis
`[B, ...]` on every tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

Params = dict[str, Tensor]


def dot(a: Params, b: Params) -> Tensor:
    """Inner product over everything, shape []."""
    return torch.stack([torch.dot(a[name].reshape(-1), b[name].reshape(-1)) for name in a]).sum()


def rows(stack: Tensor) -> Tensor:
    """One tensor of a stack as one row per task, `[B, n]`; a number per task is a row of one."""
    return stack.flatten(1) if stack.ndim > 1 else stack[:, None]


def dot_tasks(a: Params, b: Params) -> Tensor:
    """Inner product per task of two stacks, shape [B]."""
    products = [torch.linalg.vecdot(rows(a[name]), rows(b[name])) for name in a]
    return products[0] if len(products) == 1 else torch.stack(products).sum(0)


def axpy(scale: float | Tensor, direction: Params, start: Params) -> Params:
    """`start + scale * direction`; a `scale` of shape [B] scales each task of a stack by its own
    number.
    """
    return {name: start[name] + _over(scale, direction[name]) * direction[name] for name in start}


def scaled(scale: float | Tensor, params: Params) -> Params:
    """`scale * params`, with `scale` a number or one number per task."""
    return {name: _over(scale, tensor) * tensor for name, tensor in params.items()}


def zeros_like(params: Params) -> Params:
    return {name: torch.zeros_like(tensor) for name, tensor in params.items()}


def flatten(params: Params) -> Tensor:
    """One vector [n], tensors in the dictionary's order."""
    return torch.cat([tensor.reshape(-1) for tensor in params.values()])


def unflatten(flat: Tensor, like: Params) -> Params:
    """The inverse of `flatten` for the names and shapes of `like`. Copies, so that every tensor is
    aligned the same way everywhere: vectorised sums round differently on differently aligned
    memory, and workers must agree with the driver bit for bit.
    """
    sizes = [tensor.numel() for tensor in like.values()]
    parts = torch.split(flat, sizes)
    return {
        name: part.reshape(tensor.shape).clone()
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }


def flatten_tasks(params: Params) -> Tensor:
    """A stack as one row per task, shape [B, n]."""
    return torch.cat([rows(tensor) for tensor in params.values()], dim=1)


def unflatten_tasks(rows: Tensor, like: Params) -> Params:
    """The inverse of `flatten_tasks`; `like` is a stack of any number of tasks."""
    sizes = [tensor[0].numel() for tensor in like.values()]
    parts = torch.split(rows, sizes, dim=1)
    return {
        name: part.reshape(len(rows), *tensor.shape[1:]).clone()
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }


def detached(params: Params) -> Params:
    return {name: tensor.detach() for name, tensor in params.items()}


def leaves(params: Params) -> Params:
    """Copies of the references that autograd can differentiate with respect to."""
    return {name: tensor.detach().requires_grad_() for name, tensor in params.items()}


def _over(scale: float | Tensor, tensor: Tensor) -> float | Tensor:
    """A per-task scale with as many trailing axes as `tensor` needs to broadcast."""
    if isinstance(scale, Tensor) and scale.dim() == 1:
        return scale.reshape(-1, *[1] * (tensor.dim() - 1))
    return scale
