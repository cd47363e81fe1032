"""What tenants ask for, as functions of bytes: fit, add examples, predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bomemeta.errors import DataError
from bomemeta.predict.classifier import FewShotClassifier, few_shot_classifier
from bomemeta.serve.tenants import Tenants, TooLate, UnknownTenant


class Image(NamedTuple):
    """An uploaded file: JPEG, PNG or whatever Pillow reads."""

    name: str
    content: bytes
    label: str | None = None


class Desk:
    """One trained network, in this process, and the tenants' folder.

    `source`: a run's folder, or a saved classifier, whose network is taken.
    """

    def __init__(self, source: str, tenants: Path, *, trust: bool = False) -> None:
        loaded = few_shot_classifier(source, trust=trust)
        self._model, self._options = loaded.trained, loaded.get_params(deep=False)
        self.tenants = Tenants(tenants)

    def classifier(self, name: str, version: int) -> FewShotClassifier:
        """A tenant's classifier. Raises ConfigError where it cannot be read."""
        return self.tenants.load(name, version, self._model)

    def fit(self, name: str, images: Sequence[Image], adds: bool) -> dict[str, Any]:
        """Fits the tenant's classifier to these images, or, with `adds`, to these and those that it
        has. What the tenant then is. Raises DataError where an image or a label is not what is
        wanted, UnknownTenant where there is nothing to add to.
        """
        unlabelled = next((image.name for image in images if not image.label), None)
        if unlabelled is not None:
            raise DataError(f"{unlabelled} has no label; every example wants one")
        pixels, labels = self._pixels(images), [image.label for image in images]
        while True:
            before = self._newest(name)
            if adds:
                if before == 0:
                    raise UnknownTenant(f"there is no tenant {name!r} yet: fit makes one")
                classifier = self.classifier(name, before).add_examples(pixels, labels)
            else:
                classifier = FewShotClassifier(**{**self._options, "model": self._model})
                classifier.fit(pixels, labels)
            try:
                self.tenants.store(name, classifier, before)
            except TooLate:
                continue
            return self.tenants.about(name)

    def predict(
        self, classifier: FewShotClassifier, images: Sequence[Image]
    ) -> list[dict[str, Any]]:
        """For each image its class, None where it is like none of them, and all probabilities.
        Raises DataError where an image cannot be read.
        """
        pixels = self._pixels(images)
        chosen, rows = classifier.predict(pixels).tolist(), classifier.predict_proba(pixels)
        names = [str(cls) for cls in classifier.classes_.tolist()]
        return [
            {
                "name": image.name,
                "class": cls,
                "probabilities": dict(zip(names, row.tolist(), strict=True)),
            }
            for image, cls, row in zip(images, chosen, rows, strict=True)
        ]

    def _newest(self, name: str) -> int:
        try:
            return self.tenants.version(name)
        except UnknownTenant:
            return 0

    def _pixels(self, images: Sequence[Image]) -> torch.Tensor:
        """uint8 [n, C, H, W]. Raises DataError naming the file."""
        if not images:
            raise DataError("no images; wanted one or more")
        preprocessing: Any = self._model.preprocessing
        found = []
        for image in images:
            try:
                found.append(preprocessing.pixels(image.content))
            except DataError as error:
                why = str(error).removeprefix("an image ")
                raise DataError(f"{image.name} {why}") from error
        return torch.from_numpy(np.stack(found))
