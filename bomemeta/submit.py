"""`bomemeta train` as a job on a Ray cluster: what is sent there, what is checked before, and how
it is followed.

A job runs in a copy of the current folder, which is thrown away with everything that it wrote
there. So whatever a run needs must be in that copy or on the cluster, and what it leaves must go
elsewhere; both are checked here, before anything is sent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bomemeta.config import Config, load_config
from bomemeta.document import Document, apply_overrides, find_config, read_document, shipped_configs
from bomemeta.errors import ClusterError, ConfigError
from bomemeta.imports import is_file_entry
from bomemeta.sections import SECTIONS
from bomemeta.storage import is_uri

# What no run needs, at the top of the folder where it begins with a slash; .gitignore and
# .rayignore are heeded by Ray itself.
EXCLUDES = (
    ".git", ".venv", "venv", "__pycache__", "*.pyc", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints", "/runs", "/data",
    "/reproduced", "/dist",
)  # fmt: skip
# Copied to the job where they are set here: where data are, and how Ray proves who it is.
PASSED_ON = ("BOMEMETA_DATA", "BOMEMETA_CACHE", "RAY_AUTH_MODE")
# The cluster's HTTP server takes no larger upload (ray_constants.DASHBOARD_CLIENT_MAX_SIZE).
LARGEST_UPLOAD = 100 * 1024**2
BIGGEST_SHOWN = 5
# Of a driver that is killed, in a row without a new checkpoint in between.
RESTARTS = 3
TRY_AGAIN = 75  # as `bomemeta train` ends where the same command is worth another try
# Between two looks at a job whose log has ended: the cluster needs a moment to note its end.
PAUSE_S = 0.5

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job, ready to be sent."""

    entrypoint: str
    runtime_env: dict[str, Any]
    output_dir: str
    files: int
    size: int  # bytes, before they are zipped


@dataclass(frozen=True)
class Upload:
    """The files of a folder that Ray would send, with their sizes."""

    folder: Path
    sizes: Mapping[Path, int] = field(default_factory=dict)

    def has(self, path: Path) -> bool:
        """Whether a file, or something in a folder, goes along. False for what is elsewhere."""
        path = Path(os.path.abspath(path))  # not resolved: a link goes along where it lies
        return path in self.sizes or any(path in file.parents for file in self.sizes)

    def biggest(self) -> list[str]:
        largest = sorted(self.sizes.items(), key=lambda item: -item[1])[:BIGGEST_SHOWN]
        return [
            f"  {size / 1024**2:8.1f} MiB  {path.relative_to(self.folder)}"
            for path, size in largest
        ]


def prepare(
    config: str,
    overrides: Sequence[str] = (),
    *,
    uv: bool = False,
    excludes: Sequence[str] = (),
    environment: Sequence[str] = (),
    restarts: int = RESTARTS,
) -> Submission:
    """Checks the config and what it needs, and says what would be sent from the current folder.

    `environment`: NAME=VALUE, or NAME for its value here. `restarts`: as in `bomemeta train
    --restarts`. Raises ConfigError where the job could not run or its results would be lost.
    """
    folder = Path.cwd()
    excluded = [*EXCLUDES, *excludes]
    upload = Upload(folder, _files(folder, excluded))
    path = find_config(config)
    settings = load_config(path, overrides)
    # What is relative here is looked for in the job's copy of this folder.
    typed = apply_overrides(read_document(path, as_typed=True), overrides, as_typed=True)
    output_dir = _lasting(typed.data.get("output_dir"))
    _check_carried(path, typed, settings, upload)
    _check_size(upload)
    if uv and not upload.has(folder / "pyproject.toml"):
        raise ConfigError(
            f"--uv: there is no pyproject.toml in {folder}, which `uv run` on the cluster would build its environment from"
        )
    # With it Ray finds a `uv run` among the driver's parents and gives the workers the same
    # environment. Without: a cluster that was itself started by `uv run` would do that to every
    # job, which then has no Ray.
    hook = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": str(int(uv))}
    # A config that comes with bomemeta is on the cluster as well, under the same name.
    relative = path.stem if _shipped(path) else Path(os.path.relpath(path, folder)).as_posix()
    command = [
        *(["uv", "run"] if uv else []),
        "bomemeta",
        "train",
        relative,
        *overrides,
        "--auto-resume",
    ]
    command += ["--restarts", str(restarts)] if restarts else []
    return Submission(
        entrypoint=shlex.join(command),
        runtime_env={
            "working_dir": str(folder),
            "excludes": excluded,
            "env_vars": hook | _environment(environment),
        },
        output_dir=output_dir,
        files=len(upload.sizes),
        size=sum(upload.sizes.values()),
    )


def submit(submission: Submission, address: str, *, wait: bool, say: Say, show: Say) -> int:
    """Sends the job; with `wait` shows its log until it ends, and returns 0 where it was done, 1
    where it failed, 75 where it is worth another try, 130 where it was stopped.

    Ctrl-C while waiting leaves the job alone. Raises ClusterError where there is no cluster at the
    address, or it refuses us.
    """
    with _quiet():
        return _submit(submission, address, wait, say, show)


def _submit(submission: Submission, address: str, wait: bool, say: Say, show: Say) -> int:
    from ray.job_submission import JobStatus

    client, job = _send(submission, address)
    say(f"submitted: {job}")
    say(f"run folder: {submission.output_dir}")
    say(f"see it:     ray job logs --follow --address {address} {job}")
    say(
        f"stop it:    ray job stop --address {address} {job}     (the same submission again resumes from its last step)"
    )
    if not wait:
        return 0
    try:
        status = _follow(client, job, show)
        info = client.get_job_info(job)
    except KeyboardInterrupt:
        say(f"{job} continues without being followed")
        return 130
    except (OSError, RuntimeError) as error:
        raise ClusterError(
            f"the connection to {address} was lost ({error}); {job} may still run, see above for how to see it"
        ) from error
    if status == JobStatus.SUCCEEDED:
        say(f"done: {job}; run folder: {submission.output_dir}")
        return 0
    if status == JobStatus.STOPPED:
        say(f"stopped: {job}; submit it again to resume. run folder: {submission.output_dir}")
        return 130
    say(
        f"failed: {job}: {str(info.message).strip().splitlines()[-1] if info.message else 'no reason was given'}"
    )
    return TRY_AGAIN if info.driver_exit_code == TRY_AGAIN else 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray's log lines: what they say of the upload was checked or is said by us, and each
    of its loggers has a level of its own.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _send(submission: Submission, address: str) -> tuple[Any, str]:
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        return client, client.submit_job(
            entrypoint=submission.entrypoint, runtime_env=submission.runtime_env
        )
    except (RayError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ClusterError(
            f"no job could be submitted to {address}: {reason} Wanted is the address of a cluster's dashboard, as in http://HEAD:8265; "
            "RAY_AUTH_MODE and the token (RAY_AUTH_TOKEN or ~/.ray/auth_token) must be the same on both sides"
        ) from error


def _follow(client: Any, job: str, show: Say) -> Any:
    """Shows the log to its end, also over a lost connection; returns the job's last status."""
    shown = 0

    async def tail() -> None:
        nonlocal shown
        skip = shown  # a new connection begins with the whole log
        async for text in client.tail_job_logs(job):
            fresh = text[skip:]
            skip = max(skip - len(text), 0)
            shown += len(fresh)
            show(fresh)

    while True:
        try:
            asyncio.run(tail())
        except Exception:  # of the connection, by many names; whether there is one and the job still runs is asked next
            time.sleep(PAUSE_S)
        for _ in range(20):
            status = client.get_job_status(job)
            if status.is_terminal():
                return status
            time.sleep(PAUSE_S)


def _lasting(output_dir: str | None) -> str:
    if output_dir is not None and (is_uri(output_dir) or Path(output_dir).is_absolute()):
        return output_dir
    raise ConfigError(
        f"output_dir: got {output_dir!r}; a job runs in a copy of this folder that is thrown away. Give a path that all of the cluster's "
        "machines share, as in output_dir=/shared/runs/NAME, or a URI, as in output_dir=s3://BUCKET/NAME"
    )


def _shipped(path: Path) -> bool:
    """Whether a config is one of those that come with bomemeta, found by its bare name."""
    return path.parent == shipped_configs()


def _check_carried(path: Path, document: Document, settings: Config, upload: Upload) -> None:
    """Raises ConfigError naming every file that the config reads and the job would not have."""
    wrong = []
    if not upload.has(path) and not _shipped(path):
        wrong.append(
            f"{path} is not sent: it is outside of {upload.folder}, or excluded. Submit from a folder that holds it"
        )
    for entry in _entries(document):
        if Path(entry).expanduser().is_absolute() or entry.startswith("~"):
            wrong.append(
                f"{document.location(('imports',))}: imports: {entry} is not there on the cluster; write it relative to the config"
            )
    for entry in settings.imports:
        if is_file_entry(entry) and not upload.has(Path(entry)):
            wrong.append(
                f"imports: {entry} is not sent: it is outside of {upload.folder}, or excluded"
            )
    wrong += [*_loose_classes(document, upload)]
    section = document.data.get("data")
    for key in ("root", "path"):
        location = section.get(key) if isinstance(section, dict) else None
        if not isinstance(location, str) or Path(location).expanduser().is_absolute():
            continue
        override = document.location(("data", key)).startswith("override")
        if not upload.has((Path.cwd() if override else path.parent.resolve()) / location):
            wrong.append(
                f"data.{key}: {location} is not sent: it is excluded, or not there. Give the absolute path that it has on the cluster"
            )
    if wrong:
        raise ConfigError("\n".join(wrong))


def _loose_classes(document: Document, upload: Upload) -> Iterator[str]:
    """What is wrong with classes of modules that lie beside the config and are not installed: a job
    has this folder alone on Python's path.
    """
    from bomemeta.distributed.by_value import is_loose

    for key in SECTIONS:
        section = document.data.get(key)
        path = section.get("class") if isinstance(section, dict) else None
        if not isinstance(path, str):
            continue
        top = path.partition(":")[0].partition(".")[0]
        module = sys.modules.get(top)  # the config was loaded
        carried = any(upload.has(upload.folder / name) for name in (f"{top}.py", top))
        if module is not None and is_loose(module) and not carried:
            yield (
                f"{document.location((key, 'class'))}: {key}.class: {path} is not sent: module {top} is not in {upload.folder}, or "
                "excluded. Submit from the folder that holds it, or install it on the cluster"
            )


def _entries(document: Document) -> list[str]:
    """The files of `imports:` as they were typed in the config; overrides' are absolute already and
    are judged as loaded.
    """
    if document.location(("imports",)).startswith("override"):
        return []
    entries = document.data.get("imports") or []
    return [entry for entry in entries if isinstance(entry, str) and is_file_entry(entry)]


def _check_size(upload: Upload) -> None:
    size = sum(upload.sizes.values())
    if size > LARGEST_UPLOAD:
        raise ConfigError(
            f"{upload.folder} has {size / 1024**2:.0f} MiB to send, a cluster takes {LARGEST_UPLOAD / 1024**2:.0f}. The biggest files:\n"
            + "\n".join(upload.biggest())
            + "\nLeave some out with --exclude PATTERN (as in .gitignore), or submit from a smaller folder"
        )


def _environment(entries: Sequence[str]) -> dict[str, str]:
    found = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals and name not in os.environ:
            raise ConfigError(
                f"--env {name}: it is not set here; give its value, as in --env {name}=VALUE"
            )
        found[name] = value if equals else os.environ[name]
    return found


def _files(folder: Path, excludes: Sequence[str]) -> dict[Path, int]:
    """What Ray itself would put into the package: by its own walk, so that .gitignore and
    .rayignore mean the same.
    """
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path] = path.stat().st_size

    heeds_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    _dir_travel(
        folder,
        [_get_excludes(folder, list(excludes))],
        note,
        heeds_gitignore,
        logging.getLogger(__name__),
    )
    return sizes
