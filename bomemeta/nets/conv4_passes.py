"""The four-layer network's forward and backward pass for a stack of tasks, written out: the fast
twin of `backbones.Conv4` on a CPU.

`Conv4` under autograd is the readable version and tests hold the two together. What is different
here, by how much time it saves:

* **The first block's BatchNorm costs nothing.** Its convolution is a matrix product with the
  images' 3x3 patches, so mean and variance of its output follow from the patches' mean and
  covariance C (10 numbers a side for one colour): var = w'Cw for a filter w. On patches less their
  mean the whole of convolution and BatchNorm is ONE matrix product with w / sqrt(w'Cw + eps), and
  C's part in the backward pass is as small. The block's largest array, the convolution's output, is
  then needed by nobody but the pooling.
* **So that array is made piece by piece** in a buffer that stays in the core's second-level cache,
  in both directions.
* **No graph**: nothing is kept that the backward pass does not read, and there is no dispatch but
  of the operations themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bomemeta.nets.batch_norm import TaskBatchNorm

BLOCKS = 4
# Of the buffer for a piece of the first block: half of a second-level cache of 2 MiB, so that what
# is read beside it has room too.
PIECE_BYTES = 2**20

Params = dict[str, Tensor]
aten = torch.ops.aten


class _Block(NamedTuple):
    """What the backward pass of one task's block reads."""

    inputs: Tensor  # of the convolution
    convolved: Tensor
    mean: Tensor
    inverse_deviation: Tensor
    pooled: Tensor  # after the ReLU
    chosen: Tensor  # the maxima's positions


class _FirstBlock(NamedTuple):
    patches: Tensor  # less their mean, with a last row of ones: [K + 1, n * h * w]
    pieces: list[tuple[int, int]]  # images from, to
    pooled: Tensor  # [n, F, h/2, w/2] after the ReLU
    chosen: Tensor


class Conv4Passes:
    """The forward pass of a stack of images `[B, n, C, h, w]`, each task's BatchNorm statistics its
    own images'; made without a graph.

    `upper` has Conv4's parameters by name (others are not looked at). `features` is what it
    returns, `[B, n, d]`, and `pull_back` its backward pass. `differentiable=False` keeps nothing
    for it.
    """

    features: Tensor

    def __init__(self, upper: Params, images: Tensor, differentiable: bool = True) -> None:
        with torch.no_grad():
            self._weights = [
                upper[f"convolutions.{i}.weight"]
                .detach()
                .contiguous(memory_format=torch.channels_last)
                for i in range(BLOCKS)
            ]
            self._scales = [upper[f"norms.{i}.weight"].detach() for i in range(BLOCKS)]
            self._shifts = [upper[f"norms.{i}.bias"].detach() for i in range(BLOCKS)]
            self._image_shape = images.shape[2:]
            filters, self._patch = len(self._scales[0]), self._weights[0][0].numel()
            per_image = filters * images.shape[3] * images.shape[4] * images.element_size()
            self._step = min(max(PIECE_BYTES // per_image, 1), images.shape[1])
            self._buffer = images.new_empty(self._step * images.shape[3] * images.shape[4], filters)

            patches = [_patches(task) for task in images]
            self._fold(torch.stack([_covariance(task[: self._patch]) for task in patches]))
            self._kept: list[tuple[_FirstBlock, list[_Block]]] = []
            features = []
            for task, folded in zip(patches, self._folded, strict=True):
                first = self._first(task, folded)
                blocks, hidden = [], first.pooled
                for i in range(1, BLOCKS):
                    blocks.append(self._block(i, hidden))
                    hidden = blocks[-1].pooled
                features.append(hidden.flatten(1))
                if differentiable:
                    self._kept.append((first, blocks))
            self._hidden_shape = hidden.shape
            self.features = torch.stack(features)

    def pull_back(self, cotangent: Tensor) -> Params:
        """The gradient in the parameters of <features, cotangent>, summed over the tasks. May be
        asked again.
        """
        with torch.no_grad():
            weights = [torch.zeros_like(weight) for weight in self._weights]
            scales, shifts = (
                [torch.zeros_like(tensor) for tensor in tensors]
                for tensors in (self._scales, self._shifts)
            )
            folded = []
            for (first, blocks), of_task in zip(self._kept, cotangent, strict=True):
                grad = of_task.reshape(self._hidden_shape).contiguous(
                    memory_format=torch.channels_last
                )
                for i in reversed(range(1, BLOCKS)):
                    grad, *parameters = self._block_back(i, blocks[i - 1], grad)
                    for total, part in zip(
                        (weights[i], scales[i], shifts[i]), parameters, strict=True
                    ):
                        total += part
                folded.append(self._first_back(first, grad))
            weights[0], scales[0], shifts[0] = self._unfold(torch.stack(folded))
        return {
            **{f"convolutions.{i}.weight": weight for i, weight in enumerate(weights)},
            **{f"norms.{i}.weight": scale for i, scale in enumerate(scales)},
            **{f"norms.{i}.bias": shift for i, shift in enumerate(shifts)},
        }

    # The first block. In its parameters w [F, K], scale s and shift t, per task with r = (w'Cw +
    # eps)^-1/2: out = patches' [w s r; t], a product with [K + 1, F] numbers.

    def _fold(self, covariance: Tensor) -> None:
        self._flat = self._weights[0].flatten(1)  # [F, K]
        self._images = self._flat @ covariance  # Cw, [B, F, K]
        self._inverse = ((self._images * self._flat).sum(2) + TaskBatchNorm.eps).rsqrt()  # [B, F]
        self._factor = self._scales[0] * self._inverse
        weight = (self._flat * self._factor[:, :, None]).transpose(1, 2)
        self._folded = torch.cat(
            [weight, self._shifts[0].expand(len(weight), 1, -1)], 1
        )  # [B, K + 1, F]

    def _unfold(self, folded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in w, s and t from those in the folded product, [B, K + 1, F]."""
        weight = folded[:, : self._patch].transpose(1, 2)  # [B, F, K]
        factor = (weight * self._flat).sum(2)
        variance = -0.5 * self._inverse**3 * self._scales[0] * factor
        through = (weight * self._factor[:, :, None] + 2 * variance[:, :, None] * self._images).sum(
            0
        )
        return (
            through.view_as(self._weights[0]),
            (factor * self._inverse).sum(0),
            folded[:, self._patch].sum(0),
        )

    def _first(self, patches: Tensor, folded: Tensor) -> _FirstBlock:
        _, height, width = self._image_shape
        images = patches.shape[1] // (height * width)
        pieces = [
            (start, min(start + self._step, images)) for start in range(0, images, self._step)
        ]
        shape = (images, folded.shape[1], height // 2, width // 2)
        pooled = torch.empty(
            shape, dtype=patches.dtype, device=patches.device, memory_format=torch.channels_last
        )
        chosen = torch.empty_like(pooled, dtype=torch.int64)
        for start, end in pieces:
            rows = patches[:, start * height * width : end * height * width]
            out = torch.mm(rows.T, folded, out=self._buffer[: rows.shape[1]])
            aten.max_pool2d_with_indices.out(
                self._as_images(out),
                [2, 2],
                [2, 2],
                out=pooled[start:end],
                indices=chosen[start:end],
            )
        return _FirstBlock(patches, pieces, pooled.relu_(), chosen)

    def _first_back(self, first: _FirstBlock, grad: Tensor) -> Tensor:
        """The gradient in the folded product, [K + 1, F]."""
        _, height, width = self._image_shape
        grad = aten.threshold_backward.default(grad, first.pooled, 0)
        total = torch.zeros_like(self._folded[0])
        for start, end in first.pieces:
            rows = first.patches[:, start * height * width : end * height * width]
            flat = self._buffer[: rows.shape[1]]
            spread = self._as_images(flat)
            aten.max_pool2d_with_indices_backward.grad_input(
                grad[start:end],
                spread,
                [2, 2],
                [2, 2],
                [0, 0],
                [1, 1],
                False,
                first.chosen[start:end],
                grad_input=spread,
            )
            total.addmm_(rows, flat)
        return total

    def _as_images(self, flat: Tensor) -> Tensor:
        """Rows [n * h * w, F] as images with the channels innermost, the same memory."""
        _, height, width = self._image_shape
        return flat.view(-1, height, width, flat.shape[1]).permute(0, 3, 1, 2)

    # The other blocks: torch's own operations, one after the other.

    def _block(self, i: int, inputs: Tensor) -> _Block:
        convolved = functional.conv2d(inputs, self._weights[i], padding=1)
        normed, mean, inverse = torch.native_batch_norm(
            convolved, self._scales[i], self._shifts[i], None, None, True, 0.0, TaskBatchNorm.eps
        )
        pooled, chosen = functional.max_pool2d_with_indices(normed, [2, 2])
        return _Block(inputs, convolved, mean, inverse, pooled.relu_(), chosen)

    def _block_back(
        self, i: int, kept: _Block, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients in the block's input, its filters, and BatchNorm's scale and shift."""
        grad = aten.threshold_backward.default(grad, kept.pooled, 0)
        grad = aten.max_pool2d_with_indices_backward.default(
            grad, kept.convolved, [2, 2], [2, 2], [0, 0], [1, 1], False, kept.chosen
        )
        grad, scale, shift = aten.native_batch_norm_backward.default(
            grad,
            kept.convolved,
            self._scales[i],
            None,
            None,
            kept.mean,
            kept.inverse_deviation,
            True,
            TaskBatchNorm.eps,
            [True] * 3,
        )
        grad, weight, _ = aten.convolution_backward.default(
            grad,
            kept.inputs,
            self._weights[i],
            None,
            [1, 1],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, True, False],
        )
        return grad, weight, scale, shift


def _patches(images: Tensor) -> Tensor:
    """The 3x3 patches of `[n, C, h, w]` as columns, less their mean, over a row of ones: [9 C + 1,
    n * h * w].
    """
    n, channels, height, width = images.shape
    padded = functional.pad(images, (1, 1, 1, 1))
    a, b, c, d = padded.stride()
    shifted = padded.as_strided((channels, 3, 3, n, height, width), (b, c, d, a, c, d))
    patches = images.new_empty(9 * channels + 1, n * height * width)
    patches[:-1].view(shifted.shape).copy_(shifted)
    patches[:-1] -= patches[:-1].mean(1, keepdim=True)
    patches[-1] = 1.0
    return patches


def _covariance(patches: Tensor) -> Tensor:
    return torch.mm(patches, patches.T) / patches.shape[1]
