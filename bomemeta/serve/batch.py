"""Predictions for many images through Ray Data: of folders or a bucket, on the workers of a cluster."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from pyarrow.fs import FileSelector, FileSystem, FileType

from bomemeta.data.image_files import SUFFIXES
from bomemeta.distributed.cluster import RayOptions, joined, local, must_start
from bomemeta.errors import ClusterError, DataError
from bomemeta.predict.classifier import few_shot_classifier
from bomemeta.predict.inputs import labelled_files
from bomemeta.storage import is_uri

PART = 64  # images of one call


class ServedRow(NamedTuple):
    """One image: the probabilities of all classes, or why it has none."""

    path: str
    probabilities: list[float] | None
    reason: str


class _Predicts:
    """A worker: the classifier's files travel to it, so it need not see the folder. It reads the
    images itself.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self._classifier = few_shot_classifier(folder, trust=True)  # `predictions` has asked

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows of `path`, as rows of an Answer; of an image that has none the probabilities are NaN."""
        paths = batch["path"].tolist()
        rows: list[Any] = [None] * len(paths)
        reasons = [""] * len(paths)
        images: dict[int, bytes] = {}
        for i, path in enumerate(paths):
            try:
                images[i] = _content(path)
            except (OSError, ValueError) as error:
                reasons[i] = f"{path} cannot be read: {error}"
        try:
            found: Any = self._classifier.predict_proba([*images.values()]) if images else []
            for i, row in zip(images, found, strict=True):
                rows[i] = row
        except DataError:  # one of them: ask each alone
            for i, image in images.items():
                try:
                    rows[i] = self._classifier.predict_proba([image])[0]
                except DataError as error:
                    reasons[i] = str(error).replace("image 0", paths[i], 1)
        ways = len(self._classifier.classes_)
        filled = [np.full(ways, np.nan) if row is None else row for row in rows]
        return {"path": batch["path"], "probabilities": np.stack(filled), "reason": reasons}


def _content(path: str) -> bytes:
    if not is_uri(path):
        return Path(path).read_bytes()
    system, inside = FileSystem.from_uri(path)
    with system.open_input_file(inside) as file:
        content: bytes = file.read()
    return content


@contextmanager
def predictions(
    clf: Path,
    paths: Sequence[str],
    workers: int,
    *,
    address: str | None,
    trust: bool,
    say: Callable[[str], None],
) -> Iterator[tuple[list[str], int, Iterator[ServedRow]]]:
    """The classes' names, how many images there are, and an answer for each, in the order of the paths. Each is a file, a
    folder of images, or a URI as in s3://BUCKET/FOLDER.

    Raises DataError where there are no images, ClusterError where the workers cannot be had.
    """
    classifier = few_shot_classifier(clf, trust=trust)
    names = [str(name) for name in classifier.classes_.tolist()]
    files = {path.name: path.read_bytes() for path in sorted(clf.iterdir()) if path.is_file()}
    images = [image for path in paths for image in _images(path)]
    options = RayOptions(workers=workers, address=address)
    with ExitStack() as stack:
        stack.enter_context(local(options, say) if must_start(options) else joined(options))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield names, len(images), _answers(images, files, workers)


def _images(path: str) -> list[str]:
    """The images at a path or a URI, sorted; a file is itself. Raises DataError where there are none."""
    if not is_uri(path):
        if not Path(path).is_dir():
            return [str(Path(path).absolute())]
        return [str(file.absolute()) for file, _ in labelled_files(path)]
    try:
        system, inside = FileSystem.from_uri(path)
        there = system.get_file_info(inside)
        if there.type == FileType.File:
            return [path]
        below = system.get_file_info(FileSelector(inside, recursive=True, allow_not_found=True))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be looked into: {error}") from error
    start = path.rstrip("/")
    found = sorted(
        start + file.path.removeprefix(inside.rstrip("/"))
        for file in below
        if file.type == FileType.File and Path(file.path).suffix.lower() in SUFFIXES
    )
    if not found:
        raise DataError(f"{path}: no images; wanted .jpg, .png, ...")
    return found


def _answers(images: Sequence[str], files: dict[str, bytes], workers: int) -> Iterator[ServedRow]:
    blocks = -(-len(images) // PART)
    rows = ray.data.from_items([{"path": path} for path in images], override_num_blocks=blocks)
    found = rows.map_batches(
        _Predicts,
        fn_constructor_kwargs={"files": files},
        batch_size=PART,
        concurrency=min(workers, blocks),
        num_cpus=1,
    )
    try:
        for row in found.iter_rows():
            reason = str(row["reason"])
            known = None if reason else row["probabilities"].tolist()
            yield ServedRow(str(row["path"]), known, reason)
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the workers could not predict: {error}") from error
