"""Tiles as arrays: geometry, chunk-wise reading with area resampling, ordered batches.

Independent of SpatialData and torch. `TileGeometry` has the positions of the tiles of one section on its image,
`TileReader` reads them, `PatchReader` reads stored patches, `TileStream` concatenates sections, `batches` reads ahead.
"""

from __future__ import annotations

from pekasc.tiling._alpha import Alpha, on_white
from pekasc.tiling._geometry import TileGeometry, TileSpec, check_positive
from pekasc.tiling._grid import cell_corners, check_grid, grid_positions
from pekasc.tiling._lattice import Lattice, square_lattice
from pekasc.tiling._patches import PatchFile, PatchReader
from pekasc.tiling._quality import pen_fraction, pen_pixels, sharpness, sharpness_threshold
from pekasc.tiling._reader import MAX_MEMORY, ImagePyramid, TileReader
from pekasc.tiling._resample import split_channels
from pekasc.tiling._stain import Stain, StainedTiles, StainMap, coarsened, mean_stain, stain_spec
from pekasc.tiling._stream import (
    ArrayTiles,
    TilesOfSome,
    TileSource,
    TileStream,
    TileSubset,
    batches,
    cached,
    check_temporary_room,
    in_batches,
    read_ahead,
    read_parts,
)

__all__ = [
    "MAX_MEMORY",
    "Alpha",
    "ArrayTiles",
    "ImagePyramid",
    "Lattice",
    "PatchFile",
    "PatchReader",
    "Stain",
    "StainMap",
    "StainedTiles",
    "TileGeometry",
    "TileReader",
    "TileSource",
    "TileSpec",
    "TileStream",
    "TileSubset",
    "TilesOfSome",
    "batches",
    "cached",
    "cell_corners",
    "check_grid",
    "check_positive",
    "check_temporary_room",
    "coarsened",
    "grid_positions",
    "in_batches",
    "mean_stain",
    "on_white",
    "pen_fraction",
    "pen_pixels",
    "read_ahead",
    "read_parts",
    "sharpness",
    "sharpness_threshold",
    "split_channels",
    "square_lattice",
    "stain_spec",
]
