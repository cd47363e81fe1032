"""Reptile: x moves towards where gradient steps on each task lead.

Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018.

    y_i = x after T gradient steps on g_i            d_i = x - y_i

Options and step: `learner_options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bomemeta.core.local_oracle import LocalOracle
from bomemeta.core.problem import Batch, Encoded
from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import Direction, LearnerOptions


@solvers.register("reptile")
@dataclass(frozen=True, kw_only=True)
class Reptile(LearnerOptions):
    """Reptile (Nichol et al., 2018): with `upper_lr` 1 and sgd, x becomes the mean of the adapted
    y.

    For every problem without an `encode` whose y starts from x and has entries of the same names
    and shapes; entries of x that y does not have stay. Of few_shot's network form it descends the
    support set's cross-entropy: `problem.regularisation` plays no part. It trains on g alone, so
    few-shot training wants several `shots`, and f is for the log. The inner steps are plain
    gradient steps; the authors' experiments take Adam's.
    """

    second_order = False
    query_gradients = 0
    needs_pairs = True

    def direction(self, oracle: LocalOracle, encoded: Encoded, batch: Batch) -> Direction:
        problem = oracle.problem
        start = problem.init_lower(encoded, batch)
        sizes = self.step_sizes(encoded, start)
        end = self.adapted(problem, encoded, start, batch, self.inner_steps, sizes)
        with torch.no_grad():
            away = {
                name: tensor - end.lower[name] if name in end.lower else torch.zeros_like(tensor)
                for name, tensor in encoded.items()
            }
            return Direction(
                away, problem.upper_loss(encoded, end.lower, batch), end.loss(), end.lower
            )
