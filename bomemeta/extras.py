"""Optional parts: packages that the core does without, imported where something of them is asked
for, with one line that says what to install where they are absent.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

from bomemeta.errors import MissingExtra

# Some extras want more than one command.
_HOW = {
    "learn2learn": 'pip install "bomemeta[learn2learn]" needs a C compiler and the steps of '
    'docs/install.md, "Installing learn2learn"; in a clone: uv sync --extra learn2learn'
}


def require(module: str, extra: str, purpose: str) -> Any:
    """The imported module.

    `extra`: which of bomemeta's extras brings it. `purpose`: what asks for it, the message's
    subject, as in "data set learn2learn/cifarfs".
    Raises MissingExtra where the module is not installed. A module that is installed and fails
    raises its own error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Only its own absence: a package that it needs is another mistake with another remedy.
        if error.name != module.partition(".")[0]:
            raise
        how = _HOW.get(extra, f'Install it: pip install "bomemeta[{extra}]"')
        raise MissingExtra(
            f"{purpose} needs the package {error.name}, which is not installed. {how}"
        ) from error


def installed(module: str) -> bool:
    """Whether a top-level module can be imported; it is not."""
    return importlib.util.find_spec(module) is not None


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package; those that are absent are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
