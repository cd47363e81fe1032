"""A classifier in a folder: JSON and safetensors, nothing that is executed when it is read.

    classifier.json        config, preprocessing, classes, policy, digests
    model.safetensors      x, and the network's tensors that are no part of it
    head.safetensors       the fitted head: kilobytes
    examples.safetensors   the examples, for `add_examples`; may be left out

Classifiers of many tasks on one backbone may share it: with `shared` no model.safetensors is
written, its content hash is in classifier.json, and `load` is given the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from bomemeta.core.tree import Params
from bomemeta.data.preprocessing import Preprocessing
from bomemeta.errors import ConfigError
from bomemeta.files import written_whole
from bomemeta.predict.inputs import ClassExamples, class_array
from bomemeta.predict.model import TrainedModel
from bomemeta.predict.norms import Moments
from bomemeta.predict.task import Head, Task, few_shot
from bomemeta.problems.few_shot_predict import for_classes, frozen
from bomemeta.trust import check

if TYPE_CHECKING:
    from bomemeta.predict.classifier import FewShotClassifier

FORMAT = 1
DESCRIPTION = "classifier.json"
MODEL, HEAD, EXAMPLES = "model.safetensors", "head.safetensors", "examples.safetensors"


def is_saved(folder: Path) -> bool:
    """Whether the folder is one that `save` wrote."""
    return (folder / DESCRIPTION).is_file()


def save(classifier: FewShotClassifier, folder: Path, examples: bool, shared: bool = False) -> Path:
    """Writes a fitted classifier into a new folder, which it returns; `shared`: without its model.

    Raises ConfigError where the folder holds something, and where a class's name is no number, text
    or truth value.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; a classifier overwrites nothing")
    task = classifier.task()
    model = classifier.trained
    names = classifier.classes_.tolist()
    odd = next((name for name in names if not isinstance(name, str | int | float | bool)), None)
    if odd is not None:
        raise ConfigError(
            f"class {odd!r} is a {type(odd).__name__}; a file holds numbers and texts"
        )
    if model.preprocessing is None:
        raise ConfigError("this model has no preprocessing to save")
    head = task.head
    files: dict[str, dict[str, Tensor]] = {
        MODEL: _model_tensors(model),
        HEAD: {"weight": head.weight, "prototypes": head.prototypes}
        | _prefixed("network", head.network)
        | _prefixed("mean", {name: found.mean for name, found in head.moments.items()})
        | _prefixed("variance", {name: found.variance for name, found in head.moments.items()}),
    }
    if examples:
        kept = classifier.examples()
        files[EXAMPLES] = {"pixels": kept.pixels, "labels": kept.labels}
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, tensors in files.items():
        data = dump_tensors({key: tensor.contiguous() for key, tensor in tensors.items()})
        digests[name] = hashlib.sha256(data).hexdigest()
        if name == MODEL and shared:
            continue
        with written_whole(folder / name) as stream:
            stream.write(data)
    options = classifier.get_params(deep=False)
    description = {
        "format": FORMAT,
        "config": {**model.config, "output_dir": None},
        "preprocessing": model.preprocessing.to_dict(),
        "options": {name: value for name, value in options.items() if name != "model"},
        "classes": names,
        "examples_per_class": classifier.n_examples_.tolist(),
        "sha256": digests,
    }
    with written_whole(folder / DESCRIPTION) as stream:  # last: what is not whole is no classifier
        stream.write((json.dumps(description, indent=1) + "\n").encode())
    return folder


def load(
    folder: Path, shared: TrainedModel | None = None, *, trust: bool = False
) -> FewShotClassifier:
    """What `save` wrote; `shared`: the model, where it was saved without. Raises ConfigError where a
    file is missing or was changed, or belongs to another model, or is not trusted.
    """
    from bomemeta.predict.classifier import FewShotClassifier

    folder = folder.expanduser().absolute()
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise ConfigError(
                f"{folder} has format {description['format']}; this version reads {FORMAT}"
            )
        preprocessing = Preprocessing.from_dict(description["preprocessing"])
        sizes, names = description["examples_per_class"], description["classes"]
        digests, config = description["sha256"], description["config"]
        options = description["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / DESCRIPTION} cannot be read: {error!r}") from error
    if shared is not None and digests[MODEL] != model_digest(shared):
        raise ConfigError(f"{folder} was fitted on another network than the one that is served")
    own = [name for name in digests if shared is None or name != MODEL]
    stored = {name: _tensors(folder / name, digests[name]) for name in own}
    if shared is None:
        check(config, folder, trust=trust)
    model = shared or TrainedModel.of_config(
        config, _without("x", stored[MODEL]), preprocessing, _without("frozen", stored[MODEL])
    )
    tensors = stored[HEAD]
    means, variances = _without("mean", tensors), _without("variance", tensors)
    moments = {name: Moments(means[name], variances[name]) for name in means}
    head = Head(tensors["weight"], tensors["prototypes"], moments, _without("network", tensors))
    task = Task(model, for_classes(few_shot(model), sizes), head)
    classes = class_array(names)
    kept = None
    if EXAMPLES in stored:
        kept = ClassExamples(stored[EXAMPLES]["pixels"], stored[EXAMPLES]["labels"], classes)
    return FewShotClassifier(model, **options).restored(task, classes, sizes, kept)


def model_digest(model: TrainedModel) -> str:
    """The SHA-256 of model.safetensors, as classifier.json has it."""
    tensors = {key: tensor.contiguous() for key, tensor in _model_tensors(model).items()}
    return hashlib.sha256(dump_tensors(tensors)).hexdigest()


def _model_tensors(model: TrainedModel) -> dict[str, Tensor]:
    return _prefixed("x", model.upper) | _prefixed("frozen", frozen(few_shot(model)))


def _tensors(file: Path, digest: str) -> Params:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise ConfigError(f"{file} was changed or damaged: its digest is not that of {DESCRIPTION}")
    tensors: Params = load_tensors(data)
    return tensors


def _prefixed(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {f"{group}/{name}": tensor for name, tensor in tensors.items()}


def _without(group: str, tensors: Params) -> Params:
    start = f"{group}/"
    found = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    return {name: torch.as_tensor(tensor) for name, tensor in found.items()}
