"""`bomemeta train --restarts`: who is started again and who is not, who gets which signal, and that
nobody stays behind.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from test_promises import QUADRATIC, struck
from typer.testing import CliRunner

import bomemeta
from bomemeta import checkpoint, supervise
from bomemeta.cli import app

# What a supervisor is, with a command of the test's own in the place of the run. Called: PAUSE_S
# PLACE RESTARTS COMMAND...
SUPERVISOR = """
import signal, sys
from bomemeta import supervise
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as some launchers leave it
pause_s, location, restarts, *command = sys.argv[1:]
supervise.FIRST_PAUSE_S = float(pause_s)
sys.exit(supervise.supervise(command, location, int(restarts), lambda text: print(text, flush=True)))
"""
# Notes its number, counts the signals that it gets, and ends a while after the first as a stopped
# run does.
COUNTS = """
import os, signal, sys, time
def note(number, frame):
    print(signal.Signals(number).name, file=open("signals", "a"), flush=True)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
print(os.getpid(), file=open("ready", "w"), flush=True)
while not os.path.exists("signals"):
    time.sleep(0.01)
time.sleep(float(sys.argv[1]))
sys.exit(130)
"""


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}


def supervised(
    folder: Path, *command: str, restarts: int = 2, pause_s: float = 0.0
) -> subprocess.Popen[str]:
    arguments = [
        sys.executable,
        "-c",
        SUPERVISOR,
        str(pause_s),
        str(folder / "run"),
        str(restarts),
        *command,
    ]
    return subprocess.Popen(
        arguments, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    return process.communicate(timeout=60)[0].splitlines()


def wait_for(
    condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 60
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not get there in time"
        time.sleep(0.02)


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


# Who is started again


@pytest.mark.parametrize("code", [0, 1, 2, 130, 137, 143])
def test_what_ends_by_itself_is_passed_through(code, tmp_path):
    process = supervised(tmp_path, "sh", "-c", f"echo begun; exit {code}")
    assert lines_of(process) == ["begun"]
    assert process.returncode == code


@pytest.mark.parametrize(
    ("killer", "hint"), [("SEGV", ""), ("KILL", " (a system that is short of memory does that)")]
)
def test_after_n_restarts_without_a_new_checkpoint_it_gives_up(killer, hint, tmp_path):
    process = supervised(tmp_path, "sh", "-c", f"echo begun; kill -{killer} $$")
    assert lines_of(process) == [
        "begun",
        f"note: the run was killed by SIG{killer}; restart 1 of 2, in 0 s, begins again",
        "begun",
        f"note: the run was killed by SIG{killer}; restart 2 of 2, in 0 s, begins again",
        "begun",
        f"failed: the run was killed by SIG{killer}, 3 times in a row without a new checkpoint{hint}; "
        "the same command resumes from its last checkpoint",
    ]
    assert process.returncode == 128 + signal.Signals[f"SIG{killer}"]


# What a run of a cluster does, and how Ray ends a process without a raylet: at once, with code 1.
CUT_OFF = """
import os, sys
from bomemeta.supervise import announced
print("begun", flush=True)
with announced():
    if not os.path.exists("again"):
        open("again", "w").close()
        os._exit(1)
    sys.exit(int(sys.argv[1]))
"""
JOINED = SUPERVISOR.replace(
    "flush=True)))", "flush=True), supervise.Cluster('127.0.0.1', 9, 0.0)))"
)


@pytest.mark.parametrize(("joined", "code"), [(True, 0), (True, 1), (False, 1)])
def test_what_ray_ends_without_a_word_is_started_again(joined, code, tmp_path):
    """A failure of its own, with the same exit code, is not; nor is what has no cluster."""
    arguments = [sys.executable, "-c", JOINED if joined else SUPERVISOR, "0", "run", "2"]
    done = subprocess.run(
        [*arguments, sys.executable, "-c", CUT_OFF, str(code)],
        cwd=tmp_path, text=True, capture_output=True,
    )  # fmt: skip
    note = "note: the run was ended by Ray, as where this machine's part of the cluster is lost; restart 1 of 2"
    lines = done.stdout.splitlines()
    assert (done.returncode, lines.count("begun")) == (code, 2 if joined else 1), done
    assert any(line.startswith(note) for line in lines) is joined, done


def test_a_new_checkpoint_gives_all_restarts_back(tmp_path):
    """Also one of a seed. Of 5 deaths none but the fourth has the checkpoints of the one before."""
    script = """
        echo $BOMEMETA_RESTARTS >> restarts
        n=$(($(cat n 2>/dev/null || echo 0) + 1)); echo $n > n; mkdir -p run/checkpoints run/seed-1/checkpoints
        case $n in
          1|2) rm -f run/checkpoints/*; touch run/checkpoints/step_0000000$n.pt;;
          3) touch run/seed-1/checkpoints/step_00000000.pt;;
          5) touch run/seed-1/checkpoints/step_00000003.pt;;
          6) exit 7;;
        esac
        kill -9 $$
    """
    process = supervised(tmp_path, "sh", "-c", script, restarts=2)
    restarts = [line.partition("restart ")[2].partition(",")[0] for line in lines_of(process)]
    assert restarts == ["1 of 2", "1 of 2", "1 of 2", "2 of 2", "1 of 2"]
    assert process.returncode == 7
    assert (tmp_path / "restarts").read_text().split() == ["0", "1", "2", "3", "4", "5"]


def test_checkpoints_at_a_uri_are_seen(tmp_path):
    for name in (
        "checkpoints/step_00000003.pt",
        "seed-1/checkpoints/step_00000001.pt",
        "metrics.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = supervise._checkpoints(tmp_path.as_uri())
    assert (
        found
        == {"checkpoints/step_00000003.pt", "seed-1/checkpoints/step_00000001.pt"}
        == supervise._checkpoints(str(tmp_path))
    )
    assert supervise._checkpoints("nowhere://there") is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_was_asked_to_end_is_not_started_again(number, tmp_path):
    # A shell could not take back that SIGINT is ignored, as it is where the tests run in the
    # background of a script.
    end = f"import os, signal; signal.signal({number.value}, signal.SIG_DFL); os.kill(os.getpid(), {number.value})"
    process = supervised(tmp_path, sys.executable, "-c", end)
    assert lines_of(process) == [
        f"interrupted: the run was ended by {number.name}; resume with the same command"
    ]
    assert process.returncode == 128 + number


def test_a_stop_between_two_runs(tmp_path):
    process = supervised(tmp_path, "sh", "-c", "echo begun >> begun; kill -9 $$", pause_s=60.0)
    assert process.stdout is not None
    assert "restart 1 of 2, in 60 s" in process.stdout.readline()
    process.terminate()
    assert lines_of(process) == ["interrupted; resume with the same command"]
    assert process.returncode == 130
    assert (tmp_path / "begun").read_text() == "begun\n"


# Who gets which signal


@pytest.fixture
def counted(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """A supervisor whose command has begun, the command's number, and where it notes what it gets."""
    process = supervised(tmp_path, sys.executable, "-c", COUNTS, "0.3")
    wait_for(lambda: (tmp_path / "ready").exists() and (tmp_path / "ready").read_text(), process)
    yield process, int((tmp_path / "ready").read_text()), tmp_path / "signals"
    process.kill()
    process.communicate()


def test_sigterm_arrives_once(counted):
    process, _, signals = counted
    process.terminate()
    assert lines_of(process) == []
    assert (process.returncode, signals.read_text()) == (130, "SIGTERM\n")


def test_sigint_of_a_process_never_arrives_twice(counted):
    """As where `ray job stop` sends SIGINT: to the supervisor and to the command. A second one to
    the supervisor is meant.
    """
    process, number, signals = counted
    os.kill(number, signal.SIGINT)
    wait_for(signals.exists, process)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: signals.read_text() == "SIGINT\nSIGTERM\n", process)
    process.send_signal(signal.SIGINT)
    assert lines_of(process) == []
    assert (process.returncode, signals.read_text()) == (130, "SIGINT\nSIGTERM\nSIGINT\n")


def test_kill_9_of_the_supervisor_takes_the_command_along(counted):
    process, number, signals = counted
    process.kill()
    process.communicate(timeout=60)  # until nobody has its output open any more
    deadline = time.monotonic() + 60
    while alive(number):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not signals.exists()


def test_ctrl_c_at_a_terminal_arrives_once(tmp_path):
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        arguments = [
            sys.executable,
            "-c",
            SUPERVISOR,
            "0",
            "run",
            "2",
            sys.executable,
            "-c",
            COUNTS,
            "0.3",
        ]
        os.execv(sys.executable, arguments)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.write(terminal, b"\x03")
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130
    assert (tmp_path / "signals").read_text() == "SIGINT\n"


# Real runs


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bomemeta.Result:
    return bomemeta.train(QUADRATIC, [f"output_dir={tmp_path_factory.mktemp('reference') / 'run'}"])


def begin(folder: Path, how: str) -> subprocess.Popen[str]:
    """A user's command, whose run is struck once, in step 4."""
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(QUADRATIC))
    arguments = [
        "train",
        str(config),
        f"output_dir={folder}",
        *struck(how, folder.with_suffix(".mark")),
        "--auto-resume",
        "--restarts",
        "1",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "bomemeta", *arguments],
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def child_of(process: subprocess.Popen[str]) -> int:
    (number,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(number)


def test_a_killed_run_resumes_by_itself_to_the_same_bits(reference, tmp_path):
    folder = tmp_path / "run"
    process = begin(folder, "SIGKILL")
    output, message = process.communicate(timeout=120)
    assert process.returncode == 0, message
    assert reference.upper_sha256 in output
    result = json.loads((folder / "result.json").read_text())
    assert (result["upper_sha256"], result["metrics"]) == (
        reference.upper_sha256,
        reference.metrics,
    )
    assert result["first_step"] == 3
    assert (
        "note: the run was killed by SIGKILL; restart 1 of 1, in 1 s, resumes from its last checkpoint"
        in message.splitlines()
    )
    assert message.splitlines()[-1] == f"done after 8 steps; run folder: {folder}"


def test_a_stopped_run_leaves_a_checkpoint_and_its_exit_code(tmp_path):
    folder = tmp_path / "run"
    process = begin(folder, "SIGSTOP")
    wait_for(lambda: folder.with_suffix(".mark").exists(), process)
    process.terminate()
    os.kill(child_of(process), signal.SIGCONT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130, message
    assert message.splitlines()[-1] == "interrupted after 5 steps; resume with the same command"
    assert checkpoint.load_latest(folder / "checkpoints").checkpoint.step == 5


def test_sigterm_in_a_long_step_saves_and_kill_9_leaves_nobody(tmp_path):
    """As `ray job stop` does, here to the supervisor alone."""
    folder = tmp_path / "run"
    process = begin(folder, "sleep")
    wait_for(lambda: folder.with_suffix(".mark").exists(), process)
    number = child_of(process)
    process.terminate()
    wait_for((folder / "checkpoints" / "step_00000004.pt").exists, process)
    process.kill()
    process.communicate(timeout=50)  # shorter than the step
    assert not alive(number)


def test_what_is_wrong_is_said_once(tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(QUADRATIC))
    done = subprocess.run(
        [sys.executable, "-m", "bomemeta", "train", str(config), "solver.inner_step=3", f"output_dir={tmp_path}/run", "--auto-resume",
         "--restarts=3"],
        env=ENVIRONMENT, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("Did you mean solver.inner_steps?") == 1
    assert "restart" not in done.stderr
    refused = CliRunner().invoke(app, ["train", str(config), "--restarts", "3"])
    assert refused.exit_code == 2
    assert (
        refused.stderr
        == "--restarts 3: a run that is started again resumes where it was; give --auto-resume too\n"
    )
    gone = CliRunner().invoke(
        app, ["train", str(tmp_path / "nothing"), "--auto-resume", "--restarts", "3"]
    )
    assert gone.exit_code == 2
    assert gone.stderr.startswith("no config file")


@pytest.mark.parametrize("how", [["-m", "bomemeta"], ["-X", "dev", "/venv/bin/bomemeta"]])
def test_the_child_is_called_as_its_parent_was(how, monkeypatch):
    typed = ["train", "job", "steps=3", "--restarts", "3", "--auto-resume"]
    monkeypatch.setattr(sys, "orig_argv", ["python", *how, *typed])
    monkeypatch.setattr(sys, "argv", ["bomemeta", *typed])
    assert supervise.same_command("job", ["steps=3"]) == [
        sys.executable,
        *how,
        "train",
        "job",
        "steps=3",
        "--auto-resume",
    ]
