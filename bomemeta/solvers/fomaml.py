"""First-order MAML: as if the inner gradients did not depend on x.

Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML
2017, section 5.2.

    y_i = y_0(x) after T gradient steps on g_i, these taken as constant        d_i = d f_i(x, y_i) / dx

Where y_0 is x itself, d_i is the gradient of f_i at y_i. Options and step: `learner_options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.problem import Batch, Encoded
from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import Direction, LearnerOptions


@solvers.register("fomaml")
@dataclass(frozen=True, kw_only=True)
class FOMAML(LearnerOptions):
    """First-order MAML (Finn et al., ICML 2017): x moves along the gradient of f at the adapted y.

    For every problem whose y starts from x. Of few_shot's network form it descends the support
    set's cross-entropy: `problem.regularisation` plays no part.
    """

    second_order = False

    def direction(self, oracle: LocalOracle, encoded: Encoded, batch: Batch) -> Direction:
        problem = oracle.problem
        start = problem.init_lower(encoded, batch)
        sizes = self.step_sizes(encoded, start)
        end = self.adapted(problem, encoded, start, batch, self.inner_steps, sizes)

        def outer(encoded: Encoded) -> Tensor:
            # The adapted y to the last bit, with the derivative of its start.
            begun = problem.init_lower(encoded, batch)
            y = {
                name: end.lower[name] + (tensor - tensor.detach()) for name, tensor in begun.items()
            }
            return problem.upper_loss(encoded, y, batch)

        grads, value = torch.func.grad_and_value(outer)(encoded)
        return Direction(grads, value, end.loss(), end.lower)
