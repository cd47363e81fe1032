"""Where a run's random numbers come from: its seed, mixed whole, and for what a problem's functions
draw by themselves (dropout) the seed, the step and the task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

_MIXED_BITS = 63  # what torch's generators take, as a number that is not negative
_SMALL = 2**32  # torch's generator of a CPU reads the lowest 32 bits of its seed and no others


def mixed_seed(seed: int) -> int:
    """A number in 0..2^63-1 for any seed >= 0: below 2^32 the seed itself, above it a hash of all its
    bits.

    Generators read a part of a large number alone (torch's: 32 bits), so that 2^32 would be 0 to
    them.
    """
    if seed < _SMALL:
        return seed
    whole = seed.to_bytes((seed.bit_length() + 7) // 8, "little")
    digest = int.from_bytes(hashlib.sha256(whole).digest(), "little") % (1 << _MIXED_BITS)
    return digest if digest >= _SMALL else digest + _SMALL  # no small seed's number


def generator(seed: int) -> torch.Generator:
    """Torch's generator on the CPU for this seed, which may be any integer >= 0."""
    return torch.Generator().manual_seed(mixed_seed(seed))


class Draws(NamedTuple):
    """What the random numbers of a stack's tasks follow from, where a problem's functions draw from
    torch's own generator.
    """

    seed: int
    step: int
    split: str
    task_ids: Sequence[int]  # of the stack, in order

    def seed_of(self, function: str, row: int) -> int:
        """A 63-bit number for the task in this row of the stack, and for this function of it."""
        return seed_from(self.seed, self.step, self.split, self.task_ids[row], function)


def seed_from(*key: int | str) -> int:
    """A number in 0..2^63-1 that follows from the whole key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def kept_generator(device: torch.device) -> Iterator[torch.Generator]:
    """The generator that torch's functions draw from on this device, to be seeded; its state comes
    back in the end.
    """
    drawn = torch.default_generator
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        drawn = torch.cuda.default_generators[index]
    before = drawn.get_state()
    try:
        yield drawn
    finally:
        drawn.set_state(before)
