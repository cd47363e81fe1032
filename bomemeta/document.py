"""A config as it was written: YAML text and `key=value` overrides, merged, with the location that
each key came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml

from bomemeta.errors import ConfigError
from bomemeta.paths import KEYS, absolute, absolute_imports, made_absolute
from bomemeta.yaml_text import DEEPEST, parse

__all__ = [
    "Document",
    "KeyPath",
    "absolute_imports",
    "apply_overrides",
    "describe",
    "document_of",
    "find_config",
    "read_document",
]

KeyPath = tuple[str | int, ...]


class Document(NamedTuple):
    """Unchecked values, and for every key the location to name in an error (`a.yaml:7`, `override
    'steps=x'`).
    """

    data: dict[str, Any]
    locations: dict[KeyPath, str]
    name: str  # the file, or what stands for it in messages
    folder: Path  # relative paths in it start here

    def location(self, path: KeyPath) -> str:
        """Where the key, or else the nearest key above it, was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.locations:
                return self.locations[path[:length]]
        return self.name


def shipped_configs() -> Path:
    """The folder of the configs that come with bomemeta: inside the installed package, or at the
    top of a clone.
    """
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str | Path) -> Path:
    """The file meant by a path, a path without `.yaml`, or a bare name: of a file here, in
    ./configs, or of a config that comes with bomemeta, the first of them that exists.

    Raises ConfigError with the nearest file's name.
    """
    absolute(name, what="config")
    given = Path(name).expanduser()
    if not given.name:
        raise ConfigError(f"config: got {str(name)!r}, a folder; wanted a .yaml file")
    bare = given.parent == Path()
    folders = [Path(), Path("configs"), shipped_configs()] if bare else [Path()]
    candidates = [
        folder / path
        for folder in folders
        for path in (given, given.with_name(given.name + ".yaml"))
    ]
    for path in candidates:
        if _is_file(path):
            return path
    if given.exists():
        raise ConfigError(f"config: {given.absolute()} is no file; wanted a .yaml file")
    parents = dict.fromkeys(path.parent for path in candidates)
    shipped = {path.stem: path.stem for path in sorted(shipped_configs().glob("*.yaml"))}
    there = {
        path.stem: str(path)
        for parent in parents
        if parent.is_dir() and parent != shipped_configs()
        for path in sorted(parent.glob("*.y*ml"))
    }
    files = there | shipped if bare else there
    near = difflib.get_close_matches(given.stem, shipped | there, n=1)
    if near:
        hint = f"Did you mean {(shipped | there)[near[0]]}?"
    elif files:
        hint = f"There are: {', '.join(files.values())}"
    else:
        hint = f"There is no .yaml file in {next(iter(parents)).resolve()}"
    raise ConfigError(f"no config file {given.absolute()}. {hint}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long here with `.yaml`, a loop of links
        return False


def read_document(path: Path, *, as_typed: bool = False) -> Document:
    """Parses a YAML file. Its paths become absolute, from the file's folder; not where `as_typed`.

    Raises ConfigError naming file and line: unreadable, syntax, duplicate keys, empty, not a
    mapping, a text that is no path.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    node, data = parse(text, str(path))
    if data is None:
        raise ConfigError(
            f"{path}: the file is empty; a config needs at least `problem:`, `solver:` and `steps:`"
        )
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: a config is a mapping of `key: value`, got {describe(data)}")
    locations: dict[KeyPath, str] = {}
    _collect_locations(node, (), str(path), locations)
    folder = path.parent.resolve()
    if not as_typed:
        made_absolute(data, folder)
    return Document(data, locations, str(path), folder)


def document_of(values: Mapping[str, Any], name: str = "config") -> Document:
    """A document from Python values; nothing in it has a line. Paths start at the current folder."""
    data, folder = _copy(values), Path.cwd()
    made_absolute(data, folder)
    return Document(data, {}, name, folder)


def apply_overrides(
    document: Document, overrides: Sequence[str], *, as_typed: bool = False
) -> Document:
    """Sets every `key.sub=value`, the value parsed as YAML; the last one wins.

    Their paths start at the current folder, where they were typed (unless `as_typed`).
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
        location = f"override {override if len(override) <= 200 else override[:197] + '...'!r}"
        _, value = parse(text, location, lines=False)
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
        target[path[-1]] = value
        if not as_typed:
            _put(data, path, location)
        for known in [known for known in locations if known[: len(path)] == path]:
            del locations[known]
        locations[path] = location
    return document._replace(data=data, locations=locations)


def _put(data: dict[str, Any], path: tuple[str, ...], location: str) -> None:
    """Makes the paths that an override gave absolute; the others are so already."""
    typed = ".".join(path)
    keys = [key for key in KEYS if f"{key}.".startswith(f"{typed}.") or typed.startswith(f"{key}.")]
    part = data if typed == "imports" else {key: data[key] for key in data if key != "imports"}
    try:
        made_absolute(part, Path.cwd(), keys)
    except ConfigError as error:
        raise ConfigError(f"{location}: {error}") from error
    data.update(part)


def describe(value: Any) -> str:
    """`'ten' (str)`: a value and its type, short enough for one line."""
    if (
        isinstance(value, dict)
        and "object" in value
        and set(value) <= {"object", "sha256", "fields"}
    ):
        return f"an object of {value['object']}"  # as `sections.plain` records it
    try:
        text = repr(value)
    except (
        ValueError,
        RecursionError,
    ):  # an integer of thousands of digits, a list that has itself
        text = "..."
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _copy(value: Any, depth: int = 0) -> Any:
    """Dicts and lists anew, with keys as text."""
    if depth > DEEPEST:
        raise ConfigError(f"config: lists and mappings are nested more than {DEEPEST} deep")
    if isinstance(value, Mapping):
        return {str(key): _copy(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item, depth + 1) for item in value]
    return str(value) if isinstance(value, PurePath) else value


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
