"""MAML: an initialisation from which a few gradient steps on a task's support set do well on its
queries.

Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML
2017.

    y_i(x) = x after T gradient steps on CE(support_i)         d_i = d CE(queries_i; y_i(x)) / dx, through the steps

learn2learn's `MAML`. Options and step: `learner_options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import LearnerOptions


@solvers.register("maml")
@dataclass(frozen=True, kw_only=True)
class MAML(LearnerOptions):
    """MAML through learn2learn (Finn et al., ICML 2017), second order: the whole network adapts,
    and x's gradient goes through the steps.

    For `problem: {name: few_shot, form: network}` with fresh episodes; `problem.regularisation`
    plays no part. Memory grows with `inner_steps`, by one task at a time.
    """
