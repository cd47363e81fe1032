"""The examination from start to end. Nothing is written, and a cluster that is joined is left as it
was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bomemeta.assembly import build_problem, build_solver, torch_threads
from bomemeta.config import Config, load_config
from bomemeta.copies import copy_of
from bomemeta.core.problem import Problem, SharedProblem
from bomemeta.data.digest import digest_of
from bomemeta.doctor import (
    bundles,
    data,
    machine,
    memory,
    nodes,
    standing,
    storage,
    together,
    traffic,
)
from bomemeta.doctor.dry import SLOW_S, Dry, DryRun, Line, TaskCounts, line_through, plan_of
from bomemeta.doctor.findings import DoctorReport, Finding, number
from bomemeta.doctor.memory import MemoryNeeds
from bomemeta.doctor.nodes import Machines, Workers
from bomemeta.errors import BomemetaError, ConfigError, DataError, DivergenceError
from bomemeta.sections import label

Say = Callable[[str], None]

# What a step on more tasks may take before two of them must do.
QUICK_S = 3.0
FEW_TASKS = 4
# What Ray's own part of a worker holds before its first call (measured with Ray 2.60: 25 MiB beside
# torch's 301).
RAY_BYTES = 26e6


def examine(
    config: str | Path | Mapping[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    say: Say = lambda text: None,
) -> DoctorReport:
    """What a run of this config will need against what is there. `say` hears what is being done.

    Raises ConfigError as `train` would. What else `train` would fail with is a PROBLEM of the
    report.
    """
    settings = load_config(config, overrides)
    name = Path(config).stem if isinstance(config, str | Path) else label(settings.problem)
    found = _devices(settings)
    machines = _machines(settings, say)
    values: dict[str, Any] = {}
    try:
        problem = build_problem(settings)
        digest_of(problem)  # looks at the data as a run does
    except DataError as error:
        found += _no_data(settings, error)
        found += bundles.bundles(
            settings, machines, nodes.workers_of(settings, machines)
        ) + _elsewhere(settings, machines)
        return DoctorReport(found + storage.output(settings, name, machines, None), values)
    with torch_threads(settings.threads):
        found += data.data(problem) + data.batch_norm(problem)
        plan = plan_of(settings, problem)
        workers = nodes.workers_of(settings, machines)
        found += bundles.bundles(settings, machines, workers) + _elsewhere(settings, machines)
        if machines.kind != "serial":
            found += bundles.bytecode(machines)
        found += bundles.shards(settings, plan, workers)
        if machines.nodes:
            found += bundles.threads(settings, machines, workers)
        needs = _dry(settings, problem, plan, machines, workers, found, values, say)
    found += storage.output(settings, name, machines, needs)
    return DoctorReport(found, values)


def _machines(config: Config, say: Say) -> Machines:
    if nodes.kind_of(config) != "cluster":
        return nodes.here(config)
    from bomemeta.doctor import cluster

    say(
        f"the cluster at {config.address or os.environ['RAY_ADDRESS']}: its nodes, and a worker built on each"
    )
    return cluster.ask(config)


def _elsewhere(config: Config, machines: Machines) -> list[Finding]:
    """The cluster, whether it lets us in, and its nodes."""
    if machines.kind == "serial":
        return []
    mode = os.environ.get("RAY_AUTH_MODE", "unset")
    if machines.error:
        return [Finding("PROBLEM", "cluster", machines.error)]
    if machines.kind == "cluster":
        text = f"joined {config.address or os.environ.get('RAY_ADDRESS')} with RAY_AUTH_MODE {mode} here: both sides agree"
        return [Finding("OK", "authentication", text), *bundles.nodes(config, machines)]
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if mode == "disabled":
        text = "RAY_AUTH_MODE=disabled here: whoever reaches the ports of the local cluster can run code, from this machine alone"
        return [Finding("NOTE", "authentication", text, "Leave RAY_AUTH_MODE unset to have tokens")]
    with suppress(OSError):
        if "RAY_AUTH_TOKEN" not in os.environ and token.stat().st_mode & 0o077:
            return [
                Finding(
                    "NOTE",
                    "authentication",
                    f"others can read the token in {token}",
                    f"chmod 600 {token}",
                )
            ]
    return [
        Finding("OK", "authentication", "a local cluster, on the loopback address, with a token")
    ]


def _devices(config: Config) -> list[Finding]:
    """What `train` refuses when it opens its transport."""
    if config.workers == 0:
        if config.device == "cuda" and not torch.cuda.is_available():
            return [
                Finding(
                    "PROBLEM",
                    "device",
                    "device: cuda, and torch sees no GPU here",
                    "Set device=cpu or device=auto",
                )
            ]
        return []
    if config.device == "cuda" and config.gpus_per_worker == 0:
        return [
            Finding(
                "PROBLEM",
                "device",
                "device: cuda with gpus_per_worker: 0: no worker would see a GPU",
                "Set gpus_per_worker=1",
            )
        ]
    if config.device == "cpu" and config.gpus_per_worker > 0:
        text = f"device: cpu with gpus_per_worker: {config.gpus_per_worker:g}"
        return [Finding("PROBLEM", "device", text, "Take one of the two out")]
    return []


def _no_data(config: Config, error: DataError) -> list[Finding]:
    found: list[Finding] = []
    if config.data is not None:
        with suppress(BomemetaError):
            source = copy_of(config.data, "data")
            source.prepare()
            found = data.shortages(config.problem, source)
    return found or [Finding("PROBLEM", "data", str(error))]


def _dry(
    config: Config, problem: Problem, plan: TaskCounts, machines: Machines, workers: Workers, found: list[Finding], values: dict[str, Any],
    say: Say,
) -> storage.Needs | None:  # fmt: skip
    """Dry steps, and the findings that follow from them; None where there could be none."""
    solver = build_solver(config, problem)
    try:
        run = DryRun(config, problem, solver)
        process = machine.process_memory() + (RAY_BYTES if machines.kind != "serial" else 0)
        say("dry steps on one task and on a few")
        dries = _few(run, problem, plan)
        measured = _measure(run, dries, plan, process, say)
        still = standing.standing(run, solver, dries[-1].tasks)
    except DivergenceError as error:
        text = f"{label(config.solver)} diverges in its first steps: {error}"
        found.append(
            Finding(
                "PROBLEM",
                "dry step",
                text,
                "Make solver.inner_lr, lower_lr or upper_lr smaller; `bomemeta check` says by how much",
            )
        )
        return None
    except (MemoryError, RuntimeError) as error:  # the CPU's allocator raises a plain RuntimeError
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate memory" not in str(error):
            raise
        found.append(
            Finding(
                "PROBLEM",
                "memory",
                f"a step on {number(1, 'task')} does not fit into this machine's memory: {error}",
            )
        )
        return None
    needs, evaluating = measured
    steps, dry, shared = run.trainer.steps, dries[-1], isinstance(problem, SharedProblem)
    joint = together.together_of(config, plan, machines, workers, dry)
    if joint is not None:
        rest = Line(needs.step.rest + joint.member, needs.step.each)
        needs = needs._replace(step=rest, driver=joint.driver)
    times = traffic.times_of(
        config,
        problem,
        plan,
        machines,
        workers,
        dries,
        line_through([(one.tasks, one.worker_s) for one in dries]),
        evaluating,
        steps,
        [(kind.steps, kind.still) for kind in still],
        joint,
    )
    disk = traffic.needs_of(config, dries, problem.num_tasks, shared, steps)
    found += memory.memory(config, plan, machines, workers, needs) + memory.inner_steps(
        config, needs
    )
    found += memory.states(config, plan, machines, workers, dry, problem.num_tasks, shared, joint)
    found += (
        traffic.traffic(config, plan, machines, workers, dry)
        if joint is None
        else [together.finding(config, machines, workers, joint)]
    )
    found += traffic.times(config, machines, workers, times, dry.tasks, steps, run.device)
    found += standing.finding(still, steps, plan.shards)
    text = f"{label(config.solver)} takes problem {label(config.problem)}; whether its direction is right, `bomemeta check` says"
    found.append(Finding("OK", "solver", text))
    values |= {
        "plan": plan._asdict(),
        "workers": workers._asdict(),
        "memory": {
            "process_bytes": needs.process,
            "step_bytes": needs.step.at(plan.largest),
            "step_bytes_per_task": needs.step.each,
            "evaluation_bytes": needs.evaluation.at(plan.evaluated) if plan.evaluated else 0.0,
            "worker_bytes": needs.process + needs.tensors(plan),
            "driver_bytes": needs.driver,
            "bytes_per_inner_step": needs.inner_steps.each if needs.inner_steps else None,
            "lower_state_bytes": dry.state_bytes * (1 if shared else problem.num_tasks or 0),
        },
        "traffic": {
            "reduces": dry.reduces,
            **traffic.traffic_of(config, plan, machines, workers, dry)._asdict(),
        },
        "together": None if joint is None else joint._asdict(),
        "seconds": times._asdict(),
        "steps_without_x": {
            kind.name: {"steps": kind.steps, **kind.still._asdict()} for kind in still
        },
        "disk": disk._asdict(),
    }
    return disk


def _few(run: DryRun, problem: Problem, plan: TaskCounts) -> list[Dry]:
    """Dry steps on one task, and on two or, where that is quick, as many as a shard has, up to
    four.
    """
    dries = [run.steps(1)]
    most = problem.num_tasks if problem.num_tasks is not None else FEW_TASKS
    quick = dries[0].step_s * FEW_TASKS < QUICK_S
    second = min(max(plan.largest, 2), FEW_TASKS if quick else 2, most)
    if second > 1:
        dries.append(run.steps(second))
    return dries


def _measure(
    run: DryRun, dries: list[Dry], plan: TaskCounts, process: float, say: Say
) -> tuple[MemoryNeeds, Line]:
    """Memory by tasks, and an evaluation's seconds by tasks."""
    evaluation, evaluating = Line(0.0, 0.0), Line(0.0, 0.0)
    if plan.evaluated:
        say("an evaluation")
        first, seconds = run.evaluation(1)
        second = min(plan.evaluated, 10 if seconds < 1 else 2)
        more = [(second, *run.evaluation(second))] if second > 1 else []
        points = [(1, first, seconds), *more]
        evaluation = line_through([(tasks, size) for tasks, size, _ in points])
        evaluating = line_through([(tasks, taken) for tasks, _, taken in points])
    by_steps = None
    steps = getattr(run.trainer.solver, "inner_steps", None)
    if isinstance(steps, int) and steps > 0 and dries[0].step_s < SLOW_S:
        say("a step with another number of inner steps")
        other = steps // 2 if steps > 1 else 2
        with suppress(ConfigError, ValueError, DivergenceError):
            by_steps = line_through(
                sorted([(steps, run.with_inner_steps(steps)), (other, run.with_inner_steps(other))])
            )
    step = line_through([(dry.tasks, dry.worker_bytes) for dry in dries])
    last = dries[-1]
    driver = last.driver_bytes + last.bytes_reduced / max(last.reduces, 1) * plan.shards
    measured = MemoryNeeds(
        process,
        step,
        evaluation,
        run.updating_memory(),
        driver,
        tuple(dry.tasks for dry in dries),
        run.device,
        by_steps,
    )
    return measured, evaluating
