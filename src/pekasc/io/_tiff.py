"""Pyramidal TIFF files as dask arrays: tiles are decoded when they are computed, and not kept.

What a file's directories say is in `_tiff_directories` and checked in `_tiff_check`; which pictures may be the
slide in `_tiff_scenes`; what its channels mean, in `_tiff_layout`; the pixel size in `_tiff_mpp`.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np

from pekasc._settings import get_logger
from pekasc.io._levels import FileLevel, TiledLevel, as_dask
from pekasc.io._limits import warn_of_large_chunk
from pekasc.io._tiff_check import check_levels, is_copy
from pekasc.io._tiff_directories import read_directories
from pekasc.io._tiff_layout import Layout, layouts, open_tiff
from pekasc.io._tiff_scenes import choose_scene
from pekasc.io._tiff_streams import check_stream
from pekasc.tiling import on_white, split_channels

logger = get_logger(__name__)

_OPEN_FILES = 16  # maximum number of files kept open
_WHITE = 255


class _TiffLevel(FileLevel):
    """One level of an image in a TIFF, by tiles or strips."""

    def __init__(
        self,
        path: str,
        stamp: tuple[int, int],
        image: int,
        level: int,
        shape: tuple[int, int],
        tile_px: tuple[int, int],
    ) -> None:
        super().__init__(path, stamp, level, shape, tile_px)
        self.image = image

    def _tile(self, y: int, x: int) -> np.ndarray:
        height, width = self._tile_px
        needed = min(height, self.shape[1] - y * height), min(width, self.shape[2] - x * width)
        number = y * -(-self.shape[2] // width) + x
        file = _opened_file(self.path, self.stamp, self.image)
        try:
            tile = file.tile(self.level, number, needed)
        except Exception as error:  # a decoder may raise anything, and does not name the file
            raise OSError(f"tile {number} of {self.path!r} is damaged: {error}") from error
        if tile is None:  # nothing was scanned there
            return np.full((3, height, width), _WHITE, np.uint8)
        return tile


class _TiledTiffLevel(_TiffLevel, TiledLevel):
    """One level of an image in a TIFF, by tiles."""


class _File:
    """An open TIFF file for reading tiles, with one descriptor for all levels, closed with this object."""

    def __init__(self, path: str, stamp: tuple[int, int], image: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        stat = os.fstat(self._descriptor)
        if (stat.st_mtime_ns, stat.st_size) != stamp:
            raise OSError(f"the file {path!r} has changed since it was read: read it again")
        # only the pages are needed for decoding, so tifffile's own handle is closed
        with open_tiff(path) as file:
            self._levels = [_Level(layout) for layout in layouts(file, path, image)]

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def tile(self, level: int, number: int, needed_px: tuple[int, int]) -> np.ndarray | None:
        """Decode a tile, (3, y, x), of which the image needs a part; None if it was never written."""
        found = self._levels[level]
        planes: list[np.ndarray | None] = []
        for plane, first in found.planes:
            size, offset = int(plane.sizes[first + number]), int(plane.offsets[first + number])
            data = os.pread(self._descriptor, size, offset) if offset else b""
            if len(data) < size:
                raise ValueError(f"{len(data)} of {size} bytes are there")
            planes.append(plane.decode(data, first + number, needed_px) if data else None)
        first_plane = planes[0]
        if len(planes) == 1:
            if first_plane is None:
                return None
            out = np.empty((3, *first_plane.shape[:2]), np.uint8)
            split_channels(on_white(first_plane, found.alpha), out)
            return out
        written = [plane for plane in planes if plane is not None]
        if not written:
            return None
        if len(written) < len(planes):
            raise ValueError("some of its colours were never written")
        return np.ascontiguousarray(np.moveaxis(on_white(np.concatenate(written, axis=-1), found.alpha), -1, 0))


class _Plane:
    """Where the tiles of a page lie, and how they are decoded."""

    def __init__(self, page: Any, tile_px: tuple[int, int]) -> None:
        self.offsets, self.sizes = page.dataoffsets, page.databytecounts
        self._decode = page.keyframe.decode
        self._tables, self._header = page.jpegtables, page.keyframe.jpegheader
        self._compression, self._tile_px = int(page.keyframe.compression), tile_px

    def decode(self, data: bytes, number: int, needed_px: tuple[int, int]) -> np.ndarray:
        """Return the pixels of a tile, (y, x, samples)."""
        if self._header is None:
            check_stream(data, self._compression, self._tile_px, needed_px)
        pixels = self._decode(data, number, jpegtables=self._tables, jpegheader=self._header)[0][0]
        if pixels.dtype != np.uint8 or pixels.shape[0] < needed_px[0] or pixels.shape[1] < needed_px[1]:
            raise ValueError(f"its pixels are {pixels.dtype} of shape {pixels.shape}, not uint8 of {needed_px}")
        return pixels


class _Level:
    """The planes of a level: one with all samples, or one for each colour (and the alpha)."""

    def __init__(self, layout: Layout) -> None:
        self.alpha = layout.alpha
        if layout.separate:
            # all tiles of red come first, then those of green, ...
            plane = _Plane(layout.pages[0], layout.tile_px)
            step = len(plane.offsets) // layout.samples
            self.planes = [(plane, i * step) for i in range(layout.samples)]
        else:
            self.planes = [(_Plane(page, layout.tile_px), 0) for page in layout.pages]


@lru_cache(maxsize=_OPEN_FILES)
def _opened_file(path: str, stamp: tuple[int, int], image: int) -> _File:
    return _File(path, stamp, image)


def tiff_levels(path: Path, image: int | None = None) -> list[da.Array]:
    """Return the levels of an RGB TIFF, finest first, as dask arrays (3, y, x) of uint8.

    Parameters
    ----------
    path
        The file.
    image
        Number of the image in it; by default, the largest.

    Raises
    ------
    ValueError
        If the file is no TIFF, is truncated or damaged, or is not RGB of uint8.
    """
    path = path.resolve()
    stat = path.stat()
    stamp = (stat.st_mtime_ns, stat.st_size)
    directories = read_directories(path)
    image = choose_scene(path, None) if image is None else image
    with open_tiff(str(path)) as file:
        found = layouts(file, str(path), image)
        levels = {i: layout for i, layout in enumerate(found) if is_copy(found[0].shape, layout.shape)}
        check_levels(path, directories, levels)
    if found[0].assumed:
        logger.hint("%s: three channels without names are taken as red, green and blue.", path)
    for i, layout in enumerate(found):
        if i not in levels:
            logger.warning(
                "%s: the level of %d x %d px is no smaller copy of the slide (it is padded or damaged), and left out.",
                path, *layout.shape[::-1],
            )  # fmt: skip
    arrays = []
    for i, layout in levels.items():
        warn_of_large_chunk(path.name, layout.tile_px[0] * layout.tile_px[1] * layout.samples)
        kind = _TiledTiffLevel if layout.tiled else _TiffLevel
        level = kind(str(path), stamp, image, i, layout.shape, layout.tile_px)
        arrays.append(as_dask(level, layout.tile_px, "tiff", image))
    return arrays
