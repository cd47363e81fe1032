"""What people read: findings on synthetic runs that fail in known ways, progress lines, the result."""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from bomemeta.report import HealthMonitor, Quiet, TerminalListener, result_lines, show_result

HEALTHY = {
    "upper_loss": 1.0,
    "gap": 0.1,
    "multiplier": 2.0,
    "multiplier_zero_share": 0.1,
    "grad_upper_gap_norm": 0.3,
    "grad_lower_gap_norm": 0.5,
    "stationarity_gradient": 0.2,
    "stationarity_gap": 0.1,
    "upper_update_norm": 0.01,
    "upper_norm": 3.0,
}


def watch(
    metrics: Callable[[int], dict[str, float]], steps: int, monitor: HealthMonitor | None = None
) -> list[str]:
    monitor = monitor or HealthMonitor(window=20)
    return [
        text for step in range(steps) for text in monitor.update(step, {**HEALTHY, **metrics(step)})
    ]


@pytest.mark.parametrize(
    ("broken", "fragments"),
    [
        ({"multiplier": 0.0, "multiplier_zero_share": 1.0}, ["lambda was 0 in 100% of the last 20", "inner_steps", "eta"]),
        ({"upper_update_norm": 1e-9}, ["x has not moved", "solver.upper_lr"]),
        ({"upper_update_norm": 0.0, "upper_norm": 0.0}, ["x has not moved"]),
        ({"grad_upper_gap_norm": 1e-7}, ["|grad_x q| is negligible", "|grad_x q| 1.00e-07, |grad_y q| 5.00e-01, q 1.00e-01"]),
    ],
)  # fmt: skip
def test_each_silent_failure_is_said_once_with_metrics_and_advice(
    broken: dict[str, float], fragments: list[str]
) -> None:
    reported = watch(lambda step: broken, 200)
    assert len(reported) == 1
    assert all(word in reported[0] for word in fragments)


def test_a_solved_lower_problem_has_no_multiplier_and_hears_nothing() -> None:
    solved = {"gap": 0.0, "grad_lower_gap_norm": 0.0, "grad_upper_gap_norm": 0.0}
    assert watch(lambda step: {"multiplier": 0.0, "multiplier_zero_share": 1.0, **solved}, 40) == []


def test_an_oscillating_multiplier_is_said() -> None:
    assert "lambda oscillates" in watch(lambda step: {"multiplier": 1.0 + (step % 2)}, 40)[0]
    assert (
        "solver.lower_lr"
        in watch(lambda step: {"multiplier": 100.0 if step % 19 == 0 else 0.0}, 40)[0]
    )


def test_a_healthy_run_hears_nothing() -> None:
    draw = random.Random(0)
    noisy = watch(
        lambda step: {"multiplier": draw.expovariate(1.0), "multiplier_zero_share": draw.random()},
        2000,
        HealthMonitor(),
    )
    assert noisy == []
    assert watch(lambda step: {"multiplier": math.nan}, 100) == []


def test_a_solved_problem_may_stand_still() -> None:
    def solved(step: int) -> dict[str, float]:
        small = 10.0**-step if step < 20 else 0.0
        return {"stationarity_gradient": small, "stationarity_gap": 0.0, "upper_update_norm": small, "multiplier": 0.0,
                "multiplier_zero_share": float(step > 5)}  # fmt: skip

    assert watch(solved, 200) == []


def test_metrics_that_are_missing_or_rare_are_no_trouble() -> None:
    monitor = HealthMonitor(window=20)
    assert [text for step in range(50) for text in monitor.update(step, {"upper_loss": 1.0})] == []
    rare = {"grad_upper_gap_norm": 1e-9, "grad_lower_gap_norm": 1.0}
    reported = [
        text
        for step in range(50, 100)
        for text in monitor.update(step, rare if step % 15 == 0 else {})
    ]
    assert len(reported) == 1
    assert monitor.summary()["multiplier_zero_share"] is None


def test_a_finding_is_said_again_after_it_cleared() -> None:
    monitor = HealthMonitor(window=20)

    def phases(step: int) -> dict[str, float]:
        return {"multiplier_zero_share": float(step < 60 or step >= 150)}

    message = watch(phases, 220, monitor)
    summary = monitor.summary()
    assert len(message) == 2
    assert [finding["step"] for finding in summary["findings"]] == [
        19,
        168,
    ]  # full window; 95 % of the window again
    assert {finding["finding"] for finding in summary["findings"]} == {"multiplier_zero"}
    assert summary["multiplier_zero_share"] == pytest.approx(130 / 220)  # float sums
    assert summary["steps"] == 220


def listen(terminal: bool) -> str:
    stream = io.StringIO()
    listener = TerminalListener(Console(file=stream, force_terminal=terminal, width=100))
    listener.start(Path("/runs/[a]"), 3, 10, 4)
    for step in range(3, 10):
        listener.step(step, {**HEALTHY, "step_s": 0.25, "validation_accuracy": 0.5})
    listener.note("lambda [was] 0")
    listener.close()
    listener.close()
    return stream.getvalue()


def test_off_a_terminal_progress_is_plain_lines() -> None:
    text = listen(terminal=False)
    line = "upper loss 1, lambda 2, q 0.1, validation accuracy 50.00 %, 0.25 s/step"
    assert text.splitlines() == [
        "run folder: /runs/[a]",
        "resumes at step 3 of 10",
        f"step 4/10: {line}",
        f"step 8/10: {line}",
        f"step 10/10: {line}",
        "note: lambda [was] 0",
    ]
    assert "\r" not in text
    assert "\x1b" not in text


def test_on_a_terminal_there_is_a_bar() -> None:
    text = listen(terminal=True)
    assert "run folder: /runs/[a]" in text
    assert "10/10" in text
    assert "note: lambda [was] 0" in text


def on_screen(text: str) -> str:
    """What is said, without a terminal's commands; frames of the live line one after the other."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


def test_the_live_line_has_loss_accuracy_workers_and_time_left() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=110, _environ={"TERM": "xterm"})
    listener = TerminalListener(console)
    listener.start(Path("/runs/a"), 0, 10, 4)
    listener.workers(2, 2)
    listener.step(0, {**HEALTHY, "validation_accuracy": 0.625})
    listener.workers(1, 2)  # one was lost
    listener.step(1, HEALTHY)  # not validated: the newest accuracy stays
    listener.close()
    last = on_screen(stream.getvalue()).splitlines()[-1]
    assert "2/10" in last
    assert "left" in last
    assert "loss 1, accuracy 62.50 %, workers 1/2, lambda 2, q 0.1" in last


def test_a_narrow_terminal_cuts_the_end_and_a_dumb_one_gets_plain_lines() -> None:
    stream = io.StringIO()
    narrow = TerminalListener(
        Console(file=stream, force_terminal=True, width=60, _environ={"TERM": "xterm"})
    )
    narrow.start(None, 0, 10, 1)
    narrow.step(0, HEALTHY)
    narrow.close()
    assert " 1/10 " in on_screen(stream.getvalue())
    assert "loss 1" in on_screen(stream.getvalue())
    assert max(map(len, on_screen(stream.getvalue()).splitlines())) <= 60
    stream = io.StringIO()
    dumb = TerminalListener(
        Console(file=stream, force_terminal=True, width=100, _environ={"TERM": "dumb"})
    )
    dumb.start(None, 0, 10, 1)
    dumb.step(0, HEALTHY)
    dumb.close()
    assert stream.getvalue() == "step 1/10: upper loss 1, lambda 2, q 0.1\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_run_on_a_terminal_has_one_live_line(tmp_path: Path) -> None:
    import pty

    settings = ["steps=8", "workers=0", "log.tensorboard=false", f"output_dir={tmp_path / 'run'}"]
    arguments = [sys.executable, "-m", "bomemeta", "train", "analytic_quadratic", *settings]
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "110"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=slave, env=environment) as run:
        os.close(slave)
        message = b""
        with contextlib.suppress(OSError):  # Linux says so when the other side is closed
            while part := os.read(master, 65536):
                message += part
        assert run.stdout is not None
        result = run.stdout.read().decode()
    os.close(master)
    assert run.returncode == 0, message
    lines = on_screen(message.decode()).splitlines()
    live = [line for line in lines if line.startswith("step ")]
    assert live, message
    assert all("left" in line for line in live)
    assert "8/8" in live[-1]
    assert "loss " in live[-1]
    assert b"\x1b[2K" in message  # it is written over
    assert "upper sha256" in result
    assert "\x1b" not in result


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Quiet()
    quiet.start(Path(), 0, 1, 1)
    quiet.step(0, HEALTHY)
    quiet.note("x")
    quiet.close()
    assert capsys.readouterr() == ("", "")


class Ended(NamedTuple):
    run_dir: Path = Path("/runs/quickstart")
    steps: int = 800
    metrics: Any = {  # noqa: RUF012
        "test_accuracy": 0.9512,
        "test_ci95": 0.0034,
        "baseline_accuracy": 0.443,
        "f": 0.72,
        "g": math.nan,
    }
    upper_sha256: str = "ab" * 32
    notes: Any = ("a note",)
    uri: str | None = None


def test_the_result_is_one_fact_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    expected = [
        "steps              800",
        "test accuracy      95.12 % ± 0.34 (95 %)",
        "baseline accuracy  44.30 %",
        "f                  0.72",
        "g                  nan",
        f"upper sha256       {'ab' * 32}",
        "run folder         /runs/quickstart",
        "note: a note",
    ]
    assert result_lines(Ended()) == expected
    show_result(Ended())
    assert capsys.readouterr().out.splitlines() == expected
