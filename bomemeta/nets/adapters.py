"""A few trained numbers inside a frozen network: LoRA on its linear layers and small convolutions, or
FiLM on its norms.

    lora    W + B A        B [out, r] of zeros, A [r, in k k] random (Hu et al., ICLR 2022)
    film    (1 + s) * weight, bias + t of each norm, s and t zeros (Requeima et al., CNAPs, 2019)

Both change a layer's parameters and not its code, so an adapted network runs as before and can be
saved as an ordinary one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from bomemeta.nets.batch_norm import TaskBatchNorm
from bomemeta.nets.task_norms import TaskNorm

Params = dict[str, Tensor]
Adapter = Literal["lora", "film"]

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, TaskBatchNorm, TaskNorm)
KERNELS = (1, 3)  # of convolutions that get an adapter


def adapted_layers(module: nn.Module, kind: Adapter) -> list[str]:
    """Names of the layers that get an adapter."""
    fits = _takes_film if kind == "film" else _takes_lora
    return [name for name, layer in module.named_modules() if fits(layer)]


def initial(module: nn.Module, kind: Adapter, rank: int, generator: torch.Generator) -> Params:
    """The adapters' entries, with which the network is what it was."""
    found: Params = {}
    for name in adapted_layers(module, kind):
        weight = _parameter(module, name, "weight")
        prefix = f"{name}." if name else ""
        if kind == "film":
            found[f"{prefix}film_scale"] = torch.zeros_like(weight)
            found[f"{prefix}film_shift"] = torch.zeros_like(weight)
            continue
        fan_in = weight[0].numel()
        drawn = torch.randn(rank, fan_in, generator=generator, dtype=torch.float64) / fan_in**0.5
        found[f"{prefix}lora_a"] = drawn.to(weight.dtype)
        found[f"{prefix}lora_b"] = weight.new_zeros(weight.shape[0], rank)
    return found


def effective(
    parameters: Mapping[str, Tensor], kind: Adapter, layers: list[str], adapters: Params
) -> Params:
    """The parameters of the adapted layers, by their names in the module; `parameters`: its own."""
    found: Params = {}
    for name in layers:
        prefix = f"{name}." if name else ""
        weight = parameters[f"{prefix}weight"]
        if kind == "film":
            found[f"{prefix}weight"] = weight * (1 + adapters[f"{prefix}film_scale"])
            found[f"{prefix}bias"] = parameters[f"{prefix}bias"] + adapters[f"{prefix}film_shift"]
        else:
            change = adapters[f"{prefix}lora_b"] @ adapters[f"{prefix}lora_a"]
            found[f"{prefix}weight"] = weight + change.reshape(weight.shape)
    return found


def _parameter(module: nn.Module, layer: str, name: str) -> Tensor:
    found: Tensor = getattr(module.get_submodule(layer), name)
    return found.detach()


def _takes_lora(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    return (
        isinstance(layer, nn.Conv2d)
        and layer.groups == 1
        and all(size in KERNELS for size in layer.kernel_size)
    )


def _takes_film(layer: nn.Module) -> bool:
    return (
        isinstance(layer, NORMS)
        and getattr(layer, "weight", None) is not None
        and getattr(layer, "bias", None) is not None
    )
