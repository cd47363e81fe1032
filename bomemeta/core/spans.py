"""Where the time of a shard's work goes: named spans, which note nothing unless `heard` listens
(`bomemeta profile`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LOAD, ENCODE, INNER_LOOP, LOSSES, PULL_BACK, SECOND_ORDER = (
    "load", "encode", "inner loop", "losses", "pull-back", "second order",
)  # fmt: skip


@dataclass
class Spans:
    """Seconds by name. A span inside another is not counted in the outer one as well."""

    seconds: dict[str, float] = field(default_factory=dict)
    inner: list[float] = field(
        default_factory=list
    )  # of the spans that are open: what those inside them took


_listening: list[Spans] = []


class span:  # in small letters, because it is read as a word
    """`with span(LOAD): ...`"""

    __slots__ = ("_name", "_start")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        if _listening:
            _listening[-1].inner.append(0.0)
            self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if not _listening:
            return
        took = time.perf_counter() - self._start
        spans = _listening[-1]
        spans.seconds[self._name] = spans.seconds.get(self._name, 0.0) + took - spans.inner.pop()
        if spans.inner:
            spans.inner[-1] += took


@contextmanager
def heard() -> Iterator[Spans]:
    """What the spans of this process say while it is entered. For one thread."""
    spans = Spans()
    _listening.append(spans)
    try:
        yield spans
    finally:
        _listening.pop()
