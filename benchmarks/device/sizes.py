"""How large the parts' work is: for a card, and for a test on a CPU. And how time is taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# One row of a part's table. A part calls it for each, so that what was measured before it failed or
# ran over its time box is kept.
Row = dict[str, Any]
Say = Callable[[Row], None]


@dataclass(frozen=True)
class Sizes:
    """`full`: about nine minutes on a card. `tiny`: seconds on a CPU."""

    name: str
    width: int  # conv4
    resnet_width: int
    tasks: int  # of a few-shot step
    batch: int  # images or sequences of a shared step
    gpt: tuple[int, int, int, int]  # width, layers, heads, context
    seconds: float  # for the timing of one contender
    rounds: int  # at most
    steps: int  # of a trajectory
    all_solvers: bool


FULL = Sizes("full", 64, 64, 32, 256, (384, 6, 6, 256), 1.5, 30, 20, True)
# What a CPU of some cores does within the same nine minutes.
CPU = Sizes("cpu", 32, 16, 8, 16, (128, 4, 4, 64), 1.5, 10, 10, True)
TINY = Sizes("tiny", 2, 2, 1, 2, (16, 1, 2, 8), 0.0, 1, 2, False)
SIZES = {sizes.name: sizes for sizes in (FULL, CPU, TINY)}


def device_here() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The card's name, or that there is none."""
    if not torch.cuda.is_available():
        return "no GPU: everything on the CPU"
    return torch.cuda.get_device_name(0)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def timed(
    steps: Mapping[str, Callable[[], None]], sizes: Sizes, device: str
) -> dict[str, list[float]]:
    """Seconds of each, in turn, after two rounds that are not counted; until a round more would take
    longer than `sizes.seconds` for each of them.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    warm_up = 1 if sizes is TINY else 2
    began = time.perf_counter()
    for number in range(warm_up + sizes.rounds):
        if number == warm_up:
            began = time.perf_counter()
        elif number > warm_up + 1 and time.perf_counter() - began > sizes.seconds * len(steps):
            break
        for name, step in steps.items():
            wait(device)
            start = time.perf_counter()
            step()
            wait(device)
            if number >= warm_up:
                taken[name].append(time.perf_counter() - start)
    return taken


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def ms(taken: list[float]) -> float:
    return 1000 * statistics.median(taken)


def peak_mib(step: Callable[[], None], device: str) -> float:
    """Of one step: the allocator's maximum on a card, live tensors on a CPU."""
    if device == "cpu":
        from bomemeta.live_bytes import LiveBytes

        with LiveBytes() as live:
            step()
        return live.peak / 2**20
    torch.cuda.reset_peak_memory_stats()
    step()
    wait(device)
    return torch.cuda.max_memory_allocated() / 2**20
