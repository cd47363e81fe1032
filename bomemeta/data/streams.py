"""Streams of classification tasks made of one labelled data set: the same images permuted or
turned, or its classes in groups.

    permuted   task t shuffles the numbers of every input by one permutation of its own     (Kirkpatrick et al. 2017)
    rotated    task t turns every image by t * 180 / tasks degrees                          (Lopez-Paz and Ranzato 2017)
               or, with `rotation: random`, by an angle drawn between 0 and 180 degrees     (Mammoth, Buzzega et al. 2020)
    split      task t has classes of its own                                                (Zenke et al. 2017)

Training samples come from the data set's training part, test samples from its test part; which of
them follows from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.data.labelled import GREY_LEVELS, Examples, LabelledArrays, Part
from bomemeta.data.pictures import Picture, picture_of
from bomemeta.errors import ConfigError, DataError
from bomemeta.limits import check_bytes

Kind = Literal["permuted", "rotated", "split"]
Rotation = Literal["even", "random"]
ImageShape = tuple[int, int, int]  # channels, height, width

# Second numbers of the keys of what is drawn from the seed.
ROWS, PERMUTATION, CLASSES, ANGLE = range(4)
LEAST = 2  # samples of a task: one for each kind of memory
TURN = 180.0  # degrees, over all tasks of a rotated stream


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """What a stream is to be. `samples`, `test_samples`: of each task, None: all there are."""

    kind: Kind
    tasks: int
    samples: int | None
    test_samples: int | None
    classes_per_task: int | None  # split; None: the classes in equal groups
    shuffle_classes: (
        bool  # split: groups in an order that follows from the seed, else in the classes' own
    )
    seed: int
    first: int = 0  # the number of its first task in a longer stream
    rotation: Rotation = "even"  # rotated: each task a step further, or an angle of its own
    turn: int | None = None  # rotated, even: so many tasks make half a turn; None: `tasks`


class TaskRows(NamedTuple):
    """The samples of all tasks, one task after the other; in the order in which they come."""

    examples: Examples
    tasks: Tensor  # int64 [n]
    starts: tuple[int, ...]  # task t has the rows starts[t] up to starts[t + 1]


class Stream(NamedTuple):
    train: TaskRows
    test: TaskRows
    allowed: Tensor  # bool [tasks, classes], the classes that a task has


def build_stream(data: LabelledArrays, spec: StreamSpec) -> Stream:
    """Its tasks are counted from 0, whatever `spec.first` is. Raises ConfigError where the classes
    cannot be cut so, DataError where a task has too few samples.
    """
    _transform(data, spec, spec.first)  # raises where rows are no pictures and are to be turned
    _check_memory(data, spec)
    groups = _groups(data.classes, spec)
    allowed = torch.zeros(spec.tasks, data.classes, dtype=torch.bool)
    for t, group in enumerate(groups):
        allowed[t, group] = True
    transforms = [_transform(data, spec, spec.first + t) for t in range(spec.tasks)]
    return Stream(
        _part(data, spec, "train", spec.samples, allowed, transforms),
        _part(data, spec, "test", spec.test_samples, allowed, transforms),
        allowed,
    )


def _check_memory(data: LabelledArrays, spec: StreamSpec) -> None:
    """Raises ConfigError where the samples of all tasks would take more than this machine has free."""
    wanted = 0
    for part, asked in (("train", spec.samples), ("test", spec.test_samples)):
        inputs = data.examples("train" if part == "train" else "test").inputs
        rows = asked or (len(inputs) if spec.kind != "split" else 1)
        wanted += spec.tasks * rows * inputs.shape[1] * inputs.element_size()
    check_bytes("problem.tasks", f"{spec.tasks} tasks of that many samples", wanted)


def joined(streams: Sequence[Stream], numbers: Sequence[Tensor]) -> Stream:
    """One stream after the other. `numbers[i]`, int64, is what each class of stream i is in the whole;
    classes 0, 1, ... up to the greatest of them.
    """
    classes = 1 + max(int(each.max()) for each in numbers)
    allowed = torch.zeros(sum(len(stream.allowed) for stream in streams), classes, dtype=torch.bool)
    row = 0
    for stream, number in zip(streams, numbers, strict=True):
        allowed[row : row + len(stream.allowed), number] = stream.allowed
        row += len(stream.allowed)
    return Stream(
        _joined_rows([stream.train for stream in streams], numbers),
        _joined_rows([stream.test for stream in streams], numbers),
        allowed,
    )


def _joined_rows(parts: Sequence[TaskRows], numbers: Sequence[Tensor]) -> TaskRows:
    starts, tasks = [0], []
    for part in parts:
        tasks.append(part.tasks + len(starts) - 1)
        starts += [starts[-1] + start for start in part.starts[1:]]
    inputs = torch.cat([part.examples.inputs for part in parts])
    labels = [number[part.examples.labels] for part, number in zip(parts, numbers, strict=True)]
    return TaskRows(Examples(inputs, torch.cat(labels)), torch.cat(tasks), tuple(starts))


def image_shape(data: LabelledArrays, wanted_for: str) -> ImageShape:
    """(channels, height, width) of a row. Raises ConfigError where it is not known."""
    return picture_of(data, wanted_for).shape


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Images [n, C, H, W], floats, turned counter-clockwise about their middle, bilinearly; 0 where
    nothing was.
    """
    angle = math.radians(degrees)
    height, width = images.shape[2:]
    # grid_sample counts both axes from -1 to 1: what is not square would be sheared.
    matrix = torch.tensor(
        [
            [math.cos(angle), -math.sin(angle) * height / width, 0.0],
            [math.sin(angle) * width / height, math.cos(angle), 0.0],
        ],
        dtype=images.dtype,
    )
    grid = functional.affine_grid(
        matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, grid, align_corners=False)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _groups(classes: int, spec: StreamSpec) -> list[list[int]]:
    """The classes of each task."""
    if spec.kind != "split":
        return [list(range(classes))] * spec.tasks
    each = spec.classes_per_task
    if each is None:
        if classes % spec.tasks:
            fitting = [n for n in range(2, classes + 1) if classes % n == 0]
            raise ConfigError(
                f"problem.tasks: {classes} classes do not make {spec.tasks} equal groups. Set problem.classes_per_task, or problem.tasks "
                f"to one of: {', '.join(map(str, fitting))}"
            )
        each = classes // spec.tasks
    if each * spec.tasks > classes:
        raise ConfigError(
            f"problem.tasks: {spec.tasks} tasks of {each} classes want {each * spec.tasks} classes; the data set has {classes}: make "
            "problem.tasks or problem.classes_per_task smaller"
        )
    order = (
        _generator(spec.seed, CLASSES, *([spec.first] if spec.first else [])).permutation(classes)
        if spec.shuffle_classes
        else np.arange(classes)
    )
    return [
        sorted(int(label) for label in order[t * each : (t + 1) * each]) for t in range(spec.tasks)
    ]


def _transform(data: LabelledArrays, spec: StreamSpec, task: int) -> Callable[[Tensor], Tensor]:
    """What the task does to rows [n, d], as stored."""
    if spec.kind == "permuted":
        order = torch.from_numpy(
            _generator(spec.seed, PERMUTATION, task).permutation(data.features)
        )
        return lambda rows: rows[:, order]
    if spec.kind == "rotated":
        picture = picture_of(data, "problem.stream: rotated")
        degrees = task * TURN / (spec.turn or spec.tasks)
        if spec.rotation == "random":
            degrees = float(_generator(spec.seed, ANGLE, task).uniform(0, TURN))
        return lambda rows: rows if degrees == 0 else _turned(rows, picture, degrees)
    return lambda rows: rows


def _turned(rows: Tensor, picture: Picture, degrees: float) -> Tensor:
    floats = rows.float() if rows.dtype == torch.uint8 else rows
    turned = picture.flat(rotated(picture.fold(floats), degrees))
    return (
        turned.round().clamp(0, GREY_LEVELS).to(torch.uint8)
        if rows.dtype == torch.uint8
        else turned
    )


def _part(
    data: LabelledArrays,
    spec: StreamSpec,
    part: Part,
    wanted: int | None,
    allowed: Tensor,
    transforms: list[Callable[[Tensor], Tensor]],
) -> TaskRows:
    whole = data.examples(part)
    field = "samples_per_task" if part == "train" else "test_samples_per_task"
    inputs, labels, tasks, starts = [], [], [], [0]
    for t, transform in enumerate(transforms):
        there = allowed[t][whole.labels].nonzero()[:, 0].numpy()
        least = wanted if wanted is not None else LEAST
        if len(there) < least:
            raise DataError(
                f"problem.{field}: task {spec.first + t} (classes {_listed(allowed[t])}) wants {least} samples; the {part} part of the "
                f"data set has {len(there)} of them: make it smaller, or null for all"
            )
        key = (spec.seed, ROWS, part == "test", spec.first + t)
        drawn = _generator(*key).permutation(there)[:wanted]
        chosen = torch.from_numpy(drawn)
        inputs.append(transform(whole.inputs[chosen]))
        labels.append(whole.labels[chosen])
        tasks.append(torch.full((len(chosen),), t))
        starts.append(starts[-1] + len(chosen))
    return TaskRows(Examples(torch.cat(inputs), torch.cat(labels)), torch.cat(tasks), tuple(starts))


def _listed(allowed: Tensor) -> str:
    return ", ".join(str(int(label)) for label in allowed.nonzero()[:, 0])
