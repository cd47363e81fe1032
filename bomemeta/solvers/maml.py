"""MAML: an initialisation from which a few gradient steps on a task do well.

Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML
2017.

    y_i(x) = y_0(x) after T gradient steps on g_i         d_i = d f_i(x, y_i(x)) / dx, through the steps

Options and step: `learner_options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import LearnerOptions


@solvers.register("maml")
@dataclass(frozen=True, kw_only=True)
class MAML(LearnerOptions):
    """MAML (Finn et al., ICML 2017), second order: all of y adapts, and x's gradient goes through
    the steps.

    For every problem whose y starts from x. Of few_shot's network form it descends the support
    set's cross-entropy: `problem.regularisation` plays no part. Memory grows with `inner_steps`,
    by one task at a time where tasks are mapped by a loop.
    """
