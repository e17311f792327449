"""Regular grids of positions in micrometers, square or hexagonal."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np

GridShape: TypeAlias = Literal["square", "hexagon"]
GRID_SHAPES: tuple[str, ...] = get_args(GridShape)


def grid_positions(
    low: np.ndarray, high: np.ndarray, stride: float, shape: str = "square"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of a grid in a rectangle, row by row, and their row and column.

    The first position is half a stride from the corner `low`. In a hexagonal grid, odd rows are shifted by half a
    stride, and all six neighbours are a stride away.

    Parameters
    ----------
    low, high
        Corners of the rectangle, x and y.
    stride
        Distance between neighbours.
    shape
        ``"square"`` or ``"hexagon"``.

    Returns
    -------
    (n, 2) float64, x and y, and (n, 2) int64, row and column.
    """
    step_y = stride * (np.sqrt(0.75) if shape == "hexagon" else 1.0)
    n_x, n_y = (max(1, int(np.floor((h - lo) / s + 0.5))) for h, lo, s in zip(high, low, (stride, step_y), strict=True))
    row, col = (a.ravel() for a in np.mgrid[:n_y, :n_x])
    x = low[0] + (col + 0.5) * stride
    if shape == "hexagon":
        x = x + (row % 2) * stride / 2
    at = np.column_stack([x, low[1] + (row + 0.5) * step_y])
    # rounding must not put a centre outside
    inside = ((at >= low) & (at <= high)).all(axis=1)
    return at[inside], np.column_stack([row, col])[inside].astype(np.int64)


def cell_corners(centres: np.ndarray, stride: float, shape: str = "square") -> np.ndarray:
    """Return the corners of the cells that fill the plane around the positions of a grid, (n, 4 or 6, 2)."""
    if shape == "hexagon":
        angle = np.pi / 6 + np.arange(6) * np.pi / 3
        offsets = stride / np.sqrt(3) * np.column_stack([np.cos(angle), np.sin(angle)])
    else:
        offsets = stride / 2 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float64)
    return np.asarray(centres[:, None, :] + offsets)
