"""bomemeta: bilevel meta-learning, distributed on Ray.

import bomemeta
result = bomemeta.train("configs/quickstart.yaml", ["steps=100"])
print(result.metrics["test_accuracy"])
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bomemeta.api import Result, evaluate, resume, train

__all__ = ["Result", "__version__", "evaluate", "resume", "train"]
__version__ = version("bomemeta")


def __getattr__(name: str) -> Any:
    # The interface needs torch, which takes seconds to import: `bomemeta --help` does not.
    if name in {"Result", "evaluate", "resume", "train"}:
        from bomemeta import api

        return getattr(api, name)
    if name == "tune":
        return importlib.import_module("bomemeta.tune")
    raise AttributeError(f"module 'bomemeta' has no attribute {name!r}")
