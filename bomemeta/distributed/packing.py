"""Named sums, and a task's state, as ONE flat array: 160 small tensors cost ten times what one
array of the same bytes costs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.solver import LowerGroups, Sums
from bomemeta.core.tree import Layout
from bomemeta.errors import ConfigError

CPU = torch.device("cpu")


class Packed(NamedTuple):
    layout: Layout
    buffer: np.ndarray  # [n], the problem's dtype


def pack(sums: Sums, dtype: torch.dtype) -> Packed:
    """Sums into one contiguous array on the host."""
    layout = Layout.of(sums)
    if not layout:
        return Packed(layout, np.empty(0))
    parts = [tensor.detach().reshape(-1).to(dtype) for tensor in tree.tensors(sums)]
    # A GPU is waited for once. What a kernel only counted is on the CPU wherever the rest is.
    device = next((part.device for part in parts if part.device != CPU), CPU)
    return Packed(layout, torch.cat([part.to(device) for part in parts]).cpu().numpy())


def unpack(packed: Packed, device: torch.device = CPU) -> Sums:
    """The inverse of `pack`; copies. To another device all of them go at once."""
    buffer = packed.buffer if device.type == "cpu" else torch.tensor(packed.buffer).to(device)
    return packed.layout.unflatten(buffer)


class PackedTasks(NamedTuple):
    layout: Layout  # shapes of ONE task
    rows: Tensor  # [B, n]


def pack_tasks(groups: LowerGroups) -> PackedTasks:
    """A stack's groups as one row per task, on the host. Raises ConfigError where there are none."""
    if not any(groups.values()):
        raise ConfigError(
            "solver: its kernel returned no lower groups, and the round is to keep them with the tasks. Return them, as in "
            'KernelResult(sums, {"y": y}), or keep none: run(kernel, keeps=False)'
        )
    return PackedTasks(Layout.of(groups, axes=1), tree.flatten_tasks(groups).detach().cpu())


def unpack_tasks(packed: PackedTasks) -> LowerGroups:
    """The inverse of `pack_tasks`; tensors are copies."""
    return packed.layout.unflatten(packed.rows)
