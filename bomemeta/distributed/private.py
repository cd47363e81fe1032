"""What other users of this machine must not reach: the session folder of a cluster that is started
here, which has its sockets, and the token that lets one in.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bomemeta.errors import ClusterError

# The longest path of a socket: sun_path of Linux has 108 bytes with the NUL.
LONGEST_SOCKET = 107
# What lies below the folder: /r/session_DATE_TIME_PID/sockets/plasma_store, with a PID of 7 digits
# and room for a number behind it.
BELOW = len("/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10")
LONGEST_FOLDER = LONGEST_SOCKET - BELOW


@contextmanager
def session_folder() -> Iterator[Path]:
    """A new folder for Ray's sessions that this user alone can enter (0700), short enough for its
    sockets. Goes at the end, unless the block raises ClusterError: then Ray's logs stay in it.

    It lies in RAY_TMPDIR or TMPDIR where that is short enough, else in /tmp. Raises ClusterError
    where none can be made.
    """
    folder = _made()
    inner = folder / "r"  # Ray opens the folder that it is given to all (0777): it gets one inside
    inner.mkdir()
    try:
        yield inner
    except ClusterError:
        raise
    except BaseException:
        _remove(folder)
        raise
    _remove(folder)


def _made() -> Path:
    chosen = [os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp"]
    reasons = []
    for base in dict.fromkeys(each for each in chosen if each):
        prefix = os.path.join(os.path.realpath(base), "bm-")
        if len(os.fsencode(prefix)) + 8 > LONGEST_FOLDER:  # mkdtemp adds 8 characters
            reasons.append(f"{base} is longer than {LONGEST_FOLDER - 12} bytes")
            continue
        try:
            return Path(tempfile.mkdtemp(dir=os.path.dirname(prefix), prefix="bm-"))
        except OSError as error:
            reasons.append(f"{base}: {error.strerror}")
    raise ClusterError(
        f"Ray's session folder cannot be made ({'; '.join(reasons)}): a socket's path has at most {LONGEST_SOCKET} bytes. "
        "Set RAY_TMPDIR to a short folder that you may write to"
    )


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def token_file() -> Path | None:
    """The file that Ray reads its token from; None where it reads none."""
    if "RAY_AUTH_TOKEN" in os.environ or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def make_token(on_event: Callable[[str], None]) -> None:
    """The user's token file, where Ray would make it, but readable by its owner alone (Ray's own is
    readable by all). One that others can read is closed to them, and that is said.

    Raises ClusterError where it cannot be made, or stays readable by others.
    """
    path = token_file()
    if path is None:
        return
    try:
        if path.exists():
            _close(path, on_event)
        elif "RAY_AUTH_TOKEN_PATH" not in os.environ:
            _write(path)
    except OSError as error:
        raise ClusterError(
            f"Ray's token file {path} cannot be written: {error}. Set RAY_AUTH_TOKEN to a secret of your own"
        ) from error


def _write(path: Path) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    # Made with mode 0600.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix="auth_token.") as file:
        file.write(secrets.token_hex(32))
        file.flush()
        with suppress(FileExistsError):  # another process was faster: its token is as good
            os.link(file.name, path)


def _close(path: Path, on_event: Callable[[str], None]) -> None:
    mode = path.stat().st_mode & 0o777
    if not mode & 0o077:
        return
    try:
        path.chmod(mode & 0o700)
    except OSError as error:
        raise ClusterError(
            f"others can read or change Ray's token file {path} (mode {mode:04o}), and it cannot be closed to them: "
            f"{error.strerror}. Wanted mode 0600; set RAY_AUTH_TOKEN_PATH to a file of your own, or RAY_AUTH_TOKEN"
        ) from error
    on_event(
        f"others could read or change Ray's token file {path} (mode {mode:04o}): it has mode {mode & 0o700:04o} now. "
        "Who may have read it before? Delete the file to have a new token"
    )
