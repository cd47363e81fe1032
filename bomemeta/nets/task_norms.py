"""Ordinary modules under few-shot learning: which images make the statistics of their BatchNorms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from bomemeta.errors import ConfigError


@dataclass
class Statistics:
    """What the norms of one network look at: the number of first rows that make the statistics, for
    the current call. None: all rows.
    """

    rows: int | None = None


class TaskNorm(nn.Module):
    """An nn.BatchNorm whose statistics are those of the images that it is given, of the first
    `Statistics.rows` of them. Parameters and buffers keep their names, so weights load and save.
    """

    def __init__(self, norm: _BatchNorm, statistics: Statistics) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)
        self.statistics = statistics

    def forward(self, images: Tensor) -> Tensor:
        rows = self.statistics.rows
        if rows is None:
            return functional.batch_norm(
                images, None, None, self.weight, self.bias, training=True, eps=self.eps
            )
        # Written out because torch's own layer does not differentiate through statistics that it is
        # given.
        seen = images[:rows]
        over = (0, *range(2, images.dim()))
        mean = seen.mean(over, keepdim=True)
        variance = (seen - mean).square().mean(over, keepdim=True)
        normed = (images - mean) * (variance + self.eps).rsqrt()
        if self.weight is None:
            return normed
        shape = (-1, *[1] * (images.dim() - 2))
        return normed * self.weight.reshape(shape) + self.bias.reshape(shape)


def with_task_norms(module: nn.Module, statistics: Statistics) -> nn.Module:
    """The module with a TaskNorm in place of every BatchNorm; `module` itself may be one."""
    if isinstance(module, _BatchNorm):
        return TaskNorm(module, statistics)
    for name, child in module.named_children():
        setattr(module, name, with_task_norms(child, statistics))
    return module


def check_running(module: nn.Module) -> None:
    """Raises ConfigError that names the first BatchNorm without running statistics."""
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise ConfigError(
                f"problem.batch_norm: running, but layer {name} ({type(layer).__name__}) keeps no running "
                "statistics; use transductive or inductive"
            )


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(layer, _BatchNorm | TaskNorm) for layer in module.modules())


def layer_at_fault(module: nn.Module, images: Tensor) -> str:
    """The innermost layer in which the forward pass ends with an exception, with its class."""
    inside: list[str] = []
    names = {layer: name or "the module itself" for name, layer in module.named_modules()}
    hooks = [
        hook
        for layer in module.modules()
        for hook in (
            layer.register_forward_pre_hook(lambda layer, _: inside.append(names[layer])),
            layer.register_forward_hook(lambda *_: inside.pop() and None),
        )
    ]
    try:
        with torch.no_grad():
            module(images)
    except Exception:  # the same that the caller has met
        layer = dict(module.named_modules()).get(inside[-1], module) if inside else module
        return f"{inside[-1] if inside else 'the module itself'} ({type(layer).__name__})"
    finally:
        for hook in hooks:
            hook.remove()
    return "the module itself"
