"""`bomemeta list`: what a config can name, and the keys of each, read off the registered classes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from bomemeta.core.arguments import MISSING, Field, fields_of
from bomemeta.document import find_config, shipped_configs
from bomemeta.sections import SECTIONS, plain, schema_of
from bomemeta.validation import Wishes, phrase

# The words of the command line, and the config's section that each fills.
_SECTION_OF = {"solvers": "solver", "problems": "problem", "datasets": "data"}


def names_of(kinds: Sequence[str]) -> list[str]:
    """The registered names of each kind (`solvers`, `problems`, `datasets`) with the first line of
    their docstring.
    """
    lines: list[str] = []
    for kind in kinds:
        registry = SECTIONS[_SECTION_OF[kind]].registry
        names = registry.names()
        width = max((len(name) for name in names), default=0)
        lines += [
            f"{kind}:",
            *(f"  {name:<{width}}  {_first_line(registry.get(name))}".rstrip() for name in names),
            "",
        ]
    lines.append("Keys of one: bomemeta list KIND NAME")
    return lines


def config_names() -> list[str]:
    """The configs that come with bomemeta, each with the first line of its comment."""
    files = sorted(shipped_configs().glob("*.yaml"))
    width = max(len(path.stem) for path in files)
    return [
        "configs:",
        *(f"  {path.stem:<{width}}  {_first_comment(path)}".rstrip() for path in files),
        "",
        "Text of one: bomemeta list configs NAME",
    ]


def config_text(name: str) -> list[str]:
    """A config as it was written. Raises ConfigError with the nearest name where there is none."""
    return find_config(name).read_text(encoding="utf-8").splitlines()


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def keys_of(kind: str, name: str) -> list[str]:
    """A class's docstring and its keys with defaults. Raises ConfigError with the nearest name
    where there is none.
    """
    section = _SECTION_OF[kind]
    spec = SECTIONS[section]
    cls = spec.registry.get(name)
    schema = schema_of(cls, spec).json_schema(schema_generator=Wishes)
    rows = []
    for field in fields_of(cls):
        wanted = phrase(schema["properties"][field.name], schema) or "any"
        if meaning := meanings_of(kind, name).get(field.name):
            wanted += f"; {_plain_text(meaning)}"
        rows.append((f"{field.name}:", _default(field), wanted))
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return [
        f"{name}: {inspect.getdoc(cls) or ''}".rstrip(),
        "",
        f"{section}:",
        f"  {spec.key}: {name}",
        *(
            f"  {key:<{widths[0]}} {default:<{widths[1]}}  # {wanted}"
            for key, default, wanted in rows
        ),
    ]


@cache
def meanings() -> Mapping[str, Any]:
    """What the keys mean, in Markdown: `every run`, and by kind those of each class; `all` are
    those of every class of the kind that has such a key and says nothing else.
    """
    text = Path(__file__).with_name("meanings.yaml").read_text(encoding="utf-8")
    found: Mapping[str, Any] = yaml.safe_load(text)
    return found


def meanings_of(kind: str, name: str) -> Mapping[str, str]:
    """Key to meaning for a class of bomemeta's own, in Markdown; of others nothing is known."""
    cls = SECTIONS[_SECTION_OF[kind]].registry.get(name)
    if not cls.__module__.startswith("bomemeta."):
        return {}
    classes = meanings()[kind]
    own = [found for names, found in classes.items() if name in names.split(", ")]
    known = dict(classes.get("all", {}))
    for found in own:
        known |= found
    return {field.name: known[field.name] for field in fields_of(cls) if field.name in known}


def _plain_text(markdown: str) -> str:
    """Without backquotes, and links as their texts."""
    return re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", markdown).replace("`", "")


def _first_line(cls: type[Any]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _default(field: Field) -> str:
    """As YAML has it, which for these values is as JSON has it; empty for a key that must be given."""
    return "<must be given>" if field.default is MISSING else _yaml(plain(field.default))


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str)
