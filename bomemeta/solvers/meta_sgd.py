"""Meta-SGD: MAML that learns a step size for every parameter along with the initialisation.

Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017.

    x = (w, a),  y_i(x) = w after T steps  y <- y - a * grad CE(support_i; y)  (elementwise)      d_i = d CE(queries_i; y_i(x)) / dx

learn2learn's `MetaSGD`. Options and step: `learner_options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bomemeta.core.problem import Batch
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.l2l import learn2learn
from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import LearnerOptions, Network, NetworkProblem

STEP_SIZE = "step_size/"  # before a parameter's name: the entry of x that holds its step sizes


@solvers.register("meta_sgd")
@dataclass(frozen=True, kw_only=True)
class MetaSGD(LearnerOptions):
    """Meta-SGD through learn2learn (Li et al., 2017), second order: x also holds one step size per
    parameter, all `inner_lr` at the start.

    For `problem: {name: few_shot, form: network}` with fresh episodes; `problem.regularisation`
    plays no part. The step sizes may become negative, as in the paper; `upper_lr` is theirs too.
    """

    def start(self, upper: Params, steps: int) -> UpperVariable:
        sizes = {
            STEP_SIZE + name: torch.full_like(tensor, self.inner_lr)
            for name, tensor in upper.items()
        }
        return super().start({**upper, **sizes}, steps)

    def learner(self, problem: NetworkProblem, x: Params, task: Batch, follow: bool) -> Any:
        weights = {name: tensor for name, tensor in x.items() if not name.startswith(STEP_SIZE)}
        network = Network(
            weights,
            {},
            lambda params: problem.logits(params, problem.support_features(params, task)),
        )
        sizes = [x[STEP_SIZE + name] for name in weights]
        return learn2learn().algorithms.MetaSGD(network, lrs=sizes, first_order=not follow).clone()
