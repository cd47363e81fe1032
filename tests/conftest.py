"""What makes the suite short: kept bytecode, one thread each, and the longest files first."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tests start hundreds of Python processes. Where none may keep bytecode, as in many containers,
# each would compile torch anew: here they keep it beside pytest's own cache.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(
        Path(__file__).parents[1] / ".pytest_cache" / "bytecode"
    )
    sys.dont_write_bytecode = False

# Two processes of two threads each wait for each other on two cores: with one thread, tests of
# networks took 41 s of CPU time instead of 63. Before torch is imported, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ray's workers are nice (15): beside the suite's other processes they would starve. A search of one
# trial took 54 s instead of 73 at load 13.
os.environ.setdefault("RAY_worker_niceness", "0")

# pytest-xdist gives whole files to its processes, in this order.
LONGEST = (
    "test_tune",
    "test_submit",
    "test_transport_nodes",
    "test_promises",
    "test_auto_resume",
    "test_transport_ray",
    "test_objects",
    "test_s3",
    "test_docs",
)


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The record of what this user's runs executed is the tests' own, here and in their processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))  # stable
