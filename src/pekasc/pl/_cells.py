"""Tiles of a slide drawn to scale: a square grid as an image, others as polygons. Pure arrays, in micrometers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.image import AxesImage
from matplotlib.transforms import AffineDeltaTransform

from pekasc.pl._draw import Box
from pekasc.tiling import cell_corners

_OFF_GRID = 0.01  # of a stride, up to which centres lie on a grid
_MAX_PIXELS = 30_000_000  # of an image of cells; few tiles far apart on a fine grid are drawn as polygons


@dataclass(frozen=True, eq=False)
class Cells:
    """Places of tiles in um.

    Attributes
    ----------
    centres
        Centres, (n, 2) x, y.
    stride
        Distance between neighbours in a grid.
    shape
        Shape of the grid's cells, ``"square"`` or ``"hexagon"``.
    outlines, owner
        Instead of a grid: outlines, each (k, 2), and the index of the tile that each belongs to.
    """

    centres: np.ndarray
    stride: float = 0.0
    shape: str = "square"
    outlines: Sequence[np.ndarray] | None = None
    owner: np.ndarray | None = None

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower and the upper corner of the box around all cells."""
        if self.outlines is not None:
            points = np.concatenate(self.outlines)
            return points.min(axis=0), points.max(axis=0)
        cell = cell_corners(np.zeros((1, 2)), self.stride, self.shape)[0]
        return self.centres.min(axis=0) + cell.min(axis=0), self.centres.max(axis=0) + cell.max(axis=0)


def box_around(*points: np.ndarray) -> Box:
    """Return the box around points, with a margin of 3 % of its longer side."""
    pooled = np.concatenate([np.atleast_2d(p) for p in points])
    low, high = pooled.min(axis=0), pooled.max(axis=0)
    pad = 0.03 * float((high - low).max())
    return float(low[0] - pad), float(low[1] - pad), float(high[0] + pad), float(high[1] + pad)


def draw_cells(
    ax: Axes, cells: Cells, values: np.ndarray, *, norm: Normalize, cmap: str | Colormap, alpha: float | None = None
) -> AxesImage | PolyCollection:
    """Draw tiles as the cells of their grid, coloured by value; a tile without a value stays empty."""
    array = _as_image(cells, values) if cells.outlines is None and cells.shape == "square" else None
    if array is not None:
        pixels, extent = array
        # cells keep their own colours and borders: a mean of two clusters would be a third one
        return ax.imshow(pixels, extent=extent, interpolation="nearest", norm=norm, cmap=cmap, alpha=alpha)
    polygons = _polygons(ax, cells, np.isfinite(values), values)
    polygons.set(norm=norm, cmap=cmap, alpha=alpha)
    ax.add_collection(polygons, autolim=False)
    return polygons


def _as_image(cells: Cells, values: np.ndarray) -> tuple[np.ma.MaskedArray, tuple[float, float, float, float]] | None:
    """Return the values as an image with empty cells masked, and its extent; None if tiles are not on one grid."""
    low = cells.centres.min(axis=0)
    at = (cells.centres - low) / cells.stride
    index = np.rint(at).astype(np.int64)
    n_columns, n_rows = index.max(axis=0) + 1
    if np.abs(at - index).max() > _OFF_GRID or n_columns * n_rows > _MAX_PIXELS:
        return None
    pixels = np.full((n_rows, n_columns), np.nan)
    pixels[index[:, 1], index[:, 0]] = values
    x0, y0 = low - cells.stride / 2
    extent = (float(x0), float(x0 + n_columns * cells.stride), float(y0 + n_rows * cells.stride), float(y0))
    return np.ma.masked_invalid(pixels), extent


def _polygons(ax: Axes, cells: Cells, known: np.ndarray, values: np.ndarray) -> PolyCollection:
    if cells.outlines is None or cells.owner is None:
        cell = cell_corners(np.zeros((1, 2)), cells.stride, cells.shape)[0]
        # one outline at many places, as in `Axes.hexbin`: the quickest way to draw many
        offsets = AffineDeltaTransform(ax.transData)  # type: ignore[arg-type]  # as matplotlib itself does
        drawn = PolyCollection([cell], offsets=cells.centres[known], offset_transform=offsets)
        drawn.set_array(values[known])
    else:
        shown = np.flatnonzero(known[cells.owner])
        drawn = PolyCollection([cells.outlines[int(i)] for i in shown])
        drawn.set_array(values[cells.owner[shown]])
    # no antialiasing: it leaves light seams between neighbours
    drawn.set(edgecolor="none", linewidth=0, antialiased=False, rasterized=True)
    return drawn
