"""The process's global random generators while a problem's own code runs: torch's, numpy's and
Python's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from bomemeta.core.problem import Problem
from bomemeta.core.randomness import generator, seed_from
from bomemeta.core.tree import Params

_NUMPY_BITS = 32  # what numpy's global generator takes for a seed


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """The global generators start from numbers that follow from the key; in the end they are what
    they were.

    Code that draws from them (a layer made without a generator, `np.random.rand`) then gives the
    same bits in every process and on resume.
    """
    number = seed_from(*key)
    python, arrays, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.default_generators if _cuda_is_used() else ()
    there = [device.get_state() for device in devices]
    random.seed(number)
    np.random.seed(number % 2**_NUMPY_BITS)
    # Not torch.manual_seed, which would reach for accelerators that nobody uses.
    for drawn in (torch.default_generator, *devices):
        drawn.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.set_rng_state(cpu)
        for device, state in zip(devices, there, strict=True):
            device.set_state(state)


def initial_upper(problem: Problem) -> Params:
    """x at step 0, of a problem that was attached to a run."""
    with seeded(problem.seed, "init_upper"):
        return problem.init_upper(generator(problem.seed))


def _cuda_is_used() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
