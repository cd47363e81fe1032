"""The command line with folders from elsewhere, which may execute something, and with keys in a URI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import bomemeta as bm
from bomemeta import trust
from bomemeta.cli import app
from bomemeta.errors import BomemetaError, ConfigError, redacted

HERE = Path(__file__).parent
KEYS = ("AKIAKEY", "SeCrEt/x+y")
URI = f"s3://{KEYS[0]}:{KEYS[1]}@bucket/run"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose config imports a file of its own, and what reads the file leaves a line."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    witness = tmp_path / "witness"
    source = tmp_path / "mine.py"
    text = f"with open({str(witness)!r}, 'a') as file:\n    file.write('ran\\n')\n"
    source.write_text(text)
    config = {
        "imports": [str(source)],
        "problem": {"name": "analytic", "case": "quadratic"},
        "solver": {"name": "bome"},
        "steps": 2,
        "output_dir": str(tmp_path / "run"),
        "log": {"tensorboard": False},
    }
    bm.train(config)
    sys.modules.pop("bomemeta_user.mine")
    assert witness.read_text() == "ran\n"
    witness.unlink()
    return tmp_path / "run"


def elsewhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user, or another machine, would see the folder."""
    sys.modules.pop("bomemeta_user.mine", None)
    (run.parent / "witness").unlink(missing_ok=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(run.parent / "other"))


@pytest.mark.parametrize("command", ["resume", "eval"])
def test_a_folder_from_elsewhere_executes_nothing_until_it_is_trusted(run, monkeypatch, command):
    witness = run.parent / "witness"
    own = CliRunner().invoke(app, [command, str(run)])
    assert own.exit_code == 0, own.output
    assert witness.exists()
    elsewhere(run, monkeypatch)
    refused = CliRunner().invoke(app, [command, str(run)])
    assert refused.exit_code == 2
    assert f"imports {run.parent / 'mine.py'}" in refused.output
    assert "--trust" in refused.output
    assert not witness.exists()
    trusted = CliRunner().invoke(app, [command, str(run), "--trust"])
    assert trusted.exit_code == 0, trusted.output
    assert witness.exists()
    sys.modules.pop("bomemeta_user.mine")
    again = CliRunner().invoke(app, [command, str(run)])  # it was remembered
    assert again.exit_code == 0, again.output


def test_imports_that_are_typed_anew_are_not_asked_for(run, monkeypatch):
    elsewhere(run, monkeypatch)
    result = bm.evaluate(run, [f"imports=[{run.parent / 'mine.py'}]"])
    assert result.steps == 2


def test_python_asks_too(run, monkeypatch):
    elsewhere(run, monkeypatch)
    for ask in (bm.load, bm.evaluate, bm.resume, bm.load_classifier):
        with pytest.raises(ConfigError, match="comes from elsewhere"):
            ask(run)
    assert not (run.parent / "witness").exists()
    assert bm.load(run, trust=True).steps == 2


def test_a_class_is_an_entry_whatever_it_is(run, monkeypatch):
    """A module of Python's own is enough to execute anything."""
    made = run.parent / "made"
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["imports"] = []
    values["problem"] = {"class": "subprocess:Popen", "args": ["touch", str(made)]}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"class subprocess:Popen"):
        bm.load(run)
    assert not made.exists()


def test_the_entries():
    values = {
        "imports": ["/x/a.py", "package.part"],
        "problem": {"name": "analytic", "case": "quadratic"},
        "solver": {"class": "sys:Mine"},
        "data": {"name": "d", "trust_pickles": True, "root": "/data"},
    }
    assert trust.entries_of(values) == [
        "imports /x/a.py", "imports package.part", "class sys:Mine", "pickles in /data",
    ]  # fmt: skip
    assert trust.entries_of(values, {"imports", "solver", "data.root"}) == []
    assert (
        trust.entries_of({"solver": {"class": "no_such_module:Mine"}}) == []
    )  # nothing to execute


def test_a_file_that_others_can_change_counts_with_its_content(run):
    source = run.parent / "mine.py"
    entry = trust.entries_of({"imports": [str(source)]})
    source.chmod(0o666)
    open_to_all = trust.entries_of({"imports": [str(source)]})
    assert "sha256" in open_to_all[0]
    assert open_to_all != entry
    source.write_text("print('another')\n")
    assert trust.entries_of({"imports": [str(source)]}) != open_to_all


def test_a_record_that_others_could_write_counts_for_nothing(run):
    record = run.parent / "state" / "bomemeta" / "executed"
    assert record.stat().st_mode & 0o777 == 0o600
    record.chmod(0o622)
    with pytest.raises(ConfigError, match="comes from elsewhere"):
        bm.load(run)


def test_a_searchs_pickles_are_an_entry(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    entry = trust.entry_of_search(tmp_path)
    with pytest.raises(ConfigError, match="comes from elsewhere"):
        trust.ask([entry], tmp_path, trust=False)
    trust.record([entry])
    trust.ask([entry], tmp_path, trust=False)


def test_keys_in_a_uri_are_refused_and_never_shown(tmp_path):
    """The output, the folder, and what a process that failed has left behind."""
    config = tmp_path / "a.yaml"
    base = {"problem": {"name": "analytic"}, "solver": {"name": "bome"}, "steps": 1}
    config.write_text(yaml.safe_dump({**base, "output_dir": URI}))
    plain = tmp_path / "b.yaml"
    plain.write_text(json.dumps(base))
    commands = [
        ["train", str(config)],
        ["train", str(plain), f"output_dir={URI}"],
        ["train", str(plain), f"output_dir={URI}", "--auto-resume", "--restarts", "1"],
        ["resume", URI],
        ["eval", URI],
        ["submit", str(plain), f"output_dir={URI}"],
    ]
    for command in commands:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2, (command, done.output)
        assert "s3://***@bucket/run" in done.output, (command, done.output)
        assert not any(key in done.output for key in KEYS), (command, done.output)
    work = tmp_path / "work"
    work.mkdir()
    arguments = [sys.executable, "-m", "bomemeta", "train", str(config)]
    environment = {**os.environ, "TMPDIR": str(work)}
    done = subprocess.run(arguments, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    left = [file.read_bytes() for file in work.rglob("*") if file.is_file()]
    left += [done.stdout.encode(), done.stderr.encode()]
    assert not any(key.encode() in content for key in KEYS for content in left)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"got {URI}, wanted", "got s3://***@bucket/run, wanted"),
        ("abfs://files@account/x", "abfs://files@account/x"),
        ("http://host:8265", "http://host:8265"),
        ("http://u:p@host:8265/", "http://***@host:8265/"),
    ],
)
def test_what_is_taken_out_of_a_message(text, shown):
    assert redacted(text) == shown
    assert str(BomemetaError(text)) == shown
