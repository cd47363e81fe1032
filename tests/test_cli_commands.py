"""The command line: help for everything, messages without tracebacks, exit codes; the runs
themselves are replaced.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field
from typer.testing import CliRunner, Result

import bomemeta
from bomemeta.cli import app
from bomemeta.errors import ClusterError, ConfigError
from bomemeta.registry import datasets, problems, solvers
from bomemeta.report import Listener


def invoke(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "100", **environment})


@dataclasses.dataclass
class Ended:
    run_dir: Path = Path("/runs/a")
    steps: int = 7
    metrics: dict[str, float] = dataclasses.field(default_factory=lambda: {"test_accuracy": 0.9})
    upper: dict[str, Any] = dataclasses.field(default_factory=dict)
    upper_sha256: str = "ab" * 32
    interrupted: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    uri: str | None = None


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stands in for `bomemeta.runs`; `calls` holds what it was asked, `ends` says how a run ends."""
    module = types.ModuleType("bomemeta.runs")
    fake: Any = module
    fake.calls = []
    fake.ends = Ended

    def command(name: str) -> Callable[..., Any]:
        def run(
            source: Any,
            overrides: Sequence[str] = (),
            *,
            listener: Listener,
            auto_resume: bool = False,
        ) -> Any:
            fake.calls.append((name, str(source), list(overrides)))
            listener.start(Path("/runs/a"), 0, 7, 1)
            listener.step(6, {"upper_loss": 0.5})
            return fake.ends()

        return run

    for name in ("train", "resume", "evaluate"):
        setattr(module, name, command(name))
    monkeypatch.setitem(sys.modules, "bomemeta.runs", module)
    monkeypatch.setattr(bomemeta, "runs", module, raising=False)
    return module


NAMES = "train resume eval submit tune check doctor profile reproduce list data"
COMMANDS = [(), *((name,) for name in NAMES.split()), ("data", "prepare")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")
    assert "\x1b" not in result.output


def test_help_does_not_import_what_is_slow() -> None:
    check = "import sys; from bomemeta.cli import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert {"torch", "ray", "pydantic", "learn2learn"}.isdisjoint(done.stdout.split())


def test_version() -> None:
    assert invoke("--version").output.startswith("bomemeta 0.")


@pytest.mark.parametrize(
    ("typed", "called"), [("train", "train"), ("resume", "resume"), ("eval", "evaluate")]
)
def test_runs_get_the_overrides_and_print_the_result_alone_on_stdout(
    api: Any, typed: str, called: str
) -> None:
    result = invoke(typed, "x", "steps=3", "solver.betas=[0.5, 1]")
    assert result.exit_code == 0
    assert api.calls == [(called, "x", ["steps=3", "solver.betas=[0.5, 1]"])]
    assert result.stdout.splitlines() == [
        "steps          7",
        "test accuracy  90.00 %",
        f"upper sha256   {'ab' * 32}",
        "run folder     /runs/a",
    ]
    assert result.stderr.splitlines() == [
        "run folder: /runs/a",
        "step 7/7: upper loss 0.5",
        "done after 7 steps; run folder: /runs/a",
    ]


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("a.yaml:3: [x]"), 2), (ClusterError("2 CPUs are free"), 1)]
)
def test_errors_are_a_message_and_a_code(api: Any, error: Exception, code: int) -> None:
    def fail() -> None:
        raise error

    api.ends = fail
    result = invoke("train", "x")
    assert result.exit_code == code
    assert result.stderr.splitlines()[-2:] == ["run folder: /runs/a", f"failed: {error}"]
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_bug_keeps_its_traceback(api: Any) -> None:
    api.ends = lambda: 1 / 0
    assert isinstance(invoke("train", "x").exception, ZeroDivisionError)


def test_an_interrupted_run_says_how_to_resume(api: Any) -> None:
    api.ends = lambda: Ended(interrupted=True)
    result = invoke("train", "x")
    assert result.exit_code == 130
    assert (
        result.stderr.splitlines()[-1]
        == "interrupted after 7 steps; resume with `bomemeta resume /runs/a`"
    )
    assert (
        invoke("train", "x", "--auto-resume")
        .stderr.splitlines()[-1]
        .endswith("resume with the same command")
    )

    def interrupt() -> None:
        raise KeyboardInterrupt

    api.ends = interrupt
    result = invoke("train", "x")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted; resume with `bomemeta resume /runs/a`"


def test_wrong_words_are_refused() -> None:
    assert invoke("trian").exit_code == 2
    assert invoke("train").exit_code == 2
    assert invoke("list", "solver").exit_code == 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fake:
    """A solver for tests.

    It solves nothing.
    """

    ways: int
    upper_lr: Annotated[float, Field(gt=0)] = 1e-3
    phi: str = "gap"
    root: str | None = None
    betas: tuple[float, float] = (0.9, 1.0)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (solvers, problems, datasets):
        monkeypatch.setattr(registry, "_loaded", True)
        monkeypatch.setattr(registry, "_classes", {"fake": Fake})


@pytest.mark.usefixtures("fakes")
def test_list_shows_names_with_their_first_line() -> None:
    assert invoke("list", "solvers").output.splitlines()[:2] == [
        "solvers:",
        "  fake  A solver for tests.",
    ]
    whole = invoke("list").output
    assert [line for line in whole.splitlines() if line.endswith("s:")] == [
        "solvers:",
        "problems:",
        "datasets:",
    ]


@pytest.mark.usefixtures("fakes")
def test_list_shows_the_keys_of_one_as_they_stand_in_a_config() -> None:
    assert invoke("list", "datasets", "fake").output.splitlines() == [
        "fake: A solver for tests.",
        "",
        "It solves nothing.",
        "",
        "data:",
        "  dataset: fake",
        "  ways:     <must be given>  # an integer",
        "  upper_lr: 0.001            # a number > 0",
        "  phi:      gap              # a text",
        "  root:     null             # a text or null",
        "  betas:    [0.9, 1.0]       # a list of length 2",
    ]
    result = invoke("list", "solvers", "fakes")
    assert result.exit_code == 2
    assert "Did you mean fake?" in result.stderr


@pytest.mark.usefixtures("fakes")
def test_list_takes_the_users_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own_list.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom bomemeta.registry import solvers\n"
        "@solvers.register('mine')\n@dataclass\nclass Mine:\n    '''My own.'''\n"
    )
    monkeypatch.setitem(
        sys.modules, "bomemeta_user.own_list", types.ModuleType("none")
    )  # removed after the test
    del sys.modules["bomemeta_user.own_list"]
    assert "  mine  My own." in invoke("list", "solvers", "--import", str(path)).output


def test_data_prepare_hands_over_name_and_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def prepare(name: str, root: Path | None, *, trust_pickles: bool) -> Path:
        asked.append((name, root, trust_pickles))
        return (root or tmp_path) / "omniglot28.npz"

    module: Any = types.ModuleType("bomemeta.data.prepare")
    module.prepare = prepare
    monkeypatch.setitem(sys.modules, "bomemeta.data.prepare", module)
    result = invoke("data", "prepare", "omniglot", "--root", str(tmp_path))
    assert result.output == f"omniglot is ready: {tmp_path / 'omniglot28.npz'}\n"
    invoke("data", "prepare", "omniglot", "--trust-pickles")
    assert asked == [("omniglot", tmp_path, False), ("omniglot", None, True)]
