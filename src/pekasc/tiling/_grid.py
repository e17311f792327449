"""Regular grids of positions in micrometers, square or hexagonal."""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from pekasc.tiling._geometry import check_positive

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


def check_grid(
    *, shape: str = "square", shapes: Any = None, stride_um: Any = None, min_tissue: Any = None,
    min_sharpness: Any = None, max_pen: Any = None,
) -> None:  # fmt: skip
    """Check arguments of :func:`pekasc.pp.tile_grid` that depend on no slide."""
    if shape not in GRID_SHAPES:
        raise ValueError(f"`shape={shape!r}` is not known: choose one of {list(GRID_SHAPES)}.")
    if shapes is not None and not isinstance(shapes, str):
        raise TypeError(f"`shapes` must be the name of shapes, got {type(shapes).__name__}.")
    if stride_um is not None:
        if shapes is not None:
            raise ValueError("`stride_um` is of a grid, and `shapes=` makes a tile for each shape: give one of them.")
        check_positive(stride_um, "stride_um", integer=False)
    if shapes is not None and shape != "square":
        raise ValueError(
            f"`shape={shape!r}` is of a grid, and `shapes=` makes a tile for each shape: give one of them."
        )
    for name, value in (("min_tissue", min_tissue), ("max_pen", max_pen), ("min_sharpness", min_sharpness)):
        if value is None or (name == "min_sharpness" and value == "auto"):
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"`{name}` must be a number or None, got {value!r}.")
        if name == "min_sharpness":
            if not 0 <= float(value) < np.inf:
                raise ValueError(f'`min_sharpness={value!r}` must be 0 or more, "auto", or None to keep all.')
        elif not 0 <= float(value) <= 1:
            raise ValueError(f"`{name}={value!r}` must be a fraction between 0 and 1, or None to keep all.")
