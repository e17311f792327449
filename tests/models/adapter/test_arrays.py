"""Arrays that are given to an adapter: the tiles of every scale, in order, and positions that belong to them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pekasc.models.adapter._arrays import further_tiles, positions

TILES = np.zeros((3, 8, 8, 3), np.uint8)


def test_further_tiles_come_in_the_order_of_the_scales() -> None:
    given = {4.0: TILES + 4, 2.01: TILES + 2}  # within 2 % of 2
    twice, fourfold = further_tiles(TILES, given, [2.0, 4.0], 1.0)
    assert (twice == 2).all() and (fourfold == 4).all()
    assert further_tiles(TILES, None, [], 1.0) == []


@pytest.mark.parametrize(
    ("scales", "wanted", "error", "message"),
    [
        ([TILES], [2.0], TypeError, "must map pixel sizes in um to tiles, such as {2: wide}, got list"),
        ({2.0: TILES}, [], ValueError, "takes tiles at one scale, 1 um/px: leave `scales=` out"),
        (None, [2.0], ValueError, "also needs tiles of 2 um/px"),
        ({2.1: TILES}, [2.0], ValueError, "got tiles of [2.1] um/px"),
        ({2.0: TILES, 4.0: TILES}, [2.0], ValueError, "got tiles of [2.0, 4.0] um/px"),
        ({2.0: TILES[:2]}, [2.0], ValueError, "tiles of 2 um/px have shape (2, 8, 8, 3), the others (3, 8, 8, 3)"),
    ],
)
def test_further_tiles_that_do_not_fit(scales: object, wanted: list[float], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        further_tiles(TILES, scales, wanted, 1.0)  # type: ignore[arg-type]


def test_positions_belong_to_the_tiles() -> None:
    places, sections = positions(2, np.array([[1, 2], [3, 4]]), None)
    assert places.dtype == np.float64 and (sections == 0).all() and sections.shape == (2,)
    with pytest.raises(ValueError, match=r"\(2, 2\) and `section` \(2,\) for 2 tiles, got \(2, 2\) and \(3,\)"):
        positions(2, places, np.zeros(3))
