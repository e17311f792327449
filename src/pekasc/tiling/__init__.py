"""Tiles as pure arrays: geometry, chunk-wise reading with area resampling, ordered batches.

Nothing here knows SpatialData or torch. `TileGeometry` says where the tiles of one section lie on its
image, `TileReader` reads them, `PatchReader` takes them from a file, `TileStream` joins several sections, `batches`
reads ahead.
"""

from __future__ import annotations

from pekasc.tiling._geometry import TileGeometry, TileSpec
from pekasc.tiling._patches import PatchFile, PatchReader
from pekasc.tiling._reader import MAX_MEMORY, ImagePyramid, TileReader
from pekasc.tiling._resample import split_channels
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
    "ArrayTiles",
    "ImagePyramid",
    "PatchFile",
    "PatchReader",
    "TileGeometry",
    "TileReader",
    "TileSource",
    "TileSpec",
    "TileStream",
    "TileSubset",
    "TilesOfSome",
    "batches",
    "cached",
    "check_temporary_room",
    "in_batches",
    "read_ahead",
    "read_parts",
    "split_channels",
]
