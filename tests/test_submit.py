"""Jobs on a real Ray head with its dashboard that wants a token: submitted, stopped, killed and
submitted again. A head that wants none is in tests/test_head_lost.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_head import Head, ray_head
from test_promises import QUADRATIC, struck
from typer.testing import CliRunner

import bomemeta
from bomemeta import checkpoint, submit
from bomemeta.cli import app
from bomemeta.cli.app import TRY_AGAIN
from bomemeta.errors import ClusterError, ConfigError

TESTS = Path(__file__).parent
JOB_S = 600.0  # no job here takes a tenth of that on a quiet machine


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bomemeta.Result:
    return bomemeta.train(QUADRATIC, [f"output_dir={tmp_path_factory.mktemp('reference') / 'run'}"])


def make_project(folder: Path, job: dict[str, Any] = QUADRATIC) -> Path:
    """A user's folder: a config and the files that it imports."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(yaml.safe_dump({**job, "imports": ["mortal.py"]}))
    for name in ("mortal.py", "toy.py"):
        shutil.copy(TESTS / name, folder)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


# What is sent, and what is refused before


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    for name in submit.PASSED_ON:
        monkeypatch.delenv(name, raising=False)
    return project


def test_the_job_is_the_command_with_auto_resume(inside, monkeypatch):
    for name in ("runs/a", "data", ".venv/bin", "sub/data"):
        (inside / name).mkdir(parents=True, exist_ok=True)
        (inside / name / "file").write_text("x")
    monkeypatch.setenv("BOMEMETA_DATA", "/shared/data")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("SECRET", "s")
    made = submit.prepare(
        "job", ["output_dir=/shared/a b", "steps=3"], environment=["SECRET", "N=1=2"]
    )
    assert (
        made.entrypoint
        == "bomemeta train job.yaml 'output_dir=/shared/a b' steps=3 --auto-resume --restarts 3"
    )
    assert made.output_dir == "/shared/a b"
    assert made.runtime_env["working_dir"] == str(inside)
    assert made.runtime_env["env_vars"] == {
        "BOMEMETA_DATA": "/shared/data", "RAY_AUTH_MODE": "token", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "SECRET": "s", "N": "1=2",
    }  # fmt: skip
    sent = {
        path.relative_to(inside).as_posix()
        for path in submit._files(inside, made.runtime_env["excludes"])
    }
    assert sent == {"job.yaml", "mortal.py", "toy.py", "sub/data/file"}
    assert made.files == len(sent)

    (inside / "pyproject.toml").write_text("")
    made = submit.prepare("job.yaml", ["output_dir=s3://bucket/run"], uv=True, restarts=0)
    assert (
        made.entrypoint == "uv run bomemeta train job.yaml output_dir=s3://bucket/run --auto-resume"
    )
    assert made.runtime_env["env_vars"]["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "1"
    (inside / "pyproject.toml").unlink()
    shutil.rmtree(inside / "sub")


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (
            [],
            {},
            r"output_dir: got None; a job runs in a copy of this folder that is thrown away\. .*s3://",
        ),
        (["output_dir=runs/a"], {}, r"output_dir: got 'runs/a'; a job runs in a copy"),
        (["output_dir=/a"], {"uv": True}, r"--uv: there is no pyproject\.toml"),
        (
            ["output_dir=/a"],
            {"environment": ["NOT_SET"]},
            r"--env NOT_SET: it is not set here; give its value",
        ),
        (
            ["output_dir=/a"],
            {"excludes": ["*.yaml"]},
            r"job\.yaml is not sent: it is outside of .*, or excluded",
        ),
        (["output_dir=/a"], {"excludes": ["mortal.py"]}, r"imports: .*mortal\.py is not sent"),
        (
            ["output_dir=/a", f"imports=[{TESTS / 'mortal.py'}]"],
            {},
            r"imports: .*mortal\.py is not sent: it is outside",
        ),
        (["output_dir=/a", "solver.inner_step=3"], {}, r"Did you mean solver\.inner_steps\?"),
    ],
)
def test_what_could_not_run_is_refused_before_it_is_sent(inside, overrides, options, message):
    with pytest.raises(ConfigError, match=message):
        submit.prepare("job.yaml", overrides, **options)


def test_files_that_the_job_would_not_have_are_named(inside, tmp_path):
    outside = make_project(tmp_path / "outside")
    with pytest.raises(ConfigError, match=r"outside/job\.yaml is not sent"):
        submit.prepare(str(outside / "job.yaml"), ["output_dir=/a"])
    path = inside / "absolute.yaml"
    path.write_text(yaml.safe_dump({**QUADRATIC, "imports": [str(inside / "mortal.py")]}))
    with pytest.raises(
        ConfigError,
        match=r"absolute\.yaml:\d+: imports: /.*mortal\.py is not there on the cluster; write it relative",
    ):
        submit.prepare("absolute", ["output_dir=/a"])
    path.unlink()


def test_a_folder_that_is_too_large_names_its_biggest_files(inside, monkeypatch):
    with (inside / "big.bin").open("wb") as file:
        file.truncate(submit.LARGEST_UPLOAD + 1)  # a hole: it takes no room
    with pytest.raises(
        ConfigError,
        match=r"has 100 MiB to send, a cluster takes 100\. The biggest files:\n +100\.0 MiB  big\.bin\n",
    ):
        submit.prepare("job", ["output_dir=/a"])
    assert submit.prepare("job", ["output_dir=/a"], excludes=["*.bin"]).size < 1e6
    (inside / "big.bin").unlink()


def test_nobody_at_the_address(inside):
    made = submit.prepare("job", ["output_dir=/a"])
    with pytest.raises(
        ClusterError,
        match=r"no job could be submitted to http://127\.0\.0\.1:9: .*Wanted is the address",
    ):
        submit.submit(made, "http://127.0.0.1:9", wait=True, say=print, show=print)


def test_options_reach_the_job(inside, monkeypatch):
    sent: list[Any] = []

    def send(made: submit.Submission, address: str, *, wait: bool, **rest: Any) -> int:
        sent.append((made.entrypoint, address, wait))
        return 130

    monkeypatch.setattr(submit, "submit", send)
    typed = [
        "submit",
        "job",
        "output_dir=/a",
        "steps=3",
        "--address",
        "http://h:1",
        "--no-wait",
        "--restarts",
        "7",
    ]
    assert CliRunner().invoke(app, typed).exit_code == 130
    assert sent == [
        (
            "bomemeta train job.yaml output_dir=/a steps=3 --auto-resume --restarts 7",
            "http://h:1",
            False,
        )
    ]


class Flaky:
    """A job whose log is lost in the middle of a line, then comes again from its beginning, in
    other pieces.
    """

    def __init__(self) -> None:
        self.pieces = [["one\ntw", OSError("reset")], ["o", "ne\ntwo\n", "three\n"]]

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for piece in self.pieces.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def get_job_status(self, job: str) -> Any:
        from ray.job_submission import JobStatus

        return JobStatus.RUNNING if self.pieces else JobStatus.SUCCEEDED


def test_a_log_is_followed_over_a_lost_connection(monkeypatch):
    monkeypatch.setattr(submit, "PAUSE_S", 0.0)
    shown: list[str] = []
    assert str(submit._follow(Flaky(), "job", shown.append)) == "SUCCEEDED"
    assert "".join(shown) == "one\ntwo\nthree\n"


# Real jobs


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head("token") as started:
        yield started


def run(
    head: Head, folder: Path, *arguments: str, **changes: str
) -> subprocess.CompletedProcess[str]:
    """A user's command in a terminal of its own; `bomemeta` and `ray` are the installed ones."""
    return subprocess.run(
        [arguments[0] if arguments[0] == "bash" else str(Path(sys.executable).with_name(arguments[0])), *arguments[1:]],
        cwd=folder, env=environment_of(head, folder) | changes, text=True, capture_output=True, timeout=JOB_S, check=False,
    )  # fmt: skip


def environment_of(head: Head, folder: Path) -> dict[str, str]:
    # A job has its folder on Python's path; here mortal.py is to find toy.py too.
    return head.environment | {
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    }


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + JOB_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def logs(head: Head) -> str:
    return "\n".join(
        path.read_text() for path in head.folder.glob("session_*/logs/job-driver-*.log")
    )


def test_stopped_and_submitted_again_it_reaches_the_same_bits(head, project, reference, tmp_path):
    folder, mark = tmp_path / "run", tmp_path / "mark"
    arguments = [
        "bomemeta",
        "submit",
        "job",
        f"output_dir={folder}",
        "workers=1",
        "cpus_per_worker=0.5",
        *struck("sleep", mark),
    ]
    arguments += ["--address", head.dashboard]
    first = run(head, project, *arguments, "--no-wait")
    assert first.returncode == 0, first.stderr
    job = first.stderr.splitlines()[0].removeprefix("submitted: ")
    assert f"run folder: {folder}" in first.stderr
    assert job.startswith("raysubmit_"), first.stderr  # nothing of Ray's own before it
    stop = f"ray job stop --address {head.dashboard} {job}"
    assert stop in first.stderr

    wait_for(mark.exists, logs(head))  # in the middle of step 4, for a minute
    stopped = run(head, project, *stop.split())  # returns when it has ended
    assert f"Job '{job}' was stopped" in stopped.stdout + stopped.stderr
    assert checkpoint.load_latest(folder / "checkpoints").checkpoint.step == 4, logs(head)
    assert not (folder / "result.json").exists()

    script = [
        "bash",
        str(TESTS.parent / "launch" / "job_submit.sh"),
        "job",
        str(folder),
        "1",
        *arguments[4:],
    ]
    environment = {
        "BOMEMETA": f"{sys.executable} -m bomemeta",
        "RAY_API_SERVER_ADDRESS": head.dashboard,
    }
    again = run(head, project, *script, **environment)
    assert again.returncode == 0, again.stdout + again.stderr
    result = json.loads((folder / "result.json").read_text())
    assert (result["upper_sha256"], result["first_step"]) == (reference.upper_sha256, 4)
    assert result["metrics"] == reference.metrics
    lines = [line for line in again.stdout.splitlines() if line]
    assert f"run folder: {folder}" in lines
    assert lines[-1] == f"done after 8 steps; run folder: {folder}"
    assert again.stderr.splitlines()[-1].startswith("done: raysubmit_")
    assert "\r" not in again.stdout
    assert "\x1b" not in again.stdout


def test_a_killed_driver_is_started_again_by_its_job_and_reaches_the_same_bits(
    head, project, reference, tmp_path
):
    """With all of the cluster's CPUs, which the dead driver's worker must have given back."""
    folder, mark = tmp_path / "run", tmp_path / "mark"
    arguments = [
        "bomemeta",
        "submit",
        "job",
        f"output_dir={folder}",
        "workers=1",
        "cpus_per_worker=2",
        *struck("sleep", mark),
    ]
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name(arguments[0])), *arguments[1:], "--address", head.dashboard],
        cwd=project, env=environment_of(head, project), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(mark.exists, logs(head))
    drivers = [
        number
        for number, typed in commands()
        if {f"output_dir={folder}", "train"} <= {*typed} and "--restarts" not in typed
    ]
    assert len(drivers) == 1
    os.kill(drivers[0], signal.SIGKILL)
    output, message = process.communicate(timeout=JOB_S)
    assert process.returncode == 0, output + message
    note = "note: the run was killed by SIGKILL; restart 1 of 3, in 1 s, resumes from its last checkpoint"
    assert note in output.splitlines()
    assert message.splitlines()[-1].startswith("done: raysubmit_")
    result = json.loads((folder / "result.json").read_text())
    assert (result["upper_sha256"], result["first_step"]) == (reference.upper_sha256, 3)


@pytest.mark.slow(
    reason="two jobs with environments of their own: pytest -m slow -k job_that_fails"
)
def test_a_job_that_fails_says_why_and_whether_another_try_is_worth_it(head, project, tmp_path):
    """Both at once: one that would fail again, one whose cluster is not there."""
    common = ["bomemeta", "submit", "job", "--address", head.dashboard, "--restarts", "0"]
    cases = [
        (["workers=50"], 1, "failed: 50 workers of 1 CPU"),
        (["workers=1", "address=127.0.0.1:1"], TRY_AGAIN, "failed: no Ray cluster could be joined"),
    ]
    jobs = [[*common, f"output_dir={tmp_path / str(code)}", *keys] for keys, code, _ in cases]
    with ThreadPoolExecutor(len(jobs)) as beside:
        done = beside.map(lambda arguments: run(head, project, *arguments), jobs)
    for failed, (_, code, reason) in zip(done, cases, strict=True):
        assert failed.returncode == code, failed.stdout + failed.stderr
        last = [line for line in failed.stdout.splitlines() if line][-1]
        assert last.startswith(reason), failed.stdout
        assert failed.stderr.splitlines()[-1].startswith("failed: raysubmit_")


def test_a_client_without_a_token_is_refused(head, project, tmp_path):
    arguments = ["bomemeta", "submit", "job", f"output_dir={tmp_path / 'run'}"]
    arguments += ["--address", head.dashboard]
    refused = run(head, project, *arguments, RAY_AUTH_MODE="disabled")
    assert refused.returncode == 1
    assert "RAY_AUTH_MODE and the token" in refused.stderr


@pytest.mark.slow(
    reason="Ray's own command with ours in it, half a minute: pytest -m slow -k by_hand"
)
def test_by_hand(head, project, reference, tmp_path):
    """`ray job submit` of the command."""
    folder = tmp_path / "run"
    command = [
        "bomemeta",
        "train",
        "job.yaml",
        f"output_dir={folder}",
        "workers=1",
        "cpus_per_worker=0.5",
        "--auto-resume",
    ]
    arguments = ["ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--"]
    done = run(head, project, *arguments, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        json.loads((folder / "result.json").read_text())["upper_sha256"] == reference.upper_sha256
    )


def commands() -> Iterator[tuple[int, list[str]]]:
    """Every process of this machine with its command's words."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_text(errors="replace").split("\0")
