"""The user's own solvers, problems and data sets: files named in a config's `imports:`, run on
driver and workers.

Only here does bomemeta execute something that it was not installed with, and exactly the files
named there.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from bomemeta.errors import ConfigError

# The package that user files seem to live in. Ray pickles their functions by this name: the same in
# every process.
USER_PACKAGE = "bomemeta_user"


class Import(NamedTuple):
    """One entry of `imports:`, ready to travel: a file's text, or (`source` None) a module
    installed everywhere.
    """

    module: str
    source: str | None
    file: str | None  # for tracebacks only; need not exist where the text is executed


def is_file_entry(entry: str) -> bool:
    """Whether an entry of `imports:` names a file (`my_solver.py`), not an installed module
    (`my_package.solvers`).
    """
    return entry.endswith(".py") or "/" in entry or "\\" in entry


def read_imports(entries: Sequence[str]) -> list[Import]:
    """Reads the files, executing nothing.

    Raises ConfigError where a file cannot be read or two files would become the same module.
    """
    imports: dict[str, Import] = {}
    for entry in entries:
        if not is_file_entry(entry):
            imports[entry] = Import(entry, None, None)
            continue
        path = Path(os.path.realpath(Path(entry).expanduser()))
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"imports: cannot read {path}: {reason}") from error
        module = f"{USER_PACKAGE}.{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
        other = imports.get(module)
        if other is not None and other.file != str(path):
            raise ConfigError(
                f"imports: {other.file} and {path} would both be the module {module}; rename one of them"
            )
        imports[module] = Import(module, source, str(path))
    return list(imports.values())


def execute_imports(imports: Iterable[Import]) -> None:
    """Makes every import's registrations known in this process. A text that already ran here is not
    run again.

    Raises ConfigError naming the file and line that failed, with the original exception as
    `__cause__`.
    """
    for entry in imports:
        if entry.source is None:
            _import_installed(entry.module)
        else:
            _execute(entry.module, entry.source, entry.file or entry.module)


class Imports:
    """The files and modules of `imports:`, ready to travel: who unpickles this has executed them."""

    def __init__(self, entries: tuple[Import, ...]) -> None:
        self._entries = entries

    @classmethod
    def of(cls, entries: Sequence[str], objects: Iterable[object] = ()) -> Imports:
        """With the files that an earlier config's `imports:` executed here and that these objects'
        classes are of. Raises ConfigError as `read_imports` does.
        """
        found = {entry.module: entry for entry in read_imports(entries)}
        for name in {cls.__module__ for made in objects for cls in type(made).__mro__}:
            module = sys.modules.get(name)
            if name.startswith(f"{USER_PACKAGE}.") and name not in found and module is not None:
                found[name] = Import(name, module.__dict__["__bomemeta_source__"], module.__file__)
        return cls(tuple(found.values()))

    def __reduce__(self) -> tuple[Callable[..., Imports], tuple[Any, ...]]:
        return _unpickled, (self._entries,)


def _unpickled(entries: tuple[Import, ...]) -> Imports:
    execute_imports(entries)
    return Imports(entries)


def load_imports(entries: Sequence[str]) -> None:
    """Reads and executes, for a process that sees the files. Raises ConfigError as the two parts
    do.
    """
    execute_imports(read_imports(entries))


def _import_installed(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:
        frame = _last_line(error, None)
        raise ConfigError(
            f"imports: module {name!r} cannot be imported{frame}: {_say(error)}. A file of your own is named by "
            "its path, ending in .py; a module must be installed on the driver and on every worker"
        ) from error


def _execute(name: str, source: str, file: str) -> None:
    known = sys.modules.get(name)
    if known is not None and (known.__dict__.get("__bomemeta_source__"), known.__file__) == (
        source,
        file,
    ):
        return
    if USER_PACKAGE not in sys.modules:
        package = ModuleType(USER_PACKAGE, "The files of this run's `imports:` list.")
        # a package without a folder: `import bomemeta_user.x` finds x only once it was executed
        package.__path__ = []
        sys.modules[USER_PACKAGE] = package
    module = ModuleType(name)
    module.__file__ = file
    module.__dict__["__bomemeta_source__"] = source
    # Before execution: dataclasses look their own module up while the file runs.
    sys.modules[name] = module
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except Exception as error:
        sys.modules.pop(name, None)
        raise ConfigError(f"imports: {file}{_last_line(error, file)}: {_say(error)}") from error
    setattr(sys.modules[USER_PACKAGE], name.rpartition(".")[2], module)


def _last_line(error: Exception, file: str | None) -> str:
    """`:12`, the last line of `file` that the error came through; with no file ` (at FILE:12)`, the
    innermost one.
    """
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f":{error.lineno}" if file is not None else f" (at {error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    if file is None:
        # A module that is simply not there fails inside importlib, which is no location to point at.
        own = [
            frame
            for frame in frames
            if "importlib" not in frame.filename and frame.filename != __file__
        ]
        return f" (at {own[-1].filename}:{own[-1].lineno})" if own else ""
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f":{lines[-1]}" if lines else ""


def _say(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}"
