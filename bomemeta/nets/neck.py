"""What is learned between a backbone and a head: nothing, a scale and shift per feature, or a linear
map. It starts as the identity.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Neck = Literal["none", "scale", "linear"]
Params = dict[str, Tensor]


def initial_neck(neck: Neck, features: int, dtype: torch.dtype) -> Params:
    if neck == "none":
        return {}
    weight = torch.eye(features) if neck == "linear" else torch.ones(features)
    return {"neck.weight": weight.to(dtype), "neck.bias": torch.zeros(features, dtype=dtype)}


def apply_neck(neck: Neck, upper: Params, features: Tensor) -> Tensor:
    """`[..., n, d]` of `[..., n, d]`."""
    if neck == "none":
        return features
    weight, bias = upper["neck.weight"], upper["neck.bias"]
    return (features @ weight if neck == "linear" else features * weight) + bias
