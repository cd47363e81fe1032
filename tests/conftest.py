"""The files that take longest come first: pytest-xdist gives whole files to its processes, in this order."""

from __future__ import annotations

import pytest

LONGEST = (
    "test_tune",
    "test_submit",
    "test_transport_nodes",
    "test_promises",
    "test_auto_resume",
    "test_transport_ray",
    "test_docs",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))  # stable
