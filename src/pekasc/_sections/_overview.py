"""Coarse versions of an image, and where it shows tissue. Pure arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from pekasc._digests import sha256
from pekasc.tiling import ImagePyramid

OVERVIEW_PX = 1024
_OVERVIEW_LIMIT = 400_000_000  # maximum number of pixels to decode for an overview
_GLASS_SATURATION = 0.15  # upper bound of Otsu's threshold: anything more saturated is tissue
_BLACK = 0.1


def overview(pyramid_levels: list[Any]) -> np.ndarray | None:
    """Return a coarse image, (height, width, c) of about 1024 px at most, or None if too much had to be decoded.

    `pyramid_levels` are (c, y, x) arrays, finest first. The coarsest level of at least 512 px is read, with a stride.
    """
    fine_enough = [level for level in pyramid_levels if max(level.shape[1:]) >= OVERVIEW_PX // 2]
    level = fine_enough[-1] if fine_enough else pyramid_levels[0]
    if level.shape[1] * level.shape[2] > _OVERVIEW_LIMIT and not isinstance(level, np.ndarray):
        return None
    step = -(-max(level.shape[1:]) // OVERVIEW_PX)
    return np.moveaxis(np.asarray(level[:, ::step, ::step]), 0, -1)


def tissue_mask(picture: np.ndarray) -> np.ndarray:
    """Return the mask of tissue in a coarse RGB image by Otsu's threshold on the saturation.

    The threshold is capped, so that an image without glass is all tissue. Black (outside the scan) is not tissue.
    """
    from skimage.filters import threshold_otsu

    rgb = picture.astype(np.float32) / 255
    value = rgb.max(axis=-1)
    saturation = np.where(value > 0, 1 - rgb.min(axis=-1) / np.maximum(value, 1e-6), 0)
    if saturation.min() == saturation.max():
        return np.full(value.shape, bool(saturation.flat[0] > _GLASS_SATURATION))
    threshold = min(float(threshold_otsu(saturation)), _GLASS_SATURATION)
    return np.asarray((saturation > threshold) & (value > _BLACK))


def coarse(pyramid: ImagePyramid, start: np.ndarray, end: np.ndarray, wanted: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a coarse image of a rectangle, uint8 (y, x, 3), and the size of its pixels in level-0 pixels, x and y.

    Parameters
    ----------
    pyramid
        The image. At most 50 MB of a level are in memory at once.
    start, end
        Corners of the rectangle, x and y in level-0 pixels.
    wanted
        Size of a pixel in level-0 pixels; it is not exceeded, unless the image itself is coarser.
    """
    # of the levels that are fine enough the coarsest, else the finest
    scales = np.array(pyramid.scales, dtype=np.float64)
    fine = np.flatnonzero(scales.max(axis=1) <= wanted * 1.01)
    i = int(fine[np.argmax(scales[fine, 0])]) if fine.size else 0
    level, scale = pyramid.levels[i], scales[i]
    factor = max(1, int(wanted * 1.01 / scale.max()))
    x0, y0 = np.floor(start / scale).astype(int)
    x1, y1 = np.minimum(np.ceil(end / scale), (level.shape[2], level.shape[1])).astype(int)
    x1, y1 = x0 + max(1, (x1 - x0) // factor) * factor, y0 + max(1, (y1 - y0) // factor) * factor
    rows = max(1, 2**24 // max(1, (x1 - x0) * factor)) * factor  # a strip at a time: the level may not fit the memory
    strips = []
    for top in range(y0, y1, rows):
        part = np.asarray(level[:, top : min(top + rows, y1), x0:x1])
        height, width = (max(1, n // factor) for n in part.shape[1:])
        part = part[:, : height * factor, : width * factor]
        strips.append(part.reshape(3, height, part.shape[1] // height, width, -1).mean(axis=(2, 4)))
    picture = np.moveaxis(np.concatenate(strips, axis=1), 0, -1)
    return picture.round().astype(np.uint8), scale * factor


def picture_digest(pyramid: ImagePyramid) -> str:
    """Return a digest of what an image shows, 16 hex digits: its size and a coarse version of all of it.

    The same image has the same digest under any name and pixel size; another crop or level has another.
    """
    level = pyramid.levels[0]
    height, width = (int(n) for n in level.shape[1:])
    picture = overview(pyramid.levels)
    if picture is None:  # too large to be read whole, and without levels
        at = [((2 * k + 1) * height // 16, (2 * j + 1) * width // 16) for k in range(8) for j in range(8)]
        windows = [np.asarray(level[:, max(0, y - 16) : y + 16, max(0, x - 16) : x + 16]) for y, x in at]
        return sha256(f"{width} {height}", windows)[:16]
    return sha256(f"{width} {height}", picture)[:16]
