"""Meta-SGD: MAML that learns a step size for every parameter along with the initialisation.

Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017.

    x = (w, a),  y_i(x) = w after T steps  y <- y - a * grad g_i(y)  (elementwise)      d_i = d f_i(y_i(x)) / dx

Options and step: `learner_options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import LearnerOptions

STEP_SIZE = "step_size/"  # before a parameter's name: the entry of x that holds its step sizes


@solvers.register("meta_sgd")
@dataclass(frozen=True, kw_only=True)
class MetaSGD(LearnerOptions):
    """Meta-SGD (Li et al., 2017), second order: x also holds one step size per parameter, all
    `inner_lr` at the start.

    For every problem without an `encode` whose y starts from x and has entries of the same names
    and shapes. Of few_shot's network form it descends the support set's cross-entropy:
    `problem.regularisation` plays no part. The step sizes may become negative, as in the paper;
    `upper_lr` is theirs too.
    """

    needs_pairs = True

    def start(self, upper: Params, steps: int) -> UpperVariable:
        sizes = {
            STEP_SIZE + name: torch.full_like(tensor, self.inner_lr)
            for name, tensor in upper.items()
        }
        return super().start({**upper, **sizes}, steps)

    def step_sizes(self, upper: Params, lower: Params) -> dict[str, float | Tensor]:
        return {name: upper[STEP_SIZE + name] for name in lower}
