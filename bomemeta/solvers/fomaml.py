"""First-order MAML: as if the inner gradients did not depend on x.

Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML
2017, section 5.2.

    y_i = x after T gradient steps on CE(support_i)            d_i = grad CE(queries_i; .) at y_i

learn2learn's `MAML(first_order=True)`. Options and step: `learner_options.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bomemeta.registry import solvers
from bomemeta.solvers.learner_options import LearnerOptions


@solvers.register("fomaml")
@dataclass(frozen=True, kw_only=True)
class FOMAML(LearnerOptions):
    """First-order MAML through learn2learn (Finn et al., ICML 2017): x moves along the queries'
    gradient at the adapted network.

    For `problem: {name: few_shot, form: network}` with fresh episodes; `problem.regularisation`
    plays no part.
    """

    second_order = False
