"""From pydantic's errors to lines that say which key, what was got, what was wanted and which key
is nearest.
"""

from __future__ import annotations

import difflib
import json
from pathlib import PurePath
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from bomemeta.document import KeyPath, describe
from bomemeta.yaml_text import hint

LARGEST = 2**63 - 1  # of torch's and numpy's integers


class Wishes(GenerateJsonSchema):
    """JSON schemas that ask for nothing where a type is the user's own class."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {}


class ConfigIssue(NamedTuple):
    """One thing that is wrong, at one key."""

    path: KeyPath
    text: str


def check(
    schema: TypeAdapter[Any], values: Any, above: KeyPath, keys: list[str], found: list[ConfigIssue]
) -> Any:
    """The validated values, or None after adding to `found`.

    `above` is the path of these values in the config, `keys` are the valid ones at their top.
    """
    try:
        # As JSON, where strictness keeps types apart and still takes a list for a tuple and a text
        # for a path.
        as_json = json.dumps(values, default=_json)
    except (TypeError, ValueError, RecursionError) as error:
        # A value of a type that no config has, an integer of thousands of digits, a circle.
        found.append(ConfigIssue(above, f"{_dotted(above) or 'config'}: {error}"))
        return None
    try:
        checked = schema.validate_json(as_json, strict=True)
        if (large := _too_large(values)) is not None:
            got = f"{_dotted(above + large)}: got {describe(_value(values, large))}"
            found.append(ConfigIssue(above + large, f"{got}, wanted at most {LARGEST}"))
            return None
        return checked
    except ValidationError as error:
        wishes = schema.json_schema(schema_generator=Wishes)
        for item in error.errors():
            path = _trimmed(item["loc"], values, keep_last=item["type"] == "missing")
            dotted = ".".join(str(part) for part in above + path)
            wish = _at(wishes, path, wishes)
            if item["type"] == "extra_forbidden":
                valid = (
                    list(_at(wishes, path[:-1], wishes).get("properties", {}))
                    if len(path) > 1
                    else keys
                )
                text = f"{dotted} is not a key. {_nearest(str(path[-1]), valid, '.'.join(map(str, above + path[:-1])))}"
            elif item["type"] == "missing" and path == item["loc"]:
                text = f"{dotted} is missing; wanted {phrase(wish, wishes) or 'a value'}"
            else:
                wanted = (
                    None
                    if item["type"] in ("value_error", "assertion_error")
                    else phrase(wish, wishes)
                )
                value = _value(values, path)
                text = f"{dotted}: got {describe(value)}, wanted {wanted or item['msg']}"
                if wanted is not None and (better := hint(value, wanted)) is not None:
                    text += f". {better}"
            found.append(ConfigIssue(above + path, text))
        return None


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _json(value: Any) -> Any:
    """JSON of what Python code gives: paths, and numpy's numbers."""
    if isinstance(value, PurePath):
        return str(value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(f"got {describe(value)}, wanted texts, numbers, true or false, lists, mappings")


def _too_large(values: Any) -> KeyPath | None:
    """Where an integer is that no array's size and no counter can be."""
    if isinstance(values, bool) or (isinstance(values, int) and abs(values) <= LARGEST):
        return None
    if isinstance(values, int):
        return ()
    items: Any = ()
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, list):
        items = enumerate(values)
    for key, item in items:
        if (path := _too_large(item)) is not None and key != "seed":  # all its bits count
            return (key, *path)
    return None


def _nearest(key: str, valid: list[str], above: str) -> str:
    near = difflib.get_close_matches(key, valid, n=1)
    prefix = f"{above}." if above else ""
    return (
        f"Did you mean {prefix}{near[0]}?"
        if near
        else f"Known: {', '.join(prefix + name for name in valid)}"
    )


def _trimmed(loc: KeyPath, values: Any, *, keep_last: bool) -> KeyPath:
    """The part of pydantic's location that is the user's: it also names members of unions, which
    are no keys.
    """
    for length, part in enumerate(loc):
        if isinstance(values, dict):
            if part not in values:
                return loc[: length + 1] if keep_last else loc[:length]
        elif not isinstance(values, list) or not isinstance(part, int) or part >= len(values):
            return loc[:length]
        values = values[part]
    return loc


def _value(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def _at(schema: dict[str, Any], path: KeyPath, root: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of the value at `path`, {} where it has none."""
    schema = _resolved(schema, root)
    if not path:
        return schema
    for option in [schema, *schema.get("anyOf", [])]:
        option = _resolved(option, root)
        if isinstance(path[0], int):
            below = dict(enumerate(option.get("prefixItems", []))).get(path[0], option.get("items"))
        else:
            below = option.get("properties", {}).get(path[0])
        if below:
            return _at(below, path[1:], root)
    return {}


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return root["$defs"][reference.rpartition("/")[2]] if reference else schema


def phrase(schema: dict[str, Any], root: dict[str, Any]) -> str | None:
    """What a JSON schema asks for, in words: `an integer >= 1`, `one of: a, b`, `a number > 0 or
    null`.
    """
    schema = _resolved(schema, root)
    if "anyOf" in schema:
        options = [phrase(option, root) for option in schema["anyOf"]]
        return " or ".join(option for option in options if option) or None
    if "enum" in schema:
        return f"one of: {', '.join(str(value) for value in schema['enum'])}"
    if "const" in schema:
        return str(schema["const"])
    names = {"integer": "an integer", "number": "a number", "string": "a text", "boolean": "true or false",
             "array": "a list", "object": "a mapping", "null": "null"}  # fmt: skip
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<",
              "minItems": "of length >=", "maxItems": "of length <=", "minLength": "of length >="}  # fmt: skip
    if "minItems" in schema and schema.get("minItems") == schema.get("maxItems"):  # a tuple
        schema = {"type": "array", "exactItems": schema["minItems"]}
        bounds["exactItems"] = "of length"
    limits = [f"{sign} {schema[bound]}" for bound, sign in bounds.items() if bound in schema]
    word = names.get(schema.get("type", ""))
    if word is None:
        return None
    inner = phrase(schema.get("items", {}), root) if schema.get("type") == "array" else None
    return " ".join(
        [word, *([" and ".join(limits)] if limits else []), *([f"(each {inner})"] if inner else [])]
    )
