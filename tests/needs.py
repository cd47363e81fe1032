"""Marks of tests that need an optional package, with what a reader can do where they skip."""

from __future__ import annotations

import pytest

from bomemeta.extras import installed

learn2learn = pytest.mark.skipif(
    not installed("learn2learn"),
    reason="learn2learn is not installed; with a C compiler: uv run --extra learn2learn pytest",
)
