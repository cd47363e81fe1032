"""ANIL: MAML whose inner steps move the last layer alone.

Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse? Towards Understanding the
Effectiveness of MAML", ICLR 2020.

    y = (b, h) from x,  h_i(x) = h after T gradient steps on g_i(b, .)      d_i = d f_i(b, h_i(x)) / dx, through the steps

Options and step: `learner_options.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bomemeta.core.problem import Problem
from bomemeta.core.tree import Params
from bomemeta.errors import ConfigError
from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import LearnerOptions


@solvers.register("anil")
@dataclass(frozen=True, kw_only=True)
class ANIL(LearnerOptions):
    """ANIL (Raghu et al., ICLR 2020), second order: only the head adapts, on features computed
    once where the problem's `adaptation` does so, as few_shot's does.

    For every problem whose y starts from x and that names its head (`head_names`). Of few_shot's
    network form it descends the support set's cross-entropy: `problem.regularisation` plays no
    part. There the support features take BatchNorm statistics of the support set, where
    learn2learn's own example takes support and queries together.
    """

    def check_names(self, problem: Problem, upper: Params, lower: Params) -> None:
        head, kind = problem.head_names, type(problem).__name__
        if not head or not set(head) <= lower.keys():
            raise ConfigError(
                f"problem.name: head_names of {kind} is {tuple(head)}, and its y has {', '.join(lower)}; solver ANIL adapts the head "
                "alone: let head_names name entries of y"
            )

    def adapts(self, problem: Problem, lower: Params) -> Iterable[str]:
        return problem.head_names
