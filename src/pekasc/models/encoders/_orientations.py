"""The eight orientations of a tile: rotations by 90 degrees and their mirror images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# order of the orientations: the first 2 are 0 and 180 degrees, the first 4 all rotations, then the mirror images
VIEWS = (0, 2, 1, 3, 4, 6, 5, 7)


def orient_tensor(tiles: Tensor, number: int, axes: tuple[int, int]) -> Tensor:
    """Return tiles in one of eight orientations: rotated `number` times by 90 degrees, and mirrored from 4 on."""
    out = torch.rot90(tiles, number % 4, axes)
    return out.flip(axes[1]) if number >= 4 else out


def orient(tiles: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Return every tile (n, y, x, 3) in the orientation `views` (n,), numbered as in :func:`orient_tensor`.

    With NumPy, since this runs in a thread beside the training, which torch's own threads would slow down.
    """
    out = np.empty_like(tiles)
    for i, (tile, number) in enumerate(zip(tiles, views.tolist(), strict=True)):
        rotated = np.rot90(tile, number % 4)
        out[i] = rotated[:, ::-1] if number >= 4 else rotated
    return out
