"""The fields of a user's object: what its class can be given, and what this object was given.

A dataclass has them by itself. Of a plain class they are the parameters of its `__init__`; `Recorded`,
the base of problems and solvers, keeps what was passed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self, TypeVar, get_type_hints

T = TypeVar("T")

# The default of a field that must be given.
MISSING = dataclasses.MISSING
_KEPT = "_arguments"


class Recorded:
    """Keeps the arguments of a plain class's constructor, so that a run's folder can name them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        if not _is_dataclass(cls):
            if cls.__init__ is object.__init__ and (args or kwargs):
                raise TypeError(f"{cls.__name__} takes no arguments: it has no __init__")
            # Not setattr: the class may be frozen, or a torch module before its own __init__.
            object.__setattr__(made, _KEPT, (args, kwargs))
        return made


class Field(NamedTuple):
    """One argument of a class's constructor."""

    name: str
    hint: Any  # its type, with pydantic's limits; Any where there is none
    default: Any  # MISSING: must be given


def fields_of(cls: type[Any]) -> list[Field]:
    """What the class can be given, in order, without names that begin with an underscore.

    Raises NameError where a type names something that is not there.
    """
    if _is_dataclass(cls):
        hints = get_type_hints(cls, include_extras=True)
        return [
            Field(field.name, hints.get(field.name, Any), _default(field))
            for field in dataclasses.fields(cls)
            if field.init and not field.name.startswith("_")
        ]
    if cls.__init__ is object.__init__:
        return []
    hints = get_type_hints(cls.__init__, include_extras=True)
    return [
        Field(
            name,
            hints.get(name, Any),
            MISSING if parameter.default is inspect.Parameter.empty else parameter.default,
        )
        for name, parameter in _parameters(cls).items()
        if not name.startswith("_")
    ]


def values_of(made: object) -> dict[str, Any]:
    """What this object was given, defaults included.

    Of a plain class that does not derive from `Recorded`: the attributes that have a parameter's
    name; parameters without such an attribute are left out.
    """
    cls = type(made)
    names = [field.name for field in fields_of(cls)]
    if (bound := _bound(made)) is None:
        return {name: getattr(made, name) for name in names if hasattr(made, name)}
    given = {name: value for name, value in bound.arguments.items() if name in names}
    if (star := taken_by(cls, "*")) is not None and bound.arguments[star]:
        given[star] = bound.arguments[star]
    if (others := taken_by(cls, "**")) is not None:
        given |= bound.arguments[others]
    return given


def replaced(made: T, changes: Mapping[str, Any]) -> T:
    """A new object of the same class with these fields changed."""
    if _is_dataclass(type(made)):
        return dataclasses.replace(made, **changes)  # type: ignore[type-var]
    if (bound := _bound(made)) is None:
        return type(made)(**{**values_of(made), **changes})
    others = taken_by(type(made), "**")
    for name, value in changes.items():
        (bound.arguments if others is None or name in bound.arguments else bound.arguments[others])[
            name
        ] = value
    return type(made)(*bound.args[1:], **bound.kwargs)


def taken_by(cls: type[Any], sign: Literal["*", "**"]) -> str | None:
    """The name of the `*` or `**` parameter of a plain class's constructor; None without one."""
    if _is_dataclass(cls) or cls.__init__ is object.__init__:
        return None
    many = {"*": inspect.Parameter.VAR_POSITIONAL, "**": inspect.Parameter.VAR_KEYWORD}
    found = inspect.signature(cls.__init__).parameters.values()
    return next((each.name for each in found if each.kind is many[sign]), None)


def _bound(made: object) -> inspect.BoundArguments | None:
    """What the constructor of a plain `Recorded` class was called with, defaults included."""
    kept = getattr(made, "__dict__", {}).get(_KEPT)
    if kept is None or _is_dataclass(type(made)):
        return None
    args, kwargs = kept
    bound = inspect.signature(type(made).__init__).bind(made, *args, **kwargs)
    bound.apply_defaults()
    return bound


def _is_dataclass(cls: type[Any]) -> bool:
    """Whether the constructor is one that `@dataclass` wrote: a plain subclass may have its own."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    parameters = vars(owner).get("__dataclass_params__")
    return parameters is not None and bool(parameters.init)


def _parameters(cls: type[Any]) -> dict[str, inspect.Parameter]:
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = list(inspect.signature(cls.__init__).parameters.items())[1:]
    return {name: parameter for name, parameter in found if parameter.kind not in many}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
