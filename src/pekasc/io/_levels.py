"""One level of a slide in a file, read tile by tile, whoever asks for its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize

from pekasc._assemble import window

_CHUNK_PX = 1024  # approximate side of a chunk, which is a multiple of the file's tiles


class FileLevel:
    """One level, (3, y, x) uint8, with the interface that dask needs; can be pickled.

    Every way of reading gives the same pixels, since all read whole tiles (strips): :meth:`tile` is what a format has
    to bring.
    """

    ndim = 3
    dtype = np.dtype(np.uint8)

    def __init__(
        self, path: str, stamp: tuple[int, int], level: int, shape: tuple[int, int], tile_px: tuple[int, int]
    ) -> None:
        self.path, self.stamp, self.level = path, stamp, level
        self.shape = (3, *shape)
        self._tile_px = tile_px

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        y, x, kept = window(index, self.shape)
        y0, y1, x0, x1 = y.start, y.stop, x.start, x.stop
        out = np.empty((3, len(y), len(x)), np.uint8)
        height, width = self._tile_px
        for row in range(y0 // height, -(-y1 // height)) if out.size else ():
            for column in range(x0 // width, -(-x1 // width)):
                top, left = row * height, column * width
                a, b, d, e = max(top, y0), min(top + height, y1), max(left, x0), min(left + width, x1)
                try:
                    tile = self._tile(row, column)
                except OSError as error:
                    raise OSError(
                        f"The image {self.path!r} cannot be read at level {self.level}, rows {y0}:{y1}, columns "
                        f"{x0}:{x1}: {error}"
                    ) from error
                out[:, a - y0 : b - y0, d - x0 : e - x0] = tile[:, a - top : b - top, d - left : e - left]
        return np.ascontiguousarray(out[kept])

    def _tile(self, y: int, x: int) -> np.ndarray:
        """Decode one tile of the file, (3, height, width); it may be larger than what is in the image."""
        raise NotImplementedError


class TiledLevel(FileLevel):
    """A level with tiles, which are decoded one by one without dask, so that threads decode in parallel."""

    @property
    def chunk_px(self) -> tuple[int, int]:
        """Height and width of a tile."""
        return self._tile_px

    def read_chunk(self, y: int, x: int) -> np.ndarray:
        """Decode one tile of the file, (3, height, width)."""
        return self._tile(y, x)


def as_dask(level: FileLevel, tile_px: Sequence[int], kind: str, *token: Any) -> da.Array:
    """Return a level as a dask array with several tiles of the file in a chunk; its name tells of kind and token."""
    steps = tuple(n * max(1, _CHUNK_PX // n) for n in tile_px)
    name = f"pekasc-{kind}-{tokenize(level.path, level.stamp, level.level, *token)}"
    return da.from_array(level, chunks=(3, *steps), name=name, meta=np.empty((0, 0, 0), np.uint8))
