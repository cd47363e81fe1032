"""YAML as it is read by somebody who knows no YAML: numbers are decimal, true and false are the only
truth values, and everything else is text.

YAML 1.1 reads 0123 as 83, 1:30 as 90, 1_000 as 1000, `no` as false and 2020-01-01 as a date. Here
they are texts: right where a text is wanted, and refused with what to write where a number is
(`hint`).
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from bomemeta.boundary import reason
from bomemeta.errors import ConfigError

DEEPEST = 20  # of nested lists and mappings; a config has four
LONGEST_INTEGER = 40  # digits
_NULL = ("", "~", "null", "Null", "NULL")
_TRUTH = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _Composer(yaml.BaseLoader):
    """Nodes with their texts. Aliases, anchors and tags are refused: a config says everything in
    place, and nested aliases grow to any size.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        refused = None
        if isinstance(event, yaml.AliasEvent):
            refused = "aliases (*name) are not supported; write the value out"
        elif getattr(event, "anchor", None) is not None:
            refused = "anchors (&name) are not supported; leave it out, or put a text in quotes"
        elif getattr(event, "tag", None) is not None:
            refused = "tags (!!name) are not supported; write the value, a text in quotes"
        elif self.depth >= DEEPEST:
            refused = f"lists and mappings are nested more than {DEEPEST} deep"
        if refused is not None:
            raise yaml.MarkedYAMLError(problem=refused, problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def parse(text: str, name: str, *, lines: bool = True) -> tuple[yaml.Node | None, Any]:
    """The nodes of a text and its value; None and None where it is empty.

    Raises ConfigError that begins with `name`, and the line where `lines`.
    """
    loader = None
    try:
        text.encode()
        loader = _Composer(text)
        node = loader.get_single_node()
        return node, None if node is None else _value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None and lines else ""
        raise ConfigError(
            f"{name}{line}: not valid YAML: {error.problem or error.context}"
        ) from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"{name}: not valid YAML: {reason(error, named=False)}") from error
    # PyYAML takes some of its input's letters for an end or an index.
    except (ValueError, IndexError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(f"{name}: not valid YAML ({type(error).__name__})") from error
    finally:
        if loader is not None:
            loader.dispose()


def plain(text: str) -> Any:
    """What a text without quotes stands for. Raises ValueError where it is a number that no
    computer has.
    """
    if text in _NULL:
        return None
    if text in _TRUTH:
        return _TRUTH[text]
    if _INTEGER.fullmatch(text):
        if len(text) > LONGEST_INTEGER:
            raise ValueError(f"an integer of {len(text)} digits; wanted at most {LONGEST_INTEGER}")
        return int(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if _FLOAT.fullmatch(text):
        number = float(text)
        if math.isinf(number):
            raise ValueError(f"{_short(text)} is greater than any number of 64 bits")
        if number == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
            raise ValueError(f"{_short(text)} is nearer to 0 than any number of 64 bits")
        return number
    return text


def hint(value: Any, wanted: str) -> str | None:
    """What to write in the place of a value of the wrong type, where that can be guessed. `wanted`
    is the phrase that names the types.
    """
    text = value.strip() if isinstance(value, str) else ""
    if "number" in wanted or "integer" in wanted:
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            return f"Write {int(value)}"
        sign, digits = ("-" if text.startswith("-") else ""), text.lstrip("+-").replace("_", "")
        if re.fullmatch(r"0+[0-9]+", digits):
            number = sign + (digits.lstrip("0") or "0")
            return f"Write {number}: with a leading 0 some read it as octal"
        if re.fullmatch(r"0o[0-7]{1,20}|0x[0-9a-fA-F]{1,16}|0b[01]{1,64}", digits):
            return f"Write {sign}{int(digits, 0)}: numbers are decimal here"
        if re.fullmatch(r"[0-9]{1,9}(:[0-9]{1,9}){1,3}(\.[0-9]*)?", digits):
            return "Write one number: hours and minutes are not added up here"
        if "_" in text and (_INTEGER.fullmatch(digits) or _FLOAT.fullmatch(digits)):
            return f"Write {sign}{digits}"
        if isinstance(_quiet(text), int | float) and text not in _TRUTH:
            return "Leave the quotes out"
    if "true or false" in wanted and text.lower() in ("yes", "on", "y", "no", "off", "n"):
        return f"Write {'true' if text.lower() in ('yes', 'on', 'y') else 'false'}"
    if "a text" in wanted and isinstance(value, bool | int | float):
        return f"""Put it in quotes, as in '"{value}"'"""
    return None


def dump(values: Any) -> str:
    """The values as YAML text, which `parse` reads back to the same."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )


class _Dumper(yaml.SafeDumper):
    """Quotes what would not be read as the text that it is."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if _quiet(text) is text else "'"
    )


_Dumper.add_representer(str, _quoted)


def _quiet(text: str) -> Any:
    try:
        return plain(text)
    except ValueError:
        return None


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key is a list or a mapping", problem_mark=key.start_mark
                )
            if key.value in found:
                raise yaml.MarkedYAMLError(
                    problem=f"{_short(key.value)} is given twice (first in line {first[key.value]}); keep one",
                    problem_mark=key.start_mark,
                )
            first[key.value] = key.start_mark.line + 1
            found[key.value] = _value(item)
        return found
    if getattr(node, "style", None) is not None:  # quotes, or a block
        return node.value
    try:
        return plain(node.value)
    except ValueError as error:
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
