"""A function of one task over a stack of tasks: one after the other, or as one wide call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from bomemeta.core.randomness import kept_generator
from bomemeta.core.tree import Params

TaskMap = Literal["loop", "vmap"]


def map_tasks(
    function: Callable[..., Params],
    stacks: tuple[Params, ...],
    tasks: int,
    how: TaskMap,
    seeds: Callable[[int], int],
    types: tuple[torch.dtype, torch.dtype] | None = None,
) -> Params:
    """`function` of each task's slice of the stacks; results stacked.

    `loop` keeps each task's work inside the CPU's cache, `vmap` is one wide call. Both treat the
    tasks apart (BatchNorm statistics). What the function draws from torch's generator follows from
    `seeds` of the task's place; a function that draws is always looped over. `types`: what it is
    computed in by torch's autocast, and what it returns (None: as it is).
    """
    if types is None:
        return _mapped(function, stacks, tasks, how, seeds)
    lowered, dtype = types
    device = next(tensor for stack in stacks for tensor in stack.values()).device.type
    # Its cache of lowered weights would outlive the graph that it was made in.
    with torch.autocast(device, lowered, cache_enabled=False):
        found = _mapped(function, stacks, tasks, how, seeds)
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in found.items()
    }


def _mapped(
    function: Callable[..., Params],
    stacks: tuple[Params, ...],
    tasks: int,
    how: TaskMap,
    seeds: Callable[[int], int],
) -> Params:
    if how == "vmap":
        try:
            return torch.vmap(function)(*stacks)
        except RuntimeError as error:
            # In vmap's own mode for it one draw would be for the whole stack, and a task's numbers
            # would depend on the tasks beside it.
            if "randomness" not in str(error):
                raise
    results = []
    with kept_generator(next(iter(stacks[-1].values())).device) as drawn:
        for i in range(tasks):
            drawn.manual_seed(seeds(i))
            own = ({name: tensor[i] for name, tensor in stack.items()} for stack in stacks)
            results.append(function(*own))
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def rows_of(stack: Params, rows: torch.Tensor) -> Params:
    """These rows of every tensor."""
    return {name: tensor[rows] for name, tensor in stack.items()}
