"""A data set that costs nothing, for configs whose workers are other processes: they name this file
under `imports:`, and nothing else imports it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bomemeta.data.episodes import Episode, EpisodeSpec, Split
from bomemeta.registry import datasets


@datasets.register("device_noise")
@dataclass(kw_only=True)
class DeviceNoise:
    """Few-shot episodes of noise of Omniglot's size, drawn from their key."""

    def prepare(self) -> None:
        pass

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 28, 28

    def check(self, split: Split, spec: EpisodeSpec) -> None:
        pass

    def episode(self, split: Split, spec: EpisodeSpec, key: tuple[int, ...]) -> Episode:
        draw = torch.Generator().manual_seed(key[-1])
        counts = [spec.ways * each for each in (spec.shots, spec.queries)]
        images = torch.rand(sum(counts), *self.image_shape, generator=draw).split(counts)
        labels = [torch.arange(spec.ways).repeat_interleave(n // spec.ways) for n in counts]
        return Episode(images[0], labels[0], images[1], labels[1])
