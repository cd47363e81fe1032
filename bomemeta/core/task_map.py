"""How a function of one task is mapped over a stack of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from bomemeta.core.tree import Params

TaskMap = Literal["loop", "vmap"]


def map_tasks(
    function: Callable[..., Params], stacks: tuple[Params, ...], tasks: int, how: TaskMap
) -> Params:
    """`function` of each task's slice of the stacks; results stacked.

    `loop` keeps each task's work inside the CPU's cache, `vmap` is one wide call. Both treat the
    tasks apart (BatchNorm statistics).
    """
    if how == "vmap":
        return torch.vmap(function)(*stacks)
    results = [
        function(*({name: tensor[i] for name, tensor in stack.items()} for stack in stacks))
        for i in range(tasks)
    ]
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def map_lowered(
    function: Callable[..., Params],
    stacks: tuple[Params, ...],
    tasks: int,
    how: TaskMap,
    lowered: torch.dtype,
    dtype: torch.dtype,
) -> Params:
    """`map_tasks` in the type `lowered`, by torch's autocast; what it returns is in `dtype`."""
    device = next(tensor for stack in stacks for tensor in stack.values()).device.type
    # Its cache of lowered weights would outlive the graph that it was made in.
    with torch.autocast(device, lowered, cache_enabled=False):
        found = map_tasks(function, stacks, tasks, how)
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in found.items()
    }
