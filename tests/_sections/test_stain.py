"""The colours of a section: measured on tissue under its tiles, and refused where they are no stain's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import squidpy as sq
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel

import pekasc as pk
from pekasc._sections import (
    Section,
    coarse_tiles,
    reference_stain,
    section_readers,
    stain_of,
    tiled_sections,
    tissue_mask,
    with_stain,
)
from pekasc.tiling import ImagePyramid, StainMap, TileSpec, mean_stain, pen_pixels


@pytest.fixture(scope="module")
def tiled() -> tuple[list[Section], TileSpec]:
    sdata = pk.datasets.phantom(n_patients=2, size_um=700, n_genes=4)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    return tiled_sections(sdata)


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_colours_are_squidpys_on_the_same_pixels(tiled: tuple[list[Section], TileSpec], method: str) -> None:
    (section, _), spec = tiled
    tiles = coarse_tiles(section, spec)
    assert tiles.shape == (section.rows.size, 14, 14, 3)
    # the tiles side by side as one picture, with the mask of what counts as tissue
    picture = tiles.reshape(-1, 14, 3)
    mask = tissue_mask(picture) & ~pen_pixels(picture)
    sdata = SpatialData(
        images={"he": Image2DModel.parse(np.moveaxis(picture, -1, 0), dims=("c", "y", "x"))},
        labels={"he_tissue": Labels2DModel.parse(mask.astype(np.uint8), dims=("y", "x"))},
    )
    expected = sq.experimental.im.fit_stain_reference(sdata, "he", method=method)
    found = stain_of(tiles, method, "these")
    pair = (expected.mu, expected.sigma) if method == "reinhard" else expected.stain_matrix.T[:2]
    np.testing.assert_allclose([found.first, found.second], pair, rtol=1e-3, atol=1e-4)


def test_colours_do_not_depend_on_the_order_of_tiles(tiled: tuple[list[Section], TileSpec]) -> None:
    sections, spec = tiled
    order = np.random.default_rng(0).permutation(sections[0].rows.size)
    for method in ("reinhard", "macenko"):
        (own,) = reference_stain(sections[:1], spec, method)[1]
        assert reference_stain([sections[0].take(order)], spec, method)[1] == [own]


def test_tiles_are_brought_to_the_mean_of_the_sections(tiled: tuple[list[Section], TileSpec]) -> None:
    sections, spec = tiled
    reference, own = reference_stain(sections, spec, "reinhard")
    assert reference == mean_stain(own) and own[0] != own[1]
    stained = with_stain(sections, spec, reference)
    assert with_stain(sections, spec, None) == sections
    index = np.arange(5)
    for section, plain, stain in zip(stained, sections, own, strict=True):
        assert section.stain == StainMap(stain, reference)
        # wider fields of view have the map of the section
        for size, further in ((spec, False), (spec.scaled(2.0), True)):
            (before,), (after,) = (section_readers([s], size, further=further) for s in (plain, section))
            raw = before.read(index)
            np.testing.assert_array_equal(after.read(index), section.stain(raw))
            assert np.abs(raw.astype(int) - section.stain(raw)).max() > 2
            after.release()
        # measured on the tiles as they are, however often
        assert with_stain([section], spec, reference)[0].stain == section.stain


def test_a_coarse_level_is_read(tiled: tuple[list[Section], TileSpec]) -> None:
    (section, _), spec = tiled
    pyramid = section.pyramid
    assert pyramid is not None
    assert len(pyramid.levels) > 1

    class Unread:
        """A level that may not be read."""

        def __init__(self, level: object) -> None:
            self.shape, self.dtype = level.shape, level.dtype

        def __getitem__(self, index: object) -> np.ndarray:
            raise AssertionError("a fine level is read")

    levels = [*map(Unread, pyramid.levels[:1]), *pyramid.levels[1:]]
    coarse = replace(section, pyramid=ImagePyramid(levels, pyramid.scales))
    np.testing.assert_array_equal(coarse_tiles(coarse, spec), coarse_tiles(section, spec))


def of_colour(*colours: tuple[int, int, int], n: int = 8) -> np.ndarray:
    """Return tiles of some colours with grain."""
    grain = np.random.default_rng(0).integers(-6, 7, (n, 14, 14, 3))
    base = np.array(colours)[np.arange(14 * 14 * n) % len(colours)].reshape(n, 14, 14, 3)
    return np.clip(base + grain, 0, 255).astype(np.uint8)


WHITE, PINK, VIOLET = (244, 243, 245), (225, 160, 195), (120, 80, 150)


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
@pytest.mark.parametrize(
    ("tiles", "match"),
    [
        (np.full((20, 14, 14, 3), 255, np.uint8), "0 of 3920 pixels of 8 um under its tiles show tissue"),
        (
            of_colour(PINK, VIOLET, n=2),
            "392 of 392 pixels .* on 500 or more.* fit without `Readout.stain` .to predict: use an",
        ),
        (np.zeros((0, 14, 14, 3), np.uint8), "0 of 0 pixels"),
        (np.zeros((20, 14, 14, 3), np.uint8), "0 of 3920 pixels"),
        # fluorescence, brightfield with DAB, a green pen
        (of_colour((12, 14, 120), (8, 60, 20)), "darker than a stained section in transmitted light"),
        (of_colour((170, 120, 70), (200, 170, 140)), "does not absorb green most of all .*red, green and blue: 0.32"),
        (of_colour((60, 200, 90)), "0 of 1568 pixels"),
    ],
    ids=["white", "few", "none", "black", "fluorescence", "brown", "pen"],
)
def test_what_has_no_stain_to_measure(tiles: np.ndarray, match: str, method: str) -> None:
    with pytest.raises(ValueError, match=f"^Section 'A'.*{match}"):
        stain_of(tiles, method, "Section 'A'")


def test_white_beside_tissue_is_no_part_of_the_stain() -> None:
    tissue = of_colour(PINK, VIOLET)
    both = np.concatenate([tissue, of_colour(WHITE, n=30)])
    for method in ("reinhard", "macenko"):
        assert stain_of(both, method, "A") == stain_of(tissue, method, "A")


def test_one_colour_is_no_stain() -> None:
    tiles = np.full((8, 14, 14, 3), PINK, np.uint8)
    with pytest.raises(ValueError, match="does not look like haematoxylin and eosin.*single colour"):
        stain_of(tiles, "reinhard", "A")
    with pytest.raises(ValueError, match=r"A does not look like haematoxylin and eosin.*leave `Readout.stain` at None"):
        stain_of(tiles, "macenko", "A")
