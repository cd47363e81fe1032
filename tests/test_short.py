"""A cluster that is short of memory, and one that is short of room in its object store: real ones, and
what is said.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ray_head import ray_head
from test_transport_nodes import WIDE


def settings(folder: Path, **keys: object) -> str:
    path = folder / "a.yaml"
    path.write_text(yaml.safe_dump({**WIDE, **keys}))
    return str(path)


@pytest.mark.slow(reason="a cluster of its own: pytest -m slow -k memory_killer")
def test_rays_memory_killer_is_named_with_the_node(tmp_path):
    """The machine uses more than a hundredth of its memory: Ray kills every worker."""
    short = {"memory_usage_threshold": 0.01, "memory_monitor_refresh_ms": 100}
    log = tmp_path / "log"
    with ray_head("disabled", system=short) as head, log.open("w") as file:
        config = settings(tmp_path, workers=1, address=head.address)
        run = subprocess.Popen(
            [sys.executable, "-m", "bomemeta", "train", config, f"output_dir={tmp_path / 'run'}"],
            env=head.environment, stdout=file, stderr=file,
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while "killed for memory" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        run.kill()
        run.wait()
    (*_, note) = [line for line in log.read_text().splitlines() if "killed for memory" in line]
    assert re.fullmatch(
        r"note: worker 0 was killed for memory on 127\.0\.0\.1: [\d.]+ GiB of [\d.]+ in use there .*; a replacement is starting\. "
        r"Ray's memory killer did that; lower the number of workers on a node .*",
        note,
    ), note


@pytest.mark.slow(reason="a cluster of its own, 0.4 GB on the disk: pytest -m slow -k spills")
def test_an_x_larger_than_the_store_spills_and_is_noted_once(tmp_path):
    large = {"name": "wide", "tasks": 1, "size": 26_000_000}  # 99 MiB; the store has 95
    keys = {"problem": large, "steps": 2, "shards": 1, "checkpoint": {"every_steps": 100}}
    with ray_head("disabled") as head:
        config = settings(tmp_path, workers=1, address=head.address, **keys)
        done = subprocess.run(
            [sys.executable, "-m", "bomemeta", "train", config, f"output_dir={tmp_path / 'run'}"],
            env=head.environment, text=True, capture_output=True, timeout=580, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (note,) = [line for line in done.stderr.splitlines() if "object store" in line]
    assert note.startswith("note: x has 0.10 GiB and the object store of this node 0.09: it spills")
