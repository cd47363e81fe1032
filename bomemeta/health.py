"""Watches a run for the ways in which a bilevel run fails silently, and says them in plain words."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

# A share of steps (or tasks) with lambda = 0 that leaves nothing for the lower problem to say.
_NEARLY_ALL = 0.95
# |x|'s share that all steps of a window together move x by; so slow a run needs 10^8 steps to renew
# x.
_STILL = 1e-6
# Below this |grad q|^2 is |grad_y q|^2 to eight digits: as far as the barrier goes, x is not there.
_NEGLIGIBLE = 1e-4
# Neighbouring lambdas on opposite sides of their mean. Independent tasks give 0 ± 0.14 in a window
# of 50.
_ALTERNATING = -0.7
# A step size this small against its largest was taken there by a schedule.
_DECAYED = 0.01
# Of a mean of float32 losses: a gap below this share of the loss is rounding.
_ROUNDING = 1e-4
# K relative to its largest value: a run that came this far is done, and stands still for that
# reason.
_SOLVED = 1e-8


class HealthMonitor:
    """Looks at the last `window` steps. A finding is said once, and again only after it was away
    for a whole window.
    """

    def __init__(self, window: int = 50) -> None:
        self._window = window
        self._recent: deque[dict[str, float]] = deque(maxlen=window)
        self._last_true: dict[str, int] = {}
        self._reported: list[dict[str, Any]] = []
        self._stationarity_max = 0.0
        self.learning_rate_max = 0.0  # of the whole run, so far
        self._steps = 0
        self._zero_share_sum = 0.0
        self._zero_share_count = 0

    def update(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Takes one step's metrics, any of which may be missing; returns what is newly wrong, in
        words.
        """
        self._recent.append(
            {name: value for name, value in metrics.items() if math.isfinite(value)}
        )
        self._steps += 1
        self.learning_rate_max = max(
            self.learning_rate_max, self._recent[-1].get("learning_rate", 0.0)
        )
        self._stationarity_max = max(self._stationarity_max, self._stationarity() or 0.0)
        if (share := self._recent[-1].get("multiplier_zero_share")) is not None:
            self._zero_share_sum += share
            self._zero_share_count += 1
        if len(self._recent) < self._window or self._solved():
            return []
        new = []
        for name, check in _CHECKS.items():
            text = check(self)
            if text is None:
                continue
            if step - self._last_true.get(name, -self._window - 1) > self._window:
                new.append(text)
                self._reported.append({"step": step, "finding": name, "text": text})
            self._last_true[name] = step
        return new

    def summary(self) -> dict[str, Any]:
        """For result.json: what was found and when, and the share of lambda = 0 over all steps seen
        (None: no lambda).
        """
        share = self._zero_share_sum / self._zero_share_count if self._zero_share_count else None
        return {
            "steps": self._steps,
            "multiplier_zero_share": share,
            "findings": list(self._reported),
        }

    def values(self, name: str) -> list[float]:
        """The window's values of a metric, oldest first; fewer where a solver measures it now and
        then.
        """
        return [metrics[name] for metrics in self._recent if name in metrics]

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.fmean(values) if values else None

    def _stationarity(self) -> float | None:
        """K as last measured, or the squared hypergradient of solvers that have no K; None where
        this window has neither.
        """
        gradients, gaps = self.values("stationarity_gradient"), self.values("stationarity_gap")
        if gradients:
            return abs(gradients[-1]) + (gaps[-1] if gaps else 0.0)
        norms = self.values("hypergradient_norm")
        return norms[-1] ** 2 if norms else None

    def _solved(self) -> bool:
        stationarity = self._stationarity()
        return stationarity is not None and stationarity <= _SOLVED * self._stationarity_max


def _no_multiplier(monitor: HealthMonitor) -> str | None:
    share = monitor.mean("multiplier_zero_share")
    if share is None or share < _NEARLY_ALL:
        return None
    if monitor.mean("gap") == 0 and monitor.mean("grad_lower_gap_norm") == 0:
        return None  # y is the solution, as with few-shot's heads that have one: nothing is missing
    count = len(monitor.values("multiplier_zero_share"))
    return (
        f"lambda was 0 in {share:.0%} of the last {count} steps ({_values_text(monitor)}). The bilevel problem is not being "
        "solved: y is trained on the upper loss, and x gets no gradient through the lower problem. Try a larger "
        "solver.inner_steps or solver.inner_lr (a better lower solution shows a larger q), a larger solver.eta, a smaller "
        "solver.lower_lr, or more solver.adapt_steps before y is moved"
    )


def _inner_loop_climbs(monitor: HealthMonitor) -> str | None:
    gap, loss = monitor.mean("gap"), monitor.mean("lower_loss")
    if gap is None or loss is None or gap >= -_ROUNDING * abs(loss):
        return None
    return (
        f"q is negative (mean {gap:.2e} over the last {len(monitor.values('gap'))} steps): T gradient steps on the lower loss "
        "made it larger instead of smaller, so y_T is no solution of the lower problem. Lower solver.inner_lr"
    )


def _upper_still(monitor: HealthMonitor) -> str | None:
    rate = monitor.values("learning_rate")
    if rate and rate[-1] < _DECAYED * monitor.learning_rate_max:
        return None  # a schedule that ends at 0 is meant to stand still there
    moves, norms = monitor.values("upper_update_norm"), monitor.values("upper_norm")
    if not moves or not norms or sum(moves) > _STILL * max(norms):
        return None
    return (
        f"x has not moved: its last {len(moves)} steps add up to {sum(moves):.1e}, and |x| is {max(norms):.1e}. Raise "
        "solver.upper_lr; if grad_x is 0 as well, check that the upper variable enters the problem's losses"
    )


def _upper_gradient_negligible(monitor: HealthMonitor) -> str | None:
    upper, lower = monitor.mean("grad_upper_gap_norm"), monitor.mean("grad_lower_gap_norm")
    if upper is None or lower is None or upper >= _NEGLIGIBLE * lower:
        return None
    return (
        f"|grad_x q| is negligible against |grad_y q| ({_values_text(monitor)}): the lower problem hardly says anything about "
        "x. Try a larger solver.inner_steps or solver.inner_lr, so that y_T is further from y; check that x enters the "
        "lower loss"
    )


def _multiplier_oscillates(monitor: HealthMonitor) -> str | None:
    values = monitor.values("multiplier")
    if len(values) < 3:
        return None
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    alternates = spread > 0.3 * mean and _neighbour_correlation(values) < _ALTERNATING
    # Spikes of several times the mean, as when lambda shoots up to its ceiling 2 / (lower_lr L_g)
    # and falls back.
    if mean <= 0 or not (alternates or spread > 3 * mean):
        return None
    return (
        f"lambda oscillates: mean {mean:.3g}, standard deviation {spread:.3g}, largest {max(values):.3g} over the last "
        f"{len(values)} steps. y overshoots: try a smaller solver.lower_lr (lambda's ceiling is about 2 / (lower_lr L_g), "
        "with L_g the lower loss's smoothness)"
    )


_CHECKS: dict[str, Callable[[HealthMonitor], str | None]] = {
    "multiplier_zero": _no_multiplier,
    "inner_loop_climbs": _inner_loop_climbs,
    "upper_still": _upper_still,
    "upper_gradient_negligible": _upper_gradient_negligible,
    "multiplier_oscillates": _multiplier_oscillates,
}


def _values_text(monitor: HealthMonitor) -> str:
    names = {"|grad_x q|": "grad_upper_gap_norm", "|grad_y q|": "grad_lower_gap_norm", "q": "gap"}
    means = {label: monitor.mean(name) for label, name in names.items()}
    return (
        ", ".join(f"{label} {value:.2e}" for label, value in means.items() if value is not None)
        or "no metrics"
    )


def _neighbour_correlation(values: list[float]) -> float:
    mean = statistics.fmean(values)
    total = sum((value - mean) ** 2 for value in values)
    pairs = itertools.pairwise(values)
    return sum((a - mean) * (b - mean) for a, b in pairs) / total if total > 0 else 0.0
