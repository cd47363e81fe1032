"""The glyphs: real shapes, splits that share none, a cache that may be lost."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from test_data_sources import nearest_neighbour_accuracy, one_thread, rendered_glyphs

from bomemeta.data import archives, glyphs
from bomemeta.data.episodes import EpisodeSpec
from bomemeta.errors import DataError

__all__ = ["one_thread"]  # a fixture that pytest uses for this file too


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = rendered_glyphs(tmp_path_factory)
    glyphs.Glyphs(root=str(path)).prepare()
    return path


@pytest.fixture(scope="module")
def rendered(folder: Path) -> dict[str, np.ndarray]:
    return archives.read(glyphs.cache_path(folder), ("images", "count", "code_point", "split"))


def test_splits_are_large_enough(rendered: dict[str, np.ndarray]) -> None:
    # Measured with matplotlib 3.11: 1489, 231, 356. Another version's fonts may shift them a
    # little.
    for number, least in enumerate((1200, 180, 280)):
        assert (rendered["split"] == number).sum() >= least
    assert rendered["count"].min() >= glyphs.FEWEST_FACES


def test_scripts_do_not_cross_splits(rendered: dict[str, np.ndarray]) -> None:
    for code_point, split in zip(
        rendered["code_point"].tolist(), rendered["split"].tolist(), strict=True
    ):
        name = unicodedata.name(chr(code_point))
        if name.startswith(("GREEK", "COPTIC", "GEORGIAN")):
            assert glyphs.SPLITS[split] == "test", name
        if name.startswith(("CYRILLIC", "ARMENIAN", "LAO")):
            assert glyphs.SPLITS[split] == "validation", name
        if name.startswith("LATIN"):
            assert glyphs.SPLITS[split] == "train", name
    assert glyphs.split_of(ord("µ")) == "test"  # MICRO SIGN stands for Greek mu


def test_no_image_is_blank_and_no_class_is_tofu(rendered: dict[str, np.ndarray]) -> None:
    images = rendered["images"].reshape(len(rendered["images"]), -1)
    # Two Braille dots far apart have the least ink of all, 4 %.
    assert (images.mean(axis=1) / 255).min() > 0.02
    # A placeholder would be the same image under many code points. Within one class equal images do
    # occur: some faces share them.
    owner = np.repeat(np.arange(len(rendered["count"])), rendered["count"])
    owners: dict[bytes, set[int]] = {}
    for image, of in zip(images, owner.tolist(), strict=True):
        owners.setdefault(image.tobytes(), set()).add(of)
    assert max(len(of) for of in owners.values()) <= 3


def test_look_alikes_are_one_class(rendered: dict[str, np.ndarray]) -> None:
    known = set(rendered["code_point"].tolist())
    # Latin, Greek and Cyrillic capitals of one shape, and the round ones in both cases.
    hyphens = {0x2D, 0x2010, 0x2212, 0x2013}
    for twins in (
        {0x41, 0x391, 0x410},
        {0x48, 0x397, 0x41D},
        {0x54, 0x3A4, 0x422},
        {*b"Oo0", 0x39F, 0x41E, 0x3BF, 0x43E},
        hyphens,
    ):
        assert len(known & twins) <= 1


def test_rendering_is_deterministic(rendered: dict[str, np.ndarray]) -> None:
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{glyphs.FACES[0]}.ttf"
    code_points = rendered["code_point"][::7].tolist()
    covered = glyphs._code_points(font)
    first = (
        np.cumsum(rendered["count"])[::7] - rendered["count"][::7]
    )  # rows of a class follow FACES
    drawn = glyphs._draw_face(font, [c for c in reversed(code_points) if c in covered])
    assert len(drawn) > 100
    for c, row in zip(code_points, first.tolist(), strict=True):
        if c in drawn:
            assert (drawn[c] == rendered["images"][row]).all()


def test_a_damaged_cache_in_a_read_only_folder_is_rendered_in_memory(
    tmp_path: Path, rendered: dict[str, np.ndarray]
) -> None:
    glyphs.cache_path(tmp_path).write_bytes(b"half a file")
    with (
        mock.patch.object(archives, "write", side_effect=PermissionError("read-only")),
        mock.patch.object(
            glyphs, "render", return_value=rendered
        ) as render,  # the real one takes seconds
    ):
        source = glyphs.Glyphs(root=str(tmp_path))
        source.prepare()
        source.prepare()
    assert render.call_count == 1
    assert source.episode("test", EpisodeSpec(2, 1, 1), (0,)).support.any()


def test_thecache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOMEMETA_CACHE", str(tmp_path))
    assert glyphs.cache_folder(None) == tmp_path
    assert glyphs.cache_folder("elsewhere") == Path("elsewhere").absolute()
    monkeypatch.delenv("BOMEMETA_CACHE")
    assert glyphs.cache_folder(None) == Path.home() / ".cache" / "bomemeta"


def test_missing_fonts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"DejaVuSans.ttf is missing.*[Rr]einstall matplotlib"):
        glyphs.render(tmp_path)


def test_queries_show_other_faces_than_the_support(folder: Path) -> None:
    rows = glyphs._glyphs(folder).splits["train"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        # More queries than any class has faces: they repeat, but never a face of the support.
        draw = rows.draw(EpisodeSpec(5, 5, 20), rng)
        for support, query in zip(draw.support.tolist(), draw.query.tolist(), strict=True):
            assert len(set(support)) == 5
            assert not set(support) & set(query)


def test_shots_must_leave_a_face(folder: Path) -> None:
    source = glyphs.Glyphs(root=str(folder))
    source.check("test", EpisodeSpec(5, 7, 50))
    with pytest.raises(DataError, match="has 8 faces; the support takes 8"):
        source.check("test", EpisodeSpec(5, 8, 1))


def test_a_glyph_stays_in_the_image(folder: Path) -> None:
    stored = glyphs._glyphs(folder).images[::50]
    images = glyphs._perturb(stored, np.random.default_rng(0))
    edge = torch.cat(
        [images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], dim=-1
    )
    # A corner of the largest turned squares touches the edge; nothing is cut through.
    assert edge.sum() / images.sum() < 0.01
    assert images.flatten(1).sum(1).min() > 0


def test_zero_perturbation_is_the_glyph_itself(folder: Path) -> None:
    stored = glyphs._glyphs(folder).images[:200]
    middle = mock.Mock(spec=np.random.Generator)
    middle.uniform.return_value = np.zeros((7, len(stored)))
    with mock.patch.multiple(glyphs, THINNER=0.0, THICKER=0.0):
        images = glyphs._perturb(stored, middle)
    small = torch.nn.functional.interpolate(
        stored[:, None].float() / 255, (glyphs.GLYPH_PX, glyphs.GLYPH_PX), mode="bilinear"
    )
    margin = (glyphs.IMAGE_PX - glyphs.GLYPH_PX) // 2
    inside = slice(margin, margin + glyphs.GLYPH_PX)
    # Both sample the same points; the affine grid is computed in float32 over +-1.
    assert torch.allclose(images[..., inside, inside], small, atol=1e-4)


def test_neither_trivial_nor_impossible(folder: Path) -> None:
    # Measured 0.53 over 600 episodes; 100 episodes have a standard error of about 0.015.
    assert 0.45 < nearest_neighbour_accuracy(glyphs.Glyphs(root=str(folder))) < 0.60
