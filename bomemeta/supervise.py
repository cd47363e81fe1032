"""`bomemeta train --auto-resume --restarts N`: the run as a child process, which is started again
where a signal killed it, or where it lost its cluster. Without --restarts, a run that joins a
cluster is such a child too, so that a line and an exit code are left where the cluster takes it along.

What kills a driver without a word (the system short of memory, a crash in a library, kill -9)
cannot be handled by the driver. So this small process, which imports neither torch nor Ray, waits
beside it. It has no signal handlers but reads one signal after the other, so that nothing races
with anything.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bomemeta.document import apply_overrides, find_config, read_document
from bomemeta.environment import RESTARTS
from bomemeta.errors import ConfigError
from bomemeta.storage import is_uri

# Before a restart; doubled while no new checkpoint appears, up to the longest.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
INTERRUPTED = 130  # as the run itself ends when it is stopped
TRY_AGAIN = 75  # as it ends where the same command is worth another try
# Between two looks whether there is a cluster again; doubled up to the longest.
FIRST_LOOK_S, LONGEST_LOOK_S, CONNECT_S = 1.0, 30.0, 5.0
STOPS = {signal.SIGINT, signal.SIGTERM}
# Who dies of these was asked to end by somebody: no accident, nothing to restart.
# Windows has none of these two.
ASKED = {
    *STOPS,
    *(getattr(signal, name) for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name)),
}
# The pipe on which a run announces its begin and its end, as a number in its environment.
PIPE, BEGUN, ENDED = "BOMEMETA_PIPE", b"b", b"e"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SI_KERNEL = 0x80  # asm-generic/siginfo.h: not sent by a process; here, typed at the terminal
LISTING = "import sys; from bomemeta.storage import Mirror; print(*Mirror(sys.argv[1]).names(), sep='\\n')"
LISTING_S = 60.0

# The key's default, which stands in config.py: it is not imported here, a test compares the two.
ADDRESS_WAIT_S = 600.0

Say = Callable[[str], None]


def same_command(config: str, overrides: Sequence[str], auto_resume: bool = True) -> list[str]:
    """This process's own command without --restarts, by the interpreter and the way (script, -m)
    that it was called.
    """
    how = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    resumes = ["--auto-resume"] if auto_resume else []
    return [sys.executable, *how, "train", config, *overrides, *resumes]


def is_needed(config: str, overrides: Sequence[str]) -> bool:
    """Whether a run is watched without --restarts: it joins a cluster, and is not watched already."""
    here = hasattr(signal, "sigtimedwait") and PIPE not in os.environ  # Linux; not the child itself
    try:
        return here and cluster_of(config, overrides) is not None
    except ConfigError:  # the run itself says what cannot be read
        return False


def location_of(config: str, overrides: Sequence[str]) -> str | None:
    """The config's output_dir, read without the config's imports. Raises ConfigError where the file
    or an override cannot be read.
    """
    location = apply_overrides(read_document(find_config(config)), overrides).data.get("output_dir")
    return None if location is None else str(location)


class Cluster(NamedTuple):
    """Where the run joins a cluster, and how long one is waited for that was lost."""

    host: str
    port: int
    wait_s: float


def cluster_of(config: str, overrides: Sequence[str]) -> Cluster | None:
    """Of the config and RAY_ADDRESS; None where the run starts a cluster of its own."""
    data = apply_overrides(read_document(find_config(config)), overrides).data
    address = data.get("address") or os.environ.get("RAY_ADDRESS") or ""
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdigit() or not data.get("workers"):
        return None
    wait_s = data.get("address_wait_s", ADDRESS_WAIT_S)
    known = isinstance(wait_s, int | float)  # else the run itself refuses it
    return Cluster(host.strip("[]"), int(port), float(wait_s) if known else ADDRESS_WAIT_S)


def supervise(
    command: Sequence[str],
    location: str | None,
    restarts: int,
    say: Say,
    cluster: Cluster | None = None,
    again: str = "the same command",
) -> int:
    """Runs the command to its end and returns its exit code, 128 + N where signal N ended it, as
    shells do.

    Where a signal killed it that nobody sent to stop it, it is started again; not more than
    `restarts` times in a row without a new checkpoint in `location`. A run that ends with TRY_AGAIN,
    as where its cluster is lost, counts as killed, and the cluster is waited for; so does one of a
    `cluster` that was cut off (`announced`). SIGTERM and SIGINT are passed
    on, and the command's own end is waited for. It does not outlive this process. `again`: what
    resumes the run.
    Raises ConfigError where the system is not Linux.
    """
    if not hasattr(signal, "sigtimedwait"):  # nor is there a prctl
        raise ConfigError(
            f"--restarts {restarts} works on Linux alone. Leave it out: the same command again resumes the run "
            "from the last checkpoint"
        )
    seen: frozenset[str] | None = None
    alike = 0  # deaths in a row with the same checkpoints
    begun = 0
    with _held_back() as mask:
        while True:
            code, stopped, cut_off = _run(command, mask, begun)
            begun += 1
            by_ray = code > 0 and cut_off and cluster is not None
            code = TRY_AGAIN if by_ray else code
            if code >= 0 and (code != TRY_AGAIN or stopped):
                return code
            killer = _name(-code)
            how = (
                "was ended by Ray, as where this machine's part of the cluster is lost"
                if by_ray
                else "ended for want of its cluster or store"
                if code > 0
                else f"was killed by {killer}"
            )
            end = code if code > 0 else 128 - code
            if code < 0 and (stopped or -code in ASKED):
                say(f"interrupted: the run was ended by {killer}; resume with {again}")
                return 128 - code
            if not restarts:
                if code < 0 or by_ray:  # else it has said itself what happened
                    say(
                        f"failed: the run {how}{_hint(-code)}; {again} resumes from its last checkpoint"
                    )
                return end
            there = _checkpoints(location)
            alike = alike + 1 if there == seen else 1
            seen = there
            if alike > restarts:
                say(
                    f"failed: the run {how}, {alike} times in a row without a new checkpoint{_hint(-code)}; "
                    f"{again} resumes from its last checkpoint"
                )
                return end
            pause_s = min(FIRST_PAUSE_S * 2 ** (alike - 1), LONGEST_PAUSE_S)
            then = "begins again" if there == frozenset() else "resumes from its last checkpoint"
            say(f"note: the run {how}; restart {alike} of {restarts}, in {pause_s:g} s, {then}")
            stop = signal.sigtimedwait(STOPS, pause_s) is not None
            if stop or (code > 0 and cluster is not None and not _there_again(cluster, say)):
                say("interrupted; resume with the same command")
                return INTERRUPTED


def _there_again(cluster: Cluster, say: Say) -> bool:
    """Waits until the cluster takes connections, with growing pauses, and not longer than its
    `wait_s`; False where this process is asked to stop before.
    """
    deadline, pause_s = time.monotonic() + cluster.wait_s, FIRST_LOOK_S
    where = f"{cluster.host}:{cluster.port}"
    while True:
        try:
            with socket.create_connection((cluster.host, cluster.port), CONNECT_S):
                return True
        except OSError:
            left_s = deadline - time.monotonic()
        if left_s <= 0:
            say(
                f"note: there is no cluster at {where} within address_wait_s = {cluster.wait_s:g} s"
            )
            return True
        if pause_s == FIRST_LOOK_S:
            say(f"note: waiting for a cluster at {where}, for {cluster.wait_s:g} s at most")
        if signal.sigtimedwait(STOPS, min(pause_s, left_s)) is not None:
            return False
        pause_s = min(2 * pause_s, LONGEST_LOOK_S)


@contextmanager
def _held_back() -> Iterator[set[Any]]:
    """The signals that are read one at a time wait until they are; yields the mask that was before."""
    chld = signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # ignored, as it may be inherited, it would take the exit codes along
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOPS, signal.SIGCHLD})
    try:
        yield mask
    finally:
        while signal.sigtimedwait({*STOPS, signal.SIGCHLD}, 0) is not None:
            pass  # too late to be passed on; it must not change the exit code
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, chld)


@contextmanager
def announced() -> Iterator[None]:
    """In the run: tells its supervisor, if it has one, when the block begins, and when it ends in
    whatever way Python knows. Ray ends a process whose raylet is gone with exit code 1 and without.
    """
    pipe = os.environ.pop(PIPE, "")
    if not pipe.isdigit():
        yield
        return
    os.write(int(pipe), BEGUN)
    try:
        yield
    finally:
        os.write(int(pipe), ENDED)


class _Ended(NamedTuple):
    code: int  # -N: signal N
    stopped: bool  # it was asked to
    cut_off: bool  # it had begun, and ended without a word: see `announced`


def _run(command: Sequence[str], mask: set[Any], before: int) -> _Ended:
    """Runs the command once, `before` times after the first."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    reads, writes = os.pipe()
    child = subprocess.Popen(
        command,
        preexec_fn=partial(_tie, prctl, os.getpid(), mask),
        env=os.environ | {RESTARTS: str(before), PIPE: str(writes)},
        pass_fds=(writes,),
    )
    os.close(writes)
    stopped = False
    while child.poll() is None:
        info = signal.sigwaitinfo({*STOPS, signal.SIGCHLD})
        if info.si_signo == signal.SIGCHLD:
            continue
        # The terminal sends Ctrl-C to the child too. Others may have done so (`ray job stop` asks
        # every process of a job), and a second SIGINT would break off the step in hand, while a
        # SIGTERM after either changes nothing: so the first is passed on as that.
        if info.si_code != SI_KERNEL:
            child.send_signal(info.si_signo if stopped else signal.SIGTERM)
        stopped = True
    os.set_blocking(reads, False)
    with open(reads, "rb") as pipe:
        heard = pipe.read() or b""
    stopped = stopped or bool(signal.sigpending() & STOPS)
    return _Ended(child.returncode, stopped, BEGUN in heard and ENDED not in heard)


def _tie(prctl: Any, parent: int, mask: set[Any]) -> None:
    """In the child, before it becomes the command: it is killed when its parent ends in whatever
    way, and gets its signals again.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # which ended before it was watched
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _checkpoints(location: str | None) -> frozenset[str] | None:
    """Names of the checkpoints of a run, or of all its seeds; None where it cannot be seen."""
    if location is None:
        return None
    if not is_uri(location):
        folder = Path(location).expanduser()
        patterns = ("checkpoints/step_*.pt", "seed-*/checkpoints/step_*.pt")
        return frozenset(
            path.relative_to(folder).as_posix()
            for pattern in patterns
            for path in folder.glob(pattern)
        )
    # In a process of its own: what speaks to a store has threads, and this one must be able to
    # fork.
    command = [sys.executable, "-c", LISTING, location]
    try:
        listed = subprocess.run(
            command, capture_output=True, text=True, timeout=LISTING_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return frozenset(name for name in listed.stdout.splitlines() if name.endswith(".pt"))


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _hint(number: int) -> str:
    return " (a system that is short of memory does that)" if number == signal.SIGKILL else ""
