"""A stream that continues with other files' data: what was appended, and the stream as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict  # pydantic does not take typing's before Python 3.12

from bomemeta.data.digest import check_rows, digest_of_rows
from bomemeta.data.labelled import LabelledArray, LabelledArrays
from bomemeta.data.pictures import picture_or_none
from bomemeta.data.streams import Kind, Stream, StreamSpec, build_stream, joined
from bomemeta.errors import ConfigError, DataError

SHOWN = 5  # classes that a message names


class AppendedData(TypedDict):
    """One entry of `problem.appended`: a file as of data set `labelled_array`, and how many tasks are
    made of it.
    """

    path: str
    tasks: Annotated[int, Field(ge=1)]


class Whole(NamedTuple):
    """The stream with everything that was appended to it."""

    stream: Stream
    digest: dict[str, Any]  # of the appended data
    class_names: list[Any]  # of all classes, in the order of their numbers


def whole_stream(data: LabelledArrays, spec: StreamSpec, appended: Sequence[AppendedData]) -> Whole:
    """`spec` is of the data set's own tasks. Raises DataError where an appended file does not continue
    it.
    """
    names = names_of(data)
    streams, numbers = [build_stream(data, spec)], [torch.arange(data.classes)]
    digest: dict[str, Any] = {}
    first, each = spec.tasks, len(_one_task(streams[0]))
    for i, addition in enumerate(appended):
        more = opened(addition["path"], data)
        _check_alike(data, more, addition["path"])
        number = _numbers(names, more, spec.kind, addition["path"])
        its = replace(
            spec,
            tasks=addition["tasks"],
            first=first,
            turn=spec.tasks,
            classes_per_task=each if spec.kind == "split" else None,
        )
        streams.append(build_stream(more, its))
        numbers.append(number)
        digest |= {f"appended {i}: {name}": value for name, value in digest_of_rows(more).items()}
        first += addition["tasks"]
    return Whole(joined(streams, numbers) if appended else streams[0], digest, names)


def tasks_in(path: str, kind: Kind, classes_per_task: int) -> int:
    """How many tasks a file makes if nobody says it: one, or with `split` as many as its classes give.
    Raises ConfigError where they do not come out even.
    """
    if kind != "split":
        return 1
    classes = opened(path).classes
    if classes % classes_per_task:
        raise ConfigError(
            f"--data: {path} has {classes} classes, and a task of this stream has {classes_per_task}: "
            f"wanted a multiple, or --tasks {max(classes // classes_per_task, 1)}, which leaves classes out"
        )
    return classes // classes_per_task


def opened(
    path: str, like: LabelledArrays | None = None, dtype: torch.dtype | None = None
) -> LabelledArray:
    """The file, its rows folded to pictures as those of `like` are where that is such a file too."""
    options: dict[str, Any] = {}
    if isinstance(like, LabelledArray):
        options = {"image_shape": like.image_shape, "channels": like.channels}
    data = LabelledArray(path=path, **options)
    data.prepare()
    check_rows(data, dtype)
    return data


def names_of(data: LabelledArrays) -> list[Any]:
    """What its classes are called, or else their numbers. A list of its own."""
    return list(getattr(data, "class_names", range(data.classes)))


def _one_task(stream: Stream) -> list[int]:
    return [int(label) for label in stream.allowed[0].nonzero()[:, 0]]


def _check_alike(data: LabelledArrays, more: LabelledArrays, path: str) -> None:
    """One row of the stream is to be as good as another."""
    for part in ("train", "test"):
        theirs, ours = more.examples(part).inputs, data.examples(part).inputs
        if theirs.shape[1:] != ours.shape[1:] or theirs.dtype != ours.dtype:
            raise DataError(
                f"{path}: rows of x_{part} are {theirs.shape[1]} of {theirs.dtype}; the stream's are "
                f"{ours.shape[1]} of {ours.dtype}. Wanted rows like the stream's"
            )
    theirs_picture, ours_picture = picture_or_none(more), picture_or_none(data)
    if theirs_picture and ours_picture and theirs_picture != ours_picture:
        raise DataError(
            f"{path}: a row is a picture [C, H, W] = {list(theirs_picture.shape)}; the stream's are {list(ours_picture.shape)}"
        )


def _numbers(names: list[Any], more: LabelledArray, kind: Kind, path: str) -> Tensor:
    """Which class of the whole stream each class of the file is; new ones are added to `names`."""
    theirs = names_of(more)
    there = [name for name in theirs if name in names]
    if kind == "split":
        if there:
            raise DataError(
                f"{path}: the stream has {_listed(there)} already. A task of a split stream has classes of its "
                "own: give new classes other labels"
            )
        names += theirs
    elif len(there) < len(theirs):
        unknown = [name for name in theirs if name not in names]
        raise DataError(
            f"{path}: the stream has no {_listed(unknown)}; it has {_listed(names)}. With stream: {kind} all "
            "tasks have the same classes"
        )
    return torch.tensor([names.index(name) for name in theirs])


def _listed(names: Sequence[Any]) -> str:
    shown = ", ".join(map(str, names[:SHOWN]))
    return f"class{'es' if len(names) > 1 else ''} {shown}{', ...' if len(names) > SHOWN else ''}"
