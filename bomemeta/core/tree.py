"""Arithmetic on `Params`, flat dictionaries of tensors. A *stack* of tasks has a leading task axis
`[B, ...]` on every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]


class LayoutEntry(NamedTuple):
    """One tensor in a flat array."""

    group: str
    name: str | None  # within its group; None: the group is this tensor
    shape: tuple[int, ...]


class Layout(tuple[LayoutEntry, ...]):
    """What lies in a flat array, in order: x, a task's y with what is kept beside it, a round's sums."""

    __slots__ = ()

    @classmethod
    def of(cls, values: Mapping[str, Tensor | Params], axes: int = 0) -> Layout:
        """Of tensors and groups of tensors; `axes`: how many leading axes are no part of the shapes
        (1 for a stack).
        """
        return cls(
            LayoutEntry(group, name, tuple(tensor.shape[axes:]))
            for group, name, tensor in _each(values)
        )

    @classmethod
    def read(cls, entries: Any) -> Layout:
        """Of plain tuples or lists, as a checkpoint has them."""
        return cls(LayoutEntry(group, name, tuple(shape)) for group, name, shape in entries)

    def plain(self) -> tuple[tuple[Any, ...], ...]:
        """The inverse of `read`: plain tuples (group, name, shape)."""
        return tuple(tuple(entry) for entry in self)

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The entries of `flat`, [n] or [B, n], as views of their shapes."""
        return [flat[..., at].view((*flat.shape[:-1], *shape)) for at, shape in self._slices()]

    def unflatten(self, flat: Any) -> dict[str, Any]:
        """The tensors and groups that lie in `flat`, [n] or [B, n]: a tensor, or a numpy array.

        Each is a copy in memory of its own: vectorised sums round differently on differently
        aligned memory, and workers must agree with the driver bit for bit.
        """
        found: dict[str, Any] = {}
        for (group, name, _), (at, shape) in zip(self, self._slices(), strict=True):
            part = flat[..., at].reshape((*flat.shape[:-1], *shape))
            copied = part.clone() if isinstance(part, Tensor) else torch.tensor(part)
            if name is None:
                found[group] = copied
            else:
                found.setdefault(group, {})[name] = copied
        return found

    def _slices(self) -> Iterator[tuple[slice, tuple[int, ...]]]:
        start = 0
        for _, _, shape in self:
            stop = start + math.prod(shape)
            yield slice(start, stop), shape
            start = stop


def _each(values: Mapping[str, Tensor | Params]) -> Iterator[tuple[str, str | None, Tensor]]:
    for group, value in values.items():
        if isinstance(value, Tensor):
            yield group, None, value
        else:
            for name, tensor in value.items():
                yield group, name, tensor


def tensors(values: Mapping[str, Tensor | Params]) -> list[Tensor]:
    """All of them, in the order of a `Layout`."""
    return [tensor for _, _, tensor in _each(values)]


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


def flatten(values: Mapping[str, Tensor | Params]) -> Tensor:
    """One vector [n], tensors in the dictionaries' order."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors(values)])


def unflatten(flat: Tensor, like: Params) -> Params:
    """The inverse of `flatten` for the names and shapes of `like`; copies."""
    return Layout.of(like).unflatten(flat)


def flatten_tasks(values: Mapping[str, Tensor | Params]) -> Tensor:
    """A stack as one row per task, shape [B, n]."""
    return torch.cat([rows(tensor) for tensor in tensors(values)], dim=1)


def unflatten_tasks(rows: Tensor, like: Params) -> Params:
    """The inverse of `flatten_tasks`; `like` is a stack of any number of tasks. Copies."""
    return Layout.of(like, axes=1).unflatten(rows)


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
