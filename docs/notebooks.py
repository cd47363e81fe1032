"""Tutorials for the site: each is one Markdown file, whose ```python blocks are the cells of a notebook.
The page shows what they print and draw, and gives the notebook to download.

They are run when the site is built, once for each state of the code and the tutorial: what came out
is kept in .cache/tutorials. BOMEMETA_TUTORIALS=skip writes the pages without outputs.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "docs" / "tutorials").glob("[0-9]*.md"))
KEPT = ROOT / ".cache" / "tutorials"
AT_ONCE = 2  # the machines of CI have two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of two with two threads each, each waits


def pages() -> Iterator[tuple[str, str | bytes]]:
    """Every file below docs/ that the tutorials become: its path and its content."""
    import nbformat

    with ThreadPoolExecutor(AT_ONCE) as pool:
        books = list(pool.map(notebook, SOURCES))
    for source, book in zip(SOURCES, books, strict=True):
        name = f"tutorials/{source.stem}"
        yield f"{name}.ipynb", nbformat.writes(book)
        text, figures = page(book, source.stem)
        yield f"{name}.md", text
        yield from figures


def notebook(source: Path) -> Any:
    """The source as a notebook, with outputs unless they are to be skipped."""
    import nbformat

    kept = KEPT / f"{source.stem}-{_state(source)}.ipynb"
    if kept.exists():
        return nbformat.read(kept, as_version=4)
    parts = re.split(r"^```python\n(.*?)^```\n", source.read_text(), flags=re.MULTILINE | re.DOTALL)
    made = (nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell)
    cells = [
        made[number % 2](part.strip(), id=f"cell-{number}")
        for number, part in enumerate(parts)
        if part.strip()
    ]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    if os.environ.get("BOMEMETA_TUTORIALS") != "skip":
        began = time.monotonic()
        _execute(book)
        print(f"{source.name} ran in {time.monotonic() - began:.0f} s", flush=True)
        KEPT.mkdir(parents=True, exist_ok=True)
        nbformat.write(book, kept)
    return book


def page(book: Any, stem: str) -> tuple[str, list[tuple[str, bytes]]]:
    """The notebook as Markdown, and its figures."""
    parts: list[str] = []
    figures: list[tuple[str, bytes]] = []
    for cell in book.cells:
        if cell.cell_type == "markdown":
            title, _, text = cell.source.partition("\n")
            if parts:
                parts.append(cell.source)
            else:
                parts += [title, f"[This page as a notebook]({stem}.ipynb)", text.strip()]
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{stem}-{len(figures) + 1}.png"
                figures.append((f"tutorials/{file}", base64.b64decode(data["image/png"])))
                parts.append(f"![A figure that the code above draws]({file})")
            elif output.get("name") != "stderr" and ("text" in output or "text/plain" in data):
                text = output.get("text") or data["text/plain"]
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", figures


def _state(source: Path) -> str:
    """A hash of the tutorial and of the package: other code may give other outputs."""
    digest = hashlib.sha256(source.read_bytes())
    for file in sorted((ROOT / "bomemeta").rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _execute(book: Any) -> None:
    import nbclient

    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            book, timeout=1800, resources={"metadata": {"path": folder}}
        ).execute()
