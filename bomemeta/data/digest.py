"""What a data set is, in a few texts and numbers that a checkpoint can carry, and whether labelled
rows are what they are taken for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bomemeta.data.labelled import PARTS, Examples, LabelledArrays
from bomemeta.data.newsgroups import DocumentSource
from bomemeta.data.pictures import Picture, picture_or_none
from bomemeta.errors import CheckpointError, DataError

# So many classes' names and counts are in a digest; of more there is a hash.
LISTED = 100
SHOWN = 8
SHOWN_TEXT = 60  # characters of a value that a message shows


def digest_of(problem: Any) -> dict[str, Any]:
    """Looks at the problem's data as the problem does (`check_data`), or else by the data set's kind.
    A data set's own `digest()`, a text, is taken in. Raises DataError where it is not what the
    problem takes it for; empty where there is no data, or nothing to tell it by.
    """
    data, found = problem.data, problem.check_data()
    if data is None:
        return dict(found)
    if not found and isinstance(data, LabelledArrays):
        check_rows(data, problem.dtype)
        found = digest_of_rows(data)
    elif not found and isinstance(data, DocumentSource):
        found = digest_of_documents(data)
    if hasattr(data, "digest"):
        digest = data.digest() if callable(data.digest) else data.digest
        found = {"data set": type(data).__name__, **found, "content": str(digest)}
    return dict(found)


def digest_of_rows(data: LabelledArrays) -> dict[str, Any]:
    """Class names, and of each part its size, counts of the classes and a hash of its content. A few
    GB a second are read.
    """
    found: dict[str, Any] = {"data set": type(data).__name__, "number of classes": data.classes}
    names = getattr(data, "class_names", None)
    if names is not None:
        found["classes"] = _listed(list(names))
    if isinstance(picture := picture_or_none(data), Picture):
        found["picture"] = list(picture)
    for part in PARTS:
        inputs, labels = data.examples(part)[:2]
        found |= {
            f"{part} rows": len(labels),
            f"{part} row": f"{inputs.shape[1]} of {str(inputs.dtype).removeprefix('torch.')}",
            f"{part} rows of each class": _counts(labels, data.classes),
            f"{part} inputs": sha256(inputs),
            f"{part} labels": sha256(labels),
        }
    return found


def digest_of_documents(data: DocumentSource) -> dict[str, Any]:
    """The same of sparse rows."""
    found: dict[str, Any] = {
        "data set": type(data).__name__,
        "number of classes": data.classes,
        "features": data.features,
    }
    for part in PARTS:
        documents = data.documents(part)
        found |= {
            f"{part} rows": len(documents.label),
            f"{part} rows of each class": _counts(documents.label, data.classes),
            f"{part} inputs": sha256(documents.row_start, documents.column, documents.value),
            f"{part} labels": sha256(documents.label),
        }
    return found


def as_texts(digest: Mapping[str, Any]) -> dict[str, str]:
    """As a checkpoint carries it."""
    return {name: json.dumps(value) for name, value in digest.items()}


def changes(before: Mapping[str, str], now: Mapping[str, Any]) -> list[str]:
    """What differs from a checkpoint's digest, a line each: `train rows: 100 there, 90 now`. An
    entry that one of them has not is no difference: versions may list more.
    """
    texts = as_texts(now)
    return [
        f"{name}: {_text(before[name])} there, {_text(texts[name])} now"
        for name in before
        if name in texts and before[name] != texts[name]
    ]


def check_same_data(before: Mapping[str, str], now: Mapping[str, Any], step: int) -> None:
    """Raises CheckpointError where the data is not that of the steps before `step`."""
    if differing := changes(before, now):
        raise CheckpointError(
            f"the data is not what the run was trained on up to step {step}:\n"
            + "\n".join(f"  {line}" for line in differing)
            + "\nPut the earlier data back to resume, or start a new run with `bomemeta train`"
        )


def other_data(before: Mapping[str, str], now: Mapping[str, Any]) -> list[str]:
    """Says, as a note, what differs from the data of training."""
    text = "; ".join(changes(before, now))
    return [f"measured on other data than that of training: {text}"] if text else []


def sha256(*tensors: Tensor) -> str:
    """Of the tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_rows(data: LabelledArrays, dtype: torch.dtype | None = None) -> None:
    """Raises DataError where rows or labels are not those of `LabelledArrays`: it names the class of
    the data set, the part, what was got and what was wanted. `dtype`: the run's, which is to hold them.
    """
    name = type(data).__name__
    for part in PARTS:
        where, examples = f"{name}, part {part}", data.examples(part)
        _check_form(examples, data.features, where)
        if dtype is not None and examples.inputs.dtype == torch.float64:
            _check_range(examples.inputs, dtype, where)
        labels = examples.labels
        least, most = int(labels.min()), int(labels.max())
        if least < 0 or most >= data.classes:
            raise DataError(
                f"{where}: labels are {least} to {most}. Wanted 0 to {data.classes - 1}, for classes = {data.classes}"
            )
    counts = torch.bincount(data.examples("train").labels, minlength=data.classes)
    if empty := (counts == 0).nonzero()[:, 0].tolist():
        raise DataError(
            f"{name}, part train: no row of class {', '.join(map(str, empty[:SHOWN]))}{', ...' if len(empty) > SHOWN else ''}. Wanted rows "
            f"of each of its {data.classes} classes: a class without rows makes chance and the shares of wrong labels wrong. Count "
            "classes without gaps"
        )


def _check_form(examples: Examples, features: int, where: str) -> None:
    inputs, labels = examples.inputs, examples.labels
    if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        raise DataError(f"{where}: inputs are {inputs.dtype}. Wanted uint8 or floats")
    if len(inputs) == 0 or inputs.shape[1:] != (features,):
        raise DataError(
            f"{where}: inputs are {list(inputs.shape)}. Wanted [n, {features}], for features = {features}"
        )
    if labels.dtype != torch.int64 or labels.shape != (len(inputs),):
        raise DataError(
            f"{where}: labels are {labels.dtype} {list(labels.shape)}. Wanted int64 [{len(inputs)}]"
        )
    if inputs.is_floating_point() and not math.isfinite(float(inputs.sum(dtype=torch.float64))):
        rows = (~inputs.isfinite().all(1)).nonzero()[:, 0]
        if len(rows):
            raise DataError(
                f"{where}: NaN or infinite numbers in {len(rows)} of {len(inputs)} rows (first in row {int(rows[0])}). Wanted finite "
                "numbers"
            )


def _check_range(inputs: Tensor, dtype: torch.dtype, where: str) -> None:
    most = torch.finfo(dtype).max
    rows = (inputs.abs() > most).any(1).nonzero()[:, 0]
    if len(rows):
        kind = str(dtype).removeprefix("torch.")
        raise DataError(
            f"{where}: numbers up to {float(inputs.abs().max()):.3g} in {len(rows)} of {len(inputs)} rows (first in row {int(rows[0])}); "
            f"the run's dtype {kind} holds {most:.3g} at most. Scale the data, or set dtype=float64"
        )


def _counts(labels: Tensor, classes: int) -> Any:
    return _listed(torch.bincount(labels, minlength=classes).tolist())


def _listed(values: list[Any]) -> Any:
    if len(values) <= LISTED:
        return values
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _text(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else f"{text[: SHOWN_TEXT - 3]}..."
