"""ANIL: MAML whose inner steps move the last layer alone; the backbone's features are computed
once.

Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse? Towards Understanding the
Effectiveness of MAML", ICLR 2020.

    x = (b, h),  h_i(x) = h after T gradient steps on CE(support_i; b, .)      d_i = d CE(queries_i; b, h_i(x)) / dx, through the steps

learn2learn's `MAML` on the head. Options and step: `learner_options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bomemeta.core.problem import Batch
from bomemeta.core.tree import Params
from bomemeta.l2l import learn2learn
from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import LearnerOptions, Network, NetworkProblem


@solvers.register("anil")
@dataclass(frozen=True, kw_only=True)
class ANIL(LearnerOptions):
    """ANIL through learn2learn (Raghu et al., ICLR 2020), second order: only the head adapts, on
    features computed once.

    For `problem: {name: few_shot, form: network}` with fresh episodes; `problem.regularisation`
    plays no part. The support features take BatchNorm statistics of the support set, as in that
    form, where learn2learn's own example takes support and queries together.
    """

    def learner(self, problem: NetworkProblem, x: Params, task: Batch, follow: bool) -> Any:
        with torch.set_grad_enabled(follow):
            features = problem.support_features(x, task)
        head = {name: x[name] for name in problem.head_names}
        backbone = {name: tensor for name, tensor in x.items() if name not in head}
        network = Network(head, backbone, lambda params: problem.logits(params, features))
        return learn2learn().algorithms.MAML(network, self.inner_lr, first_order=not follow).clone()
