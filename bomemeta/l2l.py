"""learn2learn (Arnold et al., 2020), imported when it is first used and not before: its import
takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from typing import Any

from bomemeta.extras import require


@functools.cache
def learn2learn() -> Any:
    """The package, imported at the first call without gym's notice about itself.

    Raises MissingExtra where it is not installed.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return require("learn2learn", "learn2learn", "a data set of learn2learn")
