"""Quality of tiles: blur lowers sharpness whatever the contrast, ink is found, tissue is not ink."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

import pekasc as pk
from pekasc.tiling import pen_fraction, sharpness, sharpness_threshold


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """Return 40 tiles of tissue at 1 um per pixel."""
    sdata = pk.datasets.phantom(n_patients=1, size_um=800, mpp=1.0, n_genes=4)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    return pk.get.tiles(sdata).to_numpy()


def blurred(tiles: np.ndarray, sigma: float) -> np.ndarray:
    return gaussian_filter(tiles.astype(np.float32), (0, sigma, sigma, 0)).astype(np.uint8)


def test_blur_is_seen_and_contrast_is_not(tiles: np.ndarray) -> None:
    sharp = sharpness(tiles)
    threshold = sharpness_threshold(sharp)
    assert (sharp < threshold).mean() <= 0.03
    assert (sharpness(blurred(tiles, 1.0)) < threshold).all()
    pale = (200 + (tiles.astype(np.float32) - 200) / 2).astype(np.uint8)
    np.testing.assert_allclose(sharpness(pale), sharp, rtol=0.1)
    # a tile half of which is glass
    edge = tiles.copy()
    edge[:, :, :56] = 243
    assert (sharpness(edge) > threshold).mean() > 0.95


def test_a_wave_in_closed_form() -> None:
    # on a fine wave, second differences over central ones are 2 tan(w / 2), squared
    w = 2 * np.pi / 11
    x = np.arange(112)
    wave = np.round(128 + 100 * np.sin(w * x))[None, None, :, None]
    tile = np.broadcast_to(wave, (1, 112, 112, 3)).astype(np.uint8)
    assert sharpness(tile)[0] == pytest.approx((2 * np.tan(w / 2)) ** 2, rel=0.03)


def test_tiles_without_structure_have_no_sharpness() -> None:
    assert np.isnan(sharpness(np.full((2, 20, 20, 3), 240, np.uint8))).all()
    assert sharpness_threshold(np.array([np.nan, np.nan])) == 0


@pytest.mark.parametrize("colour", [(20, 120, 60), (30, 60, 190), (15, 15, 18)], ids=["green", "blue", "black"])
def test_ink_is_found(tiles: np.ndarray, colour: tuple[int, int, int]) -> None:
    assert pen_fraction(tiles).max() < 0.02
    marked = tiles.copy()
    marked[:, 28:84] = colour
    np.testing.assert_allclose(pen_fraction(marked), 0.5, atol=0.02)
    assert pen_fraction(np.full((1, 8, 8, 3), 255, np.uint8)) == 0
