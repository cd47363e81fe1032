"""Folders and CSV files of images. Good files are 8x8 and lossless, so that what is read must be the
very numbers that were written, in their class; odd ones are refused, left out by name, or read
as they say.
"""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fuzz import mutate
from fuzz.outcome import Silent

SIZE, CLASSES, EACH = 8, 6, 3
Pixels = NDArray[np.uint8]  # [3, H, W]
FORMATS = ("png", "bmp", "ppm", "tiff", "tga")
NAMES = ("a b", "\u00e9", "caf\udce9", "-x", "a,b", 'a"b', "a\nb", ".hidden", "CON", "x" * 200, "train", "$HOME",
"\u202e", "0", "test")  # fmt: skip


def folder(rng: random.Random, place: Path) -> None:
    """Class folders, or a CSV of them, with one to three things changed."""
    from bomemeta.data.episodes import EpisodeSpec
    from bomemeta.data.image_folder import ImageFolder

    root = place / "root"
    sound = _files(rng, root)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice((_odd_bytes, _odd_bytes, _odd_image, _odd_image, _odd_name, _odd_link))(
            rng, root, sound
        )
    given = _csv(rng, root, sound) if rng.random() < 0.4 else root
    data = ImageFolder(
        root=str(given), size=SIZE, cache=str(place / "cache"), split=rng.choice((None, [0.5, 0.25, 0.25])),
        duplicates=rng.choice(("drop", "keep", "error")), small_classes="drop",
    )  # fmt: skip
    data.prepare()
    if rng.random() < 0.15:
        _odd_cache(rng, place / "cache")
        del data.__dict__["table"]
        data.prepare()
    table = data.table
    for rows in table.splits.values():
        for start, count, name in zip(rows.start, rows.count, rows.names, strict=True):
            there = {image.tobytes() for image in table.images[start : start + count]}
            want = {
                pixels.tobytes() for path, pixels in sound.items() if _class(path, root) == name
            }
            if want - there:
                raise Silent("an image that is sound is missing, or is in another class")
    for split in ("train", "validation", "test"):
        spec = EpisodeSpec(1, 1, 1)
        data.check(split, spec)
        episode = data.episode(split, spec, (0, 0, 0))
        if not episode.support.isfinite().all():
            raise Silent("an episode has numbers that are not finite")


def _class(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0]


def _noise(rng: random.Random) -> Pixels:
    return np.frombuffer(rng.randbytes(3 * SIZE * SIZE), np.uint8).reshape(3, SIZE, SIZE)


def _files(rng: random.Random, root: Path) -> dict[Path, Pixels]:
    """CLASSES folders of EACH images, by path."""
    made: dict[Path, Pixels] = {}
    for c in range(CLASSES):
        (root / f"c{c}").mkdir(parents=True)
        for i in range(EACH):
            path = root / f"c{c}" / f"{i}.{rng.choice(FORMATS)}"
            made[path] = _noise(rng)
            Image.fromarray(made[path].transpose(1, 2, 0)).save(path)
    return made


def _one(rng: random.Random, sound: dict[Path, Pixels]) -> Path | None:
    paths = sorted(sound)
    return rng.choice(paths) if paths else None


def _odd_bytes(rng: random.Random, root: Path, sound: dict[Path, Pixels]) -> None:
    """A file whose bytes are changed, cut, or of something else."""
    if (path := _one(rng, sound)) is None:
        return
    del sound[path]
    content = path.read_bytes()
    path.write_bytes(
        rng.choice((
            b"", b"x", content[: rng.randrange(len(content))], mutate.data(rng, content), mutate.data(rng, content),
            content * 2, b"\xff\xd8\xff\xe0" + content, b"\x89PNG\r\n\x1a\n", b"GIF89a", b"P6 99999 99999 255\n",
            b"BM" + bytes(60),
            b"P6 8 8 999999999999\n" + bytes(192), b"<svg/>", b"%PDF-1.4", b"PK\x03\x04" + bytes(30), _png(rng),
        ))
    )  # fmt: skip


def _png(rng: random.Random) -> bytes:
    """A PNG of a declared size and depth with sound checksums and little behind them."""
    sizes = (0, 1, 8, 20000, 65535, 2**31 - 1, 2**32 - 1)
    head = struct.pack(
        ">IIBBBBB", rng.choice(sizes), rng.choice(sizes), rng.choice((1, 8, 16, 7)), rng.choice((0, 2, 3, 4, 6, 5)), 0,
        0, rng.choice((0, 1, 9))
    )  # fmt: skip
    body = zlib.compress(bytes(rng.choice((0, 10, 100000))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        for kind, part in ((b"IHDR", head), (b"tEXt", b"a\0" + bytes(9)), (b"IDAT", body), (b"IEND", b""))
    )  # fmt: skip


def _odd_image(rng: random.Random, root: Path, sound: dict[Path, Pixels]) -> None:
    """An image of another mode, depth, size or turn; where its numbers follow, they are wanted."""
    if (old := _one(rng, sound)) is None:
        return
    pixels = sound.pop(old)
    old.unlink()
    path = old.with_suffix(".png")
    rgb = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    grey = np.repeat(pixels[:1], 3, 0)
    kind = rng.randrange(12)
    if kind == 0:  # 16 bits
        Image.fromarray(pixels[0].astype(np.uint16) * 257).save(path)
        sound[path] = grey
    elif kind == 1:
        Image.fromarray(pixels[0]).save(path)
        sound[path] = grey
    elif kind == 2:  # half of it transparent, which is white
        alpha = np.full((SIZE, SIZE), 255, np.uint8)
        alpha[: SIZE // 2] = 0
        Image.fromarray(np.dstack([pixels.transpose(1, 2, 0), alpha])).save(path)
        sound[path] = pixels.copy()
        sound[path][:, : SIZE // 2] = 255
    elif kind == 3:  # the camera was turned
        turn = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 255))
        exif = Image.Exif()
        exif[0x0112] = turn
        rgb.save(path, exif=exif)
        turned: dict[int, Pixels] = {
            1: pixels, 2: pixels[:, :, ::-1], 3: pixels[:, ::-1, ::-1], 4: pixels[:, ::-1], 5: pixels.transpose(0, 2, 1),
            6: np.rot90(pixels, -1, (1, 2)), 7: pixels[:, ::-1, ::-1].transpose(0, 2, 1), 8: np.rot90(pixels, 1, (1, 2)),
        }  # fmt: skip
        sound[path] = np.ascontiguousarray(turned.get(turn, pixels))
    elif kind == 4:
        Image.fromarray(pixels[0].astype(np.float32)).save(path.with_suffix(".tiff"))
    elif kind == 5:
        Image.fromarray(pixels[0].astype(np.int32) * rng.choice((1, 257, 10**6, -5))).save(
            path.with_suffix(".tiff")
        )
    elif kind == 6:
        rgb.convert(rng.choice(("P", "1", "LA"))).save(path)
    elif kind == 7:
        rgb.convert("CMYK").save(path.with_suffix(".jpg"))
    elif kind == 8:  # moving pictures
        rgb.save(path.with_suffix(".gif"), save_all=True, append_images=[rgb.rotate(90)] * 3)
    elif kind == 9:  # strips and dots
        rgb.resize(rng.choice(((1, 1), (1, 5000), (5000, 1), (3, 2), (2000, 2000)))).save(path)
    elif kind == 10:
        rgb.save(path, icc_profile=rng.randbytes(40))
        sound[path] = pixels
    else:
        buffer = io.BytesIO()
        rgb.save(buffer, "JPEG", exif=b"Exif\0\0" + rng.randbytes(30))
        path.with_suffix(".jpg").write_bytes(buffer.getvalue())


def _odd_name(rng: random.Random, root: Path, sound: dict[Path, Pixels]) -> None:
    """A file or a class with another name."""
    name = rng.choice(NAMES)
    if rng.random() < 0.5:
        if (path := _one(rng, sound)) is None:
            return
        other = path.with_name(
            name + rng.choice((path.suffix, path.suffix.upper(), "", ".jpg", ".txt"))
        )
        path.rename(other)
        pixels = sound.pop(path)
        if other.suffix.lower() == path.suffix and not name.startswith("."):
            sound[other] = pixels
        return
    old = root / f"c{rng.randrange(CLASSES)}"
    if not old.is_dir() or (root / name).exists():
        return
    old.rename(root / name)
    for path in [path for path in sound if path.parent == old]:
        pixels = sound.pop(path)
        if not name.startswith("."):
            sound[root / name / path.name] = pixels


def _odd_link(rng: random.Random, root: Path, sound: dict[Path, Pixels]) -> None:
    """Links to nowhere, to themselves and up, and what is no file."""
    place = root / f"c{rng.randrange(CLASSES)}"
    if not place.is_dir():
        return
    name, kind = rng.choice(("z.png", "z", "z.jpg")), rng.randrange(8)
    at = place / name
    if kind == 0:
        to = rng.choice(
            ("/nonexistent", name, "..", ".", "/dev/zero", "/dev/null", "/proc/self/mem")
        )
        at.symlink_to(to)
        if to == "..":  # all images are in this class too
            sound.clear()
    elif kind == 1:
        os.mkfifo(at)
    elif kind == 2:
        at.mkdir()
    elif kind == 3 and (path := _one(rng, sound)) is not None:
        other = root / f"c{rng.randrange(CLASSES)}" / "copy.png"
        if other.parent.is_dir():  # in two classes: which of them is not known
            other.write_bytes(path.read_bytes())
            if other.parent != path.parent:
                del sound[path]
    elif kind == 4:
        (root / "empty").mkdir(exist_ok=True)
    elif kind == 5:
        (root / rng.choice(("loose.png", "notes.txt", "Thumbs.db"))).write_bytes(b"x")
    elif kind == 6:
        (place / "deep" / "deeper").mkdir(parents=True, exist_ok=True)
        (place / "deep" / "deeper" / "up").symlink_to(root)
        sound.clear()  # all images are in this class too
    else:
        for path in [path for path in sound if path.parent == place]:
            del sound[path]
            path.unlink()


def _csv(rng: random.Random, root: Path, sound: dict[Path, Pixels]) -> Path:
    """The sound files in a CSV, whose text is changed."""
    lines = ["path,label"] + [
        f"{path.relative_to(root)},{_class(path, root)}"
        for path in sorted(sound)
        if not set("\n,\"'\udce9\u202e$") & set(str(path.relative_to(root)))
    ]
    for path in [p for p in sound if set("\n,\"'\udce9\u202e$") & set(str(p.relative_to(root)))]:
        del sound[path]
    at = rng.randrange(1, len(lines)) if len(lines) > 1 else 0
    odd = (
        "nowhere.png,c0", "~nosuchuser/a.png,c0", "a\0.png,c0", "x" * 5000 + ".png,c0", ",c0", "c0/0.png,", "c0/0.png",
        ",,,,", "",
        '"c0/0.png,c0', "..,c0", "/dev/zero,c0", "/,c0", "s3://a/b.png,c0", "$HOME/a.png,c0", "c0,c0",
        '"' + "y" * 200000 + '",c0',
        "# a note", "c0/0.png,c0,train", "\u2028,\u2028", "c0/0.png;c0", "\ufeffc0/0.png,c0",
    )  # fmt: skip
    changed = rng.random() < 0.6
    if changed:
        if rng.random() < 0.3:
            lines[0] = rng.choice((
                "path;label", "Path,Label", "path,label,label", "path", "label,path", "", "path,label,split",
                " path , label ", "path\tlabel",
                '"path","label"', "file,class", "path,label,",
            ))  # fmt: skip
        else:
            lines.insert(at, rng.choice(odd))
    text = rng.choice(("\n", "\r\n", "\r", "\n\n")).join(lines)
    content = text.encode(
        rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32")), "replace"
    )
    if rng.random() < 0.2:
        content = mutate.data(rng, content)
        sound.clear()  # which lines it hit is not known
    if changed:
        sound.clear()
    path = root / rng.choice(("list.csv", "list", "list.tsv"))
    path.write_bytes(content)
    return path


def _odd_cache(rng: random.Random, cache: Path) -> None:
    """A file of the cache is changed: it is made anew, or said to be damaged."""
    files = sorted(path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")
    path = rng.choice(files)
    if path.suffix == ".npy":  # sound up to its length: its numbers are not compared each time
        path.write_bytes(path.read_bytes()[: rng.choice((0, 10, 128, -1, -200))])
    else:
        path.write_bytes(rng.choice((b"", b"[]", b"3", b"{}", b"null", b'{"unreadable": 3}', b'{"unreadable": [[0]]}',
        b"\xff", mutate.data(rng, path.read_bytes()))))  # fmt: skip
