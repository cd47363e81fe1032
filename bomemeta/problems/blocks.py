"""How the rows of a shared problem's data are cut into blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def block_rows(n: int, blocks: int) -> tuple[Tensor, Tensor]:
    """The numbers 0..n-1 in contiguous blocks of sizes that differ by 1 at most, int64 [blocks, m],
    and their scales, float64.

    A scale is blocks / n, so that the mean over blocks of scaled sums is the mean over all n; what
    fills up a shorter block repeats the number 0 and has scale 0.
    """
    bounds = torch.arange(blocks + 1) * n // blocks
    rows = bounds[:-1, None] + torch.arange(int(bounds.diff().max()))
    real = rows < bounds[1:, None]
    return torch.where(real, rows, 0), torch.where(
        real, torch.tensor(blocks / n, dtype=torch.float64), 0.0
    )
