"""`bomemeta train` without --restarts: who joins a cluster leaves a line and an exit code even where
Ray ends the run without a word.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from test_promises import QUADRATIC
from test_supervise import CUT_OFF, JOINED
from typer.testing import CliRunner

from bomemeta import supervise
from bomemeta.cli import app


@pytest.mark.parametrize(
    ("end", "last", "code"),
    [
        ("os._exit(1)", "failed: the run was ended by Ray, as where this machine's part of the cluster is lost; "
         "the same command resumes from its last checkpoint", 75),
        ("os.kill(os.getpid(), 9)", "failed: the run was killed by SIGKILL (a system that is short of memory does that); "
         "the same command resumes from its last checkpoint", 137),
        ("sys.exit(75)", "begun", 75),  # it has said itself why
        ("sys.exit(1)", "begun", 1),
    ],
)  # fmt: skip
def test_without_restarts_a_run_on_a_cluster_leaves_a_line_and_its_exit_code(
    end, last, code, tmp_path
):
    script = CUT_OFF.partition("    if not")[0] + f"    {end}\n"
    done = subprocess.run(
        [sys.executable, "-c", JOINED, "0", "run", "0", sys.executable, "-c", script],
        cwd=tmp_path, text=True, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, last), done
    assert done.stdout.count("begun") == 1


@pytest.mark.parametrize(
    ("overrides", "watched"),
    [
        (["workers=1", "address=a:1"], True),
        (["workers=1", "address=local"], False),
        (["workers=1"], False),
        (["workers=0", "address=a:1"], False),
    ],
)
def test_a_second_process_is_there_only_where_a_cluster_is_joined(
    overrides, watched, monkeypatch, tmp_path
):
    class Asked(Exception):
        """Who was to run it: a child, or this process."""

    def child(command: list[str], *given: object) -> int:
        raise Asked(*command[-4:], given[1])

    def here(*given: object, **named: object) -> None:
        raise Asked("here")

    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(QUADRATIC))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv(supervise.PIPE, raising=False)
    monkeypatch.setattr(supervise, "supervise", child)
    monkeypatch.setattr("bomemeta.runs.train", here)
    typed = ["train", str(config), *overrides]
    assert CliRunner().invoke(app, typed).exception.args == (
        (*typed, 0) if watched else ("here",)
    )  # fmt: skip
    monkeypatch.setenv(supervise.PIPE, "")  # the child itself
    assert CliRunner().invoke(app, typed).exception.args == ("here",)
