"""Tiles with known faults: of their shape, what the fault says, and the tiles stay as they were."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.color import rgb2hed

from pekasc.models.trust import FAULTS, corrupted


@pytest.fixture
def tiles() -> np.ndarray:
    """Return tiles of smooth colours, (3, 28, 28, 3) uint8."""
    y, x = np.mgrid[:28, :28] / 27
    colour = np.stack([200 - 60 * x, 120 + 40 * y, 190 - 30 * x * y], axis=-1)
    return np.stack([colour, colour[::-1], colour[:, ::-1]]).astype(np.uint8)


def test_every_fault_of_every_tile(tiles: np.ndarray) -> None:
    before = tiles.copy()
    found = list(corrupted(tiles, np.arange(3)))
    names = [name for name, _ in found]
    assert names[:5] == list(FAULTS) and names[5:] == [None, None]
    for _, other in found:
        assert other.shape == tiles.shape and other.dtype == np.uint8
        assert all((a != b).any() for a, b in zip(other, tiles, strict=True))
    np.testing.assert_array_equal(tiles, before)
    # the same every time
    for (_, one), (_, again) in zip(found, corrupted(tiles, np.arange(3)), strict=True):
        np.testing.assert_array_equal(one, again)
    # whichever tiles are beside it
    for (_, one), (_, again) in zip(found, corrupted(tiles[1:], np.arange(1, 3)), strict=True):
        np.testing.assert_array_equal(one[1:], again)


@pytest.mark.parametrize("px", [28, 27])
def test_pixel_sizes(tiles: np.ndarray, px: int) -> None:
    tiles = tiles[:, :px, :px]
    found = dict(corrupted(tiles, np.arange(3)))
    half, twice = (found[name].astype(float) for name in FAULTS[:2])
    edge = px // 4
    middle = tiles[:, edge : px - edge, edge : px - edge].astype(float)
    # the middle, enlarged: its corners are the middle's, its gradient half as steep
    np.testing.assert_allclose(half[:, 0, 0], middle[:, 0, 0], atol=3)
    assert np.abs(np.diff(half, axis=2)).mean() == pytest.approx(
        np.abs(np.diff(tiles.astype(float), axis=2)).mean() / 2, rel=0.2
    )
    # all of it in a quarter, mirrored beyond
    n = (px + 1) // 2
    np.testing.assert_allclose(twice[:, 0, 0], tiles[:, :2, :2].mean(axis=(1, 2)), atol=3)
    np.testing.assert_array_equal(twice[:, :, n], twice[:, :, n - 1])
    np.testing.assert_array_equal(twice[:, n], twice[:, n - 1])


def test_pens_cover_a_part(tiles: np.ndarray) -> None:
    marked = dict(corrupted(tiles, np.arange(3)))[FAULTS[2]]
    share = (marked != tiles).any(axis=-1).mean(axis=(1, 2))
    assert (share > 0.03).all() and (share < 0.6).all()
    changed = (marked != tiles).any(axis=-1)
    assert marked[changed].astype(float).mean() < tiles[changed].astype(float).mean()  # no pen is light


def test_stains_are_scaled(tiles: np.ndarray) -> None:
    stains = [other for name, other in corrupted(tiles, np.arange(3)) if name in (*FAULTS[3:], None)]
    plain = rgb2hed(tiles)[..., :2].mean()
    found = [rgb2hed(other)[..., :2].mean() / plain for other in stains]
    np.testing.assert_allclose(found, [0.35, 2.0, 0.7, 1.3], rtol=0.1)
