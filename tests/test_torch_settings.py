"""A run has torch's settings of a fresh process, and the caller's are there again afterwards."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bomemeta
from bomemeta.torch_settings import pinned, settings

CONFIG: dict[str, Any] = {
    "problem": {"name": "analytic", "case": "quadratic", "tasks": 2},
    "solver": {"name": "bome", "inner_steps": 2, "upper_optimizer": "adam"},
    "steps": 2,
    "log": {"tensorboard": False},
}


@contextlib.contextmanager
def changed(change: Callable[[], object]) -> Iterator[None]:
    before = [(setting, setting.read()) for setting in settings(1)]
    try:
        change()
        yield
    finally:
        torch.set_default_device(None)
        for setting, old in before:
            setting.set(old)


def _bfloat16() -> None:
    torch.set_float32_matmul_precision("medium")


CALLERS: dict[str, Any] = {
    "default dtype": lambda: changed(lambda: torch.set_default_dtype(torch.float64)),
    "default device": lambda: changed(lambda: torch.set_default_device("meta")),
    "device context": lambda: torch.device("meta"),
    "matmul precision": lambda: changed(_bfloat16),
    "mkldnn": lambda: changed(lambda: setattr(torch.backends.mkldnn, "enabled", False)),
    "deterministic": lambda: changed(lambda: torch.use_deterministic_algorithms(True)),
    "flush denormal": lambda: changed(lambda: torch.set_flush_denormal(True)),
    "threads": lambda: changed(lambda: torch.set_num_threads(3)),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "numpy": lambda: np.errstate(all="raise"),
}


@pytest.fixture(scope="module")
def reference() -> str:
    return bomemeta.train(CONFIG).upper_sha256


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", CALLERS)
def test_a_caller_s_setting_changes_no_bit_and_is_there_afterwards(
    name: str, reference: str
) -> None:
    def state() -> list[Any]:
        here = [setting.read() for setting in settings(1)]
        return [*here, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), np.geterr(),
                torch.is_autocast_enabled("cpu"), torch.get_default_device()]  # fmt: skip

    with CALLERS[name]():
        before = state()
        found = bomemeta.train(CONFIG).upper_sha256
        assert state() == before
    assert found == reference


def test_inside_all_are_those_of_a_fresh_process() -> None:
    with changed(lambda: torch.set_default_dtype(torch.float64)), torch.no_grad(), pinned(1):
        assert [setting.name for setting in settings(1) if setting.read() != setting.value] == []
        assert torch.is_grad_enabled()
    program = (
        "from bomemeta.torch_settings import settings\n"
        "print([s.name for s in settings(1) if s.read() != s.value and s.name != 'threads'])"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert fresh.stdout.strip() == "[]"


def test_an_error_brings_the_caller_s_back_too() -> None:
    with changed(lambda: torch.set_default_dtype(torch.float64)):
        with pytest.raises(ZeroDivisionError), pinned(2):
            raise ZeroDivisionError(torch.get_num_threads())
        assert torch.get_default_dtype() == torch.float64


def test_imported_files_that_set_something_change_no_bit(tmp_path: Path, reference: str) -> None:
    (tmp_path / "more.py").write_text(
        "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_flush_denormal(True)\n"
    )
    with changed(lambda: None):
        assert (
            bomemeta.train({**CONFIG, "imports": [str(tmp_path / "more.py")]}).upper_sha256
            == reference
        )
