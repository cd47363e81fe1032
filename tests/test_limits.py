"""Numbers of a config against what the machine has: refused in words, before it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bomemeta
from bomemeta import limits
from bomemeta.errors import BomemetaError, ConfigError

CONFIG: dict[str, Any] = {
    "problem": {"name": "analytic", "case": "quadratic", "tasks": 2},
    "solver": {"name": "bome", "inner_steps": 2},
    "steps": 1,
    "log": {"tensorboard": False},
}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("threads=100000", r"threads: got 100000; this machine has \d+ cores"),
        ("tasks_per_step=9000000000000000000", r"tasks_per_step: got 9\d+; to list so many takes .* PB"),
        ("shards=9000000000000000000", r"shards: got"),
        ("evaluation.episodes=9000000000000000000", r"evaluation\.episodes: got"),
        ("problem.tasks=1000000000000", r"more than this machine has .*problem\.tasks: 1000000000000"),
        ("problem.dim_lower=9223372036854775807", r"problem\.dim_lower: 9223372036854775807"),
        ("problem.dim_upper=4611686018427387904", r"problem\.dim_upper: 4611686018427387904"),
        ("problem.dim_lower=18446744073709551616", r"wanted at most 9223372036854775807"),
    ],
)  # fmt: skip
def test_what_the_machine_has_not_is_said(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bomemeta.train(CONFIG, [override])


def test_a_limit_is_taken_back_and_other_errors_pass() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with (
        pytest.raises(ConfigError, match=r"a: 5000000000"),
        limits.within_memory({"a": 5_000_000_000}, limited=True),
    ):
        np.zeros(2**50)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with pytest.raises(RuntimeError, match="a bug"), limits.within_memory({"a": 1}, limited=True):
        raise RuntimeError("a bug")
    with pytest.raises(BomemetaError, match="mine"), limits.within_memory({"a": 1}, limited=False):
        raise BomemetaError("mine")


def test_what_is_free_is_the_least_that_anything_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 4 kB\n")
    monkeypatch.setattr(limits, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(limits, "_CGROUP", tmp_path)
    assert limits.available_memory() == 4096
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert limits.available_memory() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert limits.available_memory() == 4096
