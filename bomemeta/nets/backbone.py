"""A backbone in two parts: what is trained, which is x, and the rest, which every process makes for
itself once.
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.dropout import _DropoutNd

from bomemeta.errors import ConfigError
from bomemeta.nets import adapters
from bomemeta.nets.backbones import Conv4, ResNet12
from bomemeta.nets.batch_norm import TaskBatchNorm
from bomemeta.nets.task_norms import (
    Statistics,
    check_running,
    has_batch_norm,
    layer_at_fault,
    with_task_norms,
)

Params = dict[str, Tensor]
Norms = Literal["transductive", "inductive", "running"]

ADAPTERS: dict[str, adapters.Adapter] = {"adapters": "lora", "film": "film"}


class Backbone:
    """Features of images as a function of x. `module` is changed: give one that nobody else uses.

    Dropout is off but where `features` is asked for it. Raises ConfigError where `trainable` or `norms` do not fit the module.
    """

    names: list[str]  # x's entries that are the backbone's
    mixes: bool  # whether an image's features depend on the other images

    def __init__(self, module: nn.Module, trainable: str | Sequence[str], norms: Norms) -> None:
        module.eval()
        self._takes_rows = isinstance(module, Conv4 | ResNet12)
        if norms == "running":
            if any(isinstance(layer, TaskBatchNorm) for layer in module.modules()):
                raise ConfigError(
                    "problem.batch_norm: running, but without problem.weights conv4 and resnet12 keep no running "
                    "statistics; use transductive or inductive, weights with running statistics, or a network of "
                    "torch.nn's layers"
                )
            check_running(module)
        self._statistics = Statistics()
        self.mixes = norms != "running" and (self._takes_rows or has_batch_norm(module))
        if norms != "running" and not self._takes_rows:
            module = with_task_norms(module, self._statistics)
        self.module = module.requires_grad_(False)
        self._dropouts = [layer for layer in module.modules() if isinstance(layer, _DropoutNd)]
        self._adapter = ADAPTERS.get(trainable) if isinstance(trainable, str) else None
        self._layers: list[str] = []
        parameters = [name for name, _ in module.named_parameters()]
        if self._adapter is not None:
            self._layers = adapters.adapted_layers(module, self._adapter)
            drawn = adapters.initial(module, self._adapter, 1, torch.Generator())
            self.names = list(drawn)
            if not self.names:
                raise ConfigError(
                    f"problem.trainable: {trainable}, but the backbone has no layer that takes one (linear, 1x1 or "
                    "3x3 convolution; film: a norm with weight and bias)"
                )
        else:
            self.names = _chosen(parameters, trainable)
        self._in_x = frozenset(self.names)
        self._own: tuple[torch.device, Params] | None = None

    def initial(self, rank: int, generator: torch.Generator) -> Params:
        """The backbone's part of x at step 0."""
        if self._adapter is not None:
            return adapters.initial(self.module, self._adapter, rank, generator)
        own = dict(self.module.named_parameters())
        return {name: own[name].detach() for name in self.names}

    @property
    def drops_out(self) -> bool:
        """Whether there is a layer of dropout."""
        return bool(self._dropouts)

    def features(
        self, x: Params, images: Tensor, rows: int | None = None, dropout: bool = False
    ) -> Tensor:
        """`[n, d]` of images `[n, C, H, W]`; `rows`: how many of the first make the statistics of
        BatchNorms, where these are the task's own. None: all. `dropout` draws from torch's generator.
        """
        own = self._own_on(images.device)
        params = own | self._effective(x, own)
        if self._takes_rows:
            features: Tensor = functional_call(self.module, params, (images, rows))
            return features
        self._statistics.rows = rows
        for layer in self._dropouts:
            layer.training = dropout
        try:
            features = functional_call(self.module, params, (images,))
        except Exception as error:  # whatever a user's network raises, here or under vmap
            if dropout and "randomness" in str(error):
                raise  # vmap's: who maps loops instead
            at_fault = layer_at_fault(self.module, images)
            raise ConfigError(
                f"problem.backbone: layer {at_fault} fails on images {tuple(images.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            self._statistics.rows = None
            for layer in self._dropouts:
                layer.training = False
        if features.dim() != 2:
            raise ConfigError(
                f"problem.backbone: got an output of shape {tuple(features.shape)} for {len(images)} images; wanted "
                "features [n, d]: add a pooling and nn.Flatten()"
            )
        return features

    def width(self, image_shape: tuple[int, int, int], dtype: torch.dtype) -> int:
        """d, from a pass over two images of zeros."""
        with torch.no_grad():
            x = self.initial(1, torch.Generator())
            return self.features(x, torch.zeros(2, *image_shape, dtype=dtype)).shape[1]

    def filled(self, x: Params) -> nn.Module:
        """A module of its own with x in its place, adapters merged into their layers."""
        module = copy.deepcopy(self.module)
        with torch.no_grad():
            own = dict(module.named_parameters())
            for name, tensor in self._effective(x, own).items():
                own[name].copy_(tensor)
        return module

    def digest(self) -> str:
        """A hash of the module's layers, parameters and buffers."""
        found = hashlib.sha256(repr(self.module).encode())
        for name, tensor in self.module.state_dict().items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()

    def _effective(self, x: Params, own: Mapping[str, Tensor]) -> Params:
        if self._adapter is not None:
            return adapters.effective(own, self._adapter, self._layers, x)
        return {name: x[name] for name in self.names}

    def _own_on(self, device: torch.device) -> Params:
        """What is not in x, parameters and buffers, on the images' device: copied there once."""
        if self._own is None or self._own[0] != device:
            named = [*self.module.named_parameters(), *self.module.named_buffers()]
            kept = {name: t.detach().to(device) for name, t in named if name not in self._in_x}
            self._own = device, kept
        return self._own[1]


def _chosen(parameters: list[str], trainable: str | Sequence[str]) -> list[str]:
    if trainable == "all":
        return parameters
    if trainable == "none":
        return []
    patterns = [trainable] if isinstance(trainable, str) else list(trainable)
    found = {
        name for pattern in patterns for name in parameters if fnmatch.fnmatchcase(name, pattern)
    }
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in parameters):
            few = ", ".join(parameters[:3] + parameters[-3:] if len(parameters) > 6 else parameters)
            raise ConfigError(
                f"problem.trainable: no parameter is called {pattern!r}; wanted all, none, adapters, film, or patterns "
                f"of names such as {few}"
            )
    return [name for name in parameters if name in found]
