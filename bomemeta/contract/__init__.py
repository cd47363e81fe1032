"""`check_problem`: whether a problem of the user's own keeps the contract of `core/problem.py`."""

from __future__ import annotations

from bomemeta.contract.check import check_at_start, check_problem

__all__ = ["check_at_start", "check_problem"]
