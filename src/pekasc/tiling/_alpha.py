"""Pixels with an alpha channel on white, the same way for every format."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_WHITE = 255


class Alpha(IntEnum):
    """What a fourth channel means; the numbers are those of TIFF's ExtraSamples."""

    NONE = 0  # "unspecified": no alpha, and ignored
    ASSOCIATED = 1  # colours were multiplied with it
    UNASSOCIATED = 2


def on_white(pixels: np.ndarray, alpha: Alpha) -> np.ndarray:
    """Return C-contiguous pixels (y, x, 3), blended with white where they are transparent.

    Parameters
    ----------
    pixels
        uint8 (y, x, 3 or 4).
    alpha
        Meaning of the fourth channel.
    """
    if pixels.shape[-1] == 4:
        share = pixels[..., 3:]
        pixels = pixels[..., :3]
        if alpha is Alpha.UNASSOCIATED and (share < 255).any():
            part = share.astype(np.float32) / 255
            pixels = np.rint(part * pixels + (1 - part) * _WHITE).astype(np.uint8)
        elif alpha is Alpha.ASSOCIATED and (share < 255).any():
            pixels = np.minimum(pixels + (_WHITE - share.astype(np.uint16)), _WHITE).astype(np.uint8)
    return np.ascontiguousarray(pixels)
