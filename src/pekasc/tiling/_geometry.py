"""Geometry of tiles on an image: squares in micrometers, under any affine transformation to level-0 pixels.

Pixel ``i`` of level 0 covers ``[i, i + 1)``; its centre is ``i + 0.5``.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

# a drift of fewer pixels than this over one tile is not a rotation: it changes no grey level
AXIS_TOLERANCE_PX = 1e-3


def check_positive(value: Any, name: str, *, integer: bool) -> None:
    """Raise unless `value` is a positive finite number or, with `integer`, a positive integer."""
    kind, words = (Integral, "a positive integer") if integer else (Real, "a positive number")
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, kind):
        raise TypeError(f"`{name}` must be {words}, got {value!r} of type {type(value).__name__}.")
    if not (np.isfinite(float(value)) and float(value) > 0):
        raise ValueError(f"`{name}` must be {words}, got {value!r}.")


def aligned_axes(matrix: np.ndarray, extent: float) -> str | None:
    """Return whether a 2 x 2 matrix keeps the axes (``"straight"``), swaps them (``"swapped"``) or neither (None)."""
    drift = np.abs(matrix) * extent
    if max(drift[0, 1], drift[1, 0]) < AXIS_TOLERANCE_PX:
        return "straight"
    if max(drift[0, 0], drift[1, 1]) < AXIS_TOLERANCE_PX:
        return "swapped"
    return None


@dataclass(frozen=True)
class TileSpec:
    """Size of a tile: pixels along its side and micrometers per pixel.

    Parameters
    ----------
    tile_px
        Pixels along the side of the square tile.
    mpp
        Micrometers per tile pixel.
    """

    tile_px: int
    mpp: float

    def __post_init__(self) -> None:
        check_positive(self.tile_px, "tile_px", integer=True)
        check_positive(self.mpp, "mpp", integer=False)
        # numpy scalars cannot be written to JSON or zarr attributes
        object.__setattr__(self, "tile_px", int(self.tile_px))
        object.__setattr__(self, "mpp", float(self.mpp))

    @property
    def side_um(self) -> float:
        """Side of the tile in micrometers."""
        return self.tile_px * self.mpp

    def scaled(self, scale: float) -> TileSpec:
        """Return tiles with the same number of pixels and `scale` times the pixel size."""
        return TileSpec(self.tile_px, self.mpp * scale)


@dataclass(frozen=True, eq=False)
class TileGeometry:
    """Tiles of one section on its image.

    The centre of output pixel (row ``i``, column ``j``) lies at
    ``centre + um_to_px @ (((j + 0.5) - tile_px / 2) * mpp, ((i + 0.5) - tile_px / 2) * mpp)``.

    Parameters
    ----------
    centres_px
        Tile centres, (n, 2), x and y in level-0 pixels.
    um_to_px
        (2, 2) matrix from an offset (x, y) in micrometers to an offset (x, y) in level-0 pixels, with rotation, flip
        and anisotropy.
    spec
        Size of the tiles.

    Raises
    ------
    ValueError
        If a shape is wrong, a value is not finite, or ``um_to_px`` is singular.
    """

    centres_px: np.ndarray
    um_to_px: np.ndarray
    spec: TileSpec

    def __post_init__(self) -> None:
        centres = np.array(self.centres_px, dtype=np.float64, ndmin=2)
        if centres.size == 0:
            centres = centres.reshape(0, 2)
        if centres.ndim != 2 or centres.shape[1] != 2:
            raise ValueError(f"`centres_px` must have shape (n, 2), got {centres.shape}.")
        bad = np.flatnonzero(~np.isfinite(centres).all(axis=1))
        if bad.size:
            raise ValueError(f"`centres_px` has {bad.size} centres that are not finite, the first at row {bad[0]}.")
        matrix = np.array(self.um_to_px, dtype=np.float64)
        if matrix.shape != (2, 2):
            raise ValueError(f"`um_to_px` must have shape (2, 2), got {matrix.shape}.")
        determinant = matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]
        if not np.isfinite(matrix).all() or abs(determinant) <= 1e-12 * np.square(matrix).sum():
            raise ValueError(f"`um_to_px` must be finite and invertible, got {matrix.tolist()}.")
        for name, array in (("centres_px", centres), ("um_to_px", matrix)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.centres_px)

    @property
    def px_per_tile_px(self) -> np.ndarray:
        """(2, 2) matrix from a step in tile pixels (column, row) to level-0 pixels (x, y)."""
        return np.asarray(self.um_to_px * self.spec.mpp)

    def corners(self) -> np.ndarray:
        """Return the corners of the tiles in level-0 pixels.

        Returns
        -------
        (n, 4, 2) float64: x, y of the upper left, upper right, lower right and lower left corner of the tile's pixels.
        """
        half = self.spec.side_um / 2
        offsets = np.array([[-half, -half], [half, -half], [half, half], [-half, half]]) @ self.um_to_px.T
        return np.asarray(self.centres_px[:, None, :] + offsets)

    def inside(self, width: int, height: int) -> np.ndarray:
        """Compute the fraction of each tile's area that lies inside the image.

        Parameters
        ----------
        width
            Width of the image in level-0 pixels.
        height
            Height of the image in level-0 pixels.

        Returns
        -------
        (n,) float32 between 0 and 1, exact for rotated tiles as well.
        """
        corners = self.corners()
        size = np.array([width, height], dtype=np.float64)
        low, high = corners.min(axis=1), corners.max(axis=1)
        overlap = np.clip(np.minimum(high, size) - np.maximum(low, 0), 0, None)
        fraction = overlap.prod(axis=1) / (high - low).prod(axis=1)
        if aligned_axes(self.px_per_tile_px, self.spec.tile_px) is None:
            # exact for boxes entirely inside or outside; the others are clipped as polygons
            cut = np.flatnonzero((fraction > 0) & ((low < 0) | (high > size)).any(axis=1))
            if cut.size:
                import shapely

                squares = shapely.polygons(corners[cut])
                image = shapely.box(0, 0, float(width), float(height))
                fraction[cut] = shapely.area(shapely.intersection(squares, image)) / shapely.area(squares)
        return np.clip(fraction, 0, 1).astype(np.float32)
