"""One rule for all paths: written in a file they start at that file's folder, typed (as an override,
an argument, or in Python) at the current one. `~` is the home folder; nothing else is expanded. A
`data.root` that is not there is taken from the folder that the environment's BOMEMETA_DATA names.

What a run folder records is absolute, so a run can be resumed from anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bomemeta.errors import ConfigError, redacted
from bomemeta.imports import is_file_entry

# Keys of a config that are paths. `imports` is a list of them.
KEYS = (
    "output_dir", "data.path", "data.root", "data.cache", "data.files", "problem.weights", "problem.appended",
)  # fmt: skip
# What tells a file of weights from a word: problems have both under the name `problem.weights`.
_WEIGHTS = re.compile(r".*(/|\.(pt|pth|bin|ckpt|safetensors)$)", re.DOTALL)
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, as Linux's file systems have them
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?")
# Where runs can be kept; pyarrow has others, which keep nothing or need a library of their own.
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "file")
# "1" in the environment of workers, unless the user has set it: they share what they read.
SHARED_DATA = "BOMEMETA_SHARED_DATA"


def absolute(typed: str | Path, folder: Path | None = None, what: str = "") -> Path:
    """The absolute path of a text, from `folder` (None: the current one).

    Raises ConfigError that begins with `what`, naming the text: empty, NUL, too long, a variable, a
    user that is not known, a URI.
    """
    text, say = str(typed), f"{what}: " if what else ""
    if not text.strip():
        raise ConfigError(f"{say}got an empty text, wanted a path; `.` is the current folder")
    if "\0" in text:
        raise ConfigError(f"{say}got {_short(text)}, which has a NUL byte; no path has one")
    if re.search(r"\$[A-Za-z_{(]", text):
        raise ConfigError(
            f"{say}got {_short(text)}; variables are not expanded here. Write the path out; in a shell, "
            "leave the single quotes out"
        )
    if (scheme := _SCHEME.match(text)) and scheme[2]:
        raise ConfigError(f"{say}got {_short(text)}, a URI; wanted a path on this machine")
    try:
        given = Path(text).expanduser()
    except RuntimeError:
        user = text.partition("/")[0]
        raise ConfigError(
            f"{say}got {_short(text)}; this machine knows no user {user[1:]}. Write ./{user} where a folder has "
            "that name"
        ) from None
    found = folder / given if folder is not None else given
    try:
        found = real(found) if ".." in found.parts else found.absolute()
        size, longest = (
            len(os.fsencode(found)),
            max((len(os.fsencode(part)) for part in found.parts), default=0),
        )
    except (
        OSError,
        UnicodeError,
    ) as error:  # the current folder is gone; not a text of this system
        raise ConfigError(f"{say}got {_short(text)}: {error}") from error
    if longest > LONGEST_NAME or size > LONGEST_PATH:
        raise ConfigError(
            f"{say}got {_short(text)}, {size} bytes long; a path has at most {LONGEST_PATH}, and "
            f"{LONGEST_NAME} between two slashes"
        )
    return found


def real(path: Path) -> Path:
    """The absolute path without links. Path.resolve would raise where one leads to itself: what opens
    the path says so with its name.
    """
    return Path(os.path.realpath(path))


def location(typed: str | Path, folder: Path | None = None, what: str = "output_dir") -> str:
    """A URI as it was typed, or the absolute path. Raises ConfigError as `absolute`, and where a URI
    names no location at which something can be kept.
    """
    text = str(typed)
    check_no_keys(text, what)
    scheme = _SCHEME.match(text)
    if scheme is None or not (scheme[2] or scheme[1].lower() in SCHEMES):
        found = absolute(text, folder, what)
        if found == Path(found.anchor):
            raise ConfigError(f"{what}: got {_short(text)}, the root of the file system")
        return str(found)
    name, rest = scheme[1], text[scheme.end() :]
    if not scheme[2]:
        raise ConfigError(f"{what}: got {_short(text)}; a URI begins with {name}://")
    if name.lower() not in SCHEMES:
        raise ConfigError(
            f"{what}: {_short(text)} is no location where a run can be kept. Use s3://, gs:// or file:///"
        )
    if name.lower() == "file":
        if not rest.startswith("/") or not rest.strip("/"):
            raise ConfigError(
                f"{what}: got {_short(text)}, wanted file:/// and an absolute path below the root"
            )
    elif not rest.partition("/")[0].strip() or rest.startswith("?"):
        raise ConfigError(
            f"{what}: got {_short(text)}, which names no bucket; wanted {name}://BUCKET/NAME"
        )
    if "\0" in text or re.search(r"\$[A-Za-z_{(]", text):
        raise ConfigError(
            f"{what}: got {_short(text)}; variables are not expanded here, and no NUL is taken"
        )
    return text


def check_no_keys(uri: str, what: str = "output_dir") -> None:
    """Raises ConfigError where a URI has a key and a secret in it: a run would write them down."""
    if redacted(uri) != uri:
        raise ConfigError(
            f"{what}: {redacted(uri)} has a key in it, which would be written into logs and run folders. Leave it out and "
            "set it where the store's own tools look: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://"
        )


def made_absolute(data: dict[str, Any], folder: Path, keys: Sequence[str] = KEYS) -> None:
    """Replaces the paths of a config's values, in place. What is no text is left for validation.

    Raises ConfigError naming the key.
    """
    for key in keys:
        section: Any = data
        *above, last = key.split(".")
        for part in above:
            section = section.get(part) if isinstance(section, Mapping) else None
        if not isinstance(section, dict):
            continue
        typed = section.get(last)
        if key == "data.files" and isinstance(typed, dict):
            section[last] = {
                name: str(absolute(file, folder, f"{key}.{name}"))
                if isinstance(file, str)
                else file
                for name, file in typed.items()
            }
        if key == "problem.appended" and isinstance(typed, list):
            section[last] = [
                each | {"path": str(absolute(each["path"], folder, f"{key}.{i}.path"))}
                if isinstance(each, dict) and isinstance(each.get("path"), str)
                else each
                for i, each in enumerate(typed)
            ]
        if not isinstance(typed, str) or (key == "problem.weights" and not _WEIGHTS.match(typed)):
            continue
        if key == "output_dir":
            section[last] = location(typed, folder, key)
            continue
        found = absolute(typed, folder, key)
        if key == "data.root" and (shared := os.environ.get("BOMEMETA_DATA")):
            beside = absolute(typed, absolute(shared, what="BOMEMETA_DATA"), key)
            found = beside if beside.exists() and not found.exists() else found
        section[last] = str(found)
    if "imports" in data:
        data["imports"] = absolute_imports(data["imports"], folder)


def absolute_imports(value: Any, folder: Path) -> Any:
    """`imports:` with every file's path made absolute; anything that is not a list is left for
    validation to refuse.
    """
    if not isinstance(value, list):
        return value
    return [
        str(absolute(entry, folder, "imports"))
        if isinstance(entry, str) and is_file_entry(entry)
        else entry
        for entry in value
    ]


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:60] + "..." + shown[-10:]
