"""The Python blocks of the pages for newcomers run, page by page, from an empty folder. A block in
```py instead of ```python is another library's code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    path
    for path in (DOCS / "index.md", DOCS / "coming_from.md", DOCS / "howto" / "index.md")
    if path.exists() and "```python\n" in path.read_text(encoding="utf-8")
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    text = path.read_text(encoding="utf-8")
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.M), 1):
        exec(compile(code, f"{path.name}, block {number}", "exec"), names)
