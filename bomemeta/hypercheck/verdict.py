"""From the numbers of a check to a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from bomemeta.errors import ConfigError
from bomemeta.hypercheck.reference import FiniteDifference, Reference

Word = Literal["OK", "POOR", "WRONG", "UNDECIDED"]

OK_ERROR = 0.1  # relative error up to which a hypergradient is OK
# cosine below which it leads elsewhere: a random direction among 100 numbers has this much by
# chance
WRONG_COSINE = 0.1

SINGULAR = 1e-10  # of L: a smallest eigenvalue of A up to here is 0 as far as float64 can tell
RESIDUAL = 1e-6  # |A v - b| / |b| above which there is no reference
UNSOLVED = 1e-7  # |grad_y g| at y* over what it was at the start
MISMATCH = 1e-6  # between a closed-form gradient and autograd's
STATIONARY = 1e-6  # |reference| over the larger of its two parts
NOISE = 0.05  # error of finite differences over |reference| from which on they say nothing
# what they may differ by from the reference, over |reference|, beside five times their error: kinks
# hide in both
DISAGREE = 1e-2


class Agreement(NamedTuple):
    """A direction h against the reference h*."""

    error: float  # |h - h*| / |h*|
    cosine: float
    length: float  # |h| / |h*|

    @property
    def word(self) -> Word:
        if self.error <= OK_ERROR:
            return "OK"
        return "WRONG" if self.cosine < WRONG_COSINE else "POOR"


@dataclass(frozen=True)
class CheckReport:
    """The result of a check. `numbers` is all of it, ready for JSON but for numbers that are not
    finite.
    """

    verdict: Word
    headline: str
    notes: list[str]
    rows: list[tuple[str, str]]
    numbers: Mapping[str, Any] = field(repr=False)

    @property
    def ok(self) -> bool:
        return self.verdict == "OK"

    def lines(self) -> list[str]:
        """The table, the verdict, and one line per note."""
        width = max((len(name) for name, _ in self.rows), default=0)
        table = [f"{name:<{width}}  {value}" for name, value in self.rows]
        return [
            *table,
            f"{self.verdict}: {self.headline}",
            *(f"note: {note}" for note in self.notes),
        ]

    def write(self, file: Path) -> None:
        """All of it as JSON; NaN and infinite numbers, which JSON does not have, become null.
        Raises ConfigError where it cannot.
        """
        whole = {
            "verdict": self.verdict,
            "headline": self.headline,
            "notes": self.notes,
            **self.numbers,
        }
        try:
            file.write_text(json.dumps(_finite(whole), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json: {file} cannot be written: {error.strerror}") from error


def compare(direction: Tensor, exact: Tensor) -> Agreement:
    size, length = float(exact.norm()), float(direction.norm())
    if size == 0 or length == 0:
        return Agreement(
            1.0 if size > 0 else math.inf if length > 0 else 0.0,
            0.0,
            math.inf if size == 0 else 0.0,
        )
    return Agreement(
        float((direction - exact).norm()) / size,
        float(direction.dot(exact)) / (size * length),
        length / size,
    )


def undecidable(known: Reference) -> list[str]:
    """Why the reference is none; empty where it is one."""
    reasons = []
    if known.mismatch > MISMATCH:
        reasons.append(
            f"the problem's loss_gradient differs from autograd's by {known.mismatch:.1e} (relative): correct the "
            "closed form, or take it out"
        )
    if known.unsolved > UNSOLVED:
        reasons.append(
            f"the lower problem was not solved: |grad_y g| is still {known.unsolved:.1e} of what it was at the start. g may have no "
            "minimiser, or have it on a kink (ReLU, max-pooling), where the implicit formula has no meaning"
        )
    if known.edge:
        reasons.append(
            "y* lies on the edge of its admissible set, and the implicit formula takes it as interior"
        )
    elif known.smallest < -SINGULAR * abs(known.largest):
        reasons.append(
            f"g is not convex at y*: the smallest eigenvalue of A = d2g/dy2 is {known.smallest:.3g} (the largest {known.largest:.3g}). "
            "y* is no isolated minimum; more regularisation in g makes it one"
        )
    elif known.smallest <= SINGULAR * known.largest:
        reasons.append(
            f"A = d2g/dy2 is singular at y* (eigenvalues from {known.smallest:.1e} to {known.largest:.3g}): g has many minimisers, f "
            "chooses among them, and the implicit formula has no meaning. sl_bamm and bome are for such problems; a little regularisation "
            "in g makes the solution unique"
        )
    elif known.residual > RESIDUAL:
        reasons.append(
            f"A v = grad_y f could not be solved, |A v - b| / |b| = {known.residual:.1e}: the condition of A is "
            f"{known.largest / known.smallest:.1e}. More regularisation in g lowers it"
        )
    return reasons


def stationary(known: Reference) -> str:
    """Where there is nothing to be relative to; empty elsewhere."""
    size = float(known.direction.norm())
    part = max(
        float(known.grad_upper_f.norm()), float((known.direction - known.grad_upper_f).norm())
    )
    if part == 0:
        return (
            "the hypergradient and both its parts are 0: x enters no loss, or f is at its minimum"
        )
    if size <= STATIONARY * part:
        return f"x is stationary (|reference| = {size:.1e}), where a relative error says nothing: check at another x"
    return ""


def disagreement(known: Reference, found: Sequence[FiniteDifference]) -> str:
    """Where finite differences contradict the implicit formula; empty where they do not, or cannot
    say.
    """
    size = max([float(known.direction.norm()), *(abs(one.found) for one in found)])
    off = [
        one
        for one in found
        if one.error <= NOISE * size
        and abs(one.found - one.implicit) > 5 * one.error + DISAGREE * size
    ]
    if not off:
        return ""
    worst = max(off, key=lambda one: abs(one.found - one.implicit))
    return (
        f"along {worst.along} finite differences give {worst.found:.6g} (+- {worst.error:.1e}) and the implicit formula gives "
        f"{worst.implicit:.6g}: x reaches a loss by a way that autograd does not see (a detach, a value computed elsewhere), or y*(x) "
        "has a jump or a kink here"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(below) for below in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
