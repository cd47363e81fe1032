"""Modules that are called too: `bm.tune(...)` beside `bm.tune.trainable`."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any


def callable_as(module: str, function: str) -> None:
    """Has the module called as this function of `bomemeta.inquiries`, imported when it is first needed."""

    def called() -> Any:
        return getattr(importlib.import_module("bomemeta.inquiries"), function)

    class Callable(ModuleType):
        def __call__(self, *args: Any, **keys: Any) -> Any:
            return called()(*args, **keys)

        @property
        def __signature__(self) -> inspect.Signature:
            return inspect.signature(called())

    sys.modules[module].__class__ = Callable
