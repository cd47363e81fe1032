"""The documentation against the code: snippets run, tables agree, examples and shipped configs
train.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

import bomemeta
from bomemeta import health, listing
from bomemeta.cli import app
from bomemeta.config import SECTIONS, load_config
from bomemeta.core.arguments import fields_of
from bomemeta.errors import DataError
from bomemeta.metrics import TENSORBOARD_TAGS, read_metrics
from bomemeta.tune.spec import load_search

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.rglob("*.md")),
]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
TUNE_FILES = [
    path for path in FILES if re.search(r"^space:", path.read_text(encoding="utf-8"), re.MULTILINE)
]
CONFIGS = [path for path in FILES if path not in TUNE_FILES]
SECTION_OF = {"solvers": "solver", "problems": "problem", "datasets": "data"}
# What the package itself registers: other tests' own classes are registered in this process too.
REGISTERED = {
    kind: [
        name
        for name in SECTIONS[section].registry.names()
        if SECTIONS[section].registry.get(name).__module__.startswith("bomemeta.")
    ]
    for kind, section in SECTION_OF.items()
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """First cell, without its backquotes, to the other cells, of every row of every table; `\\|` is a bar within a cell."""
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    return {row[0].strip("`"): [cell.replace(r"\|", "|") for cell in row[1:]] for row in cells}


# README


def test_readme_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    result = names["result"]
    assert isinstance(result, bomemeta.Result)
    # y_i = 2 x / 3, so x* is 3 / 2 times the mean of the a_i, which is 7.5 in every entry.
    assert result.upper["x"].tolist() == pytest.approx([11.25] * 3, abs=0.2)
    assert result.upper_sha256 in capsys.readouterr().out


def test_readme_names_commands_that_exist() -> None:
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    known = {"data prepare", *command.commands} - {"data"}
    named = set(re.findall(r"(?:`|uv run )bomemeta ((?:data )?[a-z]+)", README))
    assert named == known
    for name in named:
        assert CliRunner().invoke(app, [*name.split(), "--help"]).exit_code == 0
    top = CliRunner().invoke(app, ["--help"]).output
    assert all(name.partition(" ")[0] in top for name in named)
    assert "pip install uv && uv run bomemeta train configs/quickstart.yaml" in README
    assert "uv run --extra learn2learn pytest" in README


@pytest.mark.parametrize("path", [*PAGES, DOCS / "llms.txt"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
    # Pages of reference/ are written when the site is built: tests/test_site.py follows these links.
    written = {DOCS / "reference" / name for name in ("api.md", "commands.md", "keys.md")}
    missing = [link for link in links if not (path.parent / link).exists()]
    assert [link for link in missing if (path.parent / link).resolve() not in written] == []


def test_files_that_docs_name_exist() -> None:
    named = {
        name
        for path in PAGES
        for name in re.findall(r"(?:configs|docs|tests|benchmarks)/[\w/.]+\.\w+", path.read_text())
    }
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


# configuration.md


KEYS = runpy.run_path(str(DOCS / "keys.py"))


def test_every_key_has_a_meaning_and_every_meaning_a_key() -> None:
    wanted = {"every run": set(KEYS["settings_keys"]())}
    wanted |= {
        f"{kind} {name}": {field.name for field in fields_of(SECTIONS[section].registry.get(name))}
        for kind, section in SECTION_OF.items()
        for name in REGISTERED[kind]
    }
    found = {"every run": set(listing.meanings()["every run"])}
    for kind in REGISTERED:
        classes = listing.meanings()[kind]
        for name in REGISTERED[kind]:
            own = [meant for names, meant in classes.items() if name in names.split(", ")]
            shared = set(classes.get("all", {})) & wanted[f"{kind} {name}"]
            found[f"{kind} {name}"] = shared.union(*own)
        assert {name for names in classes for name in names.split(", ")} <= {
            "all",
            *REGISTERED[kind],
        }
        assert set(classes.get("all", {})) <= set().union(
            *(wanted[f"{kind} {n}"] for n in REGISTERED[kind])
        )
    differing = {
        name: (sorted(wanted[name] - found[name]), sorted(found[name] - wanted[name]))
        for name in wanted
        if wanted[name] != found[name]
    }
    assert differing == {}, "bomemeta/meanings.yaml: keys without a meaning, meanings without a key"


def test_configuration_is_written_from_the_code() -> None:
    text = page("configuration.md")
    assert KEYS["with_tables"](text) == text, "write its tables anew: python docs/keys.py"
    named = [name for heading in KEYS["sections"](text) for _, name in KEYS["registered"](heading)]
    assert sorted(named) == sorted(name for names in REGISTERED.values() for name in names)
    table = rows(KEYS["sections"](text)["`bome`"])
    assert table["inner_lr"][:2] == ["0.1", "a number > 0"]
    assert table["upper_optimizer"][:2] == ["sgd", "one of: sgd, momentum, adam, adamw"]


def test_every_registered_name_is_in_data_or_configuration() -> None:
    text = page("data.md") + page("configuration.md")
    assert [
        name for names in REGISTERED.values() for name in names if f"`{name}`" not in text
    ] == []


# metrics.md


def test_metrics_lists_every_tag() -> None:
    documented = rows(page("metrics.md"))
    assert {
        name: documented.get(name, [""])[0].strip("`") for name in TENSORBOARD_TAGS
    } == TENSORBOARD_TAGS


def test_metrics_lists_every_finding() -> None:
    text = page("metrics.md").partition("## Findings")[2]
    assert set(rows(text)) == set(health._CHECKS)


def names_in_backquotes(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


# Shipped configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_for_two_steps(path: Path, tmp_path: Path) -> None:
    overrides = ["steps=2", "workers=0", "evaluation.episodes=2", f"output_dir={tmp_path / 'run'}"]
    config = load_config(path)
    if getattr(config.solver, "warm_start_steps", 0):
        overrides += ["solver.warm_start_steps=1", "solver.upper_every=1"]
    if config.tasks_per_step:
        overrides += ["tasks_per_step=2", "shards=2"]
    try:
        result = bomemeta.train(path, overrides)
    except DataError as error:
        pytest.skip(str(error))  # says what is missing and how to get it
    assert (result.steps, result.interrupted) == (2, False)
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    known = names_in_backquotes(page("metrics.md"))
    logged = {name for line in steps for name in line}
    assert [step["step"] for step in steps] == [0, 1]
    numbered = {re.sub(r"_\d+$", "_NN", name) for name in {*logged, *written, *written["metrics"]}}
    assert numbered - known == set(), "names that docs/metrics.md does not have"


@pytest.mark.parametrize("path", TUNE_FILES, ids=lambda path: path.stem)
def test_tune_file_is_checked_and_its_base_config_trains(path: Path, tmp_path: Path) -> None:
    search = load_search(path)
    try:
        result = bomemeta.train(
            search.config,
            ["steps=2", "workers=0", "evaluation.episodes=2", f"output_dir={tmp_path / 'run'}"],
        )
    except DataError as error:
        pytest.skip(str(error))
    assert result.steps == 2


# extending.md and its examples


def test_code_blocks_are_the_files() -> None:
    text = page("extending.md")
    blocks = dict(re.findall(r"<!-- docs/examples/([\w.]+) -->\n```\w+\n(.*?)```", text, re.DOTALL))
    files = {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted(EXAMPLES.iterdir())
        if path.is_file()
    }
    assert blocks == files
    assert text.count("```") == 2 * len(blocks)  # no block without a file


def example(name: str, folder: Path, *overrides: str) -> bomemeta.Result:
    return bomemeta.train(
        EXAMPLES / name,
        [f"output_dir={folder}", "evaluation.episodes=2", "log.tensorboard=false", *overrides],
    )


def test_ridge_example_reaches_its_closed_form(tmp_path: Path) -> None:
    result = example("ridge.yaml", tmp_path / "run")
    # |x*| is 3.4 and the start is 0. A penalty of 20 leaves an error of the order of 1/20; the test
    # asks for twice that.
    assert result.metrics["upper_error"] < 0.1


def test_bome_on_the_ridge_example(tmp_path: Path) -> None:
    solver = "solver={name: bome, inner_steps: 20, inner_lr: 0.1, lower_lr: 0.1, upper_lr: 0.5}"
    assert example("ridge.yaml", tmp_path / "run", solver, "steps=3").steps == 3


def test_examples_on_a_ray_worker_give_the_same_bits(tmp_path: Path) -> None:
    """The one test here that starts Ray: the imported files reach a worker, and it computes what
    this process does.
    """
    from bomemeta.distributed import cluster

    few = ["steps=3", "tasks_per_step=2"]
    serial = [
        example(name, tmp_path / f"serial-{name}", *few).upper_sha256
        for name in ("ridge.yaml", "stripes.yaml")
    ]
    with cluster.local(cluster.RayOptions(workers=1), print):
        on_ray = [
            example(
                name, tmp_path / f"ray-{name}", *few, "workers=1", "cpus_per_worker=0.5"
            ).upper_sha256
            for name in ("ridge.yaml", "stripes.yaml")
        ]
    assert on_ray == serial
