"""Named sums as ONE flat array: moving 160 small tensors costs ten times what one array of the same bytes costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bomemeta.core.solver import Sums

# ("gap", None, ()) is a scalar; ("grad_upper_f", "convolutions.0.weight", (32, 1, 3, 3)) one tensor of a vector in x
Layout = tuple[tuple[str, str | None, tuple[int, ...]], ...]


class Packed(NamedTuple):
    layout: Layout
    buffer: np.ndarray  # [n], the problem's dtype


def pack(sums: Sums, dtype: torch.dtype) -> Packed:
    """Sums into one contiguous array on the host."""
    layout: list[tuple[str, str | None, tuple[int, ...]]] = []
    parts: list[Tensor] = []
    for name, value in sums.items():
        for key, tensor in [(None, value)] if isinstance(value, Tensor) else value.items():
            layout.append((name, key, tuple(tensor.shape)))
            parts.append(tensor.detach().reshape(-1).to("cpu", dtype))
    return Packed(tuple(layout), torch.cat(parts).numpy() if parts else np.empty(0))


def unpack(packed: Packed) -> Sums:
    """The inverse of `pack`; tensors are copies."""
    sums: Sums = {}
    flat, start = torch.from_numpy(packed.buffer), 0
    for name, key, shape in packed.layout:
        size = int(np.prod(shape, dtype=np.int64))
        tensor = flat[start : start + size].reshape(shape).clone()
        start += size
        if key is None:
            sums[name] = tensor
        else:
            sums.setdefault(name, {})[key] = tensor
    return sums


def add_in_order(parts: Sequence[Packed]) -> Packed:
    """The sum of the shards' buffers, always in shard order: float addition is not associative, and this order is the result's.

    What Ray hands out is read-only memory, so the first buffer is copied once and added into.
    """
    total = parts[0].buffer.copy()
    for part in parts[1:]:
        total += part.buffer
    return Packed(parts[0].layout, total)
