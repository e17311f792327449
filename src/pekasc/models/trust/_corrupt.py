"""Tiles as they should not be: at another pixel size, under a pen, pale and dark. Pure arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from skimage.color import hed2rgb, hsv2rgb, rgb2hed
from torch.nn.functional import interpolate

FAULTS = ("half the pixel size", "twice the pixel size", "pen marks", "pale stain", "dark stain")
_PALE, _DARK = 0.35, 2.0
_TOLERATED = (0.7, 1.3)  # of haematoxylin and eosin: what patients of one laboratory differ by
N_TOLERATED = len(_TOLERATED)


def corrupted(tiles: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[str | None, np.ndarray]]:
    """Yield tiles with every one of :data:`FAULTS`, and with what is no fault (None): a stain a little off.

    "Corruptions" in the words of Hendrycks and Dietterich, ICLR 2019.

    Parameters
    ----------
    tiles
        (n, px, px, 3) uint8.
    numbers
        (n,), what the strokes of pens are drawn by: those of a tile are the same whichever tiles are beside it.

    Yields
    ------
    The name of the fault and the tiles, of the same shape. A tile at half the pixel size is its middle, enlarged (of
    few pixels, a little less than twice); at twice the pixel size, itself at half the width, mirrored at its edges.
    """
    yield FAULTS[0], _enlarged(tiles)
    yield FAULTS[1], _reduced(tiles)
    yield FAULTS[2], _marked(tiles, numbers)
    hed = rgb2hed(tiles)
    for name, factor in ((FAULTS[3], _PALE), (FAULTS[4], _DARK), *((None, factor) for factor in _TOLERATED)):
        other = hed2rgb(hed * [factor, factor, 1.0])
        yield name, np.rint(255 * np.clip(other, 0, 1)).astype(np.uint8)


def _resized(tiles: np.ndarray, px: int, mode: str) -> np.ndarray:
    x = torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2).float()
    found = interpolate(x, size=(px, px), mode=mode)
    return found.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _enlarged(tiles: np.ndarray) -> np.ndarray:
    px = tiles.shape[1]
    edge = px // 4
    return _resized(tiles[:, edge : px - edge, edge : px - edge], px, "bicubic")


def _reduced(tiles: np.ndarray) -> np.ndarray:
    px = tiles.shape[1]
    half = (px + 1) // 2
    mirrored = (0, px - half)
    return np.pad(_resized(tiles, half, "area"), ((0, 0), mirrored, mirrored, (0, 0)), mode="symmetric")


def _marked(tiles: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return tiles with a stroke across each, of any colour that is not light, an eighth to two fifths of its width."""
    px = tiles.shape[1]
    y, x = np.mgrid[:px, :px] - (px - 1) / 2
    out = tiles.copy()
    for tile, number in zip(out, numbers, strict=True):
        rng = np.random.default_rng(int(number))
        angle, offset, width = rng.uniform(0, np.pi), rng.uniform(-0.3, 0.3) * px, rng.uniform(0.12, 0.4) * px
        stroke = np.abs(x * np.cos(angle) + y * np.sin(angle) - offset) < width / 2
        colour = 255 * hsv2rgb([rng.uniform(), rng.uniform(0.3, 1), rng.uniform(0.05, 0.6)])
        opacity = rng.uniform(0.5, 0.95)
        tile[stroke] = np.rint((1 - opacity) * tile[stroke] + opacity * colour).astype(np.uint8)
    return out
