"""Other libraries' MAML, all behind one function: adapt a module to a task and return the loss of
the queries, with its graph.

`requirements.txt` beside this file pins those that are no dependency of bomemeta; what is not
installed is left out and named as such. MAML and ANIL differ in the module: the whole network on
images, or its last layer on features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from bomemeta.errors import MissingExtra
from bomemeta.l2l import learn2learn


class Task(NamedTuple):
    """Inputs are images, or features of them."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor


# From a task to CE of its queries after adaptation, differentiable in the module's parameters.
QueryLoss = Callable[[Task], Tensor]


def learn2learn_peer(
    module: nn.Module, lr: float, steps: int, first_order: bool = False
) -> QueryLoss:
    """learn2learn's `MAML`, as in its examples: one clone per task."""
    maml = learn2learn().algorithms.MAML(module, lr=lr, first_order=first_order)

    def query_loss(task: Task) -> Tensor:
        learner = maml.clone()
        for _ in range(steps):
            learner.adapt(functional.cross_entropy(learner(task.support), task.support_labels))
        return functional.cross_entropy(learner(task.query), task.query_labels)

    return query_loss


def torchopt_peer(module: nn.Module, lr: float, steps: int) -> QueryLoss:
    """TorchOpt's `MetaSGD`, as in its few-shot example: the module is moved and put back for every
    task.
    """
    import torchopt

    inner = torchopt.MetaSGD(module, lr=lr)

    def query_loss(task: Task) -> Tensor:
        before = [
            torchopt.extract_state_dict(part, by="reference", detach_buffers=True)
            for part in (module, inner)
        ]
        for _ in range(steps):
            inner.step(functional.cross_entropy(module(task.support), task.support_labels))
        loss = functional.cross_entropy(module(task.query), task.query_labels)
        for part, state in zip((module, inner), before, strict=True):
            torchopt.recover_state_dict(part, state)
        return loss

    return query_loss


def higher_peer(module: nn.Module, lr: float, steps: int) -> QueryLoss:
    """higher's `innerloop_ctx`, as in its MAML example."""
    import higher
    import torch

    inner = torch.optim.SGD(module.parameters(), lr=lr)

    def query_loss(task: Task) -> Tensor:
        with higher.innerloop_ctx(module, inner, copy_initial_weights=False) as (
            functional_module,
            optimizer,
        ):
            for _ in range(steps):
                optimizer.step(
                    functional.cross_entropy(functional_module(task.support), task.support_labels)
                )
            loss: Tensor = functional.cross_entropy(
                functional_module(task.query), task.query_labels
            )
            return loss

    return query_loss


# All of second order; learn2learn's has a first-order version too.
PEERS: Mapping[str, Callable[..., QueryLoss]] = {
    "learn2learn": learn2learn_peer,
    "torchopt": torchopt_peer,
    "higher": higher_peer,
}


def absent() -> dict[str, str]:
    """The peers that cannot be imported here, and why."""
    import importlib
    import warnings

    found: dict[str, str] = {}
    for name in PEERS:
        try:
            with warnings.catch_warnings():  # of the peers' own code about newer versions of Python
                warnings.simplefilter("ignore")
                _: Any = learn2learn() if name == "learn2learn" else importlib.import_module(name)
        except (ImportError, MissingExtra) as error:
            found[name] = str(error)
    return found
