"""Where something of a user's enters: a file, a text, an array, code. Whatever its reader raises
becomes an error of ours, with the location.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from bomemeta.errors import BomemetaError

LONGEST = 200  # characters of a reader's message


def reason(error: BaseException, *, named: bool = True) -> str:
    """`KeyError: 'x'`, in one line; without the name where it is not `named` and there is a message."""
    name = type(error).__name__
    # A user's exception has a user's __str__.
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    if not text:
        return name
    return f"{name}: {text}" if named else text


@contextlib.contextmanager
def refusing(say: Callable[[str], BomemetaError], *, named: bool = True) -> Iterator[None]:
    """Turns what the block raises into `say(reason)`. Our own errors pass: they have their location.

    Parsers list no errors: a damaged file surfaces as any of a dozen, MemoryError and
    RecursionError among them.
    """
    try:
        yield
    except BomemetaError:
        raise
    except Exception as error:
        raise say(reason(error, named=named)) from error
