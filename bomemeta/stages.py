"""A run whose stream was appended to: the stages that it goes through, each a stream like any other, and
what becomes of x, y and memory between two of them.

At a stage's end x, y and memory grow to the next stage's shapes. What was there stays; what is new is
as at that stage's start, and 0 in what an optimiser or a solver keeps. A run that has all the data from
its beginning goes through the same stages, to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bomemeta.checkpoint import Checkpoint
from bomemeta.config import Config, differing_keys
from bomemeta.core import tree
from bomemeta.core.problem import StreamProblem
from bomemeta.core.tree import Layout, Params
from bomemeta.engine import Trainer
from bomemeta.errors import CheckpointError, ConfigError


def stages_of(settings: Config) -> list[Config]:
    """The config of each stage, the last one's being the run's. Raises ConfigError where `steps` would
    end the run within them.
    """
    problem = settings.problem
    problems: Sequence[StreamProblem] = (
        problem.stages() if isinstance(problem, StreamProblem) else []
    )
    if len(problems) < 2:
        return [settings]
    if settings.steps is not None:
        raise ConfigError(
            f"steps: got {settings.steps} with data that was appended to the stream; the stream's length is the run's. Leave it out"
        )
    before = [settings.model_copy(update={"problem": each}) for each in problems[:-1]]
    return [*before, settings]


def stage_of(saved: Checkpoint, stages: Sequence[Config]) -> int:
    """The stage that a checkpoint is of; the last one where it is of none."""
    for index, settings in enumerate(stages):
        if not differing_keys(saved.config, settings):
            return index
    return len(stages) - 1


def grown(saved: Checkpoint, trainer: Trainer) -> Checkpoint:
    """A checkpoint of the end of a stage as the state at the next one's start. `trainer` is that one's,
    just started.

    Raises CheckpointError where the shapes of the next stage are not those of this one with more at
    their ends.
    """
    upper, memory = trainer.state.upper.params, trainer.state.memory
    solver = dict(saved.solver)
    optimizer = {
        name: _grown_flat(value, saved.upper, _like(name, upper))
        if isinstance(value, Tensor) and value.numel() > 1
        else value
        for name, value in solver["optimizer"].items()
    }
    x = _grown(saved.upper, upper)
    lower, layout = _grown_lower(saved, trainer, x)
    solver |= {
        "optimizer": optimizer,
        "memory": _grown(solver["memory"], memory),
        "lower_layout": layout,
    }
    return saved._replace(upper=x, lower=lower, solver=solver, config=trainer.config.to_dict())


def _like(name: str, upper: Params) -> Params:
    """What new numbers are in an array that an optimiser keeps, or in the mean of x."""
    return upper if name == "average" else tree.zeros_like(upper)


def _grown_lower(
    saved: Checkpoint, trainer: Trainer, upper: Params
) -> tuple[dict[int, Tensor], tuple[tuple[str, str | None, tuple[int, ...]], ...]]:
    """y and what the solver keeps beside it, each of them like y."""
    problem = trainer.problem
    batch = {name: value[0] for name, value in problem.load((0,), saved.step, "train").items()}
    with torch.no_grad():
        start = problem.init_lower(problem.encode(upper, batch), batch)
    old = Layout.read(saved.solver["lower_layout"])
    new = Layout.read((g, n, start[n].shape if n in start else shape) for g, n, shape in old)
    lower = {}
    for task, flat in saved.lower.items():
        found = []
        for (group, name, size), part in zip(new, old.parts(flat), strict=True):
            like = start[name] if group == "y" and name is not None else part.new_zeros(size)
            found.append(_led(f"lower.{group}.{name}", part, like).reshape(-1))
        lower[task] = torch.cat(found)
    return lower, new.plain()


def _grown_flat(flat: Tensor, old: Params, new: Params) -> Tensor:
    return tree.flatten(_grown(tree.unflatten(flat, old), new))


def _grown(old: Mapping[str, Tensor], new: Params) -> Params:
    if old.keys() != new.keys():
        raise CheckpointError(
            f"the stream cannot be appended to: before {', '.join(sorted(old))}, after {', '.join(sorted(new))}; wanted the same names"
        )
    return {name: _led(name, old[name], tensor) for name, tensor in new.items()}


def _led(name: str, old: Tensor, new: Tensor) -> Tensor:
    """`new` with `old` at the beginning of every axis."""
    if old.dim() != new.dim() or any(a > b for a, b in zip(old.shape, new.shape, strict=True)):
        raise CheckpointError(
            f"the stream cannot be appended to: {name} is {list(old.shape)} before and {list(new.shape)} after; wanted as much or more "
            "in every axis"
        )
    found = new.detach().clone().to(old.dtype)
    found[tuple(slice(0, size) for size in old.shape)] = old
    return found
