"""`bomemeta check`: a solver's hypergradient against the implicit one and finite differences, on a
small cut of the user's problem.

`frozen.py` gets the solver's direction at a fixed x, `kernels.py` the reference, `verdict.py`
judges, `hypercheck.py` does it in order.
"""

from bomemeta.hypercheck.hypercheck import check
from bomemeta.hypercheck.verdict import CheckReport

__all__ = ["CheckReport", "check"]
