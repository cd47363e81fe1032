"""Confidence intervals of means: the one place where they are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEVEL = 0.95


def half_width(variance: float, n: int) -> float | None:
    """The half-width of the 95 % interval of a mean of `n` values by Student's t; None below two
    values, which say nothing of their spread.

    `variance`: the values' unbiased variance, the sum of squared deviations over n - 1.
    """
    from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

    if n < 2:
        return None
    return float(stdtrit(n - 1, (1 + LEVEL) / 2)) * math.sqrt(max(variance, 0.0) / n)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of independent values, and the half-width of its interval as above."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / max(n - 1, 1)
    return mean, half_width(variance, n)
