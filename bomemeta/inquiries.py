"""What looks into a run before it is trained, over the same arguments as `train`: check, doctor, profile;
tune, which trains many; and write_report, which shows one afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from bomemeta.api import objects_of, settings_of
from bomemeta.config import Source
from bomemeta.core.problem import Problem
from bomemeta.core.solver import Solver
from bomemeta.errors import ConfigError
from bomemeta.keys import RunKeys, with_keys
from bomemeta.sections import SECTIONS

if TYPE_CHECKING:
    from bomemeta.doctor import DoctorReport
    from bomemeta.hypercheck import CheckReport
    from bomemeta.profile import Profile
    from bomemeta.tune import SearchResult

Say = Callable[[str], None]


def nothing(text: str) -> None:
    """Hears what is being done."""


@with_keys
def check(
    config: Source | Problem,
    solver: Solver | Sequence[str] | None = None,
    *,
    data: Any = None,
    overrides: Sequence[str] = (),
    tasks: int = 2,
    settle_steps: int = 200,
    directions: int = 3,
    run_dir: str | Path | None = None,
    at_step: int | None = None,
    trials: int | None = None,
    say: Say = nothing,
    **keys: Unpack[RunKeys],
) -> CheckReport:
    """Compares the solver's hypergradient with the implicit one and with finite differences, in
    float64 on a small cut of the problem; writes nothing.

    The first arguments and `keys` are those of `train`; the others those of `bomemeta check`. x is
    the start's, or that of `run_dir`'s last checkpoint; `at_step` is the step that the solver takes
    it for, `trials` the most trials with other keys (None: all). Returns the report:
    `print(*report.lines(), sep="\\n")`.
    """
    from bomemeta.hypercheck import check as compare

    return compare(
        settings_of(config, solver, data, overrides, keys),
        tasks=tasks,
        settle_steps=settle_steps,
        directions=directions,
        run_dir=run_dir,
        at_step=at_step,
        trials=trials,
        say=say,
    )


@with_keys
def doctor(
    config: Source | Problem,
    solver: Solver | Sequence[str] | None = None,
    *,
    data: Any = None,
    overrides: Sequence[str] = (),
    say: Say = nothing,
    **keys: Unpack[RunKeys],
) -> DoctorReport:
    """Says what a run will need against what is there: memory, data, workers, time and disk, from a
    few dry steps in this process; writes nothing.

    The arguments are those of `train`. Returns the report: `print(*report.lines(), sep="\\n")`.
    """
    from bomemeta.doctor import examine

    return examine(settings_of(config, solver, data, overrides, keys), say=say)


@with_keys
def profile(
    config: Source | Problem,
    solver: Solver | Sequence[str] | None = None,
    *,
    data: Any = None,
    overrides: Sequence[str] = (),
    measured_steps: int = 10,
    warm_up: int = 3,
    say: Say = nothing,
    **keys: Unpack[RunKeys],
) -> Profile:
    """Says where the time of a step goes, from the medians of `measured_steps` real steps after
    `warm_up` of them; writes nothing.

    The first arguments and `keys` are those of `train`; `steps` is the run's length. Returns the
    profile: `print(*profile.lines(), sep="\\n")`.
    """
    from bomemeta.profile import profile as measure

    settings = settings_of(config, solver, data, overrides, keys)
    return measure(settings, steps=measured_steps, warm_up=warm_up, say=say)


@with_keys
def tune(
    config: Source | Problem,
    solver: Solver | Sequence[str] | None = None,
    *,
    space: Mapping[str, Any] | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
    report_every_steps: int | None = None,
    search: Mapping[str, Any] | None = None,
    data: Any = None,
    overrides: Sequence[str] = (),
    resume: str | Path | None = None,
    trust: bool = False,
    say: Say = nothing,
    **keys: Unpack[RunKeys],
) -> SearchResult:
    """Searches over hyperparameters with Ray Tune, and writes results.md, results.json and best.yaml
    into the search's folder.

    The first arguments and `keys` are those of `train` and make the run that is varied; `space` has
    its dotted keys with domains, as in `{"solver.upper_lr": {"loguniform": [1e-3, 1]}}`. `metric`,
    `mode` and `report_every_steps` are those of a tune file, `search` has its other keys (`trials`,
    `scheduler`, `seed` ...). `output_dir` is the search's folder. Without `space`, `config` is a tune
    file, as for `bomemeta tune`. `resume` is the folder of an interrupted search; `trust` as for
    `bomemeta.resume`.

    Objects travel to the trials by value. Raises a BomemetaError that says what to do.
    """
    from bomemeta.tune.search import tune as search_with

    if space is None:
        if not isinstance(config, str | Path | Mapping) or isinstance(solver, Solver):
            raise ConfigError(
                "space: missing; wanted a mapping of dotted keys to domains, as in "
                'space={"solver.upper_lr": {"loguniform": [1e-3, 1]}}'
            )
        return search_with(
            config, [*(solver or ()), *overrides], resume=resume, trust=trust, say=say
        )
    output_dir = keys.pop("output_dir", None)
    settings = settings_of(config, solver, data, overrides, keys)
    own = {
        "metric": metric,
        "mode": mode,
        "report_every_steps": report_every_steps,
        "output_dir": output_dir,
    }
    file = {"base": settings.to_dict(), "space": dict(space), **(search or {})}
    file |= {key: value for key, value in own.items() if value is not None}
    objects = {key: getattr(settings, key) for key in SECTIONS}
    given = {key: made for key, made in objects.items() if made is not None}
    return search_with(file, resume=resume, trust=trust, say=say, objects=given)


def write_report(
    run_dir: str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    episodes: int | None = None,
    force: bool = False,
    problem: Problem | type[Problem] | None = None,
    solver: Solver | type[Solver] | None = None,
    data: Any = None,
    trust: bool = False,
    say: Say = nothing,
) -> Path:
    """Writes one self-contained HTML page about a run, finished or not: curves, lambda and q, times,
    accuracy per class, test episodes, findings, config. Returns where it is: `out`, or the first free
    of NAME-report.html, NAME-report-2.html, ... in the current folder.

    `episodes`: how many test episodes are tested again (None: 100, or as many as the run's evaluation
    has, where that is less). `force`: whether `out` may replace a file. Objects, classes, `overrides`
    and `trust` as for `evaluate`. Raises ConfigError where `out` exists, where the folder is no run's,
    or comes from elsewhere and would execute something.
    """
    from bomemeta.page.run_page import write_report as write

    keys = objects_of(problem, solver, data)
    return write(
        run_dir, out, episodes=episodes, force=force, overrides=overrides, keys=keys, trust=trust, say=say
    )  # fmt: skip
