"""Objects of the user's own classes on their way to Ray's workers: by value, with their classes.

Ray's cloudpickle sends a class of `__main__` or of a notebook by value, and any other by the name of
its module, which a worker on another machine may not have. So the modules that are not installed are
registered to be sent by value too.
"""

from __future__ import annotations

import copyreg
import dataclasses
import importlib
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from ray import cloudpickle

from bomemeta.copies import cannot

# bomemeta is on every worker, and files of `imports:` travel as text.
_ELSEWHERE = ("bomemeta", "bomemeta_user", "__main__")


def send_modules_by_value(objects: Mapping[str, object]) -> None:
    """Has the modules of these objects' classes sent by value, but for those that are installed."""
    for special in list(sys.modules.values()):
        # Whose code has a word such as `classes` in it gets `torch.classes` sent along: a module of
        # a class of its own, which cloudpickle does not know to send by name.
        if isinstance(special, ModuleType) and type(special).__module__.startswith("torch"):
            copyreg.pickle(type(special), _by_name)
    # A field without a default is known by this very object.
    copyreg.pickle(type(dataclasses.MISSING), lambda missing: "MISSING")
    for made in objects.values():
        for cls in type(made).__mro__:
            module = sys.modules.get(cls.__module__.partition(".")[0])
            if module is not None and is_loose(module):
                cloudpickle.register_pickle_by_value(module)


def _by_name(module: ModuleType) -> tuple[Callable[[str], ModuleType], tuple[str]]:
    return importlib.import_module, (module.__name__,)


def why_not_sent(objects: Mapping[str, object]) -> str | None:
    """The message for the first object that cannot be pickled, naming its attribute; None: all can."""
    for name, made in objects.items():
        try:
            cloudpickle.dumps(made)
        except Exception as error:  # whatever the object's parts raise
            return cannot(made, name, "sent to workers", cloudpickle.dumps, error)
    return None


def is_loose(module: ModuleType) -> bool:
    """Whether the module is a file of the user's and not of an installed package."""
    file = getattr(module, "__file__", None)
    if module.__name__ in _ELSEWHERE or file is None:
        return False
    installed = {
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    path = Path(file).resolve()
    return not any(path.is_relative_to(Path(folder).resolve()) for folder in installed)
