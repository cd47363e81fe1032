"""Where a run's random numbers come from: its seed, mixed whole."""

from __future__ import annotations

import hashlib

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
