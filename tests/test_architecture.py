"""The rooms of docs/architecture.md: who may import whom. Read off the source, so that lazy imports
count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bomemeta"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400  # lines: what is longer is two things

# The heads that each room may import beside the standard library: top-level packages, or modules of
# bomemeta with all below them.
ROOMS = {
    "core": {"torch", "bomemeta.core", "bomemeta.errors"},
    "solvers": {
        "torch",
        "pydantic",
        "bomemeta.core",
        "bomemeta.solvers",
        "bomemeta.registry",
        "bomemeta.errors",
        "bomemeta.extras",
    },
    "nets": {"torch", "bomemeta.nets", "bomemeta.errors"},
    "contract": {"torch", "numpy", "bomemeta.core", "bomemeta.contract", "bomemeta.errors"},
}
NEVER = {
    "problems": {
        "bomemeta.solvers",
        "bomemeta.distributed",
        "bomemeta.engine",
        "bomemeta.session",
        "bomemeta.api",
    },
    "data": {
        "bomemeta.problems",
        "bomemeta.solvers",
        "bomemeta.distributed",
        "bomemeta.engine",
        "bomemeta.session",
        "bomemeta.api",
    },
    "distributed": {
        "bomemeta.problems",
        "bomemeta.solvers",
        "bomemeta.data",
        "bomemeta.engine",
        "bomemeta.session",
        "bomemeta.api",
        "bomemeta.config",
    },
}
WITH_RAY = {
    "distributed/actor.py",
    "distributed/by_value.py",
    "distributed/capacity.py",
    "distributed/cluster.py",
    "distributed/collective.py",
    "distributed/fleet.py",
    "distributed/gauges.py",
    "distributed/leaders.py",
    "distributed/losses.py",
    "distributed/node.py",
    "distributed/process_group.py",
    "distributed/ray_round.py",
    "distributed/ray_transport.py",
    "distributed/slots.py",
    "doctor/cluster.py",
    "serve/batch.py",
    "serve/serving.py",
    "submit.py",
    "tune/exchange.py",
    "tune/placement.py",
    "tune/progress.py",
    "tune/schedulers.py",
    "tune/search.py",
    "tune/trial.py",
}
ENGINE_NEVER = {
    "ray", "bomemeta.assembly", "bomemeta.session", "bomemeta.api", "bomemeta.problems", "bomemeta.solvers", "bomemeta.data",
    "bomemeta.distributed.serial", "bomemeta.distributed.ray_transport", "bomemeta.distributed.cluster", "bomemeta.distributed.actor",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Every module that the file imports anywhere, `from a import b` as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write it out"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def within(module: str, heads: set[str]) -> bool:
    return any(module == head or module.startswith(f"{head}.") for head in heads)


def room(name: str) -> list[Path]:
    files = [path for path in FILES if path.relative_to(PACKAGE).parts[0] == name]
    assert files, f"there is no bomemeta/{name}"
    return files


def wrong(paths: list[Path], forbidden: Callable[[str], bool]) -> list[str]:
    return [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in paths
        for module in sorted(imports(path))
        if forbidden(module)
    ]


@pytest.mark.parametrize("name", ROOMS)
def test_room_imports_only_what_it_may(name: str) -> None:
    allowed = ROOMS[name] | set(sys.stdlib_module_names)
    assert wrong(room(name), lambda module: not within(module, allowed)) == []


@pytest.mark.parametrize("name", NEVER)
def test_room_never_imports(name: str) -> None:
    assert wrong(room(name), lambda module: within(module, NEVER[name])) == []


def test_ray_is_imported_by_the_transport_alone() -> None:
    others = [path for path in FILES if path.relative_to(PACKAGE).as_posix() not in WITH_RAY]
    assert wrong(others, lambda module: within(module, {"ray"})) == []


def test_engine_is_given_its_parts() -> None:
    assert (
        wrong(
            [PACKAGE / name for name in ("engine.py", "evaluation.py")],
            lambda module: within(module, ENGINE_NEVER),
        )
        == []
    )


def test_the_walk_sees_lazy_imports() -> None:
    assert "bomemeta.distributed.ray_transport.RayTransport" in imports(PACKAGE / "assembly.py")


def test_importing_bomemeta_is_light() -> None:
    check = "import sys, bomemeta; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert {"torch", "ray", "learn2learn", "numpy", "pydantic"}.isdisjoint(done.stdout.split())


def test_the_interface_needs_neither_ray_nor_learn2learn() -> None:
    check = "import sys, bomemeta.api; from bomemeta.registry import solvers, problems, datasets\n"
    check += "solvers.names(), problems.names(), datasets.names(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert {"ray", "learn2learn"}.isdisjoint(done.stdout.split())


def test_a_run_needs_no_compiler(tmp_path: Path) -> None:
    """Torch imports its own where one of its optimisers is made: 150 MB, and more time than all
    else that a short run does.
    """
    check = "import sys, bomemeta; bomemeta.train('analytic_quadratic', sys.argv[1:]); print(*sys.modules)"
    overrides = [
        "steps=2",
        "workers=0",
        "solver.upper_optimizer=adam",
        f"output_dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", check, *overrides],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert {
        "torch._dynamo",
        "torch._inductor",
        "ray",
        "learn2learn",
        "sklearn",
        "matplotlib",
    }.isdisjoint(done.stdout.split())


def test_no_file_is_too_long() -> None:
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in FILES
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}
