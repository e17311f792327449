"""Quality of tiles: is it in focus, and is there a pen mark? Pure arrays.

Sources: energy of the Laplacian and of the gradient as measures of focus, Pertuz et al., Pattern Recognition 2013; hue
and saturation of pen marks, as in the filters of HistoQC (Janowczyk et al. 2019) and histolab.
"""

from __future__ import annotations

import numpy as np

_FLAT = 1.0  # squared grey levels per pixel: below, there is no structure that could be in focus
_PEN_SATURATION = 0.35
_PEN_HUES = (0.17, 0.55)  # yellow-green to cyan; eosin and haematoxylin are pink, violet and blue
_BLUE_HUE = 0.68  # up to here, a blue much brighter and purer than haematoxylin's
_BLUE_CHROMA = 0.5
_INK = 0.2  # black ink: darker than nuclei
_INK_CHROMA = 0.08


def sharpness(tiles: np.ndarray) -> np.ndarray:
    """Return how sharp tiles are: energy of the Laplacian over energy of the gradient of the grey levels.

    It is a mean squared spatial frequency, free of contrast, stain and of how much glass a tile shows: out of focus,
    the same edges are wider.

    Parameters
    ----------
    tiles
        (n, y, x, 3) uint8.

    Returns
    -------
    (n,) float32; NaN for tiles without structure.
    """
    grey = tiles.astype(np.float32).mean(axis=-1)
    inner = grey[:, 1:-1, 1:-1]
    up, down, left, right = grey[:, :-2, 1:-1], grey[:, 2:, 1:-1], grey[:, 1:-1, :-2], grey[:, 1:-1, 2:]
    energy = np.square(up + down + left + right - 4 * inner).mean(axis=(1, 2))
    gradient = (np.square(down - up) + np.square(right - left)).mean(axis=(1, 2)) / 4
    return np.divide(energy, gradient, out=np.full(len(tiles), np.nan, np.float32), where=gradient > _FLAT)


def pen_fraction(tiles: np.ndarray) -> np.ndarray:
    """Return the fraction of pixels in the colour of a green or blue pen, or of black ink.

    Parameters
    ----------
    tiles
        (n, y, x, 3) uint8.

    Returns
    -------
    (n,) float32 between 0 and 1.
    """
    return pen_pixels(tiles).mean(axis=(1, 2)).astype(np.float32)


def pen_pixels(pixels: np.ndarray) -> np.ndarray:
    """Return which pixels, (..., 3) uint8, have the colour of a green or blue pen, or of black ink."""
    rgb = pixels.astype(np.float32) / 255
    value = rgb.max(axis=-1)
    chroma = value - rgb.min(axis=-1)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    # hue in turns, of the sector of the largest channel; red as the largest is no pen's here
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(green >= blue, (blue - red) / safe + 2, (red - green) / safe + 4) / 6
    coloured = (hue >= _PEN_HUES[0]) & (hue <= _PEN_HUES[1]) & (chroma > _PEN_SATURATION * value)
    blue_ink = (hue > _PEN_HUES[1]) & (hue <= _BLUE_HUE) & (chroma > _BLUE_CHROMA)
    pen = (coloured | blue_ink) & (red < value) & (value > _INK)
    ink = (value < _INK) & (chroma < _INK_CHROMA)
    return np.asarray(pen | ink)


def sharpness_threshold(values: np.ndarray) -> float:
    """Return the sharpness below which tiles of a slide are out of focus, by the slide's own tiles.

    Four robust standard deviations (of the logarithm) below the median: few tiles of a slide in focus are below.
    """
    log = np.log(values[np.isfinite(values) & (values > 0)])
    if not log.size:
        return 0.0
    median = np.median(log)
    return float(np.exp(median - 4 * 1.4826 * np.median(np.abs(log - median))))
