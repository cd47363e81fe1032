"""Findings, and the words and numbers in which they are told."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Level = Literal["OK", "NOTE", "PROBLEM"]


class Finding(NamedTuple):
    """One line. `do` is what to do about it; OK has nothing to do."""

    level: Level
    topic: str
    text: str
    do: str = ""

    def line(self, width: int) -> str:
        return f"{self.level:<7}  {self.topic:<{width}}  {self.text}" + (
            f". {self.do}" if self.do else ""
        )


@dataclass(frozen=True)
class DoctorReport:
    """All findings, in order; `values` are the numbers behind them: bytes and seconds."""

    findings: list[Finding]
    values: Mapping[str, Any] = field(repr=False)

    @property
    def figures(self) -> Mapping[str, Any]:
        """`values`, as they were called before, and are in `to_json`."""
        return self.values

    @property
    def ok(self) -> bool:
        return self.count("PROBLEM") == 0

    def count(self, level: Level) -> int:
        return sum(finding.level == level for finding in self.findings)

    def lines(self) -> list[str]:
        """One per finding, and how many there are of each kind."""
        width = max((len(finding.topic) for finding in self.findings), default=0)
        problems, notes = self.count("PROBLEM"), self.count("NOTE")
        counts = f"{problems} problem{'s' * (problems != 1)}, {notes} note{'s' * (notes != 1)}"
        return [*(finding.line(width) for finding in self.findings), counts]

    def to_json(self) -> str:
        """All of it; NaN and infinite numbers, which JSON does not have, become null."""
        findings = [finding._asdict() for finding in self.findings]
        return json.dumps(
            _finite({"ok": self.ok, "findings": findings, "figures": dict(self.values)}), indent=2
        )


def size(count: float) -> str:
    """Bytes for people: `950 B`, `1.2 kB`, `413 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            value = count / factor
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """`12 ms`, `3.4 s`, `25 min`, `7.5 h`, `3.2 days`."""
    for unit, factor, until in (
        ("ms", 1e-3, 1.0),
        ("s", 1.0, 120.0),
        ("min", 60.0, 7200.0),
        ("h", 3600.0, 172800.0),
    ):
        if seconds < until:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"


def number(count: int, thing: str) -> str:
    """`1 worker`, `2 workers`, `2 processes`."""
    plural = "es" if thing.endswith("s") else "s"
    return f"{count:,} {thing}{plural if count != 1 else ''}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
