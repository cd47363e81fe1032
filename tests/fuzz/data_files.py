"""Archives of arrays, images and episodes."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fuzz import mutate
from fuzz.outcome import Silent

ROWS = 12


def _arrays(rng: random.Random) -> dict[str, Any]:
    draw = np.random.default_rng(rng.randrange(1000))
    pictures = rng.random() < 0.3
    shape = (ROWS, 4, 4) if pictures else (ROWS, 6)
    x = draw.integers(0, 255, shape).astype(rng.choice((np.uint8, np.float32, np.float64)))
    y = np.arange(ROWS) % 3
    return {"x_train": x, "y_train": y, "x_test": x[::-1].copy(), "y_test": y[::-1].copy()}


def archive(rng: random.Random, folder: Path) -> None:
    """A .npz of labelled rows, changed as a file, as a zip, as arrays."""
    from bomemeta.data.labelled import LabelledArray

    arrays = _arrays(rng)
    path = folder / "a.npz"
    change = rng.randrange(5)
    if change == 0:
        content = mutate.data(rng, npz(arrays, rng))
    elif change == 1:
        content = _odd_zip(rng, arrays)
    elif change == 2:
        content = _odd_header(rng, arrays)
    elif change == 3:
        arrays = _odd_arrays(rng, arrays)
        content = npz(arrays, rng)
    else:
        content = rng.choice(
            (
                b"",
                b"PK",
                _npy(arrays["x_train"]),
                b"x" * 100,
                npz({}, rng),
                mutate.data(rng, _npy(arrays["x_train"])),
            )
        )
    path.write_bytes(content)
    source = LabelledArray(path=str(path))
    source.prepare()
    for part in ("train", "test"):
        rows = source.examples(part)  # type: ignore[arg-type]
        want = np.asarray(arrays[f"x_{part}"])
        got = rows.inputs.numpy()
        if got.size != want.size or not np.array_equal(got.reshape(want.shape), want):
            raise Silent("an archive's inputs are not those that were written")
        labels = np.asarray(arrays[f"y_{part}"])
        pairs = {
            (str(a), int(b)) for a, b in zip(labels.tolist(), rows.labels.tolist(), strict=True)
        }
        if len(pairs) != len(set(map(str, labels.tolist()))) or len({b for _, b in pairs}) != len(
            pairs
        ):
            raise Silent("an archive's labels are not those that were written")
    trained = {str(label) for label in np.asarray(arrays["y_train"]).tolist()}
    if source.classes != len(trained):
        raise Silent(f"{len(trained)} classes were counted as another number")


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), allow_pickle=True)
    return buffer.getvalue()


def npz(arrays: dict[str, Any], rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as file:
        for name, array in arrays.items():
            file.writestr(f"{name}.npy", _npy(array))
    return buffer.getvalue()


def _odd_zip(rng: random.Random, arrays: dict[str, Any]) -> bytes:
    method = rng.choice(
        (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, array in arrays.items():
            raw = _npy(array)
            if rng.random() < 0.1:
                raw = rng.choice((b"", raw[: rng.randrange(len(raw))], raw[8:]))
            file.writestr(
                f"{name}{rng.choice(('.npy', '.npy', '.npy', '.npy', '', '.npy.npy'))}", raw
            )
        if rng.random() < 0.3:
            file.writestr(
                rng.choice(("x_train.npy/", "../x_train.npy", "more.npy", "x_train")), b"x"
            )
    content = bytearray(buffer.getvalue())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # both copies of a member's header
        at = content.find(mark)
        if at >= 0 and rng.random() < 0.6:
            field = rng.choice((flags, flags + 2, flags + 12, flags + 16))  # flags, method, sizes
            struct.pack_into("<H", content, at + field, rng.choice((0, 1, 8, 9, 14, 77, 99, 65535)))
    return bytes(content)


HEADERS = (
    "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (200, 1099511627776), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (12, 9223372036854775807), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (1" + "0" * 30 + ",), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 6), }",
    "{'descr': '<f8', 'fortran_order': 3, 'shape': (12, 6), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (12, 6), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (12,), }",
    "{'descr': '<f9', 'fortran_order': False, 'shape': (12, 6), }",
    "{'descr': '<U4000000000', 'fortran_order': False, 'shape': (12,), }",
    "{'descr': '<f8', 'shape': (12, 6), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (12, 6)", "[" * 3000, "'''", "'", "  {1: 2}", "{1: 2}\n\t x", "\x00",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (True, 6), }", "((((" * 500, "1", "{'a': " * 200, "-" * 5000 + "1",
)  # fmt: skip


def _odd_header(rng: random.Random, arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    odd = rng.choice(list(arrays))
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in arrays.items():
            raw = _npy(array)
            if name == odd:
                header = rng.choice(HEADERS).encode() + b"\n"
                if rng.random() < 0.2:
                    header = mutate.data(rng, header)[:60000]
                version = rng.choice((1, 1, 1, 2, 3, 9))
                length = struct.pack(
                    "<H" if version == 1 else "<I",
                    min(len(header) + rng.choice((0, 0, 0, 100)), 65535),
                )
                raw = b"\x93NUMPY" + bytes((version, 0)) + length + header + raw[128:]
            file.writestr(f"{name}.npy", raw)
    return buffer.getvalue()


def _odd_arrays(rng: random.Random, arrays: dict[str, Any]) -> dict[str, Any]:
    x, y = arrays["x_train"], arrays["y_train"]
    part = rng.choice(("train", "test"))
    inputs = (
        x.astype(">f8"), np.asfortranarray(x), x.astype(np.int64), x.astype("U5"), x.astype(complex), x.astype(object),
        x * np.float32("nan"), x[:0], x[..., :0], x[:, None], x.reshape(-1), np.float64(3.0), x.astype(np.float16),
        np.full_like(x, np.inf, dtype=np.float64), x.astype(bool), x.astype("datetime64[s]"), x[:5], x.astype(np.longdouble),
    )  # fmt: skip
    labels = (
        y * 4 + 3, y.astype(np.uint64) + np.uint64(2**63), np.where(y == 2, 2**40, y), y - 1, y.astype(float), y.astype(str),
        y * 0, y + 1, y.astype(">i8"), y[:5], y[:, None], y.astype(bool), y.astype(float) * np.nan, y + 0.5, y.astype("S2"),
        y.astype(object), np.array(3), y * 10**9, np.where(y == 2, 2**64 - 1, y.astype(np.uint64)).astype(np.uint64),
    )  # fmt: skip
    if rng.random() < 0.5:
        return {**arrays, f"x_{part}": rng.choice(inputs)}
    chosen = rng.choice(labels)
    if rng.random() < 0.5:
        return {**arrays, f"y_{part}": chosen}
    return {**arrays, "y_train": chosen, "y_test": chosen}
