"""Checkpoints: whole or not there, read without running anything, refused for another run."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bomemeta import checkpoint as module
from bomemeta.checkpoint import (
    Checkpoint,
    check_same_run,
    latest,
    load,
    load_latest,
    save,
    upper_sha256,
)
from bomemeta.config import Config, load_config
from bomemeta.errors import CheckpointError
from bomemeta.registry import problems, solvers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fake:
    upper_lr: float = 0.1


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    for registry in (solvers, problems):
        monkeypatch.setattr(registry, "_loaded", True)
        monkeypatch.setattr(registry, "_classes", {"fake": Fake})
    return load_config({"steps": 5, "problem": {"name": "fake"}, "solver": {"name": "fake"}})


def state(step: int, config: dict[str, Any] | None = None) -> Checkpoint:
    return Checkpoint(
        step=step,
        upper={"w": torch.arange(3.0) + step},
        solver={
            "momentum": {"w": torch.ones(3)},
            "round": 3,
            "name": "adam",
            "history": [0.5, None],
        },
        lower={7: torch.full((2,), 0.5), 12: torch.zeros(2)},
        config=config or {"steps": 5},
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", state(200), keep=2)
    assert path.name == "step_00000200.pt"
    loaded = load(path)
    assert loaded.step == 200
    assert torch.equal(loaded.upper["w"], state(200).upper["w"])
    assert torch.equal(loaded.solver["momentum"]["w"], torch.ones(3))
    assert loaded.solver["history"] == [0.5, None]
    assert list(loaded.lower) == [7, 12]
    assert loaded.config == {"steps": 5}


def test_only_the_newest_are_kept_and_a_past_gone_back_from_is_dropped(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, state(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000002.pt",
        "step_00000003.pt",
    ]
    (tmp_path / "step_00000009.pt").write_bytes(b"damaged")
    save(tmp_path, state(4), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004.pt"]
    assert latest(tmp_path) == tmp_path / "step_00000004.pt"
    assert latest(tmp_path / "none") is None


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_checkpoint_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    good = save(tmp_path, state(1), keep=1)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(CheckpointError) as error:
            save(tmp_path, state(2), keep=1)
    message = str(error.value)
    assert "step_00000002.pt could not be written: No space left on device" in message
    assert f"The last good checkpoint is {good}" in message
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert load(good).step == 1


def test_a_disk_that_fills_up_inside_the_write(tmp_path: Path) -> None:
    # /dev/full takes the temporary file's location: every write to it fails as on a full disk.
    (tmp_path / ".step_00000002.pt.tmp").symlink_to("/dev/full")
    big = state(2)._replace(upper={"w": torch.zeros(100_000)})
    with pytest.raises(
        CheckpointError, match=r"No space left on device.*There is no earlier checkpoint"
    ):
        save(tmp_path, big, keep=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "half"])
def test_a_damaged_file_names_the_one_before_and_is_passed_over(
    tmp_path: Path, content: bytes | str
) -> None:
    good = save(tmp_path, state(1), keep=3)
    bad = save(tmp_path, state(2), keep=3)
    bad.write_bytes(
        content if isinstance(content, bytes) else bad.read_bytes()[: bad.stat().st_size // 2]
    )
    with pytest.raises(CheckpointError) as error:
        load(bad)
    assert str(bad) in str(error.value)
    assert f"The one before it is {good}" in str(error.value)
    found = load_latest(tmp_path)
    assert (found.checkpoint.step, found.path) == (1, good)
    assert len(found.notes) == 1
    assert str(bad) in found.notes[0]
    good.write_bytes(b"")
    with pytest.raises(CheckpointError, match="can be read"):
        load_latest(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_latest(tmp_path / "none")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / "step_00000001.pt"
    torch.save({**state(1)._asdict(), "solver": Malicious(ran)}, path)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load(path)
    assert not ran.exists()


def test_files_named_in_a_checkpoints_config_are_not_run(tmp_path: Path, config: Config) -> None:
    ran = tmp_path / "ran"
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(CheckpointError, match=r"imports: checkpoint \['evil.py'\], config \[\]"):
        check_same_run(state(1, {**config.to_dict(), "imports": [str(evil)]}), config)
    assert not ran.exists()


def test_another_runs_checkpoint_shows_the_differing_keys(config: Config) -> None:
    checkpoint = state(3, config.to_dict())
    check_same_run(checkpoint, load_config(config, ["workers=2", "log.every_steps=1"]))
    with pytest.raises(CheckpointError) as error:
        check_same_run(checkpoint, load_config(config, ["solver.upper_lr=0.2", "seed=4"]))
    lines = str(error.value).splitlines()
    assert "  solver.upper_lr: checkpoint 0.1, config 0.2" in lines
    assert "  seed: checkpoint 0, config 4" in lines
    assert len(lines) == 4


def test_the_hash_is_over_little_endian_bytes_in_key_order() -> None:
    upper = {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, "a": torch.tensor(5.0)}
    numbers = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0]).numpy().astype("<f4")
    assert upper_sha256(upper) == hashlib.sha256(numbers.tobytes()).hexdigest()
    assert upper_sha256(dict(reversed(upper.items()))) == upper_sha256(upper)
    assert upper_sha256({"a": torch.tensor(-0.0)}) != upper_sha256({"a": torch.tensor(0.0)})
    assert upper_sha256({}) == hashlib.sha256().hexdigest()


def test_a_programming_error_is_not_called_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(module.torch, "save", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        save(tmp_path, state(1), keep=1)
    assert list(tmp_path.iterdir()) == []


def test_the_digest_is_over_all_of_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, state(2), keep=1)
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[at] ^= 16
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="not a readable checkpoint"):
            load(path)
    path.write_bytes(content)
    assert load(path).step == 2


def test_a_flipped_bit_sends_a_run_to_the_file_before_and_is_said(tmp_path: Path) -> None:
    good, bad = save(tmp_path, state(1), keep=2), save(tmp_path, state(2), keep=2)
    content = bytearray(bad.read_bytes())
    at = content.index(torch.tensor([2.0, 3.0, 4.0]).numpy().tobytes())
    content[at] ^= 1
    bad.write_bytes(content)
    found = load_latest(tmp_path)
    assert found.path == good
    assert "the digest at its end is another" in found.notes[0]


def test_a_checkpoint_of_an_older_version_is_read_with_a_note(tmp_path: Path) -> None:
    old = {name: value for name, value in state(3)._asdict().items() if name != "data"}
    torch.save(old, tmp_path / "step_00000003.pt")
    found = load_latest(tmp_path)
    assert (found.checkpoint.step, found.checkpoint.data) == (3, {})
    assert "has no digest" in found.notes[0]


def test_what_something_else_wrote_again_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, state(3), keep=1)
    torch.save(torch.load(path, weights_only=True), path)
    with pytest.raises(CheckpointError, match="its digest is missing"):
        load(path)


NO = object()


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("step", 4, "its name says step 3, and it holds step 4"),
        ("step", None, "step is None, wanted a whole number"),
        ("step", True, "step is True, wanted a whole number"),
        ("step", NO, "step is missing"),
        ("more", 1, "'more' is not an entry of a checkpoint"),
        ("upper", None, "upper is None, wanted a mapping"),
        ("upper", {"w": None}, "upper.w is None, wanted a tensor"),
        ("upper", {"w": torch.tensor([float("nan")])}, "upper.w is not finite"),
        ("upper", {"w": torch.eye(2).to_sparse()}, "wanted a dense one"),
        ("lower", {"7": torch.zeros(2)}, "lower has a task '7'"),
        ("lower", [torch.zeros(2)], "lower is a list, wanted a mapping"),
        ("data", {"x": 3}, "data.x is 3, wanted a digest as text"),
    ],
)
def test_entries_changed_by_hand_are_said(
    tmp_path: Path, entry: str, value: object, message: str
) -> None:
    values = {**state(3)._asdict(), entry: value}
    if value is NO:
        del values[entry]
    torch.save(values, tmp_path / "step_00000003.pt")
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "step_00000003.pt")
    assert message in str(error.value)


def test_only_our_own_names_are_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, state(100_000_000), keep=3)
    for name in ("step_best.pt", "step_7.pt", "step_00000009.pt.bak"):
        (tmp_path / name).write_bytes((tmp_path / "step_100000000.pt").read_bytes())
    assert latest(tmp_path) == tmp_path / "step_100000000.pt"
    (tmp_path / "step_200000000.pt").symlink_to("nowhere")
    (tmp_path / "step_300000000.pt").mkdir()
    assert latest(tmp_path) == tmp_path / "step_100000000.pt"
    save(tmp_path, state(100_000_001), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000009.pt.bak",
        "step_100000001.pt",
        "step_200000000.pt",
        "step_300000000.pt",
        "step_7.pt",
        "step_best.pt",
    ]


def test_a_flipped_bit_of_a_file_without_a_digest_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "step_00000003.pt"
    torch.save(state(3)._asdict(), path)
    assert module.load_latest(tmp_path).checkpoint.step == 3
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = next(info for info in archive.infolist() if "/data/" in info.filename)
    header = content[record.header_offset + 26 : record.header_offset + 30]
    start = record.header_offset + 30 + sum(struct.unpack("<HH", header))
    content[start] ^= 16
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"data/\d+ is not what was written: its checksum"):
        module.load_latest(tmp_path)
