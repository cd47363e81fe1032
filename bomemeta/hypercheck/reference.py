"""The reference hypergradient of the cut, task by task, and finite differences of Phi(x) = mean_i
f_i(x, y_i*(x)) that vouch for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bomemeta.core import tree
from bomemeta.core.solver import LowerStates, Rounds, Solver
from bomemeta.core.tree import Params
from bomemeta.hypercheck import kernels

# The step of finite differences, times max(1, |x|): with y* known to 1e-13 both the truncation and
# what rounding leaves are small.
DIFFERENCE_STEP = 3e-5
SHORTER = 1 / 300  # a kink within the step (ReLU) is often outside a shorter one
ROUGH = 1e-5  # error over |reference| from which on the shorter step is tried too


class Reference(NamedTuple):
    """Means over tasks of vectors in x, flat; the worst task of every value."""

    direction: Tensor  # grad_x f - (d2g/dxdy) v at y*
    grad_upper_f: Tensor  # its first part
    at_solvers_y: Tensor  # the same formula, v solved exactly, at the solver's own y
    # at y*, what T inner steps see of it: no first-order solver comes closer; `direction` where
    # there is no such T
    seen: Tensor
    lower: tuple[LowerStates, ...]  # y* of each part
    scales: tuple[float, ...]  # |grad_y g| at the start, of each part
    unsolved: float  # |grad_y g| at y*, over what it was at the start
    distance: float  # |y - y*| over the larger of |y| and |y*|, y the solver's
    edge: bool  # whether a constraint holds y*
    mismatch: float  # of closed-form gradients in y from autograd's
    residual: float  # |A v - b| / |b|
    steps_enough: int  # conjugate gradients until v is known to 1 %
    smallest: float  # mu, eigenvalue of A = d2g/dy2 at y*
    smallest_error: float
    largest: float  # L

    @property
    def condition(self) -> float:
        """L / mu; infinite where A is not positive."""
        return self.largest / self.smallest if self.smallest > 0 else float("inf")


class FiniteDifference(NamedTuple):
    """Phi's slope along one unit direction."""

    along: str
    implicit: float  # <reference, direction>
    found: float  # by finite differences
    error: float  # what finite differences with two step sizes disagree by, and rounding


def reference(
    solver: Solver,
    upper: Params,
    lower: LowerStates,
    parts: Sequence[Rounds],
    inner: tuple[int, float],
    adapts: bool,
    seed: int,
) -> Reference:
    """The reference at x. `parts`: one run per task, or the one of the shared y; `lower`: where the
    solver left their y; `inner`: T and alpha of the solver's inner loop, (0, 0) where it has none.

    Raises DivergenceError where a number is not finite.
    """
    found = [_of_one(solver, upper, lower, part, inner, adapts, seed) for part in parts]

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(one, name) for one in found]).mean(0)

    def worst(name: str) -> float:
        return max(float(getattr(one, name)) for one in found)

    softest = min(found, key=lambda one: one.smallest)
    return Reference(
        direction=mean("direction"),
        grad_upper_f=mean("grad_upper_f"),
        at_solvers_y=mean("at_solvers_y"),
        seen=mean("seen"),
        lower=tuple(state for one in found for state in one.lower),
        scales=tuple(scale for one in found for scale in one.scales),
        unsolved=worst("unsolved"),
        distance=worst("distance"),
        edge=any(one.edge for one in found),
        mismatch=worst("mismatch"),
        residual=worst("residual"),
        steps_enough=int(worst("steps_enough")),
        smallest=softest.smallest,
        smallest_error=softest.smallest_error,
        largest=worst("largest"),
    )


def differences(
    solver: Solver,
    upper: Params,
    parts: Sequence[Rounds],
    known: Reference,
    random: int,
    seed: int,
    say: Callable[[str], None],
) -> list[FiniteDifference]:
    """Central differences along the reference hypergradient and along `random` random directions,
    y* solved anew at each point.

    Raises DivergenceError where a number is not finite.
    """
    size = float(tree.flatten(upper).norm())
    step = DIFFERENCE_STEP * max(1.0, size)
    generator = torch.Generator().manual_seed(seed)
    directions = [("reference", known.direction)] if known.direction.any() else []
    for number in range(random):
        directions.append(
            (
                f"random {number + 1}",
                torch.randn(known.direction.shape, generator=generator, dtype=torch.float64),
            )
        )
    found = []
    for along, direction in directions:
        say(f"finite differences along {along}")
        unit = direction / direction.norm()

        def phi(shift: float, unit: Tensor = unit) -> float:
            at = tree.axpy(shift, tree.unflatten(unit, upper), upper)
            runs = zip(parts, known.lower, known.scales, strict=True)
            values = [
                part(kernels.solve, solver, at, states, scale=scale).sums["upper_loss"]
                for part, states, scale in runs
            ]
            return float(torch.stack(values).mean())

        slope, error = _slope(phi, step)
        if error > ROUGH * float(known.direction.norm()):
            slope, error = min((slope, error), _slope(phi, step * SHORTER), key=lambda one: one[1])
        found.append(FiniteDifference(along, float(known.direction.dot(unit)), slope, error))
    return found


def _slope(phi: Callable[[float], float], step: float) -> tuple[float, float]:
    """phi'(0) by central differences with two step sizes, and its error."""
    values = [phi(shift * step) for shift in (-2, -1, 1, 2)]
    wide, narrow = (values[3] - values[0]) / (4 * step), (values[2] - values[1]) / (2 * step)
    # Richardson's extrapolation; what it takes off `narrow` stands for its own error, which is
    # smaller where phi is smooth
    slope = (4 * narrow - wide) / 3
    return slope, abs(slope - narrow) + 1e-14 * max(abs(value) for value in values) / step


def _of_one(
    solver: Solver,
    upper: Params,
    lower: LowerStates,
    run: Rounds,
    inner: tuple[int, float],
    adapts: bool,
    seed: int,
) -> Reference:
    own, kept = run(kernels.locate, solver, upper, lower, keeps=True, adapts=adapts)
    scale = float(own["scale"]) or 1.0  # y starts at y*: nothing to be relative to
    solved, states = run(kernels.solve, solver, upper, kept, keeps=True, scale=scale)
    exact = run(kernels.implicit, solver, upper, states, inner=inner).sums
    near = run(kernels.implicit, solver, upper, kept).sums
    curvature = run(kernels.spectrum, solver, upper, states, seed=seed).sums
    return Reference(
        direction=tree.flatten(exact["direction"]),
        grad_upper_f=tree.flatten(exact["grad_upper_f"]),
        at_solvers_y=tree.flatten(near["direction"]),
        seen=tree.flatten(exact["seen"]),
        lower=(states,),
        scales=(scale,),
        unsolved=float(solved["grad"]) / scale,
        distance=float(solved["moved"]) / max(float(solved["norm"]), 1e-300),
        edge=bool(solved["edge"]),
        mismatch=float(own["mismatch"]),
        residual=float(exact["residual"]),
        steps_enough=int(exact["steps_enough"]),
        smallest=float(curvature["smallest"]),
        smallest_error=float(curvature["smallest_error"]),
        largest=float(curvature["largest"]),
    )
