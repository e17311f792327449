"""Arrays that are given to an adapter: the tiles of every scale, in order, and positions that belong to them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pekasc.models.adapter._arrays import field_tiles, positions

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
