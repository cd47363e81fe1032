"""The sections `problem:`, `solver:` and `data:`: a class and its fields, or an object, which is the same
with the class given.

    solver: {name: bome, inner_steps: 20}                a registered class by its name
    solver: {class: "my_package.solvers:Mine", ...}      any class that can be imported
    bm.Mine(...)                                         an object from Python
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
)

from pydantic import ConfigDict, TypeAdapter
from pydantic.errors import PydanticUserError
from typing_extensions import TypedDict  # pydantic does not take typing's before Python 3.12

from bomemeta.boundary import reason
from bomemeta.core.arguments import MISSING, fields_of, replaced, taken_by, values_of
from bomemeta.document import Document, KeyPath, describe
from bomemeta.errors import ConfigError
from bomemeta.registry import Registry, datasets, problems, solvers
from bomemeta.validation import ConfigIssue, check


class SectionKind(NamedTuple):
    """A section whose keys are a class's fields, and the key that names a registered class."""

    registry: Registry
    key: str


SECTIONS = {
    "problem": SectionKind(problems, "name"),
    "solver": SectionKind(solvers, "name"),
    "data": SectionKind(datasets, "dataset"),
}
# The key that names a class which is not registered, as `module:Class`.
CLASS = "class"
# The only key of a value that a config cannot hold: an object that a field was given.
OBJECT = "object"


def label(made: object) -> str:
    """What messages call an object's class: its registered name, or its own name."""
    cls = type(made)
    names = (kind.registry.name_of(cls) for kind in SECTIONS.values())
    return next((name for name in names if name is not None), cls.__qualname__)


def section_of(key: str, made: object) -> dict[str, Any]:
    """The object as the config file has it: JSON values only. `key` is the section's.

    A value that is no JSON value stands as `{object: module:Class, sha256: ...}`, from which it cannot
    be made again; the digest is there for tensors, arrays and modules.
    """
    kind, cls = SECTIONS[key], type(made)
    name = kind.registry.name_of(cls)
    head = {kind.key: name} if name is not None else {CLASS: class_path(cls)}
    return {**head, **{field: plain(value) for field, value in values_of(made).items()}}


class GivenObject(NamedTuple):
    """An object that was given in a section's place, and the section that it is."""

    made: Any
    section: dict[str, Any]


def take_objects(data: dict[str, Any]) -> dict[str, GivenObject]:
    """Puts a section in the place of every object in a config's values; returns the objects by key.

    Raises ConfigError where a class stands in an object's place.
    """
    found: dict[str, GivenObject] = {}
    for key in SECTIONS:
        value = data.get(key)
        if isinstance(value, type):
            raise ConfigError(
                f"{key}: got the class {value.__name__}, wanted an object: {value.__name__}(...)"
            )
        if value is None or isinstance(value, dict | list | str | int | float):
            continue
        found[key] = GivenObject(value, section_of(key, value))
        data[key] = dict(found[key].section)
    return found


def read_section(
    key: str, document: Document, given: Mapping[str, GivenObject], found: list[ConfigIssue]
) -> Any:
    """The section's object; None, after adding to `found`, where something is wrong with it.

    `given` are the objects of `take_objects`: such a section is the object itself, or a new one of
    its class with what overrides have changed.
    """
    kind = SECTIONS[key]
    values = document.data.get(key)
    if values is None and key == "data":
        return None
    head = {kind.key, CLASS}
    made: Any = None
    before: Mapping[str, Any] = {}
    if key in given and isinstance(values, dict):
        made, before = given[key]
        if any(values.get(name) != before.get(name) for name in head):
            made, before = None, {}
    cls = type(made) if made is not None else _class(key, document, found)
    if cls is None or values is None:
        return None
    fields = {name: value for name, value in values.items() if name not in head}
    changed = {name for name, value in fields.items() if value != before.get(name, MISSING)}
    count = len(found)
    for name, value in fields.items():
        if _is_object(value) and (made is None or name in changed):
            text = f"{key}.{name} was an object of {value[OBJECT]}, which a config cannot hold"
            found.append(
                ConfigIssue(
                    (key, name), f"{text}; give the {key} again, as in resume(DIR, {key}=...)"
                )
            )
    try:
        schema = schema_of(cls, kind, partial=made is not None)
    except ConfigError as error:
        found.append(ConfigIssue((key,), f"{key}: {error}"))
        return None
    hints = {field.name: field.hint for field in fields_of(cls)}
    names = list(hints)
    if made is not None and kind.registry.name_of(cls) is not None:
        for name, value in fields.items():
            if _is_object(value) and _is_of_numbers(hints.get(name)):
                text = f"{key}.{name}: got an object of {value[OBJECT]}, wanted a number"
                found.append(ConfigIssue((key, name), text))
    by_position = taken_by(cls, "*")
    if made is None and by_position in fields:
        found.append(
            ConfigIssue(
                (key, str(by_position)),
                f"{key}.{by_position} was given by position, which a config cannot hold; give the {key} again, "
                f"as in resume(DIR, {key}=...)",
            )
        )
    json_values = {name: value for name, value in fields.items() if not _is_object(value)}
    if made is not None:  # what `*` and `**` of its constructor took
        json_values = {n: v for n, v in json_values.items() if n in hints or n in changed}
    checked = check(schema, json_values, (key,), [kind.key, *names], found)
    if len(found) > count:
        return None
    if made is not None and not changed:
        return made
    try:
        if made is not None:
            return replaced(made, {name: checked[name] for name in changed})
        return cls(**checked)
    except (ConfigError, TypeError, ValueError) as error:
        # What the class itself refuses: a combination of its fields. A TypeError is a user's own.
        found.append(ConfigIssue((key,), f"{key}: {error}"))
        return None


def _class(key: str, document: Document, found: list[ConfigIssue]) -> type[Any] | None:
    kind, values = SECTIONS[key], document.data.get(key)
    known = f"one of: {', '.join(kind.registry.names())}"

    def wrong(path: KeyPath, text: str) -> None:
        found.append(ConfigIssue(path, text))

    if not isinstance(values, dict):
        got = f"got {describe(values)}, " if key in document.data else "missing; "
        wrong((key,), f"{key}: {got}wanted a mapping with `{kind.key}:`, {known}")
        return None
    if CLASS in values and kind.key in values:
        wrong((key, CLASS), f"{key}.{CLASS} and {key}.{kind.key}: give one of the two")
        return None
    by = CLASS if CLASS in values else kind.key
    name = values.get(by)
    if by == CLASS and isinstance(name, type):
        return name
    if not isinstance(name, str):
        got = f": got {describe(name)}, wanted" if by in values else " is missing;"
        wrong((key, by), f"{key}.{by}{got} {known if by == kind.key else 'module:Class'}")
        return None
    try:
        return find_class(name, key) if by == CLASS else kind.registry.get(name)
    except ConfigError as error:
        wrong((key, by), f"{key}.{by}: {error}")
        return None


def forget_other_classes_keys(
    before: Mapping[str, Any], data: dict[str, Any], overridden: AbstractSet[str]
) -> None:
    """Takes out of a section whose class was overridden what only the old class has. What overrides
    give stays, to be checked.
    """
    for section, kind in SECTIONS.items():
        old, new = before.get(section), data.get(section)
        if (
            f"{section}.{kind.key}" not in overridden
            or not isinstance(old, Mapping)
            or not isinstance(new, dict)
        ):
            continue
        new.pop(CLASS, None)
        name = new.get(kind.key)
        if name == old.get(kind.key) or name not in kind.registry.names():
            continue
        known = {kind.key, *(field.name for field in fields_of(kind.registry.get(name)))}
        for field in (set(old) & set(new)) - known:
            if f"{section}.{field}" not in overridden:
                del new[field]


def schema_of(cls: type[Any], kind: SectionKind, partial: bool = False) -> TypeAdapter[Any]:
    """Validates a mapping of a class's fields; with `partial` none of them is missed.

    Raises ConfigError where a field's type cannot be read.
    """
    try:
        keys: dict[str, Any] = {}
        for field in fields_of(cls):
            optional = partial or field.default is not MISSING
            keys[field.name] = NotRequired[field.hint] if optional else Required[field.hint]
        make: Any = TypedDict  # mypy knows only literal field lists
        typed = make(cls.__name__, keys)
        # A type of the user's own is as good as any: a config cannot give such a field, Python can.
        extra: Literal["forbid", "allow"] = "forbid" if taken_by(cls, "**") is None else "allow"
        typed.__pydantic_config__ = ConfigDict(
            extra=extra, strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
        )
        return TypeAdapter(typed)
    except (NameError, TypeError, PydanticUserError) as error:
        raise ConfigError(
            f"{kind.registry.kind} {cls.__name__}: a field's type cannot be a config key: {error}"
        ) from error


def class_path(cls: type[Any]) -> str:
    """`module:Class`, as a run's folder names a class that is not registered."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find_class(path: str, key: str) -> type[Any]:
    """The class that `module:Class` names. Raises ConfigError that says how to give it instead."""
    module, colon, name = path.partition(":")
    give = (
        f"Give the class or an object in Python, as in resume(DIR, {key}={name.split('.')[-1] or '...'}), "
        "or put the class into a module that can be imported"
    )
    if not (module and colon and name):
        raise ConfigError(f"got {path!r}, wanted module:Class, as in my_package.problems:Mine")
    folder, top = Path.cwd(), module.partition(".")[0]
    if any((folder / name).exists() for name in (f"{top}.py", top)):
        # As `python script.py` would have it; the command line has only its own folder.
        sys.path += [str(folder)] if str(folder) not in sys.path else []
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(
            f"module {module} cannot be imported here ({reason(error)}). {give}"
        ) from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise ConfigError(f"class {name} of module {module} is not to be found here. {give}")
    return found


def _is_of_numbers(hint: Any) -> bool:
    """Whether a field takes numbers alone, or None."""
    if get_origin(hint) is Annotated:
        return _is_of_numbers(get_args(hint)[0])
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if len(parts) > 1:
        return all(part is NoneType or _is_of_numbers(part) for part in parts)
    return parts[0] in (int, float)


def plain(value: Any) -> Any:
    """A field's value as JSON has it; see `section_of` for what JSON does not have."""
    numpy = sys.modules.get("numpy")  # what was not imported cannot have made the value
    if numpy is not None and isinstance(value, numpy.generic):  # some are Python numbers too
        return plain(value.item())
    if value is None or isinstance(value, str | bool | int | float):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | AbstractSet):
        items = sorted(value, key=repr) if isinstance(value, AbstractSet) else value
        return [plain(item) for item in items]
    known = getattr(value, "__qualname__", None) or type(value).__qualname__
    module = getattr(value, "__module__", None) or type(value).__module__
    record: dict[str, Any] = {OBJECT: f"{module}:{known}"}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return record | {"fields": plain(values_of(value))}
    digest = _digest(value)
    return record if digest is None else record | {"sha256": digest}


def _is_object(value: Any) -> bool:
    return (
        isinstance(value, dict) and OBJECT in value and set(value) <= {OBJECT, "sha256", "fields"}
    )


def _digest(value: Any) -> str | None:
    """Of a tensor's, an array's or a module's numbers; None of anything else."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    digest = hashlib.sha256()
    tensors: Sequence[Any] = [value]
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype != object:
        pass
    elif torch is not None and isinstance(value, torch.dtype | torch.device):
        digest.update(str(value).encode())
        tensors = []
    elif torch is not None and isinstance(value, torch.Tensor):
        pass
    elif torch is not None and isinstance(value, torch.nn.Module):
        state = value.state_dict()
        digest.update(repr(value).encode())  # layers without numbers count too
        digest.update(repr(list(state)).encode())
        tensors = [tensor for tensor in state.values() if isinstance(tensor, torch.Tensor)]
    else:
        return None
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if torch is not None and isinstance(tensor, torch.Tensor):
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().tobytes())
        else:
            digest.update(numpy.ascontiguousarray(tensor).tobytes())  # type: ignore[union-attr]
    return digest.hexdigest()
