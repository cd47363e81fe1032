"""A value is what was typed, or it is refused with what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bomemeta
from bomemeta import paths
from bomemeta.config import load_config
from bomemeta.document import apply_overrides, read_document
from bomemeta.errors import ConfigError
from bomemeta.run_folder import RunFolder
from bomemeta.yaml_text import dump, parse

BASE: dict[str, Any] = {
    "problem": {"name": "analytic", "case": "quadratic", "tasks": 2},
    "solver": {"name": "bome", "inner_steps": 2},
    "steps": 2,
    "log": {"tensorboard": False},
}


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(BASE, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("typed", "write"),
    [
        ("seed=0123", "Write 123:"),
        ("seed=010", "Write 10:"),
        ("steps=1:30", "Write one number"),
        ("steps=1_000", "Write 1000"),
        ("steps=1e5", "Write 100000"),
        ("steps=0x1f", "Write 31:"),
        ("steps=0o17", "Write 15:"),
        ("steps=-012", "Write -12:"),
        ("solver.upper_lr=1_0.5", "Write 10.5"),
        ("log.tensorboard=yes", "Write true"),
        ("log.tensorboard=off", "Write false"),
        ("output_dir=2024", """Put it in quotes, as in '"2024"'"""),
        ("steps='3'", "Leave the quotes out"),
    ],
)
def test_another_reading_than_yaml_s_is_refused_with_what_to_write(typed: str, write: str) -> None:
    assert write in refused(typed)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("0123", "0123"), ("1:30", "1:30"), ("no", "no"), ("2020-01-01", "2020-01-01"), ("1_000", "1_000"),
        ("12", 12), ("-3", -3), ("+5", 5), ("1e-3", 0.001), ("1E3", 1000.0), (".5", 0.5), ("5.", 5.0), ("1e5", 1e5),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("'12'", "12"), ('"no"', "no"),
        ("[1, 01, on]", [1, "01", "on"]), ("{a: 08}", {"a": "08"}), ("<<", "<<"), ("=", "="),
    ],
)  # fmt: skip
def test_a_text_is_read_as_it_stands(typed: str, value: object) -> None:
    found = parse(typed, "here")[1]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("typed", ["1e400", "-1e400", "1e-400", "9" * 50])
def test_a_number_that_no_computer_has_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"64 bits|digits"):
        parse(typed, "here")


@pytest.mark.parametrize(
    "text",
    ["0123", "1:30", "1e5", "1.5", "no", "true", "null", "", "~", " a ", "x: y", "# a", "1_0", "2020-01-01",
     "a\nb", "é", "'", '"', "- a", "&a", "*a", "!b", "1e400", "\u2028", ".inf", "=", "<<"],
)  # fmt: skip
def test_what_is_written_is_read_back(text: str) -> None:
    values = {"a": [text, 3, 0.1, 1e-05, True, None, {text: text}]}
    assert parse(dump(values), "here")[1] == values


def test_python_s_own_values() -> None:
    import numpy as np

    assert load_config({**BASE, "steps": np.int64(3)}).steps == 3
    assert load_config({**BASE, "output_dir": Path("a")}).output_dir == str(Path("a").absolute())
    for odd in (object(), {1, 2}, b"a", 1 + 2j):
        with pytest.raises(ConfigError, match="wanted texts, numbers"):
            load_config({**BASE, "output_dir": odd})
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ConfigError, match="nested more than 20 deep"):
        load_config({**BASE, "imports": circle})
    with pytest.raises(ConfigError, match="wanted at most 9223372036854775807"):
        load_config({**BASE, "steps": 2**63})
    with pytest.raises(ConfigError, match="digits"):
        load_config({**BASE, "steps": 10**6000})


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "an empty text"), ("  ", "an empty text"), ("a\0b", "NUL"), ("$HOME/x", "variables are not expanded"),
        ("${HOME}/x", "variables are not expanded"), ("~nosuchuser/x", "knows no user nosuchuser"),
        ("x" * 300, "300 bytes|255 between"), ("x/" * 3000, "a path has at most 4095"), ("/", "the root of the file system"),
        ("s3://", "names no bucket"), ("s3:///x", "names no bucket"), ("s3:/b/x", "begins with s3://"),
        ("file://", "wanted file:///"), ("file://x", "wanted file:///"), ("file:x", "begins with file://"),
        ("mock://x", "no location where a run can be kept"), ("nosuch://x", "no location where a run can be kept"),
        ("s3://$B/x", "variables"),
    ],
)  # fmt: skip
def test_a_text_that_is_no_place_for_a_run(typed: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"output_dir: .*({message})"):
        load_config({**BASE, "output_dir": typed})


@pytest.mark.parametrize("typed", ["~nosuchuser", "x" * 300, "", ".", "/", "a\0b", "$HOME/x"])
def test_arguments_are_said_too(typed: str) -> None:
    for function in (bomemeta.train, bomemeta.resume):
        with pytest.raises(ConfigError):
            function(typed)


def test_one_rule_for_all_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    (there / "more.py").write_text("")
    text = (
        "problem: {name: analytic, case: quadratic}\nsolver: {name: bome}\nsteps: 1\nimports: [more.py]\n"
        "output_dir: runs/a\ndata: {dataset: labelled_array, path: two.npz}\n"
    )
    (there / "c.yaml").write_text(text)
    monkeypatch.chdir(here)
    written = load_config(there / "c.yaml").to_dict()
    assert written["imports"] == [str(there / "more.py")]
    assert written["output_dir"] == str(there / "runs/a")
    assert written["data"]["path"] == str(there / "two.npz")
    typed = load_config(there / "c.yaml", ["output_dir=b", "data.path=../x.npz"]).to_dict()
    assert typed["output_dir"] == str(here / "b")
    assert typed["data"]["path"] == str(tmp_path / "x.npz")
    whole = load_config(there / "c.yaml", ["data={dataset: labelled_array, path: y.npz}"])
    assert whole.to_dict()["data"]["path"] == str(here / "y.npz")
    assert whole.to_dict()["output_dir"] == str(there / "runs/a")
    python = load_config({**BASE, "output_dir": "~/a"}).to_dict()
    assert python["output_dir"] == str(Path.home() / "a")


def test_a_run_s_config_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config({**BASE, "output_dir": "run"})
    folder = RunFolder.create(config.output_dir, "name", config)
    monkeypatch.chdir("/")
    assert load_config(folder.config_file).output_dir == str(tmp_path / "run")


def test_paths_are_one_function(tmp_path: Path) -> None:
    assert paths.absolute("a/../b", tmp_path) == tmp_path.resolve() / "b"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert paths.absolute("loop", tmp_path) == tmp_path / "loop"


def test_files_of_domains_and_of_weights_are_paths_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = tmp_path / "configs" / "a.yaml"
    file.write_text(
        "problem: {name: few_shot, weights: net.pt}\n"
        "data: {dataset: installed_texts, files: {plays: plays.txt, notes: ~/notes.txt}}\n"
    )
    read = apply_overrides(read_document(file), ["data.files.more=more.txt"]).data
    assert read["problem"]["weights"] == str(tmp_path / "configs" / "net.pt")
    assert read["data"]["files"] == {
        "plays": str(tmp_path / "configs" / "plays.txt"),
        "notes": str(Path.home() / "notes.txt"),
        "more": str(tmp_path / "here" / "more.txt"),
    }
    for word in ("sample", "labels", "loss_net"):  # of problem reweighting
        assert apply_overrides(read_document(file), [f"problem.weights={word}"]).data["problem"]["weights"] == word  # fmt: skip
