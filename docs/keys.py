"""The tables of configuration.md. Which keys there are, their defaults and what they want are read off the
classes, what they mean from bomemeta/meanings.yaml; the rest of the page is written by hand.

`python docs/keys.py` writes the tables anew; a test says where they are not the code's. A section whose
heading names classes (`bome`) has one table, of the first; the others have the same keys.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, TypeAdapter

from bomemeta import listing
from bomemeta.config import SECTIONS, Settings
from bomemeta.validation import phrase

KINDS = {"solvers": "solver", "problems": "problem", "datasets": "data"}
EVERY_RUN = "Every run"
PAGE = Path(__file__).with_name("configuration.md")
HEADER = "| key | default | wants | meaning |\n|---|---|---|---|\n"


class Key(NamedTuple):
    default: str
    wants: str


def settings_keys() -> dict[str, Key]:
    """The keys that every run has."""
    schema = TypeAdapter(Settings).json_schema()
    found: dict[str, Key] = {}
    for key, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            below = schema["$defs"][field.annotation.__name__]["properties"]
            for name, part in field.annotation.model_fields.items():
                wants = phrase(below[name], schema) or ""
                found[f"{key}.{name}"] = Key(json.dumps(part.default), wants)
        else:
            default = "must be given"
            if not field.is_required():
                given = field.default
                default = given if isinstance(given, str) and given else json.dumps(given)
            found[key] = Key(default, phrase(schema["properties"][key], schema) or "")
    return found


def class_keys(kind: str, name: str) -> dict[str, Key]:
    """The keys of a registered class, as `bomemeta list KIND NAME` prints them."""
    found = (
        re.fullmatch(r"  (\w+): +(.*?) +# (.*?)(?:; .*)?", line)
        for line in listing.keys_of(kind, name)
    )
    return {line[1]: Key(line[2].strip("<>"), line[3]) for line in found if line is not None}


def sections(page: str) -> dict[str, str]:
    """The text below each heading, by the heading."""
    parts = re.split(r"^##+ (.*)\n", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def registered(heading: str) -> list[tuple[str, str]]:
    """The classes that a heading names: (kind, name)."""
    named = re.findall(r"`([\w/-]+)`", heading)
    return [
        (kind, name)
        for name in named
        for kind, section in KINDS.items()
        if name in SECTIONS[section].registry.names()
    ]


def with_tables(page: str) -> str:
    """The page with every table of keys as the code has it. Raises KeyError where a meaning lacks."""
    for heading, text in sections(page).items():
        classes = registered(heading)
        if classes:
            keys, meanings = class_keys(*classes[0]), listing.meanings_of(*classes[0])
        elif heading == EVERY_RUN:
            keys, meanings = settings_keys(), listing.meanings()["every run"]
        else:
            continue
        if keys:
            shared = listing.meanings().get(classes[0][0], {}).get("all", {}) if classes else {}
            # What the class alone has, then what others have too.
            keys = dict(
                sorted(keys.items(), key=lambda item: shared.get(item[0]) == meanings[item[0]])
            )
            rows = "".join(
                f"| `{key}` | {_cell(each.default)} | {_cell(each.wants)} | {_cell(meanings[key])} |\n"
                for key, each in keys.items()
            )
            table = re.compile(r"^\| key \|.*\n\|[-|]*\n(?:\|.*\n?)*", re.MULTILINE)
            made = table.sub(lambda _, rows=rows: HEADER + rows, text, count=1)
            page = page.replace(f" {heading}\n{text}", f" {heading}\n{made}", 1)
    return page


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
