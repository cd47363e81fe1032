"""Parts `bits` and `trajectories`: the same run twice, and the same run on the CPU and on the card."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch

from benchmarks.device.jobs import jobs, trained
from benchmarks.device.sizes import Say, Sizes, device_here
from bomemeta.errors import BomemetaError


def bits(sizes: Sizes, say: Say) -> None:
    """Each run twice on the device, in its own type: equal hashes of x. `warned`: operations that
    torch has no deterministic version of there.
    """
    with jobs(sizes) as found:
        for name, job in found.items():
            row: dict[str, Any] = {"run": name}
            began = time.perf_counter()
            try:
                with warnings.catch_warnings(record=True) as heard:
                    warnings.simplefilter("always")
                    first, second = (trained(job, []) for _ in range(2))
                row["equal"] = first.upper_sha256 == second.upper_sha256
                row["warned"] = sorted(
                    {str(w.message).split(". ")[0] for w in heard if "determinis" in str(w.message)}
                )
            except (BomemetaError, RuntimeError, ImportError) as error:
                row["failed"] = _short(error)
            say({**row, "seconds": time.perf_counter() - began})


def trajectories(sizes: Sizes, say: Say) -> None:
    """Each run on the CPU and on the device in float64: how far apart x ends, over how far it came.
    Without a card: tasks in a loop against tasks in one wide call.
    """
    on = device_here() != "cpu"
    here, there = (
        (["device=cpu"], ["device=cuda"]) if on else (["task_map=loop"], ["task_map=vmap"])
    )
    with jobs(sizes) as found:
        for name, job in found.items():
            row: dict[str, Any] = {"run": name, "compared": f"{here[0]} and {there[0]}"}
            try:
                ends = [trained(job, ["dtype=float64", *where]).upper for where in (here, there)]
                start = trained(job, ["dtype=float64", "device=cpu", "steps=1"]).upper
                row["difference"] = _distance(*ends) / max(_distance(ends[0], start), 1e-300)
            except (BomemetaError, RuntimeError, ImportError) as error:
                row["failed"] = _short(error)
            say(row)


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(((a[name] - b[name]) ** 2).sum()) for name in a))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
