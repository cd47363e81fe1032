"""The three lists that users extend: solvers, problems and data sets, each filled by a
`register("name")` decorator.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from bomemeta.errors import ConfigError

C = TypeVar("C", bound=type[Any])


class Registry:
    """Names to classes of one kind; the package's own files are imported at the first look-up."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._classes: dict[str, type[Any]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator: make the class known as `name`. Raises ConfigError where the name is
        taken.
        """

        def add(cls: C) -> C:
            known = self._classes.get(name)
            # The same file imported again (by driver and worker in one process, by a script and by
            # `imports:`) defines the same class anew: that is no clash.
            if known is not None and _origin(known) != _origin(cls):
                raise ConfigError(
                    f"{self.kind} {name!r} is already registered by {known.__module__}, now again by {cls.__module__}: "
                    "choose another name, or import a file that `imports:` names as bomemeta_user.<its name>"
                )
            self._classes[name] = cls
            return cls

        return add

    def get(self, name: str) -> type[Any]:
        """The class registered as `name`. Raises ConfigError with the nearest name where there is
        none.
        """
        self._load()
        if name in self._classes:
            return self._classes[name]
        near = difflib.get_close_matches(name, self._classes, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(self.names())}."
        raise ConfigError(
            f"{name!r} is not a {self.kind}. {hint} A file of your own that registers one belongs in the config's `imports:` list"
        )

    def name_of(self, cls: type[Any]) -> str | None:
        """The name that the class is registered under; None where it is not."""
        for name, known in self._classes.items():
            if _origin(known) == _origin(cls):
                return name
        return None

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._classes)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")


def _origin(cls: type[Any]) -> tuple[str, str]:
    """Where the class is defined: its file, or its module where that has none, and its name there."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return (os.path.realpath(file) if file else cls.__module__, cls.__qualname__)


solvers = Registry("solver", "bomemeta.solvers")
problems = Registry("problem", "bomemeta.problems")
datasets = Registry("data set", "bomemeta.data")
