"""The documentation site: it builds without a warning, its generated pages have everything, and it
fetches nothing from elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bomemeta

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if built := os.environ.get("BOMEMETA_SITE"):  # CI builds it, with the tutorials' outputs
        return ROOT / built
    for module in ("mkdocs", "material", "mkdocstrings", "nbformat"):
        pytest.importorskip(module, reason="the site needs the extra: uv sync --extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "BOMEMETA_TUTORIALS": "skip"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def generate() -> object:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_its_docstring_on_the_page(site: Path) -> None:
    text = (site / "reference" / "api.html").read_text(encoding="utf-8")
    headed = set(re.findall(r'<h3 id="([\w.]+)"', text))
    wanted = {f"{module}.{name}" for module, names in bomemeta._NAMES.items() for name in names}
    wanted |= {f"bomemeta.{module}" for module in bomemeta._MODULES}
    assert wanted - headed == set()


def test_links_within_the_site_lead_somewhere(site: Path) -> None:
    """mkdocs checks links of Markdown; this one looks at what was written, docstrings' too."""
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    pages.pop(site / "404.html")  # its links begin at the root of a server
    lost = []
    for path, text in pages.items():
        for link in re.findall(r'<(?:a|img|script|link)[^>]* (?:href|src)="([^"]+)"', text):
            target, _, anchor = link.partition("#")
            if re.match(r"\w+:", target):
                continue
            found = (path.parent / target).resolve() if target else path
            there = not anchor or f'id="{anchor}"' in pages.get(found, f'id="{anchor}"')
            if not (found.exists() and there):
                lost.append(f"{path.name}: {link}")
    assert lost == []


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    fetched = [
        f"{path.name}: {found}"
        for path in site.rglob("*.html")
        for found in re.findall(
            r'<(?:script|img|link|iframe)[^>]* (?:src|href)="(?:https?:)?//[^"]+"', path.read_text()
        )
    ]
    assert fetched == []


def test_every_command_is_on_its_page() -> None:
    text = generate().commands()  # type: ignore[attr-defined]
    headed = re.findall(r"^## bomemeta (.+)$", text, re.MULTILINE)
    for name in ("train", "resume", "submit", "eval", "tune", "check", "doctor", "data prepare"):
        assert name in headed
    assert "`--auto-resume`" in text
