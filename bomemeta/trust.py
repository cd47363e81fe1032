"""What a run folder may execute, and whether this user has said yes to it: the one list of it.

| entry | what it executes |
|---|---|
| `imports` | each file or installed module of config.yaml's `imports:` |
| `class` | the module of each `class: module:Class` in a section of config.yaml, and that class's `__init__` |
| `pickles` | the pickles in `data.root`, where config.yaml has `data.trust_pickles: true` |
| `search` | the pickles of Ray Tune in a search's folder, which `tune --resume` loads |

Everything else in a folder is read as numbers and text alone. A folder is from elsewhere where one of
its entries is not in the record of what this user's own runs executed on this machine, or where
somebody else has changed such a file since. What is typed anew (`imports=[...]`, an object for a
section) is the user's own word and is not asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bomemeta.config import Config, load_config
from bomemeta.document import apply_overrides, document_of, read_document
from bomemeta.errors import ConfigError
from bomemeta.imports import is_file_entry
from bomemeta.sections import CLASS, SECTIONS
from bomemeta.storage import is_uri

if TYPE_CHECKING:
    from bomemeta.run_folder import RunFolder


def config_of(
    folder: RunFolder,
    overrides: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
    *,
    trust: bool = False,
) -> Config:
    """`load_config` of a run folder, after `check`. Raises ConfigError as both do."""
    values = read_document(folder.config_file).data
    check(values, folder.location, overrides, keys or {}, trust=trust)
    return load_config(folder.config_file, overrides, keys)


def check(
    values: Mapping[str, Any],
    location: Path | str,
    overrides: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
    *,
    trust: bool = False,
) -> None:
    """Raises ConfigError that lists what the config of a folder would execute and this user never
    did. With `trust` it is recorded instead.
    """
    given = {override.partition("=")[0].strip() for override in overrides} | set(keys or ())
    values = apply_overrides(document_of(values), overrides).data if overrides else values
    ask(entries_of(values, given), location, trust=trust)


def ask(entries: Sequence[str], location: Path | str, *, trust: bool) -> None:
    """See `check`."""
    if trust:
        record(entries)
        return
    unknown = [entry for entry in entries if entry not in _recorded(entries)]
    if unknown:
        raise ConfigError(
            f"{location} comes from elsewhere, and would execute: {'; '.join(unknown)}. No run of yours on this machine did "
            "that before. Look at it; if you trust it, say so: --trust on the command line, trust=True in Python"
        )


def entries_of(values: Mapping[str, Any], given: Iterable[str] = ()) -> list[str]:
    """What a config executes when it is read and its data are, one text for each; not what the keys
    in `given` say.
    """
    own = set(given)
    found = []
    if "imports" not in own:
        imports = values.get("imports")
        for entry in imports if isinstance(imports, list) else []:
            found.append(f"imports {_file(Path(entry)) if is_file_entry(str(entry)) else entry}")
    for key in SECTIONS:
        section = values.get(key)
        if not isinstance(section, Mapping) or key in own:
            continue
        if _is_there(section.get(CLASS)) and not own & {
            f"{key}.{CLASS}",
            f"{key}.{SECTIONS[key].key}",
        }:
            found.append(f"class {section[CLASS]}{_origin(str(section[CLASS]))}")
        if section.get("trust_pickles") and not own & {f"{key}.trust_pickles", f"{key}.root"}:
            root = section.get("root")
            found.append(f"pickles in {os.path.realpath(root) if root else 'the data folder'}")
    return found


def entry_of_search(location: Path | str) -> str:
    """A search's pickles, by the folder; one on a disk that is somebody else's is never known."""
    if is_uri(location):
        return f"search {location}"
    path = os.path.realpath(location)
    with suppress(OSError):
        if (owner := os.stat(path).st_uid) != os.geteuid():
            return f"search {path}, of the user {owner}"
    return f"search {path}"


def record(entries: Sequence[str]) -> None:
    """Remembers that this user executes these. Where that cannot be written, it is asked for again."""
    new = [entry for entry in entries if entry not in _recorded(entries)]
    if not new:
        return
    with suppress(OSError):
        file = _state_file()
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, "".join(json.dumps(entry) + "\n" for entry in new).encode())
        finally:
            os.close(descriptor)


def _state_file() -> Path:
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "bomemeta" / "executed"


def _recorded(entries: Sequence[str]) -> set[str]:
    if not entries:
        return set()
    try:
        file = _state_file()
        status = file.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:  # anybody could have written it
            return set()
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, RuntimeError, UnicodeError):
        return set()
    return {json.loads(line) for line in lines if line.startswith('"') and line.endswith('"')}


def _file(path: Path) -> str:
    """A file by its path; where somebody else could change it, by its content too."""
    real = Path(os.path.realpath(path.expanduser()))
    with suppress(OSError):
        status = real.stat()
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o002:
            return f"{real} (sha256 {hashlib.sha256(real.read_bytes()).hexdigest()})"
    return str(real)


def _is_there(path: Any) -> bool:
    """Whether a class's outermost module can be had here: what is nowhere cannot be executed."""
    if not isinstance(path, str):
        return False
    module, _, name = path.partition(":")
    top = module.partition(".")[0]
    if top == "__main__":
        return hasattr(sys.modules[top], name.partition(".")[0])
    if top in sys.modules or top in sys.builtin_module_names:
        return True
    with suppress(ImportError, ValueError):
        return PathFinder.find_spec(top, [os.getcwd(), *sys.path]) is not None
    return True


def _origin(path: str) -> str:
    """The file that a class's outermost module is, or would be, read from."""
    top = path.partition(":")[0].partition(".")[0]
    if top == "__main__":
        return ""
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None and top not in sys.modules:
        with suppress(ImportError, ValueError):
            spec = PathFinder.find_spec(top, [os.getcwd(), *sys.path])
            file = spec.origin if spec is not None else None
    return f" of {_file(Path(file))}" if file else ""
