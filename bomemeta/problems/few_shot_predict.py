"""What a classifier asks of problem `few_shot`: a task of any classes, and its head as one matrix."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from bomemeta.core.problem import Encoded
from bomemeta.core.tree import Params
from bomemeta.errors import ConfigError
from bomemeta.problems.few_shot import FewShot
from bomemeta.problems.few_shot_heads import SOLVED, with_one


def for_classes(problem: FewShot, sizes: Sequence[int]) -> FewShot:
    """The same problem for a task whose classes have so many support images each, class after class.

    Raises ConfigError where the network itself has another number of outputs.
    """
    if problem.form == "network" and len(sizes) != problem.ways:
        raise ConfigError(
            f"got {len(sizes)} classes; a network of `form: network` tells {problem.ways} apart, as many as in "
            "training. Train with `form: head` for any number"
        )
    task = copy.copy(problem)
    vars(task)["class_sizes"] = tuple(sizes)  # of this task, over the class's
    return task


def head_inputs(problem: FewShot, features: Tensor) -> Tensor:
    """What `head_weight` is multiplied with: scaled features `[n, d]`, with a 1 for a bias where the
    head has one.
    """
    return with_one(features) if problem.head in SOLVED else features


def head_weight(problem: FewShot, encoded: Encoded, lower: Params, support: Tensor) -> Tensor:
    """W of one task, `[d, ways]` or `[d + 1, ways]`. `support`: its scaled features `[n, d]`.

    W = y for a linear head, W*(x) + y for one with a solution, Z_s' y in the span of the support set.
    """
    if "solution" in encoded:
        return encoded["solution"] + lower["head"]
    return support.mT @ lower["head"] if problem.head == "span" else lower["head"]


def frozen(problem: FewShot) -> Params:
    """The network's tensors that are no part of x: frozen parameters and buffers."""
    network = problem.network
    return {
        name: tensor.detach()
        for name, tensor in network.module.state_dict().items()
        if name not in network.names
    }


def load_frozen(problem: FewShot, tensors: Params) -> None:
    """Puts `frozen` tensors back. Raises ConfigError where they are another network's."""
    own = problem.network.module.state_dict()
    different = [
        name
        for name in sorted({*frozen(problem), *tensors})
        if name not in tensors or name not in own or own[name].shape != tensors[name].shape
    ]
    if different:
        raise ConfigError(
            f"the saved network is another one than its config's: {', '.join(different)}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
