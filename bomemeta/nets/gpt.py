"""A small GPT in plain PyTorch: byte-level language models for a shared lower variable."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

BYTES = 256


class _Block(nn.Module):
    """Pre-norm attention and a four times wider feed-forward layer, each beside a shortcut."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self._attention(self.norm1(hidden))
        down: Tensor = self.down(functional.gelu(self.up(self.norm2(hidden))))
        return hidden + down

    def _attention(self, hidden: Tensor) -> Tensor:
        n, length, width = hidden.shape
        parts = self.qkv(hidden).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
            mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return out


def _recomputed(block: nn.Module, hidden: Tensor) -> Tensor:
    """The block with the weights that it has now. They are handed on: `functional_call` has put the
    module's own back when the block is computed again.
    """
    weights = dict(block.named_parameters())

    def again(hidden: Tensor, *values: Tensor) -> Tensor:
        found: Tensor = functional_call(block, dict(zip(weights, values, strict=True)), (hidden,))
        return found

    out: Tensor = checkpoint(again, hidden, *weights.values(), use_reentrant=False)
    return out


class GPT(nn.Module):
    """Next-token logits `[n, length, vocabulary]` of tokens `[n, length]`; the last layer shares the
    embedding's weights (Radford et al. 2019). No dropout: a loss is a function of x, y and data.

    `fused`: torch's fused attention, which has no second derivative; without it solvers that take
    Hessian products work too. `recompute`: a block keeps its input alone and is computed again on
    the way back (activation checkpointing).
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        context: int = 128,
        vocabulary: int = BYTES,
        fused: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        if width % heads:
            raise ValueError(f"width: got {width}, which {heads} heads do not divide")
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads, fused) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        indices = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.tokens(tokens) + self.positions(indices)
        for block in self.blocks:
            again = self.recompute and torch.is_grad_enabled()
            hidden = _recomputed(block, hidden) if again else block(hidden)
        return functional.linear(self.norm(hidden), self.tokens.weight)

    def reset(self, generator: torch.Generator) -> None:
        """Draws all weights anew: normal with 0.02, and the layers that end a shortcut's side divided
        by sqrt(2 layers), as GPT-2 does.
        """
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                elif "norm" in name:
                    parameter.fill_(1.0)
                else:
                    last = name.endswith(("out.weight", "down.weight"))
                    scale = 0.02 / math.sqrt(2 * len(self.blocks)) if last else 0.02
                    parameter.normal_(0.0, scale, generator=generator)
