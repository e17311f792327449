"""The eight orientations of a tile: quarter turns and mirror images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


VIEWS = (0, 2, 1, 3, 4, 6, 5, 7)  # 2: as it is and half round; 4: all turns; 8: their mirror images too


def turned(tiles: Tensor, number: int, axes: tuple[int, int]) -> Tensor:
    """Return tiles in one of their eight orientations: turned by so many quarters, from 4 on mirrored as well."""
    out = torch.rot90(tiles, number % 4, axes)
    return out.flip(axes[1]) if number >= 4 else out


def orient(tiles: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Return every tile (n, y, x, 3) in the orientation that `views` (n,) says, see :func:`turned`.

    In NumPy, for it runs in a thread beside the training: torch's own threads there would spin and slow that down.
    """
    out = np.empty_like(tiles)
    for i, (tile, number) in enumerate(zip(tiles, views.tolist(), strict=True)):
        side = np.rot90(tile, number % 4)
        out[i] = side[:, ::-1] if number >= 4 else side
    return out
