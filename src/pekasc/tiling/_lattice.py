"""Rows and columns of positions that lie on a square lattice, and the raster with one pixel for each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

_OFF = 0.01  # of the stride: how far a position may lie from its place
_NEIGHBOUR = 0.2  # relative difference of distances to neighbours; across a square it is 0.41


@dataclass(frozen=True, eq=False)
class Lattice:
    """A raster whose pixels are the places of a square lattice.

    Parameters
    ----------
    row, col
        Pixel of every position, (n,) int64.
    stride
        Side of a pixel.
    origin
        (2,) x and y of the corner of the first pixel: the centre of pixel (row, col) lies at
        ``origin + stride * (col + 0.5, row + 0.5)``.
    """

    row: np.ndarray
    col: np.ndarray
    stride: float
    origin: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns of the raster."""
        return int(self.row.max()) + 1, int(self.col.max()) + 1

    def to_positions(self) -> np.ndarray:
        """Return the (3, 3) matrix from pixels of the raster, x and y, to positions."""
        matrix = np.diag([self.stride, self.stride, 1.0])
        matrix[:2, 2] = self.origin
        return matrix


def square_lattice(positions: np.ndarray, stride: float | None = None) -> Lattice:
    """Return the lattice that positions lie on.

    Parameters
    ----------
    positions
        (n, 2) x and y.
    stride
        Distance between neighbours; by default, the mean distance of neighbours.

    Raises
    ------
    ValueError
        If they do not lie on one, two lie on one place, or there is but one and no `stride`.
    """
    places = np.asarray(positions, dtype=np.float64)
    step = _stride(places) if stride is None else float(stride)
    relative = (places - places[0]) / step
    index = np.rint(relative).astype(np.int64)
    if stride is None and index.any():
        centred, steps = places - places.mean(axis=0), index - index.mean(axis=0)
        step = float((centred * steps).sum() / np.square(steps).sum())
        relative = (places - places[0]) / step
    # the mean offset, so that rounding in the first position does not count against the others
    offset = (relative - index).mean(axis=0)
    off = np.abs(relative - index - offset).max()
    if off > _OFF:
        raise ValueError(
            f"positions {step:.5g} um apart do not lie on a square lattice: they are off by up to {off * step:.3g} um"
        )
    low = index.min(axis=0)
    col, row = (index - low).T
    twice = len(index) - len(np.unique(index, axis=0))
    if twice:
        raise ValueError(f"{twice} positions share a place of the lattice of {step:.5g} um with another one")
    return Lattice(row, col, step, places[0] + (offset + low - 0.5) * step)


def _stride(places: np.ndarray) -> float:
    if len(places) < 2:
        raise ValueError("the stride is not known from a single position")
    near = cKDTree(places).query(places, k=min(5, len(places)))[0][:, 1:]  # up to four neighbours
    step = float(np.median(near[:, 0]))
    if not step > 0:
        raise ValueError("positions lie upon one another")
    # the nearest alone are a little too near, which adds up over many columns
    return float(near[np.abs(near / step - 1) < _NEIGHBOUR].mean())
