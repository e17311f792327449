"""What is given to an adapter: tiles of every scale, in order, positions that belong to them, and stain maps."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pekasc.models.adapter._arrays import field_tiles, positions, recoloured
from pekasc.tiling import Stain, StainMap, TileSpec

TILES = np.zeros((3, 8, 8, 3), np.uint8)


def test_tiles_of_fields_come_in_the_order_of_the_widths() -> None:
    given = {448.0: TILES + 4, 225: TILES + 2}  # within 2 % of 224
    narrow, wide = field_tiles(TILES, given, [224.0, 448.0])
    assert (narrow == 2).all() and (wide == 4).all()
    assert field_tiles(TILES, None, []) == field_tiles(TILES, None, [448.0]) == field_tiles(TILES, {}, []) == []


@pytest.mark.parametrize(
    ("fields", "wanted", "error", "message"),
    [
        ([TILES], [224.0], TypeError, "must map widths in um to tiles, such as {224: wide}, got list"),
        ({448.0: TILES}, [], ValueError, "This adapter reads no wider field of view: leave `fields=` out"),
        ({}, [224.0], ValueError, "`fields=` must hold tiles of 224 um around the same centres"),
        ({235.0: TILES}, [224.0], ValueError, "got tiles of [235.0] um. Or leave it out"),
        ({224.0: TILES, 448.0: TILES}, [224.0], ValueError, "got tiles of [224.0, 448.0] um"),
        ({224.0: TILES}, [224.0, 448.0], ValueError, "must hold tiles of 224, 448 um"),
        ({"a": TILES}, [224.0], TypeError, "must map widths in um to tiles, got 'a' as a width"),
        ({224.0: TILES[:2]}, [224.0], ValueError, "tiles of 224 um have shape (2, 8, 8, 3), the others (3, 8, 8, 3)"),
    ],
)
def test_tiles_of_fields_that_do_not_fit(fields: object, wanted: list[float], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        field_tiles(TILES, fields, wanted)  # type: ignore[arg-type]


def test_positions_belong_to_the_tiles() -> None:
    places, sections = positions(2, np.array([[1, 2], [3, 4]]), None)
    assert places.dtype == np.float64 and (sections == 0).all() and sections.shape == (2,)
    with pytest.raises(ValueError, match=r"\(2, 2\) and `section` \(2,\) for 2 tiles, got \(2, 2\) and \(3,\)"):
        positions(2, places, np.zeros(3))
    with pytest.raises(ValueError, match="`coords_um` is NaN or infinite for 1 of 2 tiles"):
        positions(2, np.array([[1, 2], [3, np.nan]]), None)
    with pytest.raises(TypeError, match="`coords_um` must hold numbers, positions in um, got dtype <U1"):
        positions(1, "x", None)  # type: ignore[arg-type]
    sections = positions(2, places, np.array(["a", None], dtype=object))[1]
    assert len(np.unique(sections)) == 2  # names that cannot be sorted


SPEC = TileSpec(14, 8.0)
REFERENCE = Stain("reinhard", (8.8, -0.1, 0.03), (0.22, 0.06, 0.012))
PALE = StainMap(Stain("reinhard", (9.1, -0.05, 0.02), (0.15, 0.03, 0.008)), REFERENCE)
DARK = StainMap(Stain("reinhard", (8.3, -0.12, 0.03), (0.3, 0.08, 0.015)), REFERENCE)
SECTION = np.array(["a", "b", "a", "b", "b", "a"])


def pink(n: int = 6) -> np.ndarray:
    """Return tiles of two colours with grain."""
    colours = np.array([(225, 160, 195), (120, 80, 150)])[np.arange(n * 14 * 14) % 2].reshape(n, 14, 14, 3)
    return np.clip(colours + np.random.default_rng(0).integers(-9, 10, colours.shape), 0, 255).astype(np.uint8)


def test_tiles_of_every_field_get_the_map_of_their_section() -> None:
    tiles, wide = pink(), pink()[::-1].copy()
    before = tiles.copy()
    made = recoloured([tiles, wide], SPEC, REFERENCE, {"a": PALE, "b": DARK}, SECTION)
    for array, found in zip((tiles, wide), made, strict=True):
        for name, each in (("a", PALE), ("b", DARK)):
            np.testing.assert_array_equal(found[SECTION == name], each(array[SECTION == name]))
    np.testing.assert_array_equal(tiles, before)
    (alone,) = recoloured([tiles], SPEC, REFERENCE, PALE, None)
    np.testing.assert_array_equal(alone, PALE(tiles))
    assert recoloured([tiles], SPEC, None, None, SECTION)[0] is tiles


def test_colours_measured_on_the_tiles_given(caplog: pytest.LogCaptureFixture) -> None:
    tiles = pink()
    tiles[SECTION == "b"] = DARK(tiles[SECTION == "b"])
    with caplog.at_level("INFO", logger="pekasc"):
        (made,) = recoloured([tiles], SPEC, REFERENCE, "tiles", SECTION)
    assert "The tiles of section 'b': colours by 'reinhard', measured on these 3 tiles." in caplog.text
    means = [made[SECTION == name].mean(axis=(0, 1, 2)) for name in ("a", "b")]
    before = [tiles[SECTION == name].mean(axis=(0, 1, 2)) for name in ("a", "b")]
    assert np.abs(means[0] - means[1]).max() < 0.3 * np.abs(before[0] - before[1]).max()


OTHER = replace(PALE, reference=Stain("reinhard", (8.7, -0.1, 0.03), (0.22, 0.06, 0.012)))


@pytest.mark.parametrize(
    ("reference", "stain", "section", "error", "message"),
    [
        (None, "tiles", None, ValueError, "takes tiles as they are (it has no stain map): leave `stain=` out"),
        (REFERENCE, None, None, ValueError, "brought to one stain ('reinhard'), and each section has a map of its own"),
        (REFERENCE, "reinhard", None, ValueError, "`stain='reinhard'` is no stain map: give `stain=\"tiles\"`"),
        (REFERENCE, OTHER, None, ValueError, "This stain map is of another adapter: it brings colours to"),
        (REFERENCE, {"a": PALE, "b": OTHER}, SECTION, ValueError, "This stain map is of another adapter"),
        (REFERENCE, PALE, SECTION, ValueError, "`stain` is one map, and the tiles are of 2 sections"),
        (REFERENCE, {"a": PALE}, SECTION, KeyError, "`stain` has no map of section 'b', only of ['a']"),
        (REFERENCE, {"a": PALE, "b": DARK}, None, ValueError, "say which tile is of which section (`section=`)"),
        (REFERENCE, 3, None, TypeError, "must be a stain map, maps by section or 'tiles', got int"),
        (REFERENCE, {"a": REFERENCE}, None, TypeError, "`stain` must hold stain maps, got Stain"),
        (REFERENCE, PALE, SECTION[:4], ValueError, "`section` must have shape (6,) for 6 tiles, got (4,)"),
    ],
)
def test_stain_maps_that_do_not_fit(
    reference: Any, stain: Any, section: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        recoloured([pink()], SPEC, reference, stain, section)


@pytest.mark.parametrize(
    ("tiles", "match"), [(pink(2), "392 of 392"), (np.full((9, 14, 14, 3), 255, np.uint8), "0 of")]
)
def test_too_little_tissue_in_the_tiles_given(tiles: np.ndarray, match: str) -> None:
    with pytest.raises(ValueError, match=rf"^These tiles: {match}.* pixels of 8 um"):
        recoloured([tiles], SPEC, REFERENCE, "tiles", None)
