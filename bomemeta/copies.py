"""Copies of the user's objects, and what is wrong with one that cannot be copied or sent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

from bomemeta.boundary import reason
from bomemeta.errors import ConfigError

T = TypeVar("T")

# How deep attributes of attributes are looked at: for arrays, and for the one to blame.
DEPTH = 4


def copy_of(made: T, section: str) -> T:
    """A copy of a config's object, to be changed; arrays that are its attributes, or those of its
    attributes, are shared.

    Raises ConfigError naming the attribute that cannot be copied.
    """
    try:
        return copy.deepcopy(made, {id(value): value for value in _arrays(made, DEPTH)})
    except Exception as error:  # whatever the object's parts raise
        raise ConfigError(cannot(made, section, "copied", copy.deepcopy, error)) from error


def _arrays(made: object, depth: int) -> Iterator[torch.Tensor | np.ndarray]:
    for value in getattr(made, "__dict__", {}).values():
        if isinstance(value, torch.Tensor | np.ndarray):
            yield value
        elif depth and not isinstance(value, type):
            yield from _arrays(value, depth - 1)


def cannot(
    made: object, section: str, what: str, action: Callable[[Any], object], error: Exception
) -> str:
    """The message for an object on which `action` failed: the attribute to blame, and what to do."""
    name, culprit = section, made
    for _ in range(DEPTH):
        below = _failing(culprit, action)
        if below is None:
            break
        attribute, culprit, error = below
        name = f"{name}{attribute}"
    return (
        f"{name}: an object of {type(culprit).__qualname__} cannot be {what} "
        f"({reason(error)}). Each worker gets a copy of the {section}: make in `setup()`, "
        "which runs there, what cannot be copied"
    )


def _failing(made: object, action: Callable[[Any], object]) -> tuple[str, Any, Exception] | None:
    """The first part on which the action fails too, as `.name` or `[key]`."""
    parts: dict[str, Any] = {}
    if isinstance(made, dict):
        parts = {f"[{key!r}]": value for key, value in made.items()}
    elif isinstance(made, list | tuple):
        parts = {f"[{number}]": value for number, value in enumerate(made)}
    else:
        parts = {f".{key}": value for key, value in getattr(made, "__dict__", {}).items()}
    own = {name: value for name, value in parts.items() if name != "._arguments"}
    for name, value in (own | parts).items():
        try:
            action(value)
        except Exception as error:  # whatever the part raises
            return name, value, error
    return None
