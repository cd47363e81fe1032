"""The check from start to end: solver, reference, finite differences, other keys, verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bomemeta.assembly import trainer_of
from bomemeta.checkpoint import load_latest
from bomemeta.config import Config, load_config
from bomemeta.core.arguments import replaced
from bomemeta.core.problem import SharedProblem
from bomemeta.core.randomness import mixed_seed
from bomemeta.core.solver import Rounds, Solver
from bomemeta.core.tree import Params
from bomemeta.engine import Trainer
from bomemeta.errors import CheckpointError, ConfigError, DivergenceError
from bomemeta.evaluation import READABLE_NUMBERS
from bomemeta.hypercheck import advice
from bomemeta.hypercheck.advice import Trial
from bomemeta.hypercheck.frozen import Settled, settle
from bomemeta.hypercheck.reference import FiniteDifference, Reference, differences, reference
from bomemeta.hypercheck.verdict import (
    NOISE,
    SINGULAR,
    Agreement,
    CheckReport,
    compare,
    disagreement,
    stationary,
    undecidable,
)
from bomemeta.metrics import RunFolder
from bomemeta.sections import label

Say = Callable[[str], None]

# A spread of a direction that did not settle from which on a note says so.
RESTLESS = 0.01

# The reference is made in float64 and here, whatever the run does.
OWN_KEYS = ("dtype=float64", "workers=0")


class Subproblem(NamedTuple):
    """The small cut of the problem: x, the solver's run, and one run per task (or the one of the
    shared y) for the reference.
    """

    upper: Params
    whole: Rounds
    parts: list[Rounds]
    tasks: int
    step: int


def check(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    tasks: int = 2,
    settle_steps: int = 200,
    directions: int = 3,
    run_dir: str | Path | None = None,
    at_step: int | None = None,
    trials: int | None = None,
    say: Say = lambda text: None,
) -> CheckReport:
    """Compares the config's solver with the implicit hypergradient and with finite differences;
    nothing is written.

    x is the start's, or that of `run_dir`'s last checkpoint. `at_step` is the step that the solver
    is told (default: the checkpoint's, else 0), `trials` the most trials with other keys (default:
    all). Raises a BomemetaError where there is nothing to check: a wrong config, missing data, an x
    of another shape.
    """
    settings = load_config(config, [*overrides, *OWN_KEYS])
    with trainer_of(settings, say) as trainer:
        subproblem = _subproblem(trainer, tasks, run_dir, at_step, say)
        return _report(trainer, subproblem, settle_steps, directions, trials, say)


def _report(
    trainer: Trainer,
    subproblem: Subproblem,
    settle_steps: int,
    directions: int,
    most: int | None,
    say: Say,
) -> CheckReport:
    solver, seed = trainer.solver.unpaced(), mixed_seed(trainer.config.seed)
    say(f"the direction of {label(trainer.solver)} at a fixed x")
    settled = settle(solver, subproblem.upper, subproblem.whole, settle_steps)
    say("the reference: y*, A v = grad_y f, eigenvalues of A")
    reasons = [settled.failure] if settled.failure else []
    known, found, trials, now = None, [], [], None
    try:
        adapts = trainer.problem.num_tasks is None and not settled.failure
        known = reference(
            solver,
            subproblem.upper,
            settled.lower,
            subproblem.parts,
            advice.inner_loop(solver),
            adapts,
            seed,
        )
        reasons += undecidable(known)
        if not reasons:
            found = differences(
                solver, subproblem.upper, subproblem.parts, known, directions, seed, say
            )
            reasons += [text for text in (disagreement(known, found), stationary(known)) if text][
                :1
            ]
    except DivergenceError as error:
        reasons.append(
            f"the reference is not finite ({error}): g may have no minimiser, or a loss no second derivative"
        )
    except (
        RuntimeError
    ) as error:  # torch says it with this or with NotImplementedError, which is one
        if "derivative" not in str(error):
            raise
        reasons.append(
            f"a loss cannot be differentiated twice, so there is no reference: {str(error).partition(chr(10))[0]}"
        )
    notes: list[str] = []
    if known is not None and settled.direction is not None:
        now = compare(settled.direction, known.direction)
    if known is not None and (
        settled.failure or (now is not None and not reasons and now.word != "OK")
    ):
        trials = _trials(solver, subproblem, known, settled, settle_steps, most, say)
        notes = (
            advice.explain(solver, settled, known, now)
            if now is not None
            else [advice.unstable(solver, known)]
        )
    if settled.spread > RESTLESS:
        notes.append(
            f"the direction does not stand still: this is its mean over the last quarter of {settled.steps} steps, from which one step is "
            f"off by {settled.spread:.2g}. For more steps: --settle"
        )
    if known is not None and any(
        one.error > NOISE * float(known.direction.norm()) for one in found
    ):
        notes.append(
            "finite differences are too rough here to confirm the reference: a loss has kinks, as networks with ReLU do"
        )
    rows = _rows(trainer, subproblem, settled, known, found, now, trials)
    numbers = _numbers(settled, known, found, now, trials, subproblem)
    notes = [note for note in notes if note]
    if reasons or now is None:
        cure = advice.cure(trials, None) if settled.failure else None
        hint = (
            [f"run again with {cure.keys}: the direction is finite there"]
            if cure is not None
            else []
        )
        return CheckReport("UNDECIDED", reasons[0], [*reasons[1:], *hint, *notes], rows, numbers)
    return CheckReport(
        now.word, _headline(now, trials, advice.is_penalty(solver, settled)), notes, rows, numbers
    )


def _trials(
    solver: Solver,
    subproblem: Subproblem,
    known: Reference,
    settled: Settled,
    settle_steps: int,
    most: int | None,
    say: Say,
) -> list[Trial]:
    """The solver again with other keys, until one is OK or `most` were tried; keys that change nothing at all are left
    out.
    """
    trials: list[Trial] = []
    tried: list[advice.Changes] = []
    waiting = advice.proposals(solver, known)
    while waiting and not any(one.ok for one in trials) and (most is None or len(tried) < most):
        trial = Trial(waiting.pop(0), None)
        tried.append(trial.changes)
        try:
            other: Solver = replaced(solver, trial.changes)
        except (ConfigError, ValueError):  # what the class itself refuses
            continue
        say(f"once more with {trial.keys}")
        again = settle(other, subproblem.upper, subproblem.whole, settle_steps)
        if again.direction is None:
            trials.append(trial)
        elif settled.direction is None or not torch.equal(again.direction, settled.direction):
            trials.append(trial._replace(comparison=compare(again.direction, known.direction)))
        whole = advice.together(solver, trials) if not waiting else None
        if whole is not None and whole not in tried:
            waiting.append(whole)
    return trials


def _headline(now: Agreement, trials: Sequence[Trial], penalty: bool) -> str:
    text = f"relative error {now.error:.2g}, cosine {now.cosine:.3f}"
    if now.word == "OK":
        return text
    cure = advice.cure(trials, now)
    if cure is not None and cure.comparison is not None:
        return (
            f"{text}. Run again with {cure.keys}: relative error {cure.comparison.error:.2g} there"
        )
    if not trials or penalty:
        return text
    return f"{text}. More work or another step size does not help: see whether the formula is right"


def _subproblem(
    trainer: Trainer, tasks: int, run_dir: str | Path | None, at_step: int | None, say: Say
) -> Subproblem:
    if tasks < 1:
        raise ConfigError(f"--tasks: got {tasks}, wanted 1 or more")
    upper, step = trainer.state.upper.params, 0
    if run_dir is not None:
        loaded = load_latest(RunFolder.open(run_dir).checkpoints)
        for note in loaded.notes:
            say(note)
        saved = loaded.checkpoint.upper
        wanted, got = (
            {name: tuple(tensor.shape) for name, tensor in params.items()}
            for params in (upper, saved)
        )
        if wanted != got:
            different = sorted(
                name for name in {**wanted, **got} if wanted.get(name) != got.get(name)
            )
            raise CheckpointError(
                f"the x of {loaded.path} has another shape than the config's problem: {', '.join(different)}. Check with that run's "
                "own config.yaml"
            )
        upper, step = saved, loaded.checkpoint.step
        memory = loaded.checkpoint.solver["memory"]
        trainer.state.memory = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in memory.items()
        }
    last = trainer.steps - 1
    if at_step is not None and not 0 <= at_step <= last:
        raise ConfigError(
            f"--at-step: got {at_step}, wanted 0 to {last}, as the config has steps: {trainer.config.steps}"
        )
    step = min(step, last) if at_step is None else at_step
    # In the problem's order of names, which the flat vectors of the check follow.
    upper = {name: upper[name].detach().to(torch.float64) for name in upper}
    num_tasks, shared = trainer.problem.num_tasks, isinstance(trainer.problem, SharedProblem)
    count = num_tasks if shared and num_tasks is not None else min(tasks, num_tasks or tasks)
    whole = trainer.run_on(range(count), trainer.config.shards, step=step)
    parts: list[Rounds] = (
        [whole] if shared else [trainer.run_on([task], 1, step=step) for task in range(count)]
    )
    return Subproblem(upper, whole, parts, count, step)


def _rows(
    trainer: Trainer,
    subproblem: Subproblem,
    settled: Settled,
    known: Reference | None,
    found: Sequence[FiniteDifference],
    now: Agreement | None,
    trials: Sequence[Trial],
) -> list[tuple[str, str]]:
    what = ("block" if isinstance(trainer.problem, SharedProblem) else "task") + (
        "s" if subproblem.tasks > 1 else ""
    )
    numbers = sum(tensor.numel() for tensor in subproblem.upper.values())
    rows = [
        (
            "checked",
            f"{label(trainer.solver)} on {label(trainer.problem)}: {subproblem.tasks} {what}, "
            f"{numbers} numbers in x, step {subproblem.step}",
        )
    ]
    if settled.direction is not None:
        rows.append(
            (
                "solver's direction",
                f"length {float(settled.direction.norm()):.6g}, {_steps(settled)}",
            )
        )
    if known is not None:
        rows += [
            (
                "reference",
                f"length {float(known.direction.norm()):.6g}, |grad_y g| fell to {known.unsolved:.0e}, "
                f"|A v - b| / |b| = {known.residual:.0e}",
            ),
            (
                "curvature of g",
                f"mu = {known.smallest:.3g}{_margin(known)}, L = {known.largest:.3g}, L / mu = {known.condition:.3g}",
            ),
            ("steps of CG for v", f"{known.steps_enough} to 1 %"),
            ("solver's y", f"|y - y*| / |y*| = {known.distance:.1e}"),
        ]
    rows += [
        (
            f"along {one.along}",
            f"implicit {one.implicit:.8g}, finite differences {one.found:.8g} +- {one.error:.0e}",
        )
        for one in found
    ]
    if now is not None:
        rows += [
            ("relative error", f"{now.error:.3g}"),
            ("cosine", f"{now.cosine:.6f}"),
            ("length, of the reference's", f"{now.length:.4g}"),
        ]
    for one in trials:
        outcome = "not finite"
        if one.comparison is not None:
            outcome = (
                f"relative error {one.comparison.error:.3g}, cosine {one.comparison.cosine:.4f}"
            )
        rows.append(("with other keys", f"{one.keys}: {outcome}"))
    return rows


def _numbers(
    settled: Settled,
    known: Reference | None,
    found: Sequence[FiniteDifference],
    now: Agreement | None,
    trials: Sequence[Trial],
    subproblem: Subproblem,
) -> dict[str, Any]:
    """Everything for `--json`."""
    values = (
        {name: value for name, value in known._asdict().items() if isinstance(value, int | float)}
        if known
        else {}
    )
    return {
        "tasks": subproblem.tasks,
        "step": subproblem.step,
        "relative_error": now and now.error,
        "cosine": now and now.cosine,
        "length": now and now.length,
        "solver": {
            "length": None if settled.direction is None else float(settled.direction.norm()),
            "direction": _listed(settled.direction),
            "steps": settled.steps,
            "change": settled.change,
            "spread": settled.spread,
            "metrics": dict(settled.metrics),
        },
        "reference": known
        and {
            "length": float(known.direction.norm()),
            "condition": known.condition,
            "error_at_solvers_y": compare(known.at_solvers_y, known.direction).error,
            "error_of_inner_steps": compare(known.seen, known.direction).error,
            "direction": _listed(known.direction),
            **values,
        },
        "finite_differences": [one._asdict() for one in found],
        "trials": [
            {
                "changes": one.changes,
                **(one.comparison._asdict() if one.comparison else {"error": None}),
            }
            for one in trials
        ],
    }


def _listed(direction: Tensor | None) -> list[float] | None:
    """Of an x that is small enough to be read."""
    return (
        direction.tolist() if direction is not None and len(direction) < READABLE_NUMBERS else None
    )


def _steps(settled: Settled) -> str:
    if settled.steps == 1:
        return "one step"
    return (
        f"settled after {settled.steps} steps"
        if settled.spread == 0
        else f"a mean: not settled after {settled.steps} steps"
    )


def _margin(known: Reference) -> str:
    """How far Lanczos may be off, where that is worth a word."""
    return (
        f" (+- {known.smallest_error:.1g})"
        if known.smallest_error > max(0.1 * abs(known.smallest), SINGULAR * known.largest)
        else ""
    )
