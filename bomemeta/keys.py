"""The keys of a config as keyword arguments: typed here, with their defaults in `help()`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar

from bomemeta.config import Settings

F = TypeVar("F", bound=Callable[..., Any])


class RunKeys(TypedDict, total=False):
    """The keys that every run has; docs/configuration.md explains each. Times are in seconds.

    `evaluation`, `checkpoint` and `log` are mappings of their own keys: those that are given are
    changed, as in `evaluation={"episodes": 1000}`.
    """

    imports: Sequence[str]
    seed: int
    seeds: int
    steps: int | None
    tasks_per_step: int | None
    shards: int
    dtype: Literal["float32", "float64"]
    compute_dtype: Literal["bfloat16"] | None
    micro_batch: int | None
    device: Literal["auto", "cpu", "cuda"]
    task_map: Literal["auto", "loop", "vmap"]
    workers: int | Literal["auto"]
    min_workers: int
    max_workers: int | None
    threads: int
    cpus_per_worker: float
    gpus_per_worker: float
    worker_labels: Mapping[str, str]
    address: str | None
    reduce: Literal["driver", "tree", "collective"]
    backup_after: float | None
    leaders_above: int | None
    step_timeout_s: float
    start_timeout_s: float
    max_replacements: int
    address_wait_s: float
    wait_for_room_s: float
    output_dir: str | None
    evaluation: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    log: Mapping[str, Any]


def with_keys(function: F) -> F:
    """Shows the keys with their defaults in the function's signature, in the place of `**keys`."""
    signature = inspect.signature(function)
    own = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    keys = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation
        )
        for name, field in Settings.model_fields.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *keys])  # type: ignore[attr-defined]
    return function
