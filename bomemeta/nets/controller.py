"""CTN (Pham, Liu, Sahoo, Hoi, ICLR 2021): a base network whose hidden layers a controller
modulates, by the task.

    gamma_t, beta_t = film(embedding_t), each divided by its own L2 norm
    out = relu(gamma_t * h + beta_t) + relu(h)            h: a layer before its ReLU

Networks are written as functions of named parameters, so that these may be a bilevel problem's y;
the controller's are its x. Without a controller a layer is relu(h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

Params = dict[str, Tensor]
Film = tuple[Tensor, Tensor]  # gamma and beta, one row per sample [n, units]

# The four stages of a ResNet-18: the stride of each, and how many times `filters` it is wide.
STAGES = ((1, 1), (2, 2), (2, 4), (2, 8))
# Of GroupNorm: five filters each with 20, a multiple of that everywhere.
GROUPS = 4


class Network(Protocol):
    """A classifier as a function of named parameters."""

    @property
    def modulated(self) -> tuple[int, ...]:
        """Units of the layers that a controller acts on, in order."""
        ...

    def initial(self, generator: torch.Generator) -> Params:
        """Parameters at the start, float64."""
        ...

    def logits(self, params: Params, inputs: Tensor, films: Sequence[Film]) -> Tensor:
        """`[n, classes]` of flat inputs `[n, d]`; `films` one per modulated layer, or none at all."""
        ...


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Layers of ReLU units, all of them modulated, and a linear head. Xavier's uniform weights,
    biases 0, as CTN's code has them.
    """

    inputs: int
    hidden: int
    layers: int
    classes: int

    @property
    def modulated(self) -> tuple[int, ...]:
        return (self.hidden,) * self.layers

    def initial(self, generator: torch.Generator) -> Params:
        params: Params = {}
        units = self.inputs
        for i in range(self.layers):
            params |= _linear(f"layer{i}", units, self.hidden, generator)
            units = self.hidden
        return params | _linear("head", units, self.classes, generator)

    def logits(self, params: Params, inputs: Tensor, films: Sequence[Film]) -> Tensor:
        hidden = inputs
        for i in range(self.layers):
            before = functional.linear(hidden, params[f"layer{i}.weight"], params[f"layer{i}.bias"])
            hidden = modulated(before, films[i] if films else None)
        return functional.linear(hidden, params["head.weight"], params["head.bias"])


@dataclass(frozen=True, kw_only=True)
class ReducedResNet18:
    """ResNet-18 with `filters` in place of 64 (20: Lopez-Paz and Ranzato, 2017), the last stage's
    output modulated.

    GroupNorm in place of BatchNorm: a sample's logits do not depend on what else is in its batch,
    nor on running averages, which would be state beside y.
    """

    channels: int
    height: int
    width: int
    filters: int
    classes: int
    channels_last: bool = False  # of an input row: [H, W, C] and not [C, H, W]

    @property
    def modulated(self) -> tuple[int, ...]:
        return (self.filters * STAGES[-1][1],)

    def initial(self, generator: torch.Generator) -> Params:
        params = _convolution("stem", self.channels, self.filters, 3, generator)
        units = self.filters
        for name, stride, wide in self._blocks():
            params |= _convolution(f"{name}.0", units, wide, 3, generator) | _convolution(
                f"{name}.1", wide, wide, 3, generator
            )
            if stride != 1 or units != wide:
                params |= _convolution(f"{name}.shortcut", units, wide, 1, generator)
            units = wide
        return params | _linear("head", units, self.classes, generator)

    def logits(self, params: Params, inputs: Tensor, films: Sequence[Film]) -> Tensor:
        if self.channels_last:
            images = inputs.reshape(-1, self.height, self.width, self.channels).movedim(-1, 1)
            images = images.contiguous()  # one layout of memory for every convolution
        else:
            images = inputs.reshape(-1, self.channels, self.height, self.width)
        hidden = functional.max_pool2d(functional.relu(_normed(params, "stem", images)), 3, 2, 1)
        blocks = self._blocks()
        for name, stride, _ in blocks:
            inside = functional.relu(_normed(params, f"{name}.0", hidden, stride))
            skip = (
                _normed(params, f"{name}.shortcut", hidden, stride)
                if f"{name}.shortcut.weight" in params
                else hidden
            )
            before = _normed(params, f"{name}.1", inside) + skip
            last = name == blocks[-1][0]
            hidden = modulated(before, films[0] if films and last else None)
        return functional.linear(hidden.mean((2, 3)), params["head.weight"], params["head.bias"])

    def _blocks(self) -> list[tuple[str, int, int]]:
        """Name, stride and width of each residual block."""
        return [
            (f"stage{i}.{j}", stride if j == 0 else 1, self.filters * factor)
            for i, (stride, factor) in enumerate(STAGES)
            for j in range(2)
        ]


def modulated(hidden: Tensor, film: Film | None) -> Tensor:
    """relu(gamma * h + beta) + relu(h) of `[n, units, ...]`; without a film relu(h)."""
    if film is None:
        return functional.relu(hidden)
    gamma, beta = (part.reshape(*part.shape, *[1] * (hidden.dim() - 2)) for part in film)
    return functional.relu(gamma * hidden + beta) + functional.relu(hidden)


def controller_initial(
    tasks: int, embedding: int, units: Sequence[int], generator: torch.Generator
) -> Params:
    """x: one embedding per task, normal, and a linear map to gamma and beta for each modulated
    layer, Xavier's uniform. float64.
    """
    params = {"embedding": torch.randn(tasks, embedding, generator=generator, dtype=torch.float64)}
    for i, width in enumerate(units):
        params |= _linear(f"film{i}", embedding, 2 * width, generator)
    return params


def controller_films(controller: Params) -> Params:
    """`gamma0`, `beta0`, `gamma1` ... for every task, `[tasks, units]`."""
    films: Params = {}
    for i in range(sum(name.endswith(".weight") for name in controller)):
        both = functional.linear(
            controller["embedding"], controller[f"film{i}.weight"], controller[f"film{i}.bias"]
        )
        gamma, beta = both.chunk(2, dim=1)
        films |= {f"gamma{i}": unit(gamma), f"beta{i}": unit(beta)}
    return films


def films_of(films: Params, tasks: Tensor) -> list[Film]:
    """The films of each sample's task, from `controller_films`; `tasks` int64 [n]."""
    return [
        (films[f"gamma{i}"].index_select(0, tasks), films[f"beta{i}"].index_select(0, tasks))
        for i in range(len(films) // 2)
    ]


def unit(rows: Tensor) -> Tensor:
    """Each row divided by its length; a row of zeros stays as it is."""
    squares = (rows * rows).sum(1, keepdim=True)
    # 1 in place of 0 before the root: its derivative there is infinite, and times 0 it would be
    # NaN.
    return rows * torch.where(squares > 0, squares, 1.0).rsqrt()


def _linear(name: str, inputs: int, units: int, generator: torch.Generator) -> Params:
    bound = math.sqrt(6 / (inputs + units))
    weight = (
        torch.rand(units, inputs, generator=generator, dtype=torch.float64)
        .mul_(2 * bound)
        .sub_(bound)
    )
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(units, dtype=torch.float64)}


def _convolution(
    name: str, channels: int, units: int, size: int, generator: torch.Generator
) -> Params:
    """A convolution without bias, He normal by its fan-out, and its norm's scale and shift."""
    weight = torch.randn(units, channels, size, size, generator=generator, dtype=torch.float64)
    weight.mul_(math.sqrt(2 / (units * size * size)))
    ones = torch.ones(units, dtype=torch.float64)
    return {
        f"{name}.weight": weight,
        f"{name}.norm.scale": ones,
        f"{name}.norm.shift": torch.zeros_like(ones),
    }


def _normed(params: Params, name: str, images: Tensor, stride: int = 1) -> Tensor:
    weight = params[f"{name}.weight"]
    hidden = functional.conv2d(images, weight, stride=stride, padding=weight.shape[-1] // 2)
    return functional.group_norm(
        hidden, GROUPS, params[f"{name}.norm.scale"], params[f"{name}.norm.shift"]
    )
