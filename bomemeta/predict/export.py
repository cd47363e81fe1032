"""A fitted classifier as one graph: images float32 `[n, C, H, W]`, preprocessed, to logits
`[n, classes]` and features `[n, d]`; n may vary.
"""

from __future__ import annotations

import importlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from bomemeta.errors import BomemetaError, ConfigError
from bomemeta.files import written_whole
from bomemeta.predict.task import Task, images_of

if TYPE_CHECKING:
    from bomemeta.predict.classifier import FewShotClassifier

SUFFIXES = {".pt2": "torch.export", ".onnx": "onnx"}
# Two runtimes add in another order: in float32 logits of a few units then agree to some 1e-5.
TOLERANCE = 1e-3
PROBES = 3  # images that the exported graph is checked with


class _Graph(nn.Module):
    """`Task` as a module."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task_module = task.module
        self._task = task

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self._task.embed(images)
        return self._task.of_features(features), features


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
    task, model = classifier.task(), classifier.trained
    assert model.preprocessing is not None, "a classifier has one"
    generator = torch.Generator().manual_seed(0)
    shape = (PROBES, *few_shape(classifier))
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    images = images_of(model, pixels).float()
    graph = _Graph(task).eval()
    wanted = [tensor.float() for tensor in graph(images)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            data = (
                _torch_export(graph, images) if chosen == "torch.export" else _onnx(graph, images)
            )
            got = _run(data, chosen, images)
    except ImportError as error:
        raise ConfigError(
            f"export: {chosen} needs {error.name}; install it with pip install 'bomemeta[onnx]'"
        ) from error
    except Exception as error:  # whatever an exporter raises about a user's network
        raise BomemetaError(
            f"export: this network cannot be exported as {chosen}: {error}"
        ) from error
    for name, mine, theirs in zip(("logits", "features"), wanted, got, strict=True):
        worst = float((mine - theirs).abs().max())
        if not worst <= TOLERANCE * max(1.0, float(mine.abs().max())):
            raise BomemetaError(
                f"export: the graph's {name} differ by {worst:.3g} from the original's"
            )
    with written_whole(file) as stream:
        stream.write(data)
    return file


def few_shape(classifier: FewShotClassifier) -> tuple[int, int, int]:
    """(channels, height, width) of what the graph is given."""
    preprocessing = classifier.trained.preprocessing
    assert preprocessing is not None, "a classifier has one"
    return preprocessing.channels, preprocessing.height, preprocessing.width


def _torch_export(graph: nn.Module, images: Tensor) -> bytes:
    n = torch.export.Dim("n", min=1, max=1 << 16)
    program = torch.export.export(graph, (images,), dynamic_shapes=({0: n},))
    out = io.BytesIO()
    torch.export.save(program, out)
    return out.getvalue()


def _onnx(graph: nn.Module, images: Tensor) -> bytes:
    importlib.import_module("onnxscript")
    n = torch.export.Dim("n", min=1, max=1 << 16)
    program = torch.onnx.export(
        graph,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: n},),
        input_names=["images"],
        output_names=["logits", "features"],
        verbose=False,
    )
    assert program is not None, "dynamo's exporter returns the program"
    return bytes(program.model_proto.SerializeToString())


def _run(data: bytes, kind: str, images: Tensor) -> list[Tensor]:
    """The exported graph's own answers, to two numbers of images."""
    if kind == "torch.export":
        module = torch.export.load(io.BytesIO(data)).module()
        return _joined([list(module(part)) for part in (images[:1], images[1:])])
    session = importlib.import_module("onnxruntime").InferenceSession(data)
    answers = [session.run(None, {"images": part.numpy()}) for part in (images[:1], images[1:])]
    return _joined([[torch.from_numpy(array) for array in answer] for answer in answers])


def _joined(answers: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*answers, strict=True)]
