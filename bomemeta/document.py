"""A config as it was written: YAML text and `key=value` overrides, merged, with the location that
each key came from.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bomemeta.errors import ConfigError
from bomemeta.imports import is_file_entry

KeyPath = tuple[str | int, ...]


class Document(NamedTuple):
    """Unchecked values, and for every key the location to name in an error (`a.yaml:7`, `override
    'steps=x'`).
    """

    data: dict[str, Any]
    locations: dict[KeyPath, str]
    name: str  # the file, or what stands for it in messages
    folder: Path  # relative `imports:` start here

    def location(self, path: KeyPath) -> str:
        """Where the key, or else the nearest key above it, was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.locations:
                return self.locations[path[:length]]
        return self.name


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases: a config says everything in place, and nested aliases grow
    to any size.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not supported; write the value out", problem_mark=mark
            )
        return super().compose_node(parent, index)


# YAML 1.1 reads 1e-3 as a string because it has no dot; everybody means the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def find_config(name: str | Path) -> Path:
    """The file meant by a path, a path without `.yaml`, or the bare name of a file in ./configs.

    Raises ConfigError with the nearest file's name.
    """
    given = Path(name).expanduser()
    folders = [Path(), Path("configs")] if given.parent == Path() else [Path()]
    candidates = [
        folder / path
        for folder in folders
        for path in (given, given.with_name(given.name + ".yaml"))
    ]
    for path in candidates:
        if path.is_file():
            return path
    parents = dict.fromkeys(path.parent for path in candidates)
    files = {
        path.stem: path
        for parent in parents
        if parent.is_dir()
        for path in sorted(parent.glob("*.y*ml"))
    }
    near = difflib.get_close_matches(given.stem, files, n=1)
    if near:
        hint = f"Did you mean {files[near[0]]}?"
    elif files:
        hint = f"There are: {', '.join(str(path) for path in files.values())}"
    else:
        hint = (
            f"There is no .yaml file in {' or '.join(str(parent.resolve()) for parent in parents)}"
        )
    raise ConfigError(f"no config file {given}. {hint}")


def read_document(path: Path) -> Document:
    """Parses a YAML file with the safe loader.

    Raises ConfigError naming file and line: unreadable, syntax, duplicate keys, empty, not a
    mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    node, data = _parse(text, str(path))
    if data is None:
        raise ConfigError(
            f"{path}: the file is empty; a config needs at least `problem:`, `solver:` and `steps:`"
        )
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: a config is a mapping of `key: value`, got {describe(data)}")
    locations: dict[KeyPath, str] = {}
    _collect_locations(node, (), str(path), locations)
    return Document(data, locations, str(path), path.parent.resolve())


def document_of(values: Mapping[str, Any], name: str = "config") -> Document:
    """A document from Python values; nothing in it has a line."""
    return Document(_copy(values), {}, name, Path.cwd())


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """Sets every `key.sub=value`, the value parsed as YAML; the last one wins.

    Files of an overriding `imports=` start at the current folder, where they were typed.
    Raises ConfigError naming the override.
    """
    data, locations = _copy(document.data), dict(document.locations)
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(
                f"override {override!r}: wanted key=value, as in steps=100 or solver.inner_steps=5"
            )
        location = f"override {override!r}"
        _, value = _parse(text, location)
        target = data
        for depth, part in enumerate(path[:-1], start=1):
            # `data: null` and a missing section may both be filled key by key.
            if target.get(part) is None:
                target[part] = {}
                locations[path[:depth]] = location
            target = target[part]
            if not isinstance(target, dict):
                raise ConfigError(
                    f"{location}: {'.'.join(path[:depth])} has no keys below it; it is {describe(target)}"
                )
        target[path[-1]] = absolute_imports(value, Path.cwd()) if path == ("imports",) else value
        for known in [known for known in locations if known[: len(path)] == path]:
            del locations[known]
        locations[path] = location
    return document._replace(data=data, locations=locations)


def describe(value: Any) -> str:
    """`'ten' (str)`: a value and its type, short enough for one line."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def absolute_imports(value: Any, folder: Path) -> Any:
    """`imports:` with every file's path made absolute; anything that is not a list is left for
    validation to refuse.
    """
    if not isinstance(value, list):
        return value
    return [
        str((folder / Path(entry).expanduser()).resolve())
        if isinstance(entry, str) and is_file_entry(entry)
        else entry
        for entry in value
    ]


def _copy(value: Any) -> Any:
    """Dicts and lists anew, with keys as text, and dates as the text that the user wrote (no config
    key is a date).
    """
    if isinstance(value, Mapping):
        return {str(key): _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value.isoformat() if isinstance(value, datetime.date) else value


def _parse(text: str, name: str) -> tuple[yaml.Node | None, Any]:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _refuse_duplicates(node, name)
        return node, _copy(loader.construct_document(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None and not name.startswith("override") else ""
        raise ConfigError(
            f"{name}{line}: not valid YAML: {error.problem or error.context}"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2020-13-45
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_duplicates(node: yaml.Node, name: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, name)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in first:
                    where = f"{name}:{line}" if not name.startswith("override") else name
                    raise ConfigError(
                        f"{where}: {key.value} is given twice (first in line {first[key.value]}); keep one"
                    )
                first[key.value] = line
            _refuse_duplicates(value, name)


def _collect_locations(
    node: yaml.Node | None, path: KeyPath, name: str, locations: dict[KeyPath, str]
) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            locations[(*path, key.value)] = f"{name}:{key.start_mark.line + 1}"
            _collect_locations(value, (*path, key.value), name, locations)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            locations[(*path, index)] = f"{name}:{item.start_mark.line + 1}"
            _collect_locations(item, (*path, index), name, locations)
