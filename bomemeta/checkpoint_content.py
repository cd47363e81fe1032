"""What a checkpoint must hold: words for everything that was edited, left out or written by another
program.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bomemeta.boundary import reason
from bomemeta.core.problem import Problem, SharedProblem
from bomemeta.core.tree import Params
from bomemeta.core.upper import UpperVariable
from bomemeta.errors import CheckpointError

SOLVER_KEYS = ("optimizer", "lower_layout", "memory", "metrics", "history")
_PLAIN = (Tensor, str, int, float, bool, type(None))


def fault_in(
    values: Mapping[Any, Any], names: Sequence[str], optional: Mapping[str, Any], trusted: bool
) -> str | None:
    """What is wrong with the entries of a file, whatever run it is of; None where nothing is.

    `trusted`: a run wrote them, as they are; numbers that are not finite are then its own.
    """
    for name in names:
        if name not in values and name not in optional:
            return f"{name} is missing"
    for name in values:
        if name not in names:
            return f"{name!r} is not an entry of a checkpoint"
    step = values["step"]
    if not _whole(step):
        return f"step is {_described(step)}, wanted a whole number >= 0"
    for name in ("upper", "solver", "lower", "config", "data", "files"):
        if name in values and not isinstance(values[name], dict):
            return f"{name} is {_described(values[name])}, wanted a mapping"
    for name, tensor in values["upper"].items():
        if not isinstance(name, str) or (fault := _not_numbers(tensor, trusted)):
            return f"upper.{name} is {fault if isinstance(name, str) else 'no name'}"
    for task, tensor in values["lower"].items():
        if not _whole(task):
            return f"lower has a task {_described(task)}, wanted whole numbers >= 0"
        if fault := _not_numbers(tensor, trusted):
            return f"lower.{task} is {fault}"
    for section in ("data", "files"):
        for name, digest in values.get(section, {}).items():
            if not isinstance(name, str) or not isinstance(digest, str):
                return f"{section}.{name} is {_described(digest)}, wanted a digest as text"
    if (odd := _odd_in(values["solver"])) is not None:
        return f"solver holds {_described(odd)}"
    return _layout_fault(values["solver"].get("lower_layout"), values["lower"])


def check_fits(
    checkpoint: Any,
    problem: Problem,
    upper: UpperVariable,
    memory: Params,
    tasks_per_step: int | None,
) -> None:
    """Raises CheckpointError naming the entries with which the run cannot resume. `upper` and `memory`
    are those of the run's start.
    """
    dtype, tasks = problem.dtype, _tasks_after_a_step(problem, tasks_per_step)
    step, solver, lower = checkpoint.step, checkpoint.solver, checkpoint.lower
    wrong: list[str] = []
    wrong += _differing("upper", upper.params, checkpoint.upper)
    for name in SOLVER_KEYS:
        if name not in solver:
            wrong.append(f"  solver.{name}: missing")
    for name in ("optimizer", "memory", "metrics"):
        if name in solver and not isinstance(solver[name], dict):
            wrong.append(f"  solver.{name}: {_described(solver[name])}, wanted a mapping")
    if isinstance(solver.get("memory"), dict):
        wrong += _differing("solver.memory", memory, solver["memory"])
    if isinstance(solver.get("metrics"), dict):
        wrong += _not_metrics("solver.metrics", solver["metrics"])
    history = solver.get("history", [])
    if not isinstance(history, list) or not all(isinstance(each, dict) for each in history):
        wrong.append(f"  solver.history: {_described(history)}, wanted a list of mappings")
    else:
        wrong += [line for each in history for line in _not_metrics("solver.history", each)]
    for task, tensor in lower.items():
        if tensor.dtype != dtype:
            wrong.append(f"  lower.{task}: {tensor.dtype}, wanted {dtype}")
    if tasks is not None and step > 0 and sorted(lower) != list(range(tasks)):
        missing = sorted(set(range(tasks)) - set(lower))
        more = sorted(set(lower) - set(range(tasks)))
        wrong.append(
            f"  lower: {len(lower)} tasks, wanted 0 to {tasks - 1}"
            + (f"; missing: {_few(missing)}" if missing else "")
            + (f"; unknown: {_few(more)}" if more else "")
        )
    if not wrong:
        wrong += _optimizer_fault(upper, checkpoint)
    if wrong:
        raise CheckpointError(
            f"the checkpoint of step {step} does not fit the config's problem and solver:\n"
            + "\n".join(wrong)
            + "\nSet the config back. Where the file was changed by hand, remove it, to resume from the one before it"
        )


def _optimizer_fault(upper: UpperVariable, checkpoint: Any) -> list[str]:
    """The optimiser's state must take a step: on a copy, along a direction of zeros."""
    state = checkpoint.solver["optimizer"]
    size = sum(tensor.numel() for tensor in upper.params.values())
    dtypes = {tensor.dtype for tensor in upper.params.values()}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1:
            if value.numel() != size or value.dtype not in dtypes:
                return [f"  solver.optimizer.{name}: {_described(value)}, x has {size} numbers"]
        elif not isinstance(value, Tensor) and not _whole(value):
            return [f"  solver.optimizer.{name}: {_described(value)}, wanted a whole number"]
    try:
        probe = copy.deepcopy(upper)
        probe.load(checkpoint.upper, copy.deepcopy(state))
        probe.move(
            {name: torch.zeros_like(tensor) for name, tensor in upper.params.items()},
            checkpoint.step,
            lambda params: params,
        )
        known = set(probe.state_dict())
    except Exception as error:  # whatever an optimiser makes of another one's state
        return [f"  solver.optimizer: no step can be taken with it ({reason(error)})"]
    if state.keys() != known and checkpoint.step > 0:
        return [f"  solver.optimizer: has {sorted(state)}, wanted {sorted(known)}"]
    return []


def _layout_fault(layout: Any, lower: Mapping[int, Tensor]) -> str | None:
    if layout is None:
        return None
    if not isinstance(layout, list | tuple):
        return f"solver.lower_layout is {_described(layout)}, wanted a list"
    size = 0
    for entry in layout:
        if not (
            isinstance(entry, list | tuple)
            and len(entry) == 3
            and isinstance(entry[0], str)
            and (entry[1] is None or isinstance(entry[1], str))
            and isinstance(entry[2], list | tuple)
            and all(_whole(length) for length in entry[2])
        ):
            return f"solver.lower_layout has {_described(entry)}, wanted (group, name, shape)"
        size += math.prod(entry[2])
    for task, tensor in lower.items():
        if tensor.shape != (size,):
            return f"lower.{task} has the shape {list(tensor.shape)}, wanted [{size}]"
    return None


def _differing(above: str, wanted: Params, got: Mapping[str, Any]) -> list[str]:
    """Lines for what one has and the other has not, and for other shapes and dtypes."""
    lines = []
    for name in sorted({*wanted, *map(str, got)}):
        want, found = wanted.get(name), got.get(name)
        if want is None or not isinstance(found, Tensor):
            got_text = "missing" if name not in got else _described(found)
            lines.append(f"  {above}.{name}: checkpoint {got_text}, config {_described(want)}")
        elif found.shape != want.shape or found.dtype != want.dtype:
            lines.append(
                f"  {above}.{name}: checkpoint {_described(found)}, config {_described(want)}"
            )
    return lines


def _not_metrics(above: str, values: Mapping[Any, Any]) -> list[str]:
    return [
        f"  {above}.{name}: {_described(value)}, wanted a number"
        for name, value in values.items()
        if not isinstance(name, str)
        or isinstance(value, bool)
        or not isinstance(value, int | float)
    ]


def _not_numbers(value: Any, trusted: bool) -> str | None:
    if not isinstance(value, Tensor):
        return f"{_described(value)}, wanted a tensor"
    if value.layout != torch.strided or value.is_quantized or value.is_complex():
        return f"{_described(value)}, wanted a dense one of real numbers"
    if not trusted and not bool(torch.isfinite(value).all()):
        return "not finite (NaN or infinite numbers)"
    return None


def _odd_in(value: Any, depth: int = 0) -> Any:
    """The first part of a nested value that no run writes; None where there is none."""
    if depth > 20:
        return value
    if isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str | int)]
        parts = [*odd, *(_odd_in(item, depth + 1) for item in value.values())]
    elif isinstance(value, list | tuple):
        parts = [_odd_in(item, depth + 1) for item in value]
    else:
        return None if isinstance(value, _PLAIN) else value
    return next((part for part in parts if part is not None), None)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:60]
    return f"a {type(value).__name__}" if value is not None else "nothing"


def _few(tasks: list[int]) -> str:
    return ", ".join(map(str, tasks[:8])) + (" ..." if len(tasks) > 8 else "")


def _tasks_after_a_step(problem: Problem, tasks_per_step: int | None) -> int | None:
    """How many lower states a run carries from its first step on; None where it depends on what
    was drawn.
    """
    tasks = problem.num_tasks
    if isinstance(problem, SharedProblem):
        return None
    if tasks is None:
        return 0
    return tasks if tasks_per_step is None or tasks_per_step >= tasks else None
