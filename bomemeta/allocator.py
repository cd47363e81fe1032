"""The C library's memory allocator, told to keep what a step frees for the next step."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters (malloc.h) and their values here.
M_TRIM_THRESHOLD, KEPT_BYTES = (
    -1,
    2**30,
)  # of freed memory at the heap's end, before any goes back to the system
M_MMAP_THRESHOLD, HEAP_BYTES = (
    -3,
    2**28,
)  # an array up to this size is part of the heap and not a mapping of its own


def keep_freed_memory() -> bool:
    """For the whole process; False where the C library is not glibc, and nothing was changed.

    A step frees its activations, tens of MB, and the next one wants as many. By default glibc gives
    such memory back to the system in between, which then clears every page of it again: up to a
    third of a step's time. Kept is at most what was in use at some time, and
    `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` of the environment do the same from
    outside.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has a mallopt too, which does nothing
        return False
    return bool(
        library.mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)
        and library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    )
