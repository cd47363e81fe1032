"""Why a direction is off, in words with numbers, and which keys to try: what a person does next."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from bomemeta.core.solver import Solver
from bomemeta.hypercheck.frozen import Settled
from bomemeta.hypercheck.reference import Reference
from bomemeta.hypercheck.verdict import OK_ERROR, Agreement, compare

MORE = 4  # how many times as much work a trial is given
HEAVIER = 16  # and weight, for a penalty: its error falls as one over it
AFFORDABLE = 1000  # a T up to which a trial is run; a longer one is only named
HELPS = 0.8  # a trial helps where the error falls to this share or less
SEEN = 0.95  # the share of the slowest direction that a proposed T sees
DULL = 0.1  # a step size below this share of 1 / L is tried at 1 / L
# a direction is what T steps see of the reference where the rest of its error is this share or less
ALIKE = 0.2

STEP_SIZES = ("inner_lr", "aux_lr")
SYSTEM_STEPS = ("subspace", "aux_steps")
PENALTIES = ("eta", "penalty")

Changes = dict[str, int | float]


class Trial(NamedTuple):
    """The solver with some keys changed."""

    changes: Changes
    comparison: Agreement | None  # None: it diverged

    @property
    def keys(self) -> str:
        return " ".join(
            f"solver.{name}={format(value, '.4g')}" for name, value in self.changes.items()
        )

    @property
    def ok(self) -> bool:
        return self.comparison is not None and self.comparison.word == "OK"


def work(solver: Solver) -> list[str]:
    """The keys that count steps of work, in whatever solver."""
    return [
        name
        for name, value in _numbers(solver).items()
        if isinstance(value, int) and value > 0 and name != "warmup_steps"
        if name.endswith(("_steps", "_terms", "_iterations")) or name in SYSTEM_STEPS
    ]


def proposals(solver: Solver, known: Reference) -> list[Changes]:
    """Changes of keys that may make a poor direction better, one reason each: more work, then step
    sizes, then penalties.
    """
    keys = _numbers(solver)
    found: list[Changes] = [{name: MORE * keys[name]} for name in work(solver)]
    if known.largest > 0:
        found += [
            {name: step_size(known)}
            for name in STEP_SIZES
            if name in keys and not DULL <= keys[name] * known.largest < 2
        ]
        if inner_share(solver, known) < SEEN:
            steps, alpha = needed(keys["inner_lr"], known.smallest), step_size(known)
            if steps <= AFFORDABLE:
                found.append({"inner_steps": steps})
            elif needed(alpha, known.smallest) <= AFFORDABLE:
                found.append({"inner_steps": needed(alpha, known.smallest), "inner_lr": alpha})
    # y's own step has to be shorter by as much, or it is no longer stable.
    slower: Changes = {"lower_lr": keys["lower_lr"] / HEAVIER} if "lower_lr" in keys else {}
    return found + [{name: HEAVIER * keys[name], **slower} for name in PENALTIES if name in keys]


def together(solver: Solver, trials: Sequence[Trial]) -> Changes | None:
    """All keys of work at once, of those that changed something by themselves; None where that is
    no new trial.
    """
    keys = [name for name in work(solver) if any(list(one.changes) == [name] for one in trials)]
    return {name: MORE * _numbers(solver)[name] for name in keys} if len(keys) > 1 else None


def cure(trials: Sequence[Trial], now: Agreement | None) -> Trial | None:
    """The first trial that helps as much as any, but for a fifth; `now` None: the first that is
    finite. None: none helps.

    eta is no cure: bome's lambda is meant to be as small as it can be.
    """
    usable = [one for one in trials if "eta" not in one.changes and one.comparison is not None]
    helping = [one for one in usable if now is None or _error(one) <= HELPS * now.error]
    return next((one for one in helping if _error(one) <= min(map(_error, helping)) / HELPS), None)


def explain(solver: Solver, settled: Settled, known: Reference, now: Agreement) -> list[str]:
    """Where a direction's error comes from."""
    notes = [note for note in (unstable(solver, known), short_inner_loop(solver, known)) if note]
    if is_penalty(solver, settled):
        notes.append(_of_a_penalty(solver, settled, known))
    elif (averaging := settled.metrics.get("mu", 0.0)) > 0:
        notes.append(
            f"mu = {averaging:.3g} at this step: the direction belongs to psi = mu f + (1 - mu) g. Where a schedule lowers mu, check a "
            "later step with --at-step"
        )
    else:
        notes.append(_of_y_or_v(solver, settled, known, now))
    if now.cosine >= 0.99:
        notes.append(
            f"the direction is right and its length {now.length:.3g} of the reference's: with upper_optimizer adam that matters little, "
            "otherwise it is as if solver.upper_lr were so many times what it is"
        )
    return notes


def is_penalty(solver: Solver, settled: Settled) -> bool:
    """Whether the direction is that of f + lambda q."""
    return "multiplier" in settled.metrics or any(name in _numbers(solver) for name in PENALTIES)


def unstable(solver: Solver, known: Reference) -> str:
    """Step sizes beyond what L allows; empty where there are none."""
    keys = _numbers(solver)
    high = [name for name in STEP_SIZES if name in keys and keys[name] * known.largest >= 2]
    if not high:
        return ""
    given = ", ".join(f"solver.{name} = {keys[name]:.3g}" for name in high)
    return f"{given}: not below 2 / L = {2 / known.largest:.3g}, so the steps climb. Try 1 / L = {step_size(known):.2g}"


def short_inner_loop(solver: Solver, known: Reference) -> str:
    """What T steps of size alpha do at this conditioning; empty where the solver has no such keys
    or they are enough.
    """
    share = inner_share(solver, known)
    if share >= SEEN:
        return ""
    keys, alpha = _numbers(solver), step_size(known)
    return (
        f"solver.inner_steps = {keys['inner_steps']} of solver.inner_lr = {keys['inner_lr']:.3g} see {100 * share:.2g} % of the slowest "
        f"direction, 1 - (1 - alpha mu)^T. For {100 * SEEN:.0f} % set solver.inner_steps={needed(keys['inner_lr'], known.smallest)}, "
        f"or solver.inner_steps={needed(alpha, known.smallest)} with solver.inner_lr={alpha:.2g}; less may do for solvers whose y "
        "continues from step to step and that do not get v from these steps"
    )


def inner_loop(solver: Solver) -> tuple[int, float]:
    """T and alpha; (0, 0) where the solver has no such keys, or T is too long to follow."""
    keys = _numbers(solver)
    if getattr(solver, "inner_optimizer", "sgd") != "sgd":
        return 0, 0.0  # not what gradient steps see
    steps = int(keys.get("inner_steps", 0)) if "inner_lr" in keys else 0
    return (steps, keys["inner_lr"]) if 0 < steps <= AFFORDABLE else (0, 0.0)


def inner_share(solver: Solver, known: Reference) -> float:
    """1 - (1 - alpha mu)^T; 1 where there is no such loop or no such mu, or where the loop is
    unstable and T is not the point.
    """
    keys = _numbers(solver)
    if (
        "inner_steps" not in keys
        or "inner_lr" not in keys
        or known.smallest <= 0
        or keys["inner_lr"] * known.largest >= 2
    ):
        return 1.0
    return float(1 - (1 - keys["inner_lr"] * known.smallest) ** keys["inner_steps"])


def needed(alpha: float, smallest: float) -> int:
    """T after which `SEEN` of the slowest direction is seen."""
    left = 1 - alpha * smallest
    return max(1, math.ceil(math.log(1 - SEEN) / math.log(left))) if 0 < left < 1 else 1


def step_size(known: Reference) -> float:
    """1 / L, to two digits."""
    return float(f"{1 / known.largest:.2g}")


def _of_a_penalty(solver: Solver, settled: Settled, known: Reference) -> str:
    weight = settled.metrics.get("multiplier", settled.metrics.get("penalty"))
    cut = compare(known.seen, known.direction).error
    steps = "T is enough" if cut <= OK_ERROR else "T is too small"
    raised = (
        "bome keeps lambda as small as it can where x is not stationary, by design; solver.eta raises it"
        if "eta" in _numbers(solver)
        else "A larger solver.penalty raises it, and wants a smaller step of y"
    )
    return (
        f"the direction is that of a penalty, grad_x f + lambda grad_x q{f' with lambda = {weight:.3g}' if weight is not None else ''}. "
        f"{steps}: were lambda infinite, the error would be {cut:.2g}; the rest is lambda's, and falls as 1 / lambda. {raised}"
    )


def _of_y_or_v(solver: Solver, settled: Settled, known: Reference, now: Agreement) -> str:
    at_y = compare(known.at_solvers_y, known.direction).error
    size = float(known.direction.norm())
    if (
        settled.direction is not None
        and float((settled.direction - known.seen).norm()) <= ALIKE * now.error * size
    ):
        return (
            "the direction is what T inner steps see of the reference, and no more: T is the reason"
        )
    if at_y > now.error / 2:
        return (
            f"the solver's y is too far from y* (|y - y*| / |y*| = {known.distance:.1e}): with v exact at it the error would "
            f"still be {at_y:.2g}"
        )
    steps = [
        f"solver.{name} = {value}"
        for name, value in _numbers(solver).items()
        if name in SYSTEM_STEPS
    ]
    given = f" and the solver has {', '.join(steps)}" if steps else ""
    return (
        f"y is not the reason (with v exact at the solver's y the error would be {at_y:.2g}): v is, or the formula. Conjugate gradients "
        f"know v to 1 % after {known.steps_enough} steps{given}"
    )


def _error(trial: Trial) -> float:
    return trial.comparison.error if trial.comparison is not None else math.inf


def _numbers(solver: Solver) -> dict[str, int | float]:
    """The solver's keys that are numbers."""
    fields: tuple[dataclasses.Field[Any], ...] = (
        dataclasses.fields(solver) if dataclasses.is_dataclass(solver) else ()
    )
    values = {field.name: getattr(solver, field.name) for field in fields}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
