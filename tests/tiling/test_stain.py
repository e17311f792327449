"""Stain maps against squidpy's own transformation of whole images, and what they leave alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import squidpy as sq
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel

from pekasc.datasets._phantom_image import SlideParams, render_region
from pekasc.tiling import ArrayTiles, Stain, StainedTiles, StainMap, TileSpec, coarsened, mean_stain, stain_spec
from pekasc.tiling._stain import STAIN_UM

METHODS = ["reinhard", "macenko"]
SIDE = 160


@pytest.fixture(scope="module")
def slides() -> SpatialData:
    """Return two synthetic slides of other stains, each with a mask of everything but glass."""
    size: dict[str, Any] = {"width_um": 640, "height_um": 640, "mpp": 2.0}
    pale: dict[str, Any] = {"hematoxylin_strength": 1.4, "eosin_strength": 0.6, "eosin": (0.3, 0.85, 0.4)}
    looks = {"a": SlideParams(seed=1, **size), "b": SlideParams(seed=2, **size, **pale)}
    images, labels = {}, {}
    for name, look in looks.items():
        region = render_region(look, 80, 80, SIDE, SIDE)
        images[name] = Image2DModel.parse(region, dims=("c", "y", "x"))
        tissue = (region.min(axis=0) < 225).astype(np.uint8)
        labels[f"{name}_tissue"] = Labels2DModel.parse(tissue, dims=("y", "x"))
    return SpatialData(images=images, labels=labels)


def pixels_of(slides: SpatialData, name: str) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(np.asarray(slides[name]), 0, -1))


def stain_in(slides: SpatialData, name: str, method: str) -> Stain:
    found = sq.experimental.im.fit_stain_reference(slides, name, method=method)
    if method == "reinhard":
        return Stain(method, tuple(found.mu), tuple(found.sigma))
    return Stain(method, tuple(found.stain_matrix[:, 0]), tuple(found.stain_matrix[:, 1]))


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_same_pixels_become_what_squidpy_makes_of_them(slides: SpatialData, method: str) -> None:
    reference = sq.experimental.im.fit_stain_reference(slides, "a", method=method)
    made = StainMap(stain_in(slides, "b", method), stain_in(slides, "a", method))(pixels_of(slides, "b"))
    white = (pixels_of(slides, "b") == 255).all(axis=-1)
    tissue = np.asarray(slides["b_tissue"]) > 0
    for whole, there in ((False, ~white), (True, tissue)):
        expected = sq.experimental.im.normalize_stains(slides, "b", reference, inplace=False, preserve_background=whole)
        expected = np.moveaxis(np.asarray(expected), 0, -1).astype(float)
        off = np.abs(made[there] - expected[there])
        assert off.mean() < 0.05 and off.max() <= 1
    # and it is no small change that is compared here
    assert np.abs(pixels_of(slides, "b")[tissue].astype(float) - made[tissue]).mean() > (
        8 if method == "reinhard" else 1
    )


def test_colours_have_the_statistics_of_the_reference(slides: SpatialData, method: str) -> None:
    target = stain_in(slides, "a", method)
    moved = StainMap(stain_in(slides, "b", method), target)(pixels_of(slides, "b"))
    again = SpatialData(
        images={"b": Image2DModel.parse(np.moveaxis(moved, -1, 0), dims=("c", "y", "x"))},
        labels={"b_tissue": slides["b_tissue"]},
    )
    found, before = stain_in(again, "b", method), stain_in(slides, "b", method)
    assert np.abs(np.subtract(found.first, target.first)).max() < 0.03
    assert np.abs(np.subtract(found.second, target.second)).max() < 0.03
    assert np.abs(np.subtract(before.second, target.second)).max() > 0.1


def test_white_stays_white_and_the_tiles_as_they_were(slides: SpatialData, method: str) -> None:
    found = StainMap(stain_in(slides, "b", method), stain_in(slides, "a", method))
    tiles = pixels_of(slides, "b").reshape(4, SIDE // 4, SIDE, 3).copy()
    tiles[0, :3] = 255
    before = tiles.copy()
    made = found(tiles)
    assert (made[0, :3] == 255).all() and made.dtype == np.uint8 and made.shape == tiles.shape
    np.testing.assert_array_equal(tiles, before)
    # a table of colours that were met before, or none, in one thread or several
    np.testing.assert_array_equal(found(tiles), made)
    found.release()
    in_place = tiles.copy()
    found.recolour_tiles(in_place)
    np.testing.assert_array_equal(in_place, made)


def test_the_reference_itself_stays(slides: SpatialData, method: str) -> None:
    own = stain_in(slides, "a", method)
    pixels = pixels_of(slides, "a")
    np.testing.assert_array_equal(StainMap(own, own)(pixels), pixels)


def test_maps_travel_to_other_processes_without_their_table(slides: SpatialData, method: str) -> None:
    found = StainMap(stain_in(slides, "b", method), stain_in(slides, "a", method))
    made = found(pixels_of(slides, "b"))
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert again == found and again.digest == found.digest
    np.testing.assert_array_equal(again(pixels_of(slides, "b")), made)
    other = StainMap(found.reference, found.source)
    assert other != found and other.digest != found.digest


def test_stains_as_values(slides: SpatialData, method: str) -> None:
    a, b = stain_in(slides, "a", method), stain_in(slides, "b", method)
    assert Stain.from_dict(a.to_dict()) == a != b
    assert mean_stain([a, b]) == mean_stain([b, a])
    np.testing.assert_allclose(mean_stain([a, a]).second, a.second, atol=2e-6)
    middle = mean_stain([a, b])
    if method == "reinhard":
        np.testing.assert_allclose(middle.first, np.add(a.first, b.first) / 2, rtol=1e-5)
        np.testing.assert_allclose(middle.second, np.add(a.second, b.second) / 2, rtol=1e-5)
    else:
        assert np.linalg.norm(middle.first) == pytest.approx(1, abs=1e-5)
        assert np.dot(middle.second, a.second) == pytest.approx(np.dot(middle.second, b.second), abs=1e-5)


ONES = (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Stain("vahadane", ONES, ONES), "Stain method 'vahadane' is not known: choose one of"),
        (lambda: Stain("reinhard", ONES, (1.0, 1.0)), "`second` of a stain must be three numbers of absolute value at"),
        (
            lambda: Stain("reinhard", (1.0, np.nan, 1.0), ONES),
            "`first` of a stain must be three numbers of absolute value at most 100, got",
        ),
        (lambda: Stain("reinhard", ONES, (1.0, 0.0, 1.0)), "standard deviations of a stain must be at least"),
        (lambda: Stain("macenko", ONES, ONES), "directions of a stain must have length 1"),
        (
            lambda: Stain("macenko", (1.0, 0.0, 0.0), (1.0, 0.0, 0.0)),
            "directions of haematoxylin and eosin must differ, got",
        ),
        (lambda: Stain.from_dict({"method": "reinhard"}), r"^A stain has the fields .*, got \['method'\]\.$"),
        (lambda: Stain.from_dict(3), r"^A stain has the fields .*, got int\.$"),  # type: ignore[arg-type]
        (
            lambda: Stain.from_dict({"method": "reinhard", "first": "123", "second": [1, 1, 1]}),
            "a list of numbers of absolute value at most 100, got 123",
        ),
        (
            lambda: StainMap(Stain("reinhard", ONES, ONES), Stain("macenko", (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))),
            "measured by 'reinhard' cannot be mapped to a reference of 'macenko': use one method",
        ),
        (lambda: StainMap(*[Stain("reinhard", ONES, ONES)] * 2)(np.zeros((2, 2, 4), np.uint8)), "three channels last"),
        (lambda: StainMap(*[Stain("reinhard", ONES, ONES)] * 2)(np.zeros((2, 2, 3))), "must be uint8"),
    ],
)
def test_what_is_no_stain(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_each_section_has_its_map(slides: SpatialData, method: str) -> None:
    a, b = stain_in(slides, "a", method), stain_in(slides, "b", method)
    tiles = pixels_of(slides, "b").reshape(4, 4, SIDE // 4, SIDE // 4, 3).reshape(16, SIDE // 4, SIDE // 4, 3)
    maps = [StainMap(b, a), StainMap(a, b)]
    which = np.array([0, 1, -1, 0] * 4)
    source = StainedTiles(ArrayTiles(tiles), maps, which)
    index = np.array([3, 1, 2, 0, 2, 5])
    read = source.read(index)
    for tile, number in zip(read, index, strict=True):
        own = tiles[number] if which[number] < 0 else maps[which[number]](tiles[number])
        np.testing.assert_array_equal(tile, own)
    source.release()
    assert source.n == 16 and source.tile_px == SIDE // 4


def test_tiles_are_brought_to_eight_um() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    spec = stain_spec(TileSpec(56, 2.0))
    assert (spec.tile_px, spec.mpp) == (14, STAIN_UM)
    made = coarsened(tiles, TileSpec(56, 2.0))
    expected = tiles.reshape(3, 14, 4, 14, 4, 3).mean(axis=(2, 4))
    assert np.abs(made - expected).max() <= 0.5 + 1e-4
    assert stain_spec(TileSpec(8, 0.25)).tile_px == 1
