"""Named sums, and a task's state, as ONE flat array: 160 small tensors cost ten times what one
array of the same bytes costs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bomemeta.core.solver import Layout, LowerGroups, Sums
from bomemeta.core.tree import rows

CPU = torch.device("cpu")


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
            parts.append(tensor.detach().reshape(-1).to(dtype))
    if not parts:
        return Packed((), np.empty(0))
    # A GPU is waited for once. What a kernel only counted is on the CPU wherever the rest is.
    device = next((part.device for part in parts if part.device != CPU), CPU)
    return Packed(tuple(layout), torch.cat([part.to(device) for part in parts]).cpu().numpy())


def unpack(packed: Packed, device: torch.device = CPU) -> Sums:
    """The inverse of `pack`. Every tensor is a copy in memory of its own: vectorised sums round
    differently on differently aligned memory, and workers must agree with the driver bit for bit.
    To another device all of them go at once.
    """
    buffer = packed.buffer if device.type == "cpu" else torch.tensor(packed.buffer).to(device)
    sums: Sums = {}
    start = 0
    for name, key, shape in packed.layout:
        size = math.prod(shape)
        part = buffer[start : start + size]
        tensor = (part.clone() if isinstance(part, Tensor) else torch.tensor(part)).reshape(shape)
        start += size
        if key is None:
            sums[name] = tensor
        else:
            sums.setdefault(name, {})[key] = tensor
    return sums


class PackedTasks(NamedTuple):
    layout: Layout  # shapes of ONE task
    rows: Tensor  # [B, n]


def pack_tasks(groups: LowerGroups) -> PackedTasks:
    """A stack's groups as one row per task, on the host."""
    entries = [
        (group, name, tensor) for group, params in groups.items() for name, tensor in params.items()
    ]
    layout = tuple((group, name, tuple(tensor.shape[1:])) for group, name, tensor in entries)
    return PackedTasks(
        layout, torch.cat([rows(tensor.detach()) for _, _, tensor in entries], dim=1).cpu()
    )


def unpack_tasks(packed: PackedTasks) -> LowerGroups:
    """The inverse of `pack_tasks`; tensors are copies."""
    groups: LowerGroups = {}
    start = 0
    for group, name, shape in packed.layout:
        size = math.prod(shape)
        part = packed.rows[:, start : start + size].reshape(-1, *shape).clone()
        start += size
        groups.setdefault(group, {})[str(name)] = part
    return groups
