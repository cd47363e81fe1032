"""Reptile: x moves towards where gradient steps on each task lead.

Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018.

    y_i = x after T gradient steps on CE(support_i)            d_i = x - y_i

learn2learn has no class for it; the steps are its `MAML(first_order=True)`'s. Options and step:
`learner_options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bomemeta.core import tree
from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.problem import Batch
from bomemeta.core.tree import Params
from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import Direction, LearnerOptions, query_loss, support_loss


@solvers.register("reptile")
@dataclass(frozen=True, kw_only=True)
class Reptile(LearnerOptions):
    """Reptile with learn2learn's inner steps (Nichol et al., 2018): with `upper_lr` 1 and sgd, x
    becomes the mean of the adapted networks.

    For `problem: {name: few_shot, form: network}` with fresh episodes; `problem.regularisation`
    plays no part. It trains on the support sets alone, so training wants several `shots`, and the
    queries are for the log. The inner steps are plain gradient steps; the authors' experiments take
    Adam's.
    """

    second_order = False
    query_gradients = 0

    def direction(self, oracle: LocalOracle, x: Params, task: Batch) -> Direction:
        learner = self.adapted(oracle, x, task, self.inner_steps, follow=False)
        with torch.no_grad():
            params = learner.params()
            return Direction(
                tree.axpy(-1.0, params, x),
                query_loss(oracle, params, task),
                support_loss(learner, task),
            )
