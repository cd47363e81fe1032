"""Steps of a run in which x stands still (`solver.warm_start_steps`, `solver.upper_every`): how many, and
what they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bomemeta.core.solver import Solver
from bomemeta.doctor.dry import DryRun, Still
from bomemeta.doctor.findings import Finding, duration, number, size
from bomemeta.solvers.pacing import Paced


class Standing(NamedTuple):
    """Steps of one kind."""

    name: str
    steps: int  # of the run
    still: Still  # one of them, dry


def standing(run: DryRun, solver: Solver, tasks: int) -> list[Standing]:
    """The kinds that the run has; none where x moves in every step."""
    if not isinstance(solver, Paced):
        return []
    steps = run.trainer.steps
    first = min(solver.warm_start_steps, steps)
    between = steps - first - solver.upper_steps(steps)
    found = []
    if first > 0:
        found.append(Standing("on g alone, at the start", first, run.still(solver, tasks, 0)))
    if between > 0 and solver.upper_every > 1:
        still = run.still(solver, tasks, first)
        found.append(Standing("between two steps of x", between, still))
    return found


def finding(found: Sequence[Standing], steps: int, shards: int) -> list[Finding]:
    if not found:
        return []
    moves = steps - sum(kind.steps for kind in found)
    parts = [
        f"{kind.steps:,} {kind.name} ({duration(kind.still.step_s)} here in {number(kind.still.reduces, 'round')}, "
        f"{size(kind.still.bytes_reduced * shards)} up)"
        for kind in found
    ]
    text = f"x moves in {moves:,} of {steps:,} steps; the others move y: {'; '.join(parts)}"
    return [Finding("OK", "steps of x", text)]
