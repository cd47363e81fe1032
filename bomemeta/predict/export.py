"""A classifier as one graph, on images that are preprocessed, float32 `[n, C, H, W]`.

Fitted: images to logits `[n, classes]` and features `[n, d]`; n may vary. Not fitted yet: support
images, their labels and query images to the queries' logits and features (`predict/learner.py`).
"""

from __future__ import annotations

import importlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from sklearn.base import clone
from torch import Tensor, nn

from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.files import written_whole
from bomemeta.predict.learner import Learner
from bomemeta.predict.task import Task, images_of

if TYPE_CHECKING:
    from bomemeta.predict.classifier import FewShotClassifier

SUFFIXES = {".pt2": "torch.export", ".onnx": "onnx"}
# Two runtimes add in another order: in float32 logits of a few units then agree to some 1e-5.
TOLERANCE = 1e-3
PROBES = 3  # images that the exported graph is checked with
# Labels of support images, and numbers of queries, that a graph with the fit in it is checked with.
LEARNER_PROBES = (([0, 2, 1, 1, 0], 4), ([1, 0], 1), ([0, 1, 2, 3, 3, 3, 0], 2))
OUTPUTS = ("logits", "features")


class _Graph(nn.Module):
    """`Task` as a module."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task_module = task.module
        self._task = task

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self._task.embed(images)
        return self._task.of_features(features), features


class _Case(NamedTuple):
    """A graph, what it is checked with, and what it has to give."""

    graph: nn.Module
    inputs: dict[str, Tensor]
    varying: tuple[dict[int, Any], ...]  # of each input: axes whose sizes may vary
    checks: list[
        tuple[dict[str, Tensor], list[Tensor]]
    ]  # inputs of several sizes, logits and features


def export(
    classifier: FewShotClassifier, file: Path, format: Literal["torch.export", "onnx"] | None
) -> Path:
    """Writes the graph and checks it against the original on images of noise.

    Raises ConfigError where the format is unknown or its packages are missing, BomemetaError where
    the network cannot be exported or the exported graph computes something else.
    """
    file = file.expanduser().absolute()
    chosen = format if format is not None else SUFFIXES.get(file.suffix)
    if chosen is None or chosen not in SUFFIXES.values():
        raise ConfigError(
            f"export: got {file.name} and format {format}; wanted a name in .pt2 (torch.export) or .onnx"
        )
    if file.exists():
        raise ConfigError(f"export: {file} exists, and is not written over")
    case = _fitted(classifier) if classifier.is_fitted else _learner(classifier)
    make, run = (_torch_export, _run_torch) if chosen == "torch.export" else (_onnx, _run_onnx)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            data = make(case)
            got = run(data, [inputs for inputs, _ in case.checks])
    except ImportError as error:
        raise ConfigError(
            f"export: {chosen} needs {error.name}; install it with pip install 'bomemeta[onnx]'"
        ) from error
    except Exception as error:  # whatever an exporter raises about a user's network
        raise BomemetaError(
            f"export: this network cannot be exported as {chosen}: {error}"
        ) from error
    for (_, wanted), answers in zip(case.checks, got, strict=True):
        for name, mine, theirs in zip(OUTPUTS, wanted, answers, strict=True):
            worst = float((mine - theirs).abs().max())
            if not worst <= TOLERANCE * max(1.0, float(mine.abs().max())):
                raise BomemetaError(
                    f"export: the graph's {name} differ by {worst:.3g} from the original's"
                )
    with written_whole(file) as stream:
        stream.write(data)
    return file


def _noise(classifier: FewShotClassifier, count: int, seed: int = 0) -> Tensor:
    """Pixels uint8 `[count, C, H, W]`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, *few_shape(classifier))
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _fitted(classifier: FewShotClassifier) -> _Case:
    """Checked with one image, and with two."""
    task, model = classifier.task(), classifier.trained
    images = images_of(model, _noise(classifier, PROBES)).float()
    graph = _Graph(task).eval()
    wanted = [tensor.float() for tensor in graph(images)]
    checks = [
        ({"images": images[part]}, [tensor[part] for tensor in wanted])
        for part in (slice(1), slice(1, None))
    ]
    return _Case(graph, {"images": images}, ({0: _size("n", 1)},), checks)


def _learner(classifier: FewShotClassifier) -> _Case:
    """Checked with the classifier's own fits of other numbers of images, of classes and of queries."""
    model = classifier.trained
    graph = Learner(model, classifier.steps).eval()

    def inputs(labels: list[int], queries: int) -> dict[str, Tensor]:
        pixels = _noise(classifier, len(labels) + queries, seed=len(labels))
        images = images_of(model, pixels).float()
        one_hot = torch.nn.functional.one_hot(torch.tensor(labels)).float()
        return {"support": images[: len(labels)], "labels": one_hot, "query": images[len(labels) :]}

    checks = []
    for labels, queries in LEARNER_PROBES:
        pixels = _noise(classifier, len(labels) + queries, seed=len(labels))
        fitted = clone(classifier).fit(pixels[: len(labels)], labels)
        asked = pixels[len(labels) :]
        wanted = [fitted.decision_function(asked), fitted.transform(asked)]
        checks.append((inputs(labels, queries), [torch.from_numpy(one).float() for one in wanted]))
    several, ways, asked_for = _size("s", 2), _size("ways", 2), _size("q", 1)
    varying = ({0: several}, {0: several, 1: ways}, {0: asked_for})
    return _Case(graph, inputs(*LEARNER_PROBES[0]), varying, checks)


def _size(name: str, least: int) -> Any:
    return torch.export.Dim(name, min=least, max=1 << 16)


def few_shape(classifier: FewShotClassifier) -> tuple[int, int, int]:
    """(channels, height, width) of what the graph is given."""
    preprocessing = classifier.trained.preprocessing
    assert preprocessing is not None, "a classifier has one"
    return preprocessing.channels, preprocessing.height, preprocessing.width


def _torch_export(case: _Case) -> bytes:
    inputs = tuple(case.inputs.values())
    program = torch.export.export(case.graph, inputs, dynamic_shapes=case.varying)
    out = io.BytesIO()
    torch.export.save(program, out)
    return out.getvalue()


def _onnx(case: _Case) -> bytes:
    importlib.import_module("onnxscript")
    program = torch.onnx.export(
        case.graph,
        tuple(case.inputs.values()),
        dynamo=True,
        dynamic_shapes=case.varying,
        input_names=list(case.inputs),
        output_names=list(OUTPUTS),
        verbose=False,
    )
    assert program is not None, "dynamo's exporter returns the program"
    return bytes(program.model_proto.SerializeToString())


def _run_torch(data: bytes, asked: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    module = torch.export.load(io.BytesIO(data)).module()
    return [list(module(*inputs.values())) for inputs in asked]


def _run_onnx(data: bytes, asked: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    session = importlib.import_module("onnxruntime").InferenceSession(data)
    given = [{name: one.numpy() for name, one in inputs.items()} for inputs in asked]
    return [[torch.from_numpy(array) for array in session.run(None, one)] for one in given]
