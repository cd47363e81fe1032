"""Where two methods coincide in mathematics they agree in numbers: before their times may be
compared.

learn2learn is a dependency; TorchOpt and higher are tested where they are installed
(benchmarks/peers/requirements.txt).
"""

from __future__ import annotations

import copy
import importlib
import warnings
from pathlib import Path

import needs
import pytest
import torch
from torch import nn
from torch.nn import functional
from toy import Bench, attached

from bomemeta.core.local_oracle import LocalOracle
from bomemeta.problems.few_shot import FewShot
from bomemeta.solvers.itd import ITD
from bomemeta.solvers.maml import MAML

ROOT = Path(__file__).parents[1]
PEERS = ("learn2learn", "torchopt", "higher")
STEPS, LR = 3, 0.05
WAYS = 3


@pytest.fixture(params=PEERS)
def peer(request, monkeypatch):
    """A peer's function, in float64 throughout the test."""
    monkeypatch.syspath_prepend(str(ROOT))
    peers = importlib.import_module("benchmarks.peers")
    missing = peers.absent()
    if request.param in missing:
        pytest.skip(
            f"{missing[request.param]}. torchopt and higher: install benchmarks/peers/requirements.txt into an environment of its own"
        )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of the peers' own code about newer versions of Python and torch
        yield peers, peers.PEERS[request.param]


def few_shot(**fields):
    problem = attached(FewShot(ways=WAYS, queries=2, width=4, **fields))
    upper = problem.init_upper(torch.Generator().manual_seed(1))
    batch = problem.load(range(2), 0, "train")
    return problem, upper, batch


def tasks(peers, batch):
    for i in range(len(batch["support"])):
        yield peers.Task(
            *(batch[name][i] for name in ("support", "support_labels", "query", "query_labels"))
        )


class Whole(nn.Module):
    """The few-shot problem's network as a module: its backbone and the linear layer."""

    def __init__(self, problem: FewShot, upper: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.features = copy.deepcopy(problem.network.module).requires_grad_()
        self.head = nn.Linear(problem._features, WAYS).double()
        with torch.no_grad():
            for name, parameter in self.features.named_parameters():
                parameter.copy_(upper[name])
            self.head.weight.copy_(upper["head.weight"].T)
            self.head.bias.copy_(upper["head.bias"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(images))
        return logits


def test_maml_is_the_same_everywhere(peer):
    """Solver `maml` on the network form against the peer on the same network as a module."""
    peers, make = peer
    problem, upper, batch = few_shot(form="network", shots=2)
    upper["head.weight"] = (
        0.1
        * torch.randn(
            upper["head.weight"].shape, generator=torch.Generator().manual_seed(2)
        ).double()
    )
    net = Whole(problem, upper)
    query_loss = make(net, LR, STEPS)
    for task in tasks(peers, batch):
        query_loss(task).backward()

    bench = Bench(
        problem, MAML(inner_steps=STEPS, inner_lr=LR, upper_lr=1.0, upper_optimizer="sgd"), 1
    )
    for name, tensor in upper.items():
        bench.upper.params[name].copy_(tensor)
    before = {name: tensor.clone() for name, tensor in bench.upper.params.items()}
    bench.advance(range(2))
    moved = {
        name: 2 * (before[name] - tensor) for name, tensor in bench.upper.params.items()
    }  # x moved by the mean of 2 tasks
    for name, parameter in net.features.named_parameters():
        torch.testing.assert_close(moved[name], parameter.grad, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(moved["head.weight"], net.head.weight.grad.T, rtol=1e-5, atol=1e-9)


def test_anil_from_a_head_of_zeros_is_iterative_differentiation(peer):
    """Solver `itd` on the head form (no regularisation, y from 0) against the peer's ANIL: the same
    gradient in the backbone.
    """
    peers, make = peer
    problem, upper, batch = few_shot(head="ridge", regularisation=0.0, shots=2)
    oracle = LocalOracle(problem, upper, batch, "loop")
    solver = ITD(inner_steps=STEPS, inner_lr=LR)
    ours = oracle.unrolled(oracle.init_lower(), solver.inner_steps, solver.inner_lr)

    backbone = copy.deepcopy(problem.network.module).requires_grad_()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.copy_(upper[name])
    head = nn.Linear(problem._features, WAYS, bias=False).double()
    nn.init.zeros_(head.weight)
    query_loss = make(head, LR, STEPS)
    losses = []
    for task in tasks(peers, batch):
        features = problem.feature_scale * functional.normalize(
            backbone(torch.cat([task.support, task.query])), dim=1
        )
        supports = len(task.support)
        losses.append(
            query_loss(task._replace(support=features[:supports], query=features[supports:]))
        )
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(ours.upper_value, torch.stack(losses).detach(), rtol=1e-5, atol=1e-9)
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(ours.upper[name], parameter.grad, rtol=1e-5, atol=1e-9)


@needs.learn2learn
def test_learn2learns_first_order_version_leaves_the_second_derivatives_out(monkeypatch):
    """What is timed as first order is first order: its gradient differs, and it is that of the
    queries' loss at the adapted network.
    """
    monkeypatch.syspath_prepend(str(ROOT))
    peers = importlib.import_module("benchmarks.peers")
    problem, upper, batch = few_shot(form="network", shots=2)
    task = next(tasks(peers, batch))
    grads = []
    for first_order in (True, False):
        net = Whole(problem, upper)
        peers.learn2learn_peer(net, LR, STEPS, first_order=first_order)(task).backward()
        grads.append(torch.cat([parameter.grad.reshape(-1) for parameter in net.parameters()]))
    adapted = Whole(problem, upper)
    for _ in range(STEPS):
        loss = functional.cross_entropy(adapted(task.support), task.support_labels)
        with torch.no_grad():
            for parameter, grad in zip(
                adapted.parameters(),
                torch.autograd.grad(loss, list(adapted.parameters())),
                strict=True,
            ):
                parameter -= LR * grad
    functional.cross_entropy(adapted(task.query), task.query_labels).backward()
    torch.testing.assert_close(
        grads[0], torch.cat([parameter.grad.reshape(-1) for parameter in adapted.parameters()])
    )
    assert (grads[0] - grads[1]).norm() > 1e-3 * grads[1].norm()
