"""Archives of arrays that are damaged, hostile or odd: read as written, or refused in words."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bomemeta.data import archives
from bomemeta.errors import DataError
from bomemeta.paths import SHARED_DATA


def npy(header: str, body: bytes = b"", version: int = 1) -> bytes:
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes((version, 0)) + length + text + body


def zipped(path: Path, raw: bytes, method: int = zipfile.ZIP_STORED, name: str = "x.npy") -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(name, raw)
    return path


def good() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(6.0))
    return buffer.getvalue()


def header(shape: str, descr: str = "'<f8'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (npy(header("(1000000000000,)")), r"says that it is float64 \[1000000000000\], 8 TB, and 0 bytes follow"),
        (npy(header("(200, 1099511627776)"), b"x" * 8), r"and 8 bytes follow"),
        (npy(header("(1" + "0" * 30 + ",)")), r"bytes follow"),
        (npy(header("(-1,)")), r"has the shape \(-1,\)"),
        (npy(header("(True,)", "'|u1'"), b"x"), r"has the shape"),
        (npy(header("(2,)", "'|O'"), b"x" * 16), r"holds Python objects"),
        (npy(header("(2,)", "'<f9'")), r"not a valid|descr"),
        (npy("[" * 3000), r"is not a readable archive"),
        (npy("'''"), r"is not a readable archive"),
        (npy("  {1: 2}"), r"is not a readable archive"),
        (npy(header("(2,)"), b"x" * 16, version=9), r"is of version 9\.0"),
        (good()[8:], r"is not a readable archive"),
        (good()[:-8], r"and 40 bytes follow"),
        (good() + b"more", r"and 52 bytes follow"),
        (b"", r"is not a readable archive"),
    ],
)  # fmt: skip
def test_a_header_that_does_not_hold_is_said(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        archives.read(zipped(tmp_path / "a.npz", raw), ["x"])


def test_zips_that_are_not_numpy_s_are_said(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.npz", good(), zipfile.ZIP_BZIP2)
    with pytest.raises(DataError, match="x is compressed by method 12"):
        archives.read(path, ["x"])
    content = bytearray(zipped(path, good()).read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + at] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="x is encrypted"):
        archives.read(path, ["x"])
    with pytest.raises(DataError, match=r"it has no array y; there is x\.npy"):
        archives.read(zipped(path, good()), ["y"])
    path.write_bytes(good())
    with pytest.raises(DataError, match="File is not a zip file"):
        archives.read(path, ["x"])
    with pytest.raises(DataError, match="is not a readable archive"):
        archives.read(tmp_path, ["x"])


def test_a_flipped_bit_anywhere_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.npz", good(), zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 4
        path.write_bytes(flipped)
        try:
            found = archives.read(path, ["x"])["x"]
        except DataError:
            continue
        assert np.array_equal(found, np.arange(6.0))


def test_orders_of_bytes_and_of_axes_are_read_as_meant(tmp_path: Path) -> None:
    array = np.arange(12.0).reshape(3, 4)
    for stored in (
        array.astype(">f8"),
        np.asfortranarray(array),
        array[:0],
        np.array(3.0),
        array.astype(">i2"),
    ):
        np.savez(tmp_path / "a.npz", x=stored)
        found = archives.read(tmp_path / "a.npz", ["x"])["x"]
        assert found.shape == stored.shape
        assert np.array_equal(found, stored)
        assert found.dtype.isnative
        assert found.flags.c_contiguous
        assert found.flags.writeable


def test_workers_map_what_one_of_them_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOMEMETA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(SHARED_DATA, "1")
    path, large = tmp_path / "a.npz", np.arange(200_000.0)
    np.savez_compressed(path, x=large, n=np.arange(3))

    def mapped() -> bool:
        found = archives.read(path, ["x", "n"])
        assert np.array_equal(found["x"], large)
        assert found["n"].tolist() == [0, 1, 2]
        base = found["x"]
        while isinstance(base, np.ndarray):
            base = base.base
        found["x"][0] = 7.0  # a copy of this page alone
        return isinstance(base, mmap.mmap)

    assert mapped()
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_read", None)  # it is not read again
        assert mapped()
    (cached,) = (tmp_path / "cache" / "arrays").glob("*/x.npy")
    cached.write_bytes(cached.read_bytes()[:-100])  # damaged: the archive is read
    assert not mapped()
    large = large + 1
    np.savez(path, x=large, n=np.arange(3))  # another file in its place
    assert mapped()
    monkeypatch.setenv("BOMEMETA_CACHE", str(path / "none"))  # cannot be written
    assert not mapped()
    with pytest.raises(DataError, match="it has no array y"):
        archives.read(path, ["y"])
