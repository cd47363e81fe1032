"""benchmarks/memory.py --peers: what other libraries keep of their inner steps, on the same network
and images.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import needs
import pytest

ROOT = Path(__file__).parents[1]


@needs.learn2learn
def test_second_order_maml_keeps_every_inner_step_and_first_order_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    memory = importlib.import_module("benchmarks.memory")
    sizes = (
        "--filters",
        "4",
        "--tasks",
        "2",
        "--inner-steps",
        "1",
        "4",
        "--solvers",
        "bome",
        "--peers",
    )
    result = memory.main([*sizes, "--json", str(tmp_path / "memory.json")])
    assert json.loads((tmp_path / "memory.json").read_text()) == result
    slopes = {
        (row["form"], row["solver"]): row["bytes_per_inner_step"] for row in result["results"]
    }
    # Of each inner step the graph keeps at least what the first layer's images became: 5 images, 4
    # filters of 28 x 28 floats.
    images = 5 * 4 * 28 * 28 * 4
    assert slopes["network", "learn2learn MAML"] > images
    assert abs(slopes["network", "learn2learn first-order MAML"]) < images / 100
    assert abs(slopes["network", "bome"]) < images / 100
    assert abs(slopes["head", "learn2learn ANIL"]) < images / 10  # the backbone is not adapted
    assert set(result["absent"]) == {
        name for name in ("torchopt", "higher") if not any(name in solver for _, solver in slopes)
    }
